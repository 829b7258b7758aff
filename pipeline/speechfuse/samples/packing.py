"""The plan of a training: which samples make up every step, known before the first.

In: the lengths of the samples of several datasets, and a share for each. Out: a folder of
memory-mapped files that says for every optimizer step which samples lie in which row, so that the
step alone is the data's position, whatever the number of ranks and wherever a run was stopped.

The datasets are mixed in fixed shares of the samples (not of the tokens): up to any place in the
order, each dataset's number of samples is exact to one or two. Each dataset is read in passes of
its own, and each pass is shuffled. A step takes samples until their tokens would fill its rows, and
puts them, longest first, each into the fullest row that has room for it (best-fit decreasing).
Samples that fit no row wait for the next step, which places them first; while they have fewer
tokens than a row, the step takes further samples for the room that is left. An example: one dataset
of three samples of 5, 3 and 4 tokens, in steps of two rows of 8 tokens:

    sample 0 (5 tokens)   into row 0, 3 left
    sample 2 (4 tokens)   only row 1 has room, 4 left
    sample 1 (3 tokens)   fits both; row 0 is the fuller one

    the plan of step 0    [[(0, 0), (0, 1)], [(0, 2)]]     rows of (dataset, number)
    on disk               samples = [0, 1, 2], ends = [2, 3], counts.json = {"steps": 1, ...}

samples.view.collate shows the batch that these rows become. The rows of a step are then shuffled,
so that the longest samples do not all go to one rank.

torchtune's packer concatenates all samples in memory before the first step (meta-pytorch/torchtune
issues 1051 and 2180); this one reads lengths only.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speechfuse import artifact, failures

VERSION = 1
BLOCK = 1 << 16  # samples that are put in order at once
_DATASET_BITS = 40  # a sample is one integer: dataset << 40 | number


@dataclass(frozen=True)
class Shape:
    """A step has `rows` rows, on all ranks together, of `seq_len` tokens each. If not `packed`, a
    row holds one sample."""

    seq_len: int
    rows: int
    packed: bool = True


@dataclass(frozen=True)
class Counts:
    """Totals of a plan. `samples` (placed in rows) and `dropped` (longer than seq_len) have a
    number for each dataset. `epoch_ends` are the steps, counted from 1, that complete a pass over
    the first dataset; the plan's last step is always the last of them."""

    steps: int
    tokens: int
    samples: list[int]
    dropped: list[int]
    epoch_ends: list[int]


class Plan:
    """Rows of samples by step. A row is a list of (dataset, number)."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.counts = Counts(**json.loads((folder / "counts.json").read_text()))
        self._samples = np.memmap(folder / "samples", np.int64, "r")
        self._ends = np.memmap(folder / "ends", np.int64, "r")

    def identity(self) -> dict[str, Any]:
        """Return what a run keeps of the plan, to go on with no other one."""
        parts = (self._ends, self._samples)
        return {
            "packing": VERSION,
            "rows": [hashlib.sha256(each.data).hexdigest() for each in parts],
        }

    def rows(self, step: int) -> list[list[tuple[int, int]]]:
        """Return the rows of `step`, counted from 0, each a list of (dataset, number). In the last
        step some rows may be empty."""
        first = step * self.shape.rows
        ends = self._ends[first : first + self.shape.rows].tolist()
        starts = [int(self._ends[first - 1]) if first else 0, *ends[:-1]]
        return [
            [divmod(int(s), 1 << _DATASET_BITS) for s in self._samples[start:end]]
            for start, end in zip(starts, ends, strict=True)
        ]


def make(
    lengths: list[np.ndarray],
    shares: list[float],
    shape: Shape,
    epochs: int,
    steps: int | None,
    seed: int,
    folder: Path,
) -> Plan:
    """Return the plan of `epochs` passes over the first dataset, or of `steps` steps where that is
    less. The plan is written to `folder`, counts.json last, unless that is there already.

    `lengths` has the tokens of each dataset's samples, int32 (samples,); `shares` add up to 1.
    Raises ValueError for a dataset without a sample that fits a row, and when the first step has an
    empty row.
    """
    if (folder / "counts.json").exists():
        return Plan(folder, shape)
    folder.mkdir(parents=True, exist_ok=True)
    fitting = [_fitting(i, each, shape.seq_len) for i, each in enumerate(lengths)]
    samples = _stream(fitting, lengths, shares, epochs, seed)
    packs = _packed(samples, shape) if shape.packed else _one_a_row(samples, shape)
    counted, tokens, step = [0] * len(lengths), 0, 0
    left_of_pass = [len(fitting[0])] * epochs
    pass_ends: list[int] = []
    with (
        failures.writing(folder),
        open(folder / "samples", "wb") as places,
        open(folder / "ends", "wb") as ends,
    ):
        for step, rows in enumerate(tqdm(packs, desc="plan", unit="step", total=steps, delay=2), 1):
            if step == 1 and not all(rows):
                raise ValueError(
                    f"the data fills {sum(map(bool, rows))} rows of {shape.seq_len} tokens, less "
                    f"than one batch of {shape.rows}: lower batch_size or seq_len, or add data"
                )
            order = np.random.default_rng([seed, step - 1]).permutation(len(rows))
            for row in (rows[i] for i in order):
                for sample in row:
                    counted[sample.place >> _DATASET_BITS] += 1
                    tokens += sample.length
                    if sample.turn >= 0:
                        left_of_pass[sample.turn] -= 1
                places.write(np.array([sample.place for sample in row], np.int64).tobytes())
                ends.write(np.array([sum(counted)], np.int64).tobytes())
            while len(pass_ends) < epochs and not left_of_pass[len(pass_ends)]:
                pass_ends.append(step)
            if step == steps:
                break
    # other datasets may have samples left after the last pass
    epoch_ends = pass_ends[: epochs - 1]
    if not epoch_ends or epoch_ends[-1] < step:
        epoch_ends.append(step)
    dropped = [len(each) - len(fits) for each, fits in zip(lengths, fitting, strict=True)]
    counts = Counts(step, tokens, counted, dropped, epoch_ends)
    artifact.write_json(folder / "counts.json", asdict(counts))
    return Plan(folder, shape)


def _fitting(dataset: int, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the numbers of the samples that fit a row, int32 (n,). Raises ValueError for none."""
    if not len(lengths):
        raise ValueError(
            f"dataset {dataset}: its select keeps no row; set datasets.{dataset}.select=null, or "
            "select by a column of its rows or a key of their extra"
        )
    fits = np.flatnonzero(lengths <= seq_len).astype(np.int32)
    if not len(fits):
        raise ValueError(
            f"dataset {dataset}: none of its {len(lengths)} samples has at most "
            f"seq_len={seq_len} tokens"
        )
    return fits


