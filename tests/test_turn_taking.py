"""Turn-taking from times alone."""

from typing import Any

import pytest

from speechfuse.scores import turn_taking


def turn(role: str, start: float, end: float) -> dict[str, Any]:
    return {"role": role, "start": start, "end": end}


ANSWER = [turn("user", 1.0, 2.0), turn("assistant", 2.8, 4.0)]
TWICE = [*ANSWER, turn("user", 5.0, 6.0), turn("assistant", 6.5, 8.0)]
BARGE_IN = [turn("user", 1.0, 2.0), turn("assistant", 2.8, 4.0), turn("user", 3.4, 4.4)]
BARGE_IN += [turn("assistant", 5.0, 6.0)]


def values(kind: str, wanted: list[dict], *said: tuple[float, float]) -> dict[str, Any]:
    own = [turn("assistant", *times) for times in said]
    session = {"kind": kind, "wanted": wanted, "said": own, "fact": "f"}
    return {name: each for name, each in turn_taking.values(session).items() if each}


def test_a_model_that_talks_at_once_scores_nothing():
    for kind, wanted in (("answer", ANSWER), ("twice", TWICE), ("pause", ANSWER)):
        found = values(kind, wanted, *((t["start"] + 0.08, t["end"]) for t in wanted))
        assert not any(found["started"]) and all(found["early"]), kind
        assert max(found["latency"]) < 0
        assert found.get("false_alarm", [True]) == [True]
    one = {"kind": "answer", "wanted": ANSWER, "said": [turn("assistant", 1.08, 2)], "fact": "f"}
    scored = {score.metric: score for score in turn_taking.scores([one] * 4, "all")}
    assert scored["started"].value == 0 and scored["early"].value == 1


def test_latency_is_signed_and_of_each_turn():
    found = values("twice", TWICE, (2.4, 3.0), (5.8, 7.0))
    assert found["latency"] == pytest.approx([0.4, -0.2])
    assert found["started"] == [True, False] and found["early"] == [False, True]
    silent = values("twice", TWICE)
    assert silent["started"] == [False, False] == silent["early"] and "latency" not in silent


def test_an_earlier_turn_that_goes_on_is_no_early_start():
    found = values("barge_in", BARGE_IN, (2.5, 4.2), (5.0, 6.0))
    assert found["early"] == [False, False] and found["started"] == [True, True]
    assert found["barge_in"] == [True] and found["stop"] == pytest.approx([0.8])
    assert values("barge_in", BARGE_IN, (2.5, 5.1))["barge_in"] == [False]
    assert "barge_in" not in values("barge_in", BARGE_IN, (2.5, 3.0))


@pytest.mark.parametrize(
    ("kind", "said", "alarm"),
    [
        ("user_only", [], False),
        ("user_only", [(2.5, 3.0)], True),
        ("pause", [(2.5, 3.0)], False),
        ("pause", [(1.5, 3.0)], True),
        ("backchannel", [(2.5, 4.0)], False),
        ("backchannel", [(2.5, 4.0), (4.5, 5.0)], True),
    ],
)
def test_false_alarms(kind, said, alarm):
    wanted = ANSWER[: 1 if kind == "user_only" else 2]
    wanted = wanted + [turn("user", 3.2, 3.5)] * (kind == "backchannel")
    assert values(kind, wanted, *said)["false_alarm"] == [alarm]
    assert "false_alarm" not in values("answer", ANSWER, *said)


def test_figures_are_pooled_over_turns():
    said = [turn("assistant", 2.4, 3.0), turn("assistant", 5.8, 7.0)]
    first = {"kind": "twice", "wanted": TWICE, "said": said, "fact": "a"}
    second = {"kind": "answer", "wanted": ANSWER, "said": said[:1], "fact": "b"}
    found = {score.metric: score for score in turn_taking.scores([first, second], "all")}
    assert found["started"].value == pytest.approx(2 / 3) and found["started"].n == 3
    assert found["latency"].value == pytest.approx(0.4) and found["latency_q1"].value < 0.2
    assert found["latency"].ci_low < found["latency"].ci_high == pytest.approx(0.4)
    assert found["gap"].value == pytest.approx((0.8 + 0.5 + 0.8) / 3)
