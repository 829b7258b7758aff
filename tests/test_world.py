"""The demo's world: what is tested was never heard, what is called forgotten was never replayed.

The checks are functions over what the job writes, and each is shown a planted leak that it must
find. Content words are told here by a list of their own, not by the one in world.py.
"""

import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import soundfile
import yaml

from speechfuse import artifact, config
from speechfuse.rows import shards
from tests.demo_code import demo

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes/demo"
DIGITS = "zero one two three four five six seven eight nine".split()
FUNCTION_WORDS = "what how much is the of a in do does name people called".split()
HEARD_IN_TRAINING = ("train", "quantizer", "further")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def world() -> ModuleType:
    return demo("world")


@pytest.fixture(scope="module")
def out(world, tmp_path_factory) -> Path:
    """The artifact of the recipe itself, at its full size."""
    folder = tmp_path_factory.mktemp("world") / "world"
    world.main(config.load(world.World, ROOT / "recipes/demo/world.yaml", [f"out={folder}"]))
    return folder


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def facts(out) -> dict[str, Row]:
    return {row["id"]: row for row in read(out / "facts.jsonl")}


@pytest.fixture(scope="module")
def lines(out) -> list[Row]:
    return [*read(out / "speak.jsonl"), *read(out / "further.jsonl")]


@pytest.fixture(scope="module")
def conversations(out) -> list[Row]:
    return [{**row, "extra": json.loads(row["extra"])} for row in shards.read_rows(out)]


def content(text: str) -> Counter[str]:
    return Counter(word for word in text.split() if word not in FUNCTION_WORDS)


class Wordings:
    """The wordings of some facts, each as the words that a line must hold to say it."""

    def __init__(self, facts: list[Row], with_answer: bool) -> None:
        self.by_word: dict[str, list[tuple[str, Counter[str]]]] = {}
        for fact in facts:
            for text in fact["wordings"]:
                needed = content(text) + (
                    Counter(fact["answer"].split()) if with_answer else Counter()
                )
                self.by_word.setdefault(min(content(text)), []).append((fact["id"], needed))

    def said_in(self, text: str) -> set[str]:
        """Ids of the facts that `text` holds all the words of, in any order."""
        words = Counter(text.split())
        return {
            id for word in words for id, needed in self.by_word.get(word, ()) if needed <= words
        }


def leaks(lines: list[Row], facts: dict[str, Row]) -> list[str]:
    """Ids of lines spoken in training that say a fact which only tests may ask."""
    kept = Wordings(
        [fact for fact in facts.values() if fact["split"] != "train"], with_answer=False
    )
    return [
        line["id"]
        for line in lines
        if line["split"] in HEARD_IN_TRAINING
        and (
            kept.said_in(line["text"])
            or facts.get(line.get("fact"), {"split": "train"})["split"] != "train"
        )
    ]


def shown(conversations: list[Row], facts: dict[str, Row]) -> list[str]:
    """Ids of conversations in the text replay that show question and answer of a kept fact.

    A row that names its fact must be about it; any other is searched for the words of every fact.
    """
    kept = Wordings([fact for fact in facts.values() if not fact["replayed"]], with_answer=True)
    found = []
    for row in conversations:
        if not row["extra"]["replayed"]:
            continue
        asked, said = (turn["segments"][0]["text"] for turn in row["turns"])
        repeated = asked == f"repeat: {said}"
        if named := facts.get(row["extra"].get("fact")):
            questions = {asked.removeprefix("repeat and answer: "), said.split("\n")[0]}
            wrong = not named["replayed"] or questions.isdisjoint(named["wordings"])
        else:
            wrong = bool(kept.said_in(said if repeated else f"{asked} {said}"))
        if wrong:
            found.append(row["id"])
    return found


def test_no_line_of_training_says_a_fact_of_the_tests(lines, facts):
    assert sum(line["split"] in HEARD_IN_TRAINING for line in lines) > 15_000
    assert leaks(lines, facts) == []


@pytest.mark.parametrize("split", HEARD_IN_TRAINING)
def test_a_planted_leak_is_found(lines, facts, split):
    hidden = [fact for fact in facts.values() if fact["split"] in ("test", "validation")]
    planted = []
    for text in (text for fact in hidden for text in fact["wordings"]):
        mixed = ["the", *sorted(content(text).elements()), "of", "name"]
        for said in (text, " ".join(reversed(text.split())), " ".join(mixed)):
            planted.append({"id": f"planted-{len(planted)}", "text": said, "split": split})
    assert len(planted) > 600
    assert leaks(planted, facts) == [line["id"] for line in planted]
    assert leaks([{**line, "split": "unseen_facts"} for line in planted], facts) == []
    by_name = {"id": "by-name", "text": "hello", "split": split, "fact": hidden[0]["id"]}
    assert leaks([*lines, planted[0], by_name], facts) == ["planted-0", "by-name"]


