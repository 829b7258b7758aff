"""Samples and batches: documents stay apart, rows are found by number, what is wrong is said."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from torchtune.models.llama3_1 import llama3_1

from speechfuse import artifact
from speechfuse.rows import shards
from speechfuse.samples import datasets, index, instructions, packing
from speechfuse.samples.datasets import Batches, Mixture
from speechfuse.samples.view import IGNORE, PADDING, Sample, View, collate
from speechfuse.tokens.expansion import add_sound_tokens
from speechfuse.tokens.vocabulary import SoundLayout, Vocabulary
from speechfuse.train.attention import mask_of
from tests.demo_code import demo

init_base = demo("init_base")

PAD, CODES, QUANTIZER = 999, 16, "ab" * 32
LAYOUT = SoundLayout(start=100, end=101, first=102, codes=CODES, quantizer=QUANTIZER)


def sample(name: str, length: int, rng: np.random.Generator) -> Sample:
    targets = rng.random(length) < 0.5
    targets[0] = True  # the packing must not let the first token of a document be a label
    return Sample(name, rng.integers(1, 200, length).astype(np.int32), targets)


@pytest.fixture(scope="module")
def packed() -> tuple[list[list[Sample]], dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    rows = [
        [sample(f"{r}{i}", int(rng.integers(3, 9)), rng) for i in range(r % 5)] for r in range(8)
    ]
    assert max(map(len, rows)) >= 4 and not rows[0]
    batch = collate(rows, 32, PAD, LAYOUT)
    return rows, batch | {"mask": mask_of(batch["document"], "dense")}


def test_packs_hold_the_samples_one_after_the_other(packed):
    packs, batch = packed
    assert batch["tokens"].shape == batch["labels"].shape == batch["input_pos"].shape == (8, 32)
    for row, pack in enumerate(packs):
        tokens = [int(token) for s in pack for token in s.tokens]
        assert batch["tokens"][row].tolist() == [*tokens, *[PAD] * (32 - len(tokens))]
        positions = [p for s in pack for p in range(len(s.tokens))]
        assert batch["input_pos"][row, : len(tokens)].tolist() == positions


def test_labels_are_the_next_tokens_that_are_targets_of_the_same_document(packed):
    packs, batch = packed
    checked = 0
    for row, pack in enumerate(packs):
        expected, start = [IGNORE] * 32, 0
        for s in pack:
            for t in range(len(s.tokens) - 1):
                if s.targets[t + 1]:
                    expected[start + t] = int(s.tokens[t + 1])
            start += len(s.tokens)
            checked += int(s.targets[1:].sum())
        assert batch["labels"][row].tolist() == expected
    assert checked > 30
    assert int((batch["labels"] != IGNORE).sum()) == checked
    assert not (batch["labels"] == PAD).any()


def test_the_mask_is_causal_inside_each_document_and_closed_between_them(packed):
    packs, batch = packed
    assert batch["mask"].dtype == torch.bool and batch["mask"].shape == (8, 32, 32)
    for row, pack in enumerate(packs):
        owner = [i for i, s in enumerate(pack) for _ in s.tokens]
        owner += [-1] * (32 - len(owner))
        for query in range(32):
            seen = [owner[query] == owner[key] and key <= query for key in range(32)]
            assert batch["mask"][row, query].tolist() == seen
    assert batch["mask"].any(-1).all()  # a row of nothing would be NaN in the softmax
    assert (batch["document"] == PADDING).any()


def test_a_real_decoder_gives_a_packed_document_the_logits_it_has_alone(packed):
    packs, batch = packed
    torch.manual_seed(0)
    model = llama3_1(
        vocab_size=1000,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=16,
        intermediate_dim=32,
        max_seq_len=32,
    )
    with torch.no_grad():
        together = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
        assert together.isfinite().all(), "a row of padding alone too"
        for row, pack in enumerate(packs[1:4], 1):
            start = 0
            for s in pack:
                alone = model(torch.from_numpy(s.tokens).long()[None])[0]
                torch.testing.assert_close(
                    together[row, start : start + len(s.tokens)], alone, rtol=1e-4, atol=1e-5
                )
                start += len(s.tokens)


def test_sound_labels_are_told_from_text(packed):
    _, batch = packed
    expected = (batch["labels"] >= 100) & (batch["labels"] <= 118)
    assert torch.equal(batch["sound"], expected) and expected.any() and not expected.all()
    assert not collate([[]], 8, PAD, None)["sound"].any()


def test_the_example_of_collate():
    """Its table, read from the docstring."""
    a, b, c = ([*range(first, last)] for first, last in ((11, 16), (21, 24), (31, 35)))
    rows = [
        [
            Sample("", np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)))
            for ids in row
        ]
        for row in ([a, b], [c])
    ]
    batch = collate(rows, 8, 0, None)
    lines = [line.split() for line in (collate.__doc__ or "").split("\n")]
    table = {line[0]: [*map(int, line[1:])] for line in lines if line and line[0] in batch}
    assert sorted(table) == ["document", "input_pos", "labels", "tokens"]
    for name, values in table.items():
        assert batch[name].flatten().tolist() == values


def write(folder: Path, schema: Any, rows: list[dict], stream: dict | None) -> Path:
    work = artifact.Artifact(folder, "test", 1, {}, {})
    work.begin()
    path = folder / shards.shard_name(0)
    shards.write_shard(path, rows, schema, stream)
    work.finish({}, [path])
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """speech/, texts/, and a checkpoint with sound tokens but without weights."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [
        {
            "id": f"s{i}",
            "codes": [i % 16, 16, 3],
            "text": "what",
            "seconds": 0.12,
            "extra": json.dumps({"kind": "question" if i % 2 else "phrase", "answer": "four"}),
        }
        for i in range(20)
    ]
    stream = {"quantizer": QUANTIZER, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    write(folder / "speech", shards.SPEECH, rows, stream)

    def turn(role: str, text: str) -> dict:
        return {"role": role, "segments": [{"text": text}]}

    texts = [
        {
            "id": f"t{i}",
            "turns": [turn("user", "hi"), turn("assistant", "yo")],
            "extra": json.dumps({"replayed": i < 5}),
        }
        for i in range(10)
    ]
    write(folder / "texts", shards.CONVERSATIONS, texts, None)
    tokenizer = init_base.train_tokenizer(["one"], vocab_size=256)
    add_sound_tokens(tokenizer, CODES)
    tokenizer.save_pretrained(folder / "checkpoint")
    layout = {"start": 263, "end": 264, "first": 265, "codes": CODES, "quantizer": QUANTIZER}
    (folder / "checkpoint/config.json").write_text(
        json.dumps({"model_type": "llama", "speechfuse": layout})
    )
    return folder


def load(parts: Path, *specs: dict[str, Any], cache: Path | None = None, **changes: Any) -> Mixture:
    values = {"shape": packing.Shape(64, 1), "epochs": 1, "steps": None, "seed": 0} | changes
    folder = cache or parts / "cache"
    return datasets.load(list(specs), parts / "checkpoint", folder=folder, **values)


def test_samples_with_nothing_to_learn_are_left_out_counted_and_no_data(parts, tmp_path):
    def turns(*roles: str) -> list[dict[str, Any]]:
        return [{"role": role, "segments": [{"text": "one"}]} for role in roles]

    asked = [{"id": f"q{i}", "turns": turns("user"), "extra": "{}"} for i in range(3)]
    whole = [{"id": f"a{i}", "turns": turns("user", "assistant"), "extra": "{}"} for i in range(8)]
    for name, rows in (("both", asked + whole), ("questions", asked)):
        work = artifact.Artifact(tmp_path / name, "test", 1, {}, {})
        work.begin()
        shards.write_shard(tmp_path / name / shards.shard_name(0), rows, shards.CONVERSATIONS, None)
        work.finish({}, [])  # lists no outputs: rows are still told apart by content
    spec = {"_component_": "speechfuse.samples.conversations", "share": 1}
    both = load(parts, spec | {"path": str(tmp_path / "both")}, cache=tmp_path / "cache")
    (found,) = both.indexes
    assert [each.name for each in read(both)[0]] == [f"a{i}" for i in range(8)]
    assert found.without_target == 3 and found.left_out == 0
    assert found.said() == ["3 rows with nothing to learn are left out"]
    with pytest.raises(ValueError, match="questions holds no sample to train on: 3 rows with noth"):
        load(parts, spec | {"path": str(tmp_path / "questions")}, cache=tmp_path / "cache")


def test_a_rank_renders_its_own_rows_alone(parts, monkeypatch):
    mixture = load(parts, speech(parts), shape=packing.Shape(64, 4))
    every, rendered = mixture.samples(0), []
    render = index.Index.at
    monkeypatch.setattr(
        index.Index, "at", lambda self, n, step: rendered.append(n) or render(self, n, step)
    )
    for rank in range(2):
        rendered.clear()
        own = mixture.samples(0, rank, 2)
        names = [[each.name for each in row] for row in own]
        assert names == [[each.name for each in row] for row in every[rank::2]]
        assert len(rendered) == sum(map(len, own)) < sum(map(len, every))


def read(mixture: Mixture) -> list[list[Sample]]:
    return [[each[i] for i in range(len(each))] for each in mixture.indexes]


def speech(parts: Path, **changes: Any) -> dict[str, Any]:
    turns = {"_component_": "speechfuse.samples.answer", "repeat_first": True}
    spec = {
        "_component_": "speechfuse.samples.speech",
        "path": str(parts / "speech"),
        "turns": turns,
        "select": {"kind": "question"},
        "share": 0.5,
    }
    return {**spec, **changes}


def texts(parts: Path, **changes: Any) -> dict[str, Any]:
    spec = {
        "_component_": "speechfuse.samples.conversations",
        "path": str(parts / "texts"),
        "select": {"replayed": True},
        "share": 0.5,
    }
    return {**spec, **changes}


def test_rows_on_disk_become_samples_and_select_chooses(parts):
    spoken, written = read(load(parts, speech(parts), texts(parts)))
    assert [s.name for s in spoken] == [f"s{i}" for i in range(1, 20, 2)]
    assert [s.name for s in written] == [f"t{i}" for i in range(5)]
    assert spoken[0].tokens.dtype == np.int32 and spoken[0].targets.dtype == bool
    assert spoken[0].tokens[9:14].tolist() == [263, 266, 281, 268, 264]
    said = spoken[0].tokens[spoken[0].targets]
    assert len(said) == len("what\nfour") + 1 and said[-1] == 262
    entry = {"_component_": "speechfuse.samples.sound", "path": str(parts / "speech"), "share": 1}
    (alone,) = read(load(parts, entry))
    assert len(alone) == 20
    assert alone[2].tokens.tolist() == [256, 263, 267, 281, 268, 264, 257]
    assert alone[2].targets.tolist() == [False] + [True] * 6


def other_collate(*_: Any) -> dict[str, torch.Tensor]:
    return {}


def other_sound(vocabulary: Vocabulary, path: str) -> View:
    return replace(datasets.sound(vocabulary, path), collate=other_collate)


def test_a_view_says_how_its_samples_become_a_batch(parts):
    alone = {"_component_": "speechfuse.samples.sound", "path": str(parts / "speech"), "share": 1}
    other = alone | {"_component_": f"{__name__}.other_sound"}
    assert Batches(load(parts, other), 0, 1, 4)[0] == [{}]
    with pytest.raises(ValueError, match="different kinds of batches"):
        load(parts, other, alone)


def test_a_list_under_select_keeps_the_rows_of_all_its_values(parts):
    question, phrase = ({"kind": kind} for kind in ("question", "phrase"))
    names = [
        {s.name for s in read(load(parts, speech(parts, select=select)))[0]}
        for select in (question, phrase, {"kind": ["question", "phrase"]}, {"id": ["s1", "s3"]})
    ]
    assert names[0] and names[1] and not names[0] & names[1]
    assert names[2] == names[0] | names[1]
    assert names[3] == {"s1", "s3"}  # a column of the row


def test_turns_that_cannot_be_called_are_refused_before_any_row(parts):
    turns = {"_component_": "speechfuse.samples.answer", "repeat": True}
    with pytest.raises(ValueError, match="unknown argument 'repeat'; did you mean 'repeat_first'"):
        load(parts, speech(parts, turns=turns))


def test_train_on_all_makes_every_token_but_the_first_a_target(parts):
    answers, everything = read(load(parts, texts(parts), texts(parts, train_on="all")))
    for a, b in zip(answers, everything, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert b.targets.tolist() == [False] + [True] * (len(b.tokens) - 1)
        assert a.targets.sum() == len("yo") + 1
    with pytest.raises(ValueError, match="train_on='answer'"):
        load(parts, texts(parts, train_on="answer"))


def test_shares_are_relative_to_each_other(parts):
    for scale in (1, 0.5, 100):
        mixture = load(parts, speech(parts, share=0.8 * scale), texts(parts, share=0.4 * scale))
        assert mixture.plan.counts.samples == [10, 5]


@pytest.mark.parametrize("share", [0, -0.1, None, "half"])
def test_a_share_that_is_not_above_0_is_refused(parts, share):
    with pytest.raises(ValueError, match="share above 0"):
        load(parts, speech(parts), texts(parts, share=share))


@pytest.mark.parametrize("missing", ["share", "path"])
def test_an_entry_without_share_or_path_is_refused(parts, missing):
    spec = texts(parts)
    del spec[missing]
    with pytest.raises(ValueError, match="a path and a share above 0"):
        load(parts, spec)


def test_unknown_keys_and_unfinished_datasets_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"unknown argument 'selekt'.*did you mean 'select'"):
        load(parts, {**texts(parts), "selekt": {}})
    with pytest.raises(ValueError, match="absent does not exist"):
        load(parts, texts(parts, path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=r"dataset 0: its select keeps no row"):
        load(parts, texts(parts, select={"replayed": "maybe"}))


def test_a_dataset_of_the_other_schema_is_refused_with_what_reads_it(parts):
    with pytest.raises(ValueError, match=r"holds conversations: .* speechfuse.samples.conversat"):
        load(parts, texts(parts, _component_="speechfuse.samples.sound"))
    with pytest.raises(ValueError, match=r"holds rows of speech: .* speechfuse.samples.speech or"):
        load(parts, texts(parts, path=speech(parts)["path"]))


def test_a_batch_is_rendered_alike_by_any_number_of_ranks_and_workers(parts):
    mixture = load(parts, speech(parts), texts(parts), shape=packing.Shape(64, 4), epochs=3)
    steps = range(mixture.plan.counts.steps)
    whole = [Batches(mixture, 0, 1, 4)[step][0] for step in steps]
    assert len(whole) >= 3
    for ranks, micro, workers in ((2, 2, 0), (2, 1, 2), (4, 1, 1)):
        loaders = [
            DataLoader(each, None, sampler=steps, num_workers=workers)
            for each in (Batches(mixture, rank, ranks, micro) for rank in range(ranks))
        ]
        for expected, *parts_of in zip(whole, *loaders, strict=True):
            for name in ("tokens", "labels", "document"):
                for rank, own in enumerate(parts_of):
                    found = torch.cat([part[name] for part in own])
                    assert torch.equal(found, expected[name][rank::ranks])


def test_questions_are_drawn_anew_in_every_epoch_alike_for_any_number_of_ranks(parts, tmp_path):
    """A file first, of two, and then a line: three lines of .5, .25, .25."""
    texts = {"a.txt": "what?\n\n", "b.txt": "a longer question?\nwho <audio> is it?\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    turns: dict[str, Any] = {"_component_": "speechfuse.samples.context"}
    turns["questions"] = [str(tmp_path / name) for name in texts]
    spec = speech(parts, turns=turns)
    shape = packing.Shape(64, 2)
    mixture = load(parts, spec, shape=shape, epochs=40, cache=tmp_path / "cache")
    drawn: dict[str, list[str]] = {}
    for step in range(mixture.plan.counts.steps):
        whole = mixture.samples(step)
        assert [sum(len(each.tokens) for each in row) <= 64 for row in whole] == [True, True]
        ranks = [mixture.samples(step, rank, 2) for rank in range(2)]
        for row, (own,) in zip(whole, ranks, strict=True):
            for one, other in zip(row, own, strict=True):
                assert np.array_equal(one.tokens, other.tokens)
                said = mixture.vocabulary.tokenizer.decode(one.tokens)
                drawn.setdefault(one.name, []).append(re.sub("<.*?>|\n", "", said))
    assert len(drawn) == 10 and {len(of) for of in drawn.values()} == {40}
    counts = Counter(text for of in drawn.values() for text in of)
    asked = ["what?", "a longer question?", "who  is it?"]
    found = [counts[f"user{text}assistantfour"] for text in asked]
    assert sum(found) == 400 and min(len({*of}) for of in drawn.values()) == 3
    expected = (200, 100, 100)
    assert sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True)) < 9.21  # p > .01
    (tmp_path / "a.txt").write_text("why?")  # other content is another index
    assert load(parts, spec, shape=shape, cache=tmp_path / "cache").indexes[0].key != (
        mixture.indexes[0].key
    )
    (tmp_path / "a.txt").write_text(" \n")
    instructions._questions.cache_clear()
    with pytest.raises(ValueError, match=r"a\.txt has no question: write one a line"):
        mixture.samples(0)


def test_codes_are_replaced_anew_in_every_step_alike_for_any_number_of_ranks(parts):
    shape = packing.Shape(64, 2)
    plain, other = (load(parts, speech(parts, **of), shape=shape) for of in ({}, {"replaced": 0.4}))
    shares, seen = [], set()
    for step in range(plain.plan.counts.steps):
        rows = [row for rank in range(2) for row in other.samples(step, rank, 2)]
        for was, now in zip(chain(*plain.samples(step)), chain(*rows), strict=True):
            sound = (was.tokens >= 265) & (was.tokens < 265 + CODES)
            assert np.array_equal(now.tokens[~sound], was.tokens[~sound])
            assert ((now.tokens[sound] >= 265) & (now.tokens[sound] < 265 + CODES)).all()
            shares.append((now.tokens != was.tokens).sum() / sound.sum())
            seen.add(now.tokens.tobytes())
        for one, two in zip(chain(*other.samples(step)), chain(*rows), strict=True):
            assert np.array_equal(one.tokens, two.tokens)
    assert 0.2 < np.mean(shares) < 0.6 and len(seen) > len(shares) / 2
    assert len({other.sample(step, 0, 0).tokens.tobytes() for step in range(20)}) > 5
    with pytest.raises(ValueError, match="replaced"):
        load(parts, speech(parts, replaced=1.5))
    with pytest.raises(ValueError, match="datasets is empty"):
        load(parts)


def test_an_answer_is_enough_but_not_for_a_piece_of_a_recording(parts, tmp_path):
    """As in NeMo's manifests of questions, whose recordings have no transcript."""
    rows = [{"id": f"r{i}", "codes": [1], "text": None, "seconds": 0.1} for i in range(3)]
    extras: list[dict[str, str]] = [{"answer": "four", "context": "hm?"}, {}, {"answer": "four"}]
    for row, extra in zip(rows, extras, strict=True):
        row["extra"] = json.dumps(extra)
    rows[2]["part"] = 0
    stream = {"quantizer": QUANTIZER, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    path = str(write(tmp_path / "rows", shards.SPEECH, rows, stream))
    turns = {"_component_": "speechfuse.samples.context"}
    spec = speech(parts, path=path, turns=turns, select={})
    (found,) = load(parts, spec, cache=tmp_path / "cache").indexes
    assert [found[i].name for i in range(len(found))] == ["r0"] and found.left_out == 2
    plain = spec | {"turns": {"_component_": "speechfuse.samples.answer"}}  # needs a transcript
    with pytest.raises(ValueError, match="no sample"):
        load(parts, plain, cache=tmp_path / "cache")


def test_a_changed_chat_template_is_seen_by_the_index(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    before = index._tokens_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("Q: {{ messages[0].content }}")
    assert index._tokens_of(tmp_path) != before


def test_unpacked_rows_are_padded_to_the_longest_of_their_micro_batch(parts):
    mixture = load(
        parts, speech(parts), texts(parts), shape=packing.Shape(64, 4, packed=False), epochs=2
    )
    lengths = set()
    for part in (p for step in range(3) for p in Batches(mixture, 0, 1, 2)[step]):
        used = (part["document"] != PADDING).sum(1)
        assert part["document"].max() <= 0 and used.max() == part["tokens"].shape[1]
        lengths.add(part["tokens"].shape[1])
    assert len(lengths) > 1


def test_joined_samples_are_the_turns_of_one_conversation_alike_for_any_number_of_ranks(parts):
    specs, shape = [speech(parts), texts(parts)], packing.Shape(128, 4)
    mixture = load(parts, *specs, shape=shape, joined=0.5)
    apart = load(parts, *specs, shape=shape)
    (whole,), begin = Batches(mixture, 0, 1, 4)[0], mixture.vocabulary.begin
    for number, (document, positions) in enumerate(
        zip(whole["document"], whole["input_pos"], strict=True)
    ):
        own, many = document != PADDING, len(apart.samples(0)[number])
        assert many > 1 and int(document.max()) == (0 if number < 2 else many - 1)
        assert int((whole["tokens"][number][own] == begin).sum()) == (1 if number < 2 else many)
        if number < 2:
            assert positions[own].tolist() == [*range(int(own.sum()))]
    ((plain,), ranks) = Batches(apart, 0, 1, 4)[0], [Batches(mixture, r, 2, 2)[0] for r in (0, 1)]
    assert (plain["labels"] != IGNORE).sum() == (whole["labels"] != IGNORE).sum()
    for rank, (part,) in enumerate(ranks):
        assert all(torch.equal(part[name], whole[name][rank::2]) for name in part)


def test_only_packed_conversations_are_joined(parts):
    with pytest.raises(ValueError, match=r"joined=0.5: packed=false puts one into a row"):
        load(parts, texts(parts), shape=packing.Shape(64, 4, packed=False), joined=0.5)
    sound = {"_component_": "speechfuse.samples.sound", "path": speech(parts)["path"], "share": 1}
    with pytest.raises(ValueError, match=r"joined=1: .* holds no conversations: leave joined out"):
        load(parts, sound, joined=1.0)


def test_the_index_is_made_once_for_each_use_of_a_dataset(parts, tmp_path, monkeypatch):
    specs = speech(parts), texts(parts)
    first = read(load(parts, *specs, cache=tmp_path))
    made = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(index, "index_shard", None)
    again = read(load(parts, *specs, cache=tmp_path))
    assert [s.tokens.tolist() for s in first[0]] == [s.tokens.tolist() for s in again[0]]
    assert {path.name for path in tmp_path.iterdir()} == made
    monkeypatch.undo()
    load(parts, speech(parts, train_on="all"), texts(parts), cache=tmp_path)
    new = {path.name for path in tmp_path.iterdir()} - made
    assert len([name for name in new if name.startswith("view-")]) == 1
    assert not [name for name in new if name.startswith("rows-")], "rows are copied once"


def test_another_tokenizer_is_another_index(parts, tmp_path):
    load(parts, texts(parts), cache=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(parts / "checkpoint", other / "checkpoint")
    config = json.loads((other / "checkpoint/config.json").read_text())
    (other / "checkpoint/config.json").write_text(json.dumps(config | {"more": 1}))
    shutil.copytree(parts / "texts", other / "texts")
    before = len(list(tmp_path.glob("view-*")))
    load(other, texts(other), cache=tmp_path)
    assert len(list(tmp_path.glob("view-*"))) == before + 1
    assert len(list(tmp_path.glob("rows-*"))) == 1, "the folder's place does not matter"


def test_datasets_whose_manifests_list_no_outputs_do_not_share_rows(parts, tmp_path):
    for name, reply in (("one", "yo"), ("two", "no")):
        turns = [
            {"role": role, "segments": [{"text": text}]}
            for role, text in (("user", "hi"), ("assistant", reply))
        ]
        folder = write(tmp_path / name, shards.CONVERSATIONS, [{"id": name, "turns": turns}], None)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["outputs"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    specs = [texts(parts, path=str(tmp_path / name), select=None) for name in ("one", "two")]
    indexes = load(parts, *specs, cache=tmp_path / "cache").indexes
    assert [index.row(0)["id"] for index in indexes] == ["one", "two"]


def test_many_shards_are_read_by_worker_processes_and_give_the_same_index(tmp_path, parts):
    rows = [
        {
            "id": f"s{i}",
            "codes": [i % 16] * (i % 7 + 1),
            "text": f"row {i}" if i % 3 else None,
            "seconds": 0.1,
            "extra": "{}",
        }
        for i in range(33 * 4)
    ]
    stream = {"quantizer": QUANTIZER, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    work = artifact.Artifact(tmp_path / "many", "test", 1, {}, {})
    work.begin()
    paths = [tmp_path / "many" / shards.shard_name(i) for i in range(33)]
    for i, path in enumerate(paths):
        shards.write_shard(path, rows[i * 4 : i * 4 + 4], shards.SPEECH, stream)
    work.finish({}, paths)
    turns = {"_component_": "speechfuse.samples.transcribe", "requests": ["a", "b"]}
    spec = {
        "_component_": "speechfuse.samples.speech",
        "path": str(tmp_path / "many"),
        "turns": turns,
        "share": 1,
    }
    (found,) = load(parts, spec, cache=tmp_path / "cache").indexes
    assert found.left_out == 44 and len(found) == 88 and found.rejected == []
    assert [found[i].name for i in range(88)] == [r["id"] for r in rows if r["text"]]
    assert found.row(5)["codes"].tolist() == rows[8]["codes"]


def test_rows_that_cannot_be_rendered_are_named(parts, tmp_path):
    rows = [
        {"id": "good", "codes": [1], "text": "one", "extra": '{"answer": "1"}'},
        {"id": "bad", "codes": [1, 17], "text": "two", "extra": '{"answer": "2"}'},
        {"id": "worse", "codes": [1], "text": "three", "extra": "{}"},
    ]
    stream = {"quantizer": QUANTIZER, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    folder = write(tmp_path / "speech", shards.SPEECH, rows, stream)
    spec = speech(parts, path=str(folder), select=None)
    (found,) = load(parts, spec, cache=tmp_path / "cache").indexes
    assert len(found) == 1 and [each["id"] for each in found.rejected] == ["bad", "worse"]
    assert "code 17 is out of range" in found.rejected[0]["reason"]
    assert "answer" in found.rejected[1]["reason"]


def test_a_damaged_shard_is_named_with_the_cure(parts, tmp_path):
    shutil.copytree(parts / "texts", tmp_path / "texts")
    shard = tmp_path / "texts" / shards.shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-00000.parquet .*just verify"):
        load(parts, texts(parts, path=str(tmp_path / "texts")), cache=tmp_path / "cache")
    assert pq.read_metadata(parts / "texts" / shards.shard_name(0)).num_rows == 10
