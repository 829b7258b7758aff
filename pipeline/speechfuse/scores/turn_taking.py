"""Turn-taking of a model of two channels, from times alone.

In: sessions {kind, wanted, said, fact}: `wanted` are the turns {role, start, end} of user and agent
as they were built, `said` those of the model, in seconds. Out: a value for each turn, and figures
with intervals. A latency is signed; a turn that the model takes while the user still speaks is
early, and an early start is a failure, not a success.
"""

from collections import defaultdict
from statistics import quantiles
from typing import Any

from speechfuse.scores import intervals

PATIENCE = 1.5  # seconds in which a model that is spoken to while it speaks is to be silent
ALARMS = ("pause", "backchannel", "user_only")  # kinds in which a turn may be taken unasked


def values(session: dict[str, Any]) -> dict[str, list[float]]:
    """Return {started, early, latency, barge_in, stop, false_alarm}, lists of a session's values:
    shares as 0 or 1, times in seconds. `barge_in` and `stop` are of a model that was speaking."""
    found, kind = defaultdict[str, list[float]](list), session["kind"]
    users = [turn for turn in session["wanted"] if turn["role"] == "user"]
    starts = [turn["start"] for turn in users] + [float("inf")]
    answered = [turn["start"] for turn in session["wanted"] if turn["role"] == "assistant"]
    for user, until in zip(users, starts[1:], strict=True):
        taken = [
            turn["start"] for turn in session["said"] if user["start"] <= turn["start"] < until
        ]
        if any(user["end"] <= start < until for start in answered):
            early = bool(taken) and taken[0] < user["end"]
            found["early"].append(early)
            found["started"].append(bool(taken) and not early)
            found["latency"] += [start - user["end"] for start in taken[:1]]
        speaking = [t for t in session["said"] if t["start"] < user["start"] < t["end"]]
        if kind == "barge_in" and speaking:
            found["stop"].append(speaking[0]["end"] - user["start"])
            found["barge_in"].append(found["stop"][-1] <= PATIENCE)
    if kind in ALARMS:
        last = users[-1]
        begun = [turn["start"] for turn in session["said"] if turn["start"] >= last["start"]]
        asked = kind == "pause"
        found["false_alarm"].append(any(not asked or start < last["end"] for start in begun))
    return found


def figures(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {started, early, barge_in, false_alarm: (mean, low, high), counted: {name: n}, latency
    and stop: [quartiles]}, pooled over all turns; the intervals are clustered by fact."""
    pooled, facts = defaultdict[str, list[float]](list), defaultdict[str, list[str]](list)
    for session in sessions:
        for name, each in values(session).items():
            pooled[name] += map(float, each)
            facts[name] += [str(session.get("fact"))] * len(each)
    times = ("latency", "stop")
    means = {n: intervals.mean(each, facts[n]) for n, each in pooled.items() if n not in times}
    spread = {n: quantiles(pooled[n], n=4) for n in times if len(pooled[n]) > 1}
    return means | spread | {"counted": {name: len(each) for name, each in pooled.items()}}
