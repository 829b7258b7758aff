"""The plan: every sample once a pass, shares exact at every step, packs nearly full."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from speechfuse.samples import packing
from speechfuse.samples.packing import Plan, Shape

LENGTHS = [
    np.random.default_rng(0).integers(3, 13, 150).astype(np.int32),
    np.random.default_rng(1).integers(3, 13, 70).astype(np.int32),
    np.random.default_rng(2).integers(3, 30, 40).astype(np.int32),
]
SHARES = [0.5, 0.3, 0.2]


def plan(folder: Path, lengths=LENGTHS, shares=SHARES, **changes) -> Plan:
    values = {"shape": Shape(32, 4), "epochs": 3, "steps": None, "seed": 0} | changes
    return packing.make(lengths, shares[: len(lengths)], folder=folder / "plan", **values)


def steps(made: Plan) -> list[list[list[tuple[int, int]]]]:
    return [made.rows(step) for step in range(made.counts.steps)]


def flat(made: Plan) -> list[tuple[int, int]]:
    return [sample for rows in steps(made) for row in rows for sample in row]


@pytest.mark.parametrize("packed", [True, False])
def test_every_sample_of_the_first_dataset_comes_once_in_every_pass(tmp_path, packed):
    made = plan(tmp_path, shape=Shape(32, 4, packed))
    seen = Counter(flat(made))
    assert {n for d, n in seen if d == 0} == set(range(150))
    assert {count for (d, _), count in seen.items() if d == 0} == {3}
    for dataset, (size, total) in enumerate(zip((150, 70, 40), (450, 270, 180), strict=True)):
        of = [count for (d, _), count in seen.items() if d == dataset]
        assert sum(of) == total == made.counts.samples[dataset]
        # no sample again before all others have been there
        assert len(of) == size and max(of) - min(of) <= 1
    assert made.counts.tokens == sum(LENGTHS[d][n] for d, n in flat(made))


def test_epochs_end_where_the_passes_of_the_first_dataset_are_complete(tmp_path):
    made = plan(tmp_path)
    last = {}
    seen: Counter[int] = Counter()
    for step, rows in enumerate(steps(made), 1):
        for d, n in (sample for row in rows for sample in row):
            if d == 0:
                seen[n] += 1
                last[seen[n]] = step
    assert made.counts.epoch_ends[:2] == [last[1], last[2]]
    assert made.counts.epoch_ends[2] == made.counts.steps >= last[3]


def test_rows_have_at_most_seq_len_tokens_and_little_padding(tmp_path):
    made = plan(tmp_path)
    used = [[sum(LENGTHS[d][n] for d, n in row) for row in rows] for rows in steps(made)]
    assert max(map(max, used)) <= 32 and all(len(row) == 4 for row in used)
    assert all(min(row) > 0 for row in used[:-1]), "only the last step may have empty rows"
    assert np.mean(used[:-1]) > 0.97 * 32
    single = plan(tmp_path / "plain", shape=Shape(32, 4, packed=False))
    assert all(len(row) == 1 for rows in steps(single)[:-1] for row in rows)


@pytest.mark.parametrize("packed", [True, False])
def test_shares_are_exact_to_less_than_a_pack_at_every_step(tmp_path, packed):
    lengths = [np.tile(each, 20) for each in LENGTHS]
    made = plan(tmp_path, lengths, shape=Shape(256, 3, packed), epochs=1)
    shortest_pack = 256 // 3  # samples of a pack at most
    seen: Counter[int] = Counter()
    assert made.counts.steps > 20
    for rows in steps(made):
        seen.update(d for row in rows for d, _ in row)
        total = sum(seen.values())
        for dataset, share in enumerate(SHARES):
            assert abs(seen[dataset] - share * total) <= (shortest_pack / 4 if packed else 2)


def test_shares_of_a_hundred_thousand_samples_are_within_a_thousandth(tmp_path):
    lengths = [np.full(n, n % 31 + 3, np.int32) for n in (70_000, 11, 9_000)]
    made = plan(tmp_path, lengths, [0.7, 0.03, 0.27], shape=Shape(512, 8), epochs=1)
    found = np.array(made.counts.samples) / sum(made.counts.samples)
    assert sum(made.counts.samples) == 100_000
    assert np.abs(found - [0.7, 0.03, 0.27]).max() < 0.001


def test_order_is_the_seeds_and_another_in_every_pass(tmp_path):
    first, again, other = (
        plan(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert steps(first) == steps(again) != steps(other)
    order = [n for d, n in flat(first) if d == 0]
    assert sorted(order[:150]) != order[:150] and order[:100] != order[150:250]


def test_datasets_are_mixed_in_every_step_and_long_samples_among_ranks(tmp_path):
    made = plan(tmp_path, shape=Shape(32, 8))
    for rows in steps(made)[:-1]:
        assert {d for row in rows for d, _ in row} == {0, 1, 2}
    halves = np.array(
        [[sum(len(row) for row in rows[half::2]) for half in (0, 1)] for rows in steps(made)[:-1]]
    )
    assert abs(np.diff(halves.sum(0))) < 0.1 * halves.sum()


def test_a_plan_may_end_after_so_many_steps(tmp_path):
    whole, cut = plan(tmp_path / "whole"), plan(tmp_path / "cut", steps=5)
    assert steps(cut) == steps(whole)[:5] and cut.counts.epoch_ends == [5]
    end = whole.counts.epoch_ends[0]
    assert plan(tmp_path / "end", steps=end).counts.epoch_ends == [end]
    past = end + 1
    assert plan(tmp_path / "past", steps=past).counts.epoch_ends == [past - 1, past]


def test_too_long_samples_are_left_out_and_counted_by_dataset(tmp_path):
    made = plan(tmp_path, shape=Shape(12, 4))
    over = [int((each > 12).sum()) for each in LENGTHS]
    assert made.counts.dropped == over and over[2] > 5
    assert all(LENGTHS[d][n] <= 12 for d, n in flat(made))
    with pytest.raises(ValueError, match=r"dataset 1: none of its 2 samples .* seq_len=32"):
        plan(tmp_path / "none", [LENGTHS[0], np.array([33, 40], np.int32)])


def test_less_than_one_step_is_refused_and_leaves_no_plan(tmp_path):
    for _ in range(2):  # what the first attempt left is not taken for a plan
        with pytest.raises(ValueError, match=r"fills \d+ rows of 32 tokens, .* batch of 400"):
            plan(tmp_path, shape=Shape(32, 400), epochs=1)
    assert not (tmp_path / "plan/counts.json").exists()


def test_a_plan_whose_writing_was_stopped_is_written_again(tmp_path):
    whole = plan(tmp_path / "whole")
    plan(tmp_path / "cut")
    (tmp_path / "cut/plan/counts.json").unlink()
    (tmp_path / "cut/plan/samples").write_bytes(b"half")
    assert steps(plan(tmp_path / "cut")) == steps(whole)


def test_the_example_of_the_module(tmp_path):
    made = plan(tmp_path, [np.array([5, 3, 4], np.int32)], [1.0], shape=Shape(8, 2), epochs=1)
    assert steps(made) == [[[(0, 0), (0, 1)], [(0, 2)]]]
    for name, values in (("samples", [0, 1, 2]), ("ends", [2, 3])):
        assert np.fromfile(tmp_path / "plan" / name, np.int64).tolist() == values


def test_a_plan_is_made_once_and_then_opened(tmp_path, monkeypatch):
    first = steps(plan(tmp_path))
    monkeypatch.setattr(packing, "_stream", None)
    assert steps(plan(tmp_path)) == first
