"""Which task a reply is of, where no word asked for one: the scores of a task of learned states."""

import json

import numpy as np
import pytest

from speechfuse.evals.states import States
from speechfuse.rows import shards
from tests.small_training import dataset
from tests.test_splice import FRAMES, frames_row

QUESTIONS = {"what is four plus two": "six", "what is the color of snow": "white"}
TURNS = {
    "transcribe": {"_component_": "speechfuse.samples.transcribe"},
    "both": {"_component_": "speechfuse.samples.answer", "repeat_first": True},
    "count": {"_component_": "speechfuse.samples.count_words"},
}
RIGHT = {
    "transcribe": ["what is four plus two", "what is the color of snow"],
    "both": ["what is four plus two\nsix", "what is the color of snow\nwhite"],
    "count": ["five", "six"],
}


def scores(folder, **changed: list[str]) -> tuple[dict[str, float], dict[str, bool]]:
    """The scores by split, and the items that crossed, of the right replies, some of them
    `changed`."""
    rng, rows = np.random.default_rng(0), []
    for number, (text, answer) in enumerate(QUESTIONS.items()):
        extra = json.dumps({"answer": answer, "fact": answer})
        rows.append(frames_row(number, rng) | {"text": text, "extra": extra})
    dataset(folder / "frames", shards.FRAMES, rows, FRAMES)
    of = {name: {"checkpoint": name, "turns": turns} for name, turns in TURNS.items()}
    task = States(str(folder / "frames"), of, cluster="fact")
    said = RIGHT | changed
    replies = {f"{name} f{i}": reply for name, each in said.items() for i, reply in enumerate(each)}
    assert {*task.ids()} == replies.keys()
    scored = task.score([{"id": i, "reply": replies[i], "capped": False} for i in task.ids()])
    assert {score.metric for score in scored.scores} == {"acc"}
    crossed = {item["id"]: item["crossed"] for item in scored.items}
    return {score.split: score.value for score in scored.scores}, crossed


def test_right_replies_are_of_their_own_task(tmp_path):
    found, crossed = scores(tmp_path)
    assert found.pop("own") == 1 and not any(crossed.values())
    own = {f"own_{name}": 1 for name in TURNS}
    assert found == own | {"other_state": 0, "crossed": 0}


@pytest.mark.parametrize(
    ("state", "reply", "crossed"),
    [
        ("transcribe", "what is for plus too", False),  # misheard is not another task
        ("transcribe", "", True),  # nearest to one word
        ("transcribe", "six", True),
        ("transcribe", "what is four plus two\neight", True),
        ("transcribe", "what is four plus two six", False),  # one line
        ("both", "what is five plus two\nseven", False),
        ("both", "what is for\nmuch too many wrong words", False),
        ("both", "what is four plus two", True),
        ("both", "six", True),
        ("count", "nine", False),
        ("count", "what is four plus two", True),
    ],
)
def test_a_reply_is_of_the_task_whose_right_one_is_nearest(tmp_path, state, reply, crossed):
    found, items = scores(tmp_path, **{state: [reply, RIGHT[state][1]]})
    assert items.pop(f"{state} f0") == crossed and not any(items.values())
    assert found["crossed"] == pytest.approx(crossed / 6)
    assert found["own"] == pytest.approx(5 / 6) and found[f"own_{state}"] == 0.5


def test_what_is_right_for_another_state_is_counted_of_all_others(tmp_path):
    found, _ = scores(tmp_path, both=RIGHT["transcribe"])
    assert found["other_state"] == pytest.approx(2 / 12) and found["own_both"] == 0
    assert found["own"] == pytest.approx(4 / 6) and found["crossed"] == pytest.approx(2 / 6)