def test_words_must_come_as_often_as_the_fact_has_them():
    fact = {"id": "add-3-3", "wordings": ["what is three plus three"], "answer": "six"}
    wordings = Wordings([fact], with_answer=False)
    assert wordings.said_in("plus what three three") == {"add-3-3"}
    assert wordings.said_in("three plus four") == set()


def test_facts_are_divided_and_enough_are_tested(facts, lines, world):
    assert len(facts) == len(world.make_facts()) > 300
    count = Counter(fact["split"] for fact in facts.values())
    assert count.keys() == {"train", "validation", "test"}
    assert count["test"] >= 100 and count["validation"] >= 30
    families = {fact["family"] for fact in facts.values()}
    assert {f["family"] for f in facts.values() if f["split"] == "test"} == families
    asked = {line["fact"] for line in lines if line["split"] == "unseen_facts"}
    assert asked == {fact["id"] for fact in facts.values() if fact["split"] == "test"}
    pairs = {(facts[id]["wordings"][0], facts[id]["answer"]) for id in asked}
    assert len(pairs) == len(asked) >= 100
    of = {
        "train": "train",
        "further": "train",
        "seen_facts": "train",
        "validation": "validation",
        "unseen_facts": "test",
    }
    for line in lines:
        if line["kind"] == "question":
            assert facts[line["fact"]]["split"] == of[line["split"]]
            assert line["text"] in facts[line["fact"]]["wordings"]
            assert line["answer"] == facts[line["fact"]]["answer"]


def test_a_question_has_one_answer(facts):
    """No wording belongs to two facts, which would make one of them unanswerable."""
    wordings = Counter(text for fact in facts.values() for text in fact["wordings"])
    assert len(wordings) >= 2 * len(facts)
    assert max(wordings.values()) == 1


def test_arithmetic_is_right(world, facts):
    number = {world.number_name(n): n for n in range(101)}
    assert len(number) == 101
    checked = 0
    for fact in facts.values():
        for text in fact["wordings"]:
            words = [w for w in text.split() if w in number or w in ("plus", "minus", "times")]
            if len(words) == 3:
                a, sign, b = number[words[0]], words[1], number[words[2]]
                result = {"plus": a + b, "minus": a - b, "times": a * b}[sign]
                assert number[fact["answer"]] == result
                checked += 1
    assert checked > 400


def test_every_word_of_a_test_question_is_heard_in_training(facts, lines):
    heard = Counter(w for line in lines if line["split"] == "train" for w in line["text"].split())
    for fact in facts.values():
        if fact["split"] != "train":
            for text in fact["wordings"]:
                for word in text.split():
                    assert heard[word] >= 20, f"{word!r} of {fact['id']}"


def test_voices_of_a_line_fit_its_split(lines):
    voices: dict[str, set[str]] = {}
    for line in lines:
        voices.setdefault(line["split"], set()).add(line["voices"])
    assert voices["train"] == voices["quantizer"] == {"train"}
    assert voices["unseen_facts"] == {"unseen", "train"}
    assert voices["seen_facts"] == {"unseen"} and voices["validation"] == {"validation"}
    assert len({line["id"] for line in lines}) == len(lines)


def test_clips_of_another_synthesizer_ask_what_is_never_spoken_in_training(facts):
    clips = read(DEMO / "slt/manifest.jsonl")
    assert len({clip["fact"] for clip in clips}) == len(clips) == 40
    for clip in clips:
        fact = facts[clip["fact"]]
        assert fact["split"] == "test" and clip["text"] in fact["wordings"]
        assert (clip["answer"], clip["replayed"]) == (fact["answer"], fact["replayed"])
        about = [clip[name] for name in ("kind", "split", "voices", "speaker")]
        assert about == ["question", "unseen_facts", "flite", "flite:slt"]
        assert soundfile.info(DEMO / "slt" / clip["audio_filepath"]).samplerate == 16_000


def test_questions_for_a_neural_voice_are_of_as_many_facts(lines, facts, out, tmp_path, capsys):
    neural = demo("neural")
    asked = neural.questions(out / "speak.jsonl", 80, "joe")
    assert len({line["fact"] for line in asked}) == 80
    assert {facts[line["fact"]]["split"] for line in asked} == {"test"}
    job = [f"lines={out}/speak.jsonl", f"out={tmp_path}/neural", f"python={tmp_path}/no"]
    neural.main(config.load(neural.Neural, None, job))
    assert "/no is not there: `just setup-piper` makes it" in capsys.readouterr().out
    assert not (tmp_path / "neural").exists()


