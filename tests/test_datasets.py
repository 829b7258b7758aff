"""Packing, mixture and samples: documents stay apart, nothing is lost, shares hold."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchtune.models.llama3_1 import llama3_1

from speechfuse import artifact, datasets, shards
from speechfuse.datasets import IGNORE, Mixture, Sample, collate
from speechfuse.vocab import add_sound_tokens
from stages import init_base

PAD, CODES, QUANTIZER = 999, 16, "ab" * 32


def sample(name: str, length: int, rng: np.random.Generator) -> Sample:
    targets = rng.random(length) < 0.5
    targets[0] = True  # the packing must not let the first token of a document be a label
    return Sample(name, rng.integers(1, PAD, length).astype(np.int32), targets)


def group(
    prefix: str, count: int, shortest: int = 3, longest: int = 12, seed: int = 0
) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        sample(f"{prefix}{i}", int(rng.integers(shortest, longest + 1)), rng) for i in range(count)
    ]


def names(packs: list[list[Sample]]) -> list[str]:
    return [s.name for pack in packs for s in pack]


@pytest.fixture(scope="module")
def packed() -> tuple[list[list[Sample]], dict[str, torch.Tensor]]:
    packs = Mixture([group("a", 40)], [1.0], seq_len=32, batch_size=1, seed=0).packs(0)[:8]
    assert max(map(len, packs)) >= 4 and any(sum(len(s.tokens) for s in p) < 32 for p in packs)
    return packs, collate(packs, 32, PAD)


def test_packs_hold_the_samples_one_after_the_other(packed):
    packs, batch = packed
    assert batch["tokens"].shape == batch["labels"].shape == batch["input_pos"].shape == (8, 32)
    for row, pack in enumerate(packs):
        tokens = np.concatenate([s.tokens for s in pack])
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
    assert checked > 50
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


def test_a_real_decoder_gives_a_packed_document_the_logits_it_has_alone(packed):
    packs, batch = packed
    torch.manual_seed(0)
    model = llama3_1(
        vocab_size=1000, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=16,
        intermediate_dim=32, max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():
        together = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
        assert together.isfinite().all()
        for row, pack in enumerate(packs[:3]):
            start = 0
            for s in pack:
                alone = model(torch.from_numpy(s.tokens).long()[None])[0]
                torch.testing.assert_close(
                    together[row, start : start + len(s.tokens)], alone, rtol=1e-4, atol=1e-5
                )
                start += len(s.tokens)


def test_packs_are_nearly_full_and_none_overflows():
    mixture = Mixture([group("a", 200, longest=32)], [1.0], seq_len=32, batch_size=4, seed=0)
    used = [sum(len(s.tokens) for s in pack) for pack in mixture.packs(0)]
    assert max(used) <= 32 and min(used) > 0
    # a new pack whenever the next sample does not fit the last one would give 0.75
    assert np.mean(used) > 0.9 * 32


def test_every_sample_of_the_first_dataset_is_seen_once_an_epoch():
    first, second = group("a", 150), group("b", 70, seed=1)
    mixture = Mixture([first, second], [0.6, 0.4], seq_len=32, batch_size=4, seed=0)
    for epoch in range(3):
        packs = mixture.packs(epoch)
        seen = Counter(name for name in names(packs) if name[0] == "a")
        assert seen == {s.name: 1 for s in first}
        batches = mixture.batches(epoch)
        assert {len(batch) for batch in batches} == {4}
        flat = [pack for batch in batches for pack in batch]
        assert flat == packs[: len(flat)] and 0 <= len(packs) - len(flat) < 4
    assert any(len(mixture.packs(e)) % 4 for e in range(3)), "no epoch here has an incomplete batch"


@pytest.mark.parametrize(
    "shares", [[0.7, 0.3], [0.49, 0.21, 0.3], [0.1, 0.9], [1 / 3, 1 / 3, 1 / 3]]
)
def test_shares_are_exact_to_one_sample(shares):
    groups = [group(prefix, 90, seed=i) for i, prefix in enumerate("abc"[: len(shares)])]
    mixture = Mixture(groups, shares, seq_len=32, batch_size=1, seed=0)
    for epoch in range(2):
        seen = Counter(name[0] for name in names(mixture.packs(epoch)))
        assert seen["a"] == 90
        for prefix, share in zip("abc", shares, strict=False):
            assert abs(seen[prefix] - share * 90 / shares[0]) <= 1


def test_the_mixture_is_mixed_not_one_dataset_after_the_other():
    mixture = Mixture([group("a", 200), group("b", 200, seed=1)], [0.5, 0.5], 32, 1, 0)
    order = [name[0] for name in names(mixture.packs(0))]
    half = Counter(order[: len(order) // 2])
    assert abs(half["a"] - half["b"]) < 60
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > 120


def test_other_datasets_go_on_with_their_passes_from_epoch_to_epoch():
    second = group("b", 50, seed=1)
    for share, count in ((0.2, 20), (0.6, 120)):  # less and more than a pass an epoch, of 50
        mixture = Mixture([group("a", 80), second], [1 - share, share], 32, 1, 0)
        seen: Counter[str] = Counter({s.name: 0 for s in second})
        for epoch in range(5):
            seen.update(name for name in names(mixture.packs(epoch)) if name[0] == "b")
            assert sum(seen.values()) == (epoch + 1) * count
            assert max(seen.values()) - min(seen.values()) <= 1  # no sample twice before all once
        assert min(seen.values()) == 5 * count // 50


def test_the_order_is_the_seeds_and_new_in_every_epoch():
    def order(seed: int, epoch: int) -> list[list[str]]:
        mixture = Mixture([group("a", 60), group("b", 30, seed=1)], [0.8, 0.2], 32, 2, seed)
        mixture.packs(3)  # asking for another epoch first changes nothing
        return [[s.name for s in pack] for batch in mixture.batches(epoch) for pack in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_overlong_samples_are_left_out_and_counted():
    rng = np.random.default_rng(0)
    exact, over = sample("exact", 32, rng), sample("over", 33, rng)
    mixture = Mixture(
        [[*group("a", 20), exact, over], [*group("b", 20), over]], [0.5, 0.5], 32, 1, 0
    )
    assert mixture.dropped == 2
    seen = names(mixture.packs(0))
    assert "exact" in seen and "over" not in seen and len(seen) == 42
    with pytest.raises(ValueError, match=r"dataset 1: none of its 1 samples .* at most seq_len=32"):
        Mixture([group("a", 20), [over]], [0.5, 0.5], 32, 1, 0)


def test_less_than_one_batch_is_refused():
    mixture = Mixture([group("a", 10)], [1.0], seq_len=32, batch_size=64, seed=0)
    with pytest.raises(
        ValueError, match=r"fills \d packs of 32 tokens.*batch of 64: lower batch_size"
    ):
        mixture.batches(0)


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
        {"id": f"s{i}", "codes": [i % 16, 16, 3], "text": "what", "seconds": 0.12,
         "extra": json.dumps({"kind": "question" if i % 2 else "phrase", "answer": "four"})}
        for i in range(20)
    ]  # fmt: skip
    stream = {"quantizer": QUANTIZER, "token_rate": 25.0, "codebooks": 1, "codebook_size": CODES}
    write(folder / "speech", shards.SPEECH, rows, stream)

    def turn(role: str, text: str) -> dict:
        return {"role": role, "segments": [{"text": text}]}

    texts = [
        {"id": f"t{i}", "turns": [turn("user", "hi"), turn("assistant", "yo")],
         "extra": json.dumps({"replayed": i < 5})}
        for i in range(10)
    ]  # fmt: skip
    write(folder / "texts", shards.CONVERSATIONS, texts, None)
    tokenizer = init_base.train_tokenizer(["one"], vocab_size=256)
    add_sound_tokens(tokenizer, CODES)
    tokenizer.save_pretrained(folder / "checkpoint")
    layout = {"start": 263, "end": 264, "first": 265, "codes": CODES, "quantizer": QUANTIZER}
    (folder / "checkpoint/config.json").write_text(
        json.dumps({"model_type": "llama", "speechfuse": layout})
    )
    return folder


def load(parts: Path, *specs: dict[str, Any], seq_len: int = 64) -> Mixture:
    return datasets.load(list(specs), parts / "checkpoint", seq_len, 1, 0)[1]


def speech(parts: Path, **changes: Any) -> dict[str, Any]:
    turns = {"_component_": "speechfuse.instructions.answer", "repeat_first": True}
    spec = {
        "_component_": "speechfuse.datasets.speech", "path": str(parts / "speech"), "turns": turns,
        "select": {"kind": "question"}, "share": 0.5,
    }  # fmt: skip
    return {**spec, **changes}


def texts(parts: Path, **changes: Any) -> dict[str, Any]:
    spec = {
        "_component_": "speechfuse.datasets.conversations", "path": str(parts / "texts"),
        "select": {"replayed": True}, "share": 0.5,
    }  # fmt: skip
    return {**spec, **changes}


def test_rows_on_disk_become_samples_and_select_chooses(parts):
    spoken, written = load(parts, speech(parts), texts(parts)).datasets
    assert [s.name for s in spoken] == [f"s{i}" for i in range(1, 20, 2)]
    assert [s.name for s in written] == [f"t{i}" for i in range(5)]
    assert spoken[0].tokens.dtype == np.int32 and spoken[0].targets.dtype == bool
    assert spoken[0].tokens[9:14].tolist() == [263, 266, 281, 268, 264]
    said = spoken[0].tokens[spoken[0].targets]
    assert len(said) == len("what\nfour") + 1 and said[-1] == 262
    (alone,) = load(
        parts,
        {"_component_": "speechfuse.datasets.sound", "path": str(parts / "speech"), "share": 1},
    ).datasets
    assert len(alone) == 20
    assert alone[2].tokens.tolist() == [256, 263, 267, 281, 268, 264, 257]
    assert alone[2].targets.tolist() == [False] + [True] * 6


def test_train_on_all_makes_every_token_but_the_first_a_target(parts):
    answers, everything = load(parts, texts(parts), texts(parts, train_on="all")).datasets
    for a, b in zip(answers, everything, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert b.targets.tolist() == [False] + [True] * (len(b.tokens) - 1)
        assert a.targets.sum() == len("yo") + 1
    with pytest.raises(ValueError, match="train_on='answer'"):
        load(parts, texts(parts, train_on="answer"))


def test_shares_are_relative_to_each_other(parts):
    for scale in (1, 0.5, 100):
        mixture = load(parts, speech(parts, share=0.8 * scale), texts(parts, share=0.4 * scale))
        assert mixture.counts == [10, 5]


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
