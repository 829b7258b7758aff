"""Contamination: every planted overlap is found, what only looks like one is not."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from speechfuse import artifact
from speechfuse.evals.contamination import training_hits
from speechfuse.rows import shards
from speechfuse.scores.words import words
from speechfuse.texts.shared_words import SharedWords

STREAM = {"quantizer": "q", "token_rate": 25.0, "codebooks": 1, "codebook_size": 512}
LONG = "the quick brown fox jumps over the lazy dog and then runs back home to sleep"  # 16 words


def codes(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


def dataset(folder: Path, rows: list[dict], schema=shards.SPEECH) -> str:
    folder.mkdir()
    shards.write_shard(folder / shards.shard_name(0), rows, schema, STREAM)
    artifact.write_json(folder / "manifest.json", {"totals": {"rows": len(rows)}})
    return str(folder)


def look(folder: Path, training: list[dict], *items: dict) -> list[tuple[str, str, str]]:
    """(item, kind, training row) of the hits; rows and items are {text, codes}, named in order."""
    rows = [{"id": f"row {i}", **row} for i, row in enumerate(training)]
    path = dataset(folder, rows)
    asked = [{"id": str(i), "text": None, "codes": None} | item for i, item in enumerate(items)]
    found = training_hits([path], asked)
    assert all(hit["shared"] for hit in found)
    return [(hit["id"], hit["kind"], hit["training_id"]) for hit in found]


@pytest.mark.parametrize(
    ("training", "asked", "kind"),
    [
        ("What is the capital of Peru?", "what is  the capital of peru", "exact"),
        ("Yes!", "yes", "exact"),
        ("yes and no", "yes", None),
        ("tell me what is the capital of peru please", "What is the capital of Peru?", "ngram"),
        ("is it so that one two three four", "one two three four", None),  # too short to tell
        ("what is the capital of chile", "what is the capital of peru", None),
        (f"he said {LONG}", LONG, "ngram"),
        (" ".join(LONG.split()[2:15]) + " whatever", LONG, "ngram"),  # 13 of its 16 words
        (" ".join(LONG.split()[2:14]) + " whatever", LONG, None),  # 12
        (" ".join(LONG.split()[:7]) + " x " + " ".join(LONG.split()[7:]), LONG, None),
        ("请告诉我秘鲁的首都是哪里", "秘鲁的首都是哪里\uff1f", "ngram"),
        ("", "", None),
    ],
)
def test_texts(tmp_path, training, asked, kind):
    found = look(tmp_path / "a", [{"text": "another text"}, {"text": training}], {"text": asked})
    assert found == ([("0", kind, "row 1")] if kind else [])


@pytest.mark.parametrize(
    ("training", "asked", "found"),
    [
        (codes(1, 90) + codes(2, 50) + codes(3, 20), codes(4, 33) + codes(2, 50), True),
        (codes(1, 90) + codes(2, 49) + codes(3, 20), codes(4, 33) + codes(2, 49), False),
        (codes(2, 50), codes(2, 50), True),
        (codes(2, 40), codes(2, 40), True),  # a short one, whole
        (codes(2, 41), codes(2, 40), False),
        (codes(2, 40), codes(2, 90), False),
        ([7] * 90, codes(1, 10) + [7] * 90, False),  # silence
        ([7] * 90 + codes(2, 60), [7] * 90 + codes(2, 60), True),
        (None, codes(1, 90), False),
        (codes(1, 90), None, False),
        ([], [], False),
    ],
)
def test_codes(tmp_path, training, asked, found):
    hits = look(tmp_path / "a", [{"codes": codes(9, 70)}, {"codes": training}], {"codes": asked})
    assert hits == ([("0", "codes", "row 1")] if found else [])


def test_the_longest_shared_run_is_told(tmp_path):
    path = dataset(tmp_path / "a", [{"id": "t", "text": LONG, "codes": codes(1, 120)}])
    items = [{"id": "i", "text": LONG + " soon", "codes": codes(2, 30) + codes(1, 120)[20:100]}]
    shared = {hit["kind"]: hit["shared"] for hit in training_hits([path], items)}
    assert shared["codes"] == "80 codes"
    assert shared["ngram"] == "13 words: " + " ".join(LONG.split()[:13])


def test_one_hit_of_each_kind_and_exact_stands_for_the_words(tmp_path):
    part = LONG + " soon"
    training = [{"text": part, "codes": codes(1, 60)}, {"text": LONG}, {"text": LONG}]
    first = {"text": LONG, "codes": codes(1, 60)}
    found = look(tmp_path / "a", training, first, {"text": "no"}, first, {"text": part})
    assert found == [
        ("0", "codes", "row 0"),
        ("0", "exact", "row 1"),
        ("2", "codes", "row 0"),
        ("2", "exact", "row 1"),
        ("3", "exact", "row 0"),
    ]


def test_conversations_and_several_datasets(tmp_path):
    speech = {"id": "s", "text": "what is the capital of peru", "codes": codes(1, 60)}
    turns = [
        {"role": "user", "segments": [{"text": "please answer"}, {"speech": speech}]},
        {"role": "assistant", "segments": [{"text": "it is lima of course"}]},
    ]
    talk = dataset(tmp_path / "a", [{"id": "talk", "turns": turns}], shards.CONVERSATIONS)
    rows = dataset(tmp_path / "b", [{"id": "row", "text": "and of chile", "codes": None}])
    items = [
        {"id": "peru", "text": "What is the capital of Peru?", "codes": codes(1, 60)},
        {"id": "lima", "text": "It is Lima, of course.", "codes": None},
        {"id": "chile", "text": "And of Chile?", "codes": None},
    ]
    hits = training_hits([talk, rows], items)
    assert [(hit["id"], hit["kind"], hit["training_id"]) for hit in hits] == [
        ("peru", "codes", "talk"),
        ("peru", "exact", "talk"),
        ("lima", "exact", "talk"),
        ("chile", "exact", "row"),
    ]


def test_runs_of_codes_are_those_a_plain_search_finds(tmp_path):
    """Of few different codes, so that runs nearly match, and repeat."""
    rng = np.random.default_rng(1)
    pool = [rng.integers(0, 12, 70) for _ in range(6)]

    def made() -> list[int]:
        parts = [pool[rng.integers(6)][: rng.integers(44, 71)] for _ in range(2)]
        return np.concatenate(parts).tolist()

    training, asked = [made() for _ in range(30)], [made() for _ in range(40)]
    runs = [{tuple(t[i : i + 50]) for i in range(len(t) - 49)} for t in training]
    expected = []
    for i, item in enumerate(asked):
        own = {tuple(item[k : k + 50]) for k in range(len(item) - 49)}
        own = {run for run in own if len(set(run)) >= 10}
        if first := [f"row {t}" for t, found in enumerate(runs) if found & own]:
            expected.append((str(i), "codes", first[0]))
    hits = look(tmp_path / "a", [{"codes": t} for t in training], *({"codes": a} for a in asked))
    assert 5 < len(expected) and hits == expected


def test_memory_does_not_grow_with_the_training_set(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_ROWS_PER_GROUP", 500)
    items = [{"id": str(i), "text": f"{LONG} {i}", "codes": codes(i, 80)} for i in range(50)]
    peaks = []
    for count in (1000, 5000):
        rows = ({"id": str(i), "text": f"text {i}", "codes": [i % 512] * 60} for i in range(count))
        folder = tmp_path / str(count)
        folder.mkdir()
        shards.write_shard(folder / shards.shard_name(0), rows, shards.SPEECH, STREAM)
        artifact.write_json(folder / "manifest.json", {"totals": {"rows": count}})
        tracemalloc.start()
        assert training_hits([str(folder)], items) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_what_is_no_dataset_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: no recipe here makes it"):
        training_hits([str(tmp_path / "nowhere")], [])


def test_words():
    assert words("What's  Zoë's 2nd_name?!") == ("what", "s", "zoë", "s", "2nd", "name")
    assert words("\uff21B 你好") == ("ab", "你", "好")


def test_texts_take_few_bytes_a_word_and_may_be_added_after_a_look():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 5000, 40))) for _ in range(1000)]
    tracemalloc.start()
    shared = SharedWords(6)
    for i, text in enumerate(texts):
        shared.add(i, text)
    owners, _, whole = next(shared.find(texts[7]))
    assert owners == {7} and whole
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 1000 * 28 * 100, "a dict of tuples takes 800 bytes a run"
    shared.add("new", texts[7] + " more")
    assert {7, "new"} in [owners for owners, *_ in shared.find(texts[7])]
    assert not list(shared.find("none of it is there"))