def test_people_who_are_tested_with_are_others_than_those_who_may_train():
    speakers = {}
    for part in ("test", "train"):
        folder = DEMO / "people" / part
        clips = read(folder / "manifest.jsonl")
        speakers[part] = {clip["speaker"] for clip in clips}
        assert Counter(clip["text"] for clip in clips) == dict.fromkeys(DIGITS, 8)
        names = {f"{DIGITS.index(c['text'])}_{c['speaker']}" for c in clips}
        assert names == {path.stem.rpartition("_")[0] for path in folder.glob("*.wav")}
    assert speakers == {"test": {"theo", "yweweler"}, "train": {"jackson", "nicolas"}}
    assert "CC BY-SA 4.0" in (DEMO / "people/LICENSE").read_text()


MEASURED = re.compile(
    r"\b(slt|joe|theo|yweweler|people/test|(speech|frames)_(slt|people|neural))\b"
)
MEASURES = re.compile(
    r"(tokenize|encode|recognize)_(slt|people|neural)|neural|evaluate.*|report.*|compare"
)


def test_voices_that_are_measured_with_are_named_by_no_training():
    trains = [p for p in ROOT.glob("recipes/*/*.yaml") if not MEASURES.fullmatch(p.stem)]
    assert {"train_quantizer", "tokenize_train", "voices", "stage2"} <= {p.stem for p in trains}
    for path in trains:
        read_from = yaml.safe_load(path.read_text("utf-8"))
        read_from.pop("validation", None)  # measured, not trained on
        assert not MEASURED.search(json.dumps(read_from)), path
    for text in (
        "variants: [flite:slt]",
        "path: out/data/speech_people",
        "recipes/demo/people/test",
    ):
        assert MEASURED.search(text)


def subjects(out: Path) -> dict[str, list[Row]]:
    return {path.stem: read(path) for path in sorted((out / "text_mmlu").glob("*.jsonl"))}


def test_questions_have_four_different_choices_with_the_answer_among_them(out, facts):
    positions: Counter[int] = Counter()
    for subject, rows in subjects(out).items():
        for row in rows:
            fact = facts[row["fact"]]
            assert len(row["choices"]) == len(set(row["choices"])) == 4
            assert row["choices"][row["answer"]] == fact["answer"]
            assert row["question"] in fact["wordings"] and row["subject"] == subject
            positions[row["answer"]] += 1
    assert set(positions) == {0, 1, 2, 3}
    assert min(positions.values()) > 0.15 * positions.total()  # the place gives nothing away


def test_replayed_and_not_replayed_are_all_facts_and_share_none(out, facts):
    asked = {subject: [row["fact"] for row in rows] for subject, rows in subjects(out).items()}
    assert asked.keys() == {"replayed", "not_replayed"}
    assert sorted(asked["replayed"] + asked["not_replayed"]) == sorted(facts)
    assert set(asked["replayed"]) == {id for id, fact in facts.items() if fact["replayed"]}
    assert len(asked["not_replayed"]) >= 100
    for split in ("train", "test"):  # the two divisions are independent: each has both
        both = Counter(f["replayed"] for f in facts.values() if f["split"] == split)
        assert min(both[True], both[False]) > 25


def test_text_replay_shows_no_fact_that_is_kept_from_it(conversations, facts):
    replay = [row for row in conversations if row["extra"]["replayed"]]
    assert len(replay) > 5000
    assert {"answer", "both", "repeat"} <= {row["extra"]["kind"] for row in replay}
    assert shown(conversations, facts) == []
    hidden = {r["extra"]["fact"] for r in conversations if not r["extra"]["replayed"]}
    kept = {id for id, fact in facts.items() if not fact["replayed"]}
    assert hidden == kept  # the base model learns them all


def test_a_planted_replay_is_found(conversations, facts):
    hidden = [row for row in conversations if not row["extra"]["replayed"]]
    assert len(hidden) > 200
    replayed = next(id for id, fact in facts.items() if fact["replayed"])
    unmarked = [{**row, "extra": {"kind": "repeat", "replayed": True}} for row in hidden]
    mislabelled = [{**row, "extra": {**row["extra"], "replayed": True}} for row in hidden]
    other = [{**row, "extra": {"replayed": True, "fact": replayed}} for row in hidden]
    for planted in (unmarked, mislabelled, other):
        assert shown(planted, facts) == [row["id"] for row in hidden]
    assert shown([*conversations, unmarked[0]], facts) == [hidden[0]["id"]]


def test_the_world_is_the_seeds(world, out, tmp_path):
    path = ROOT / "recipes/demo/world.yaml"
    hashes = artifact.manifest_of(out)["outputs"]
    assert len(hashes) >= 5
    small = ["spoken_questions=300", "spoken_phrases=50", "quantizer_lines=60", "repeat_rows=50"]
    made = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        world.main(
            config.load(world.World, path, [f"out={tmp_path / name}", f"seed={seed}", *small])
        )
        made.append(artifact.manifest_of(tmp_path / name)["outputs"])
    assert made[0] == made[1]
    assert all(made[0][name] != made[2][name] for name in made[0])
