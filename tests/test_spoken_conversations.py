"""The task of spoken conversations: what the model is given, what is right, what a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from speechfuse.evals.generation import Generator
from speechfuse.evals.speech import Speech
from speechfuse.rows import shards
from speechfuse.tokens.vocabulary import Vocabulary
from tests.small_training import STREAM, dataset, make_parts

REFUSAL = "i did not hear that"


def heard(codes: list[int], text: str | None) -> dict[str, Any]:
    source = {"uri": "x"}
    return {"speech": {"id": "s", "codes": codes, "seconds": 1.0, "text": text, "source": source}}


def row(id: str, *turns: tuple[str, list[dict]], **extra: Any) -> dict[str, Any]:
    named = [{"role": role, "segments": segments} for role, segments in turns]
    return {"id": id, "turns": named, "extra": json.dumps(extra)}


def rows() -> list[dict[str, Any]]:
    two = [
        ("user", [heard([1, 2], "one")]),
        ("assistant", [{"text": "one\ntwo"}]),
        ("user", [{"text": "say "}, heard([3], "three"), {"text": "now"}]),
        ("assistant", [{"text": "three\nfour"}]),
    ]
    noise = [("user", [heard([5, 5], None)]), ("assistant", [{"text": REFUSAL}])]
    one = [("user", [heard([6], "six")]), ("assistant", [{"text": "six\nseven"}])]
    return [
        row("d", *two, kind="dialogue", fact="f1"),
        row("n", *noise, kind="noise"),
        row("q1", *one, kind="question", fact="f2"),
        row("q2", *one, kind="question", fact="f2"),
        row("other", *one, kind="transcription"),
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("conversations"))
    dataset(folder / "asked", shards.CONVERSATIONS, rows(), STREAM)
    return folder


def task(parts: Path, **changes: Any) -> Speech:
    splits = {kind: {"kind": kind} for kind in ("question", "dialogue", "noise")}
    settings = {
        "data": str(parts / "asked"),
        "metric": "acc",
        "reference": "answer",
        "reply": {"_component_": "speechfuse.tokens.read_spoken_answer"},
        "cluster": "fact",
        "splits": splits,
        "refusals": [REFUSAL],
    }
    return Speech(**{**settings, **changes})


def given(of: Speech, checkpoint: Path, monkeypatch) -> dict[str, list[int]]:
    seen: list[list[int]] = []

    def record(self, ids, max_new_tokens):
        seen.extend(ids)
        return [{"reply": "x", "tokens": 1, "capped": False}] * len(ids)

    monkeypatch.setattr(Generator, "_generate", record)
    said = [each["id"] for batch in of.predict(checkpoint, of.ids()) for each in batch]
    return dict(zip(said, seen, strict=True))


def test_the_last_question_is_asked_with_all_that_came_before(parts, monkeypatch):
    checkpoint = parts / "expanded"
    words = Vocabulary.load(checkpoint)
    user, assistant, end = words.header("user"), words.header("assistant"), [words.end_of_turn]
    last = [
        *user,
        *words.text("say "),
        *words.sound([3]),
        *words.text("now"),
        *end,
        *assistant,
    ]
    first = [*user, *words.sound([1, 2]), *end, *assistant, *words.text("one\ntwo"), *end]
    found = given(task(parts), checkpoint, monkeypatch)
    assert set(found) == {"d", "n", "q1", "q2"}, "no row but those of a split"
    assert found["d"] == [words.begin, *first, *last]
    alone = given(task(parts, history=False), checkpoint, monkeypatch)
    assert alone["d"] == [words.begin, *last] and alone["q1"] == found["q1"]
    assert task(parts).inputs() != task(parts, history=False).inputs()


def test_a_limit_takes_items_of_every_split(parts, tmp_path):
    one = [("user", [heard([6], "six")]), ("assistant", [{"text": "seven"}])]
    turns = [row(f"r{i}", *one, kind="ab"[i % 2]) for i in range(20)]
    dataset(tmp_path / "turns", shards.CONVERSATIONS, turns, STREAM)
    splits = {kind: {"kind": kind} for kind in "ab"}
    of = task(parts, data=str(tmp_path / "turns"), splits=splits, limit=10)
    assert [r["extra"]["kind"] for r in of.rows.values()].count("a") == 5 == len(of.rows) / 2


def test_right_answers_and_refusals_are_counted_by_split(parts):
    replies = {"d": "threee\nFour", "n": REFUSAL.upper(), "q1": "six\neight", "q2": REFUSAL}
    of = task(parts)
    said = [{"id": id, "reply": replies[id], "tokens": 3, "capped": False} for id in of.ids()]
    scored = of.score(said)
    found = {(s.split, s.metric): (s.value, s.n) for s in scored.scores}
    assert found == {
        ("question", "acc"): (0, 2),
        ("dialogue", "acc"): (1, 1),
        ("noise", "acc"): (1, 1),
        ("question", "refusal_rate"): (0.5, 2),
        ("dialogue", "refusal_rate"): (0, 1),
        ("noise", "refusal_rate"): (1, 1),
    }
    items = {item["id"]: item for item in scored.items}
    assert items["d"]["question"] == "one / one\ntwo / say three now"
    assert items["d"]["expected"] == "four" and items["q1"]["cluster"] == "f2"
    assert items["n"]["question"] == "(sound)" and items["n"]["cluster"] == "n"
    without = task(parts, refusals=[]).score(said).scores
    assert {score.metric for score in without} == {"acc"}


def test_answers_of_several_lines_are_compared_whole(parts, tmp_path):
    """Whether their first line repeats the question or is of the answer, the target shows."""
    steps = "Three steps:\n1. boil\n2. eat"
    asked = ("user", [{"text": "now: "}, heard([6], "how")])
    repeats = row("r", asked, ("assistant", [{"text": f"how\n{steps}"}]), kind="question")
    answers = row("a", asked, ("assistant", [{"text": steps}]), kind="question")
    dataset(tmp_path / "steps", shards.CONVERSATIONS, [repeats, answers], STREAM)
    of = task(parts, data=str(tmp_path / "steps"), splits={"q": {"kind": "question"}})
    for replies, right in (
        ({"r": f"How\n{steps}", "a": steps}, [True, True]),
        ({"r": "how\nBoil.\n2. eat", "a": "Boil.\n2. eat"}, [False, False]),
    ):
        said = [{"id": id, "reply": replies[id], "tokens": 9, "capped": False} for id in of.ids()]
        items = of.score(said).items
        assert [item["correct"] for item in items] == right
        assert [item["expected"] for item in items] == [steps, steps]


def test_what_cannot_be_asked_is_said_beforehand(parts, tmp_path):
    with pytest.raises(ValueError, match=r"asked has no row of the splits nothing"):
        task(parts, splits={"nothing": {"kind": "x"}}).check(parts / "expanded")
    with pytest.raises(ValueError, match=r"splits: no row of .*asked is in nosie"):
        task(parts, splits={"noise": {"kind": "noise"}, "nosie": {"kind": "nosie"}}).rows  # noqa: B018
    other = dict(STREAM, quantizer="1" * 64)
    dataset(tmp_path / "deaf", shards.CONVERSATIONS, rows(), other)
    with pytest.raises(ValueError, match="quantizer"):
        task(parts, data=str(tmp_path / "deaf")).check(parts / "expanded")
    open_row = row("q", ("user", [{"text": "x"}]), kind="question")
    dataset(tmp_path / "open", shards.CONVERSATIONS, [open_row], STREAM)
    with pytest.raises(ValueError, match="row q does not end in an answer"):
        task(parts, data=str(tmp_path / "open")).check(parts / "expanded")
    for changes in ({"prompt": "say {speech}"}, {"input": "shuffled"}, {"contamination": ["x"]}):
        with pytest.raises(ValueError, match=r"conversations, which are asked as they are|x does"):
            task(parts, **changes).check(parts / "expanded")
