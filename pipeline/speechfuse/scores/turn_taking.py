"""Turn-taking of a model of two channels, from times alone.

In: sessions {kind, wanted, said, fact}: `wanted` are the turns {role, start, end} of user and agent
as they were built, `said` those of the model, in seconds. Out: a value for each turn, and scores. A
latency is signed; a turn that the model takes while the user still speaks is early, and an early
start is a failure, not a success.
"""

from collections import defaultdict
from typing import Any

from speechfuse.scores import intervals
from speechfuse.scores.intervals import Score

PATIENCE = 1.5  # seconds in which a model that is spoken to while it speaks is to be silent
ALARMS = ("pause", "backchannel", "user_only")  # kinds in which a turn may be taken unasked
QUARTILES = {"_q1": 0.25, "": 0.5, "_q3": 0.75}  # of times, by the end of the metric's name
Turn = dict[str, Any]


def replies(session: dict[str, Any]) -> list[tuple[Turn, Turn | None, Turn | None]]:
    """Return each turn of the user with the reply that was built for it and the model's first turn
    before the user's next; None for what is not there."""
    users = [turn for turn in session["wanted"] if turn["role"] == "user"]
    own = [turn for turn in session["wanted"] if turn["role"] == "assistant"]
    found = []
    for user, until in zip(users, [*users[1:], {"start": float("inf")}], strict=False):
        wanted = (t for t in own if user["end"] <= t["start"] < until["start"])
        taken = (t for t in session["said"] if user["start"] <= t["start"] < until["start"])
        found.append((user, next(wanted, None), next(taken, None)))
    return found


def values(session: dict[str, Any]) -> dict[str, list[float]]:
    """Return {started, early, latency, gap, barge_in, stop, false_alarm}, lists of a session's
    values: shares as 0 or 1, times in seconds. `gap` is the latency that was built, `barge_in` and
    `stop` are of a model that was speaking."""
    found, kind = defaultdict[str, list[float]](list), session["kind"]
    for user, wanted, taken in replies(session):
        if wanted:
            early = taken is not None and taken["start"] < user["end"]
            found["early"].append(early)
            found["started"].append(bool(taken) and not early)
            found["gap"].append(wanted["start"] - user["end"])
            found["latency"] += [taken["start"] - user["end"]] if taken else []
        speaking = [t for t in session["said"] if t["start"] < user["start"] < t["end"]]
        if kind == "barge_in" and speaking:
            found["stop"].append(speaking[0]["end"] - user["start"])
            found["barge_in"].append(found["stop"][-1] <= PATIENCE)
    if kind in ALARMS:
        begun = [turn["start"] for turn in session["said"] if turn["start"] >= user["start"]]
        asked = kind == "pause"
        found["false_alarm"].append(any(not asked or start < user["end"] for start in begun))
    return found


def scores(sessions: list[dict[str, Any]], split: str) -> list[Score]:
    """Return started, early, gap, barge_in and false_alarm as means, latency and stop as medians
    with their quartiles, pooled over all turns; the intervals are clustered by fact."""
    pooled, facts = defaultdict[str, list[float]](list), defaultdict[str, list[str]](list)
    for session in sessions:
        for name, each in values(session).items():
            pooled[name] += map(float, each)
            facts[name] += [str(session.get("fact"))] * len(each)
    found = []
    for name, each in pooled.items():
        if not each:  # a model that never spoke has no latency
            continue
        if name in ("latency", "stop"):
            rows = intervals.quantiles(each, facts[name], [*QUARTILES.values()])
            numbers = {name + end: row for end, row in zip(QUARTILES, rows, strict=True)}
        else:
            numbers = {name: intervals.mean(each, facts[name])}
        found += [Score("turn_taking", split, n, *row, len(each)) for n, row in numbers.items()]
    return found
