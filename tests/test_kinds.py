"""Kinds of sample, pinned to golden ids, and the plan: exact shares, every text and voice alike."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechfuse import artifact
from speechfuse.rows import shards
from speechfuse.synthesis import kinds
from speechfuse.synthesis import plan as synthesis_plan
from speechfuse.texts.conversations import Conversation, Turn, row_of
from speechfuse.tokens import prompts
from speechfuse.tokens.expansion import add_sound_tokens
from speechfuse.tokens.vocabulary import SoundLayout, Vocabulary
from tests.demo_code import demo
from tests.test_prompts import ASSISTANT, CODES, USER, golden, said

init_base = demo("init_base")

ONE = Conversation("q1", [Turn("user", "what is a b"), Turn("assistant", "it is c")], "s")
TWO = Conversation(
    "m1",
    [*ONE.turns, Turn("user", "and of d"), Turn("assistant", "e")],
    "s",
)
SPOKEN = [
    "<|sound_start|><|sound_0003|><|sound_0000|><|sound_end|>",
    "<|sound_start|><|sound_0007|><|sound_end|>",
]
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = init_base.train_tokenizer(["no merge fits into 256"], vocab_size=256)
    add_sound_tokens(tokenizer, CODES)
    return Vocabulary(tokenizer, SoundLayout(263, 264, 265, CODES, "q"))


def made(turns: kinds.Turns | None) -> kinds.Turns:
    """What the job puts in place of the segments that are to be made: codes 3 0, then 7."""
    assert turns is not None
    codes = iter([[3, 0], [7]])

    def segment(of: dict[str, Any]) -> dict[str, Any]:
        return of if "text" in of else {"speech": {"codes": next(codes)}}

    return [{**turn, "segments": [segment(s) for s in turn["segments"]]} for turn in turns]


GOLDEN: dict[str, tuple[kinds.Kind, Conversation, str, list[str]]] = {
    "instruction": (
        kinds.Instruction(),
        ONE,
        f"{USER}{SPOKEN[0]}{EOT}{ASSISTANT}it is c{EOT}",
        ["it is c"],
    ),
    "instruction, repeated first": (
        kinds.Instruction(repeat_first=True),
        ONE,
        f"{USER}{SPOKEN[0]}{EOT}{ASSISTANT}what is a b\nit is c{EOT}",
        ["what is a b\nit is c"],
    ),
    "transcription": (
        kinds.Transcription(["repeat:"]),
        ONE,
        f"{USER}repeat:{SPOKEN[0]}{EOT}{ASSISTANT}what is a b{EOT}",
        ["what is a b"],
    ),
    "transcription, asked for behind": (
        kinds.Transcription(["{speech} What did I say?"]),
        ONE,
        f"{USER}{SPOKEN[0]} What did I say?{EOT}{ASSISTANT}what is a b{EOT}",
        ["what is a b"],
    ),
    "text around": (
        kinds.TextAround(["In a word:{speech} Thank you."]),
        ONE,
        f"{USER}In a word:{SPOKEN[0]} Thank you.{EOT}{ASSISTANT}it is c{EOT}",
        ["it is c"],
    ),
    "partly spoken": (
        kinds.PartlySpoken(),
        ONE,
        f"{USER}what{SPOKEN[0]} b{EOT}{ASSISTANT}it is c{EOT}",
        ["it is c"],
    ),
    "both turns spoken": (
        kinds.MultiTurn(spoken=1.0),
        TWO,
        f"{USER}{SPOKEN[0]}{EOT}{ASSISTANT}it is c{EOT}{USER}{SPOKEN[1]}{EOT}{ASSISTANT}e{EOT}",
        ["it is c", "e"],
    ),
    "one turn spoken": (
        kinds.MultiTurn(spoken=0.0, repeat_first=True),
        TWO,
        f"{USER}what is a b{EOT}{ASSISTANT}it is c{EOT}{USER}{SPOKEN[0]}{EOT}"
        f"{ASSISTANT}and of d\ne{EOT}",
        ["it is c", "and of d\ne"],
    ),
    "refusal": (
        kinds.Refusal(["what?"]),
        ONE,
        f"{USER}{SPOKEN[0]}{EOT}{ASSISTANT}what?{EOT}",
        ["what?"],
    ),
    "refusal of the second turn": (
        kinds.Refusal(["what?"]),
        TWO,
        f"{USER}{SPOKEN[0]}{EOT}{ASSISTANT}it is c{EOT}{USER}{SPOKEN[1]}{EOT}{ASSISTANT}what?{EOT}",
        ["it is c", "what?"],
    ),
    "text": (
        kinds.Text(),
        TWO,
        f"{USER}what is a b{EOT}{ASSISTANT}it is c{EOT}{USER}and of d{EOT}{ASSISTANT}e{EOT}",
        ["it is c", "e"],
    ),
}
SEEDS = {"partly spoken": 10, "one turn spoken": 0, "refusal of the second turn": 0}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids_of_every_kind(vocabulary, name):
    kind, conversation, text, replies = GOLDEN[name]
    turns = made(kind(conversation, random.Random(SEEDS.get(name, 1))))
    ids, targets = prompts.render(vocabulary, turns)
    assert vocabulary.tokenizer.decode(ids) == f"<|begin_of_text|>{text}"
    assert ids == golden(f"<|begin_of_text|>{text}")
    assert said(ids, targets) == [golden(f"{reply}{EOT}") for reply in replies]


def test_every_kind_is_golden_and_the_same_numbers_make_the_same_sample():
    classes = {type(kind) for kind, *_ in GOLDEN.values()}
    public = {
        v
        for v in vars(kinds).values()
        if isinstance(v, type) and v.__module__ == "speechfuse.synthesis.kinds"
    }
    assert classes == public and len(public) == 7
    for kind, conversation, *_ in GOLDEN.values():
        for seed in range(20):
            made = [kind(conversation, random.Random(seed)) for _ in range(2)]
            assert made[0] == made[1] is not None


def spans(turns: kinds.Turns) -> list[str]:
    return [s["say"] for s in synthesis_plan.segments_to_speak(turns)]


def test_the_text_around_a_spoken_part_is_the_rest_of_the_question():
    text = "First part.  Then, another one? And a last"
    conversation = Conversation("q", [Turn("user", text), Turn("assistant", "a")], "s")
    heard = set()
    for seed in range(300):
        turns = kinds.PartlySpoken()(conversation, random.Random(seed))
        assert turns
        segments = turns[0]["segments"]
        parts = [s.get("say", s.get("text")) for s in segments]
        assert "".join("".join(parts).split()) == "".join(text.split())
        (spoken,) = spans(turns)
        assert spoken in text and spoken != text and spoken == spoken.strip()
        heard.add((len(segments), "text" in segments[0]))
    assert heard == {(2, True), (2, False), (3, True)}


def test_wordings_sounds_and_spoken_turns_are_all_drawn():
    requests = ["repeat:", "{speech} again?", "write down:"]
    found = Counter(str(kinds.Transcription(requests)(ONE, random.Random(i))) for i in range(300))
    assert len(found) == 3 and min(found.values()) > 60
    which = Counter(
        tuple(
            "say" in turn["segments"][0]
            for turn in (kinds.MultiTurn()(TWO, random.Random(i)) or [])[::2]
        )
        for i in range(300)
    )
    assert set(which) == {(True, False), (False, True), (True, True)} and min(which.values()) > 60
    refusals = [kinds.Refusal(["a", "b"])(ONE, random.Random(i)) for i in range(300)]
    sounds = Counter(
        s.get("sound") or ("shuffled" if s.get("shuffle") else "clean")
        for turns in refusals
        for s in synthesis_plan.segments_to_speak(turns or [])
    )
    assert set(sounds) == {
        "speechfuse.synthesis.silence",
        "speechfuse.audio.white",
        "speechfuse.audio.pink",
        "shuffled",
    }
    assert min(sounds.values()) > 30


@pytest.mark.parametrize(
    "roles", [[], ["user"], ["assistant", "user"], ["system", "user", "assistant"], ["user"] * 2]
)
def test_what_is_no_exchange_is_left_out_but_can_be_transcribed(roles):
    conversation = Conversation("x", [Turn(role, "a b") for role in roles], "s")
    for kind, *_ in GOLDEN.values():
        turns = kind(conversation, random.Random(0))
        transcribes = isinstance(kind, kinds.Transcription) and "user" in roles
        assert (turns is not None) == transcribes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: kinds.Transcription([]), "requests"),
        (lambda: kinds.TextAround(["{speech} and {speech}"]), "twice"),
        (lambda: kinds.MultiTurn(spoken=1.5), "spoken=1.5"),
        (lambda: kinds.Refusal(["no"], sounds=["music"]), "'music'; choose from noise"),
        (lambda: kinds.Refusal([]), "replies"),
        (lambda: kinds.Refusal(["no"], noises=["speechfuse.audio.brown"]), "brown"),
        (lambda: kinds.Refusal(["no"], level=(-10, -20)), "level=.*least, most"),
    ],
)
def test_a_kind_that_makes_no_sense_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def texts(folder: Path, conversations: list[Conversation], shard: int = 1000) -> Path:
    work = artifact.Artifact(folder, "curate_texts", 1, {}, {})
    work.begin({})
    paths = []
    for start in range(0, len(conversations) or 1, shard):
        paths.append(folder / shards.shard_name(len(paths)))
        rows = map(row_of, conversations[start : start + shard])
        shards.write_shard(paths[-1], rows, shards.CONVERSATIONS)
    work.finish({}, paths)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """1,900 questions and 300 conversations of two turns, `extra.level` of half of them."""
    found = []
    for i in range(2200):
        turns = TWO.turns if i % 22 < 3 else ONE.turns
        found.append(Conversation(f"t{i}", turns, "s", {"level": i % 2}))
    return texts(tmp_path_factory.mktemp("texts") / "many", found)


MIXTURE: dict[str, dict[str, Any]] = {
    "instruction": {"_component_": "speechfuse.synthesis.Instruction", "share": 0.4567},
    "transcription": {
        "_component_": "speechfuse.synthesis.Transcription",
        "share": 0.3,
        "requests": ["repeat:"],
        "select": {"level": [1, 2]},
    },
    "turns": {"_component_": "speechfuse.synthesis.MultiTurn", "share": 0.1},
    "refusal": {
        "_component_": "speechfuse.synthesis.Refusal",
        "share": 0.0433,
        "replies": ["what?"],
    },
    "text": {"_component_": "speechfuse.synthesis.Text", "share": 0.1},
}
SPEAKERS = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}


def planned(folder: Path, total: int | None, seed: int = 0, **changes: Any) -> synthesis_plan.Plan:
    entries = synthesis_plan.entries_of({**MIXTURE, **changes}, str(folder))
    return synthesis_plan.plan(entries, total, SPEAKERS, seed, 500)


def test_ids_of_samples_are_their_own_whatever_those_of_the_texts(tmp_path):
    names = ["t", "t#1", "t#1#", "t#2", "u"]
    found = texts(tmp_path / "texts", [Conversation(id, ONE.turns, "s", {}) for id in names])
    kinds = {"text": {"_component_": "speechfuse.synthesis.Text", "share": 1.0}}
    entries = synthesis_plan.entries_of(kinds, str(found))
    (shard,) = synthesis_plan.plan(entries, 20, SPEAKERS, 0, 500)
    ids = [sample["id"] for sample in shard["samples"]]
    assert len(set(ids)) == 20 and {f"text/{name}" for name in names} <= {*ids}
    assert {"text/u", "text/u#1", "text/u#2", "text/u#3"} <= {*ids}


def test_shares_are_exact_on_a_hundred_thousand_samples(many):
    plan = planned(many, 100_000)
    assert [shard["count"] for shard in plan] == [500] * 200
    every = [sample for shard in plan for sample in shard["samples"]]
    assert len({sample["id"] for sample in every}) == 100_000
    found = Counter(sample["kind"] for sample in every)
    for name, spec in MIXTURE.items():
        assert abs(found[name] / 100_000 - spec["share"]) < 0.001
        assert found[name] == round(100_000 * spec["share"])
    for name in MIXTURE:  # every text that the kind can use, as often as any other
        uses = Counter(s["text"] for s in every if s["kind"] == name)
        assert max(uses.values()) - min(uses.values()) <= 1
        assert len(uses) == {"instruction": 1900, "turns": 300, "transcription": 1100}.get(
            name, 2200
        )
    spoken = [s for s in every if any(part["voice"] for part in s["speech"])]
    shares = Counter(s["speech"][0]["voice"] for s in spoken)
    for name, share in SPEAKERS.items():
        assert abs(shares[name] - share * len(spoken)) < 1
        for kind in ("instruction", "transcription", "turns"):
            mine = [s["speech"][0]["voice"] for s in spoken if s["kind"] == kind]
            assert abs(mine.count(name) / len(mine) - share) < 0.002
    for sample in every:  # one user: one voice, and one seed for its pace, pitch, room and noise
        assert len({part["voice"] for part in sample["speech"]} - {None}) <= 1
        assert len({part["seed"] for part in sample["speech"]}) == bool(sample["speech"])
        assert bool(sample["speech"]) == (sample["kind"] != "text")
    seeds = [sample["speech"][0]["seed"] for sample in every if sample["speech"]]
    assert len(set(seeds)) > 0.999 * len(seeds)


def test_lone_marks_are_not_spoken():
    words = Conversation("c", [Turn("user", "- one ? two !"), Turn("assistant", "x")], "s")
    for seed in range(40):
        turns = kinds.PartlySpoken()(words, random.Random(seed))
        [spoken] = [s["say"] for s in turns[0]["segments"] if "say" in s]
        assert spoken in ("one", "two")


def test_silence_is_of_many_microphones():
    heard = [kinds.silence(16000, np.random.default_rng(seed)) for seed in range(50)]
    levels = [20 * np.log10(np.sqrt(np.mean(wave**2))) for wave in heard]
    assert -90.5 < min(levels) < -85 and -60 < max(levels) < -54.5


def test_a_plan_follows_from_its_seed_and_keeps_the_order_of_the_texts(many):
    plan = planned(many, 3000)
    assert json.dumps(plan) == json.dumps(planned(many, 3000))
    assert json.dumps(plan) != json.dumps(planned(many, 3000, seed=1))
    places = [tuple(s["at"]) for shard in plan for s in shard["samples"]]
    assert places == sorted(places)
    stored = {place: conversation.id for place, conversation in synthesis_plan.conversations(many)}
    assert all(stored[tuple(s["at"])] == s["text"] for shard in plan for s in shard["samples"])


def test_without_a_number_no_text_is_used_twice(many):
    plan = planned(many, None)
    uses = Counter((s["kind"], s["text"]) for shard in plan for s in shard["samples"])
    assert max(uses.values()) == 1
    assert sum(uses.values()) == 3000  # 300 conversations of two turns are a tenth


def test_mistakes_in_a_mixture_are_one_sentence(many, tmp_path):
    half = {"_component_": "speechfuse.synthesis.Text", "share": 0.5}
    for changes, says in (
        ({"text": half}, "1.4 together: give each one above 0, together 1"),
        ({"text": {**half, "share": 0}}, "each one above 0"),
        ({"text": {**half, "share": "many"}}, "each one above 0"),
        ({"text": {**half, "_component_": "speechfuse.synthesis.Texts", "share": 0.1}}, "'Text'"),
        ({"text": {**half, "share": 0.1, "wordings": []}}, "unknown argument 'wordings'"),
        ({"text": {**half, "share": 0.1, "select": {"level": 7}}}, "none of the texts can"),
        ({"text": {**half, "share": 0.1, "texts": str(tmp_path)}}, "not a finished artifact"),
        ({"text": {**half, "share": 0.1, "texts": 3}}, "texts=3 and select=.*: give the path"),
        ({"text": {**half, "share": 0.1, "select": "all"}}, "select='all': give the path"),
    ):
        with pytest.raises(ValueError, match=says):
            planned(many, 1000, **changes)
    two = {name: {**MIXTURE[name], "select": {"level": 7}} for name in ("turns", "text")}
    with pytest.raises(ValueError) as raised:
        planned(many, 1000, **two)
    assert str(raised.value) == (
        f"kinds.turns, kinds.text: none of the texts can be used (of {many}, select={{'level': 7}}"
        "): other texts are needed, or leave out what has none: kinds.turns=null kinds.text=null"
    )
    with pytest.raises(ValueError, match="is empty: it holds no conversation"):
        planned(texts(tmp_path / "none", []), 10)
    with pytest.raises(ValueError, match=r"kinds\.instruction has no texts"):
        synthesis_plan.entries_of(MIXTURE, None)