@dataclass(frozen=True, slots=True)
class _Sample:
    length: int
    place: int  # dataset << 40 | number
    turn: int  # number of the pass over the first dataset; -1 for samples of the others


def _stream(
    fitting: list[np.ndarray],
    lengths: list[np.ndarray],
    shares: list[float],
    epochs: int,
    seed: int,
) -> Iterator[_Sample]:
    """Yield all samples in the order of their times. Sample k (from 0) of a dataset with share s
    has the time (k + 1/2) / s, so at any time t each dataset is within half a sample of s * t."""
    horizon = epochs * len(fitting[0]) / shares[0]

    @lru_cache(maxsize=len(fitting))
    def order_of(dataset: int, turn: int) -> np.ndarray:
        return np.random.default_rng([seed, dataset, turn]).permutation(fitting[dataset])

    for start in range(0, int(np.ceil(horizon)), BLOCK):
        end = min(float(start + BLOCK), horizon)
        times, places, sizes, turns = [], [], [], []
        for dataset, share in enumerate(shares):
            first, last = (int(np.ceil(time * share - 0.5)) for time in (start, end))
            positions = np.arange(first, last)
            turn, at = np.divmod(positions, len(fitting[dataset]))
            numbers = np.empty(len(positions), np.int64)
            for each in np.unique(turn):
                numbers[turn == each] = order_of(dataset, int(each))[at[turn == each]]
            times.append((positions + 0.5) / share)
            places.append(numbers + (dataset << _DATASET_BITS))
            sizes.append(lengths[dataset][numbers])
            turns.append(turn if dataset == 0 else np.full(len(turn), -1))
        order = np.argsort(np.concatenate(times), kind="stable")
        block = (np.concatenate(each)[order].tolist() for each in (sizes, places, turns))
        yield from map(_Sample, *block)


def _one_a_row(samples: Iterator[_Sample], shape: Shape) -> Iterator[list[list[_Sample]]]:
    """Yield the rows of each step, with one sample a row; the last step may have empty rows."""
    while rows := [[sample] for sample in islice(samples, shape.rows)]:
        yield rows + [[] for _ in range(shape.rows - len(rows))]


def _packed(samples: Iterator[_Sample], shape: Shape) -> Iterator[list[list[_Sample]]]:
    """Yield the rows of each step, packed by best-fit decreasing."""
    waiting: list[_Sample] = []
    while True:
        packs: list[list[_Sample]] = [[] for _ in range(shape.rows)]
        room = [(shape.seq_len, pack) for pack in range(shape.rows)]
        left = shape.rows * shape.seq_len - sum(sample.length for sample in waiting)
        taken = []
        while left > 0 and (sample := next(samples, None)):
            taken.append(sample)
            left -= sample.length
        # waiting samples go first: else the shortest, which are placed last, might wait for ever
        waiting = _fill(packs, room, waiting) + _fill(packs, room, taken)
        size = sum(sample.length for sample in waiting)
        while room[-1][0] and size < shape.seq_len and (sample := next(samples, None)):
            if rest := _fill(packs, room, [sample]):
                waiting += rest
                size += sample.length
        if not any(packs):
            return
        yield packs


def _fill(
    packs: list[list[_Sample]], room: list[tuple[int, int]], samples: list[_Sample]
) -> list[_Sample]:
    """Put samples into `packs`, longest first, and update `room`, the sorted list of (tokens left,
    pack). Returns the samples that fit no pack."""
    rest = []
    for sample in sorted(samples, key=lambda each: -each.length):
        at = bisect_left(room, (sample.length,))
        if at == len(room):
            rest.append(sample)
            continue
        left, pack = room.pop(at)
        packs[pack].append(sample)
        insort(room, (left - sample.length, pack))
    return rest
