"""The plan of a training: which samples make up every step, known before the first.

In: the lengths of the samples of several datasets, and a share for each. Out: a folder of
memory-mapped files that says for every optimizer step which samples lie in which row, so that the
step alone is the data's position, whatever the number of ranks and wherever a run was stopped.

Samples come in fixed shares (shares count samples), exact to a sample or two at any place, each
dataset in shuffled passes of its own. A step takes as many as fill its packs, longest first into
the fullest pack that has room (best-fit decreasing); what finds no room, less than one pack, comes
first in the next step. torchtune's packer concatenates all samples in memory before the first step
(meta-pytorch/torchtune issues 1051 and 2180); this one reads lengths only.
"""

import json
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speechfuse import artifact

VERSION = 1
BLOCK = 1 << 16  # samples that are put in order at once
_DATASET_BITS = 40  # a sample is one integer: dataset << 40 | number


@dataclass(frozen=True)
class Shape:
    """`rows` of a step over all ranks, of `seq_len` tokens; not `packed`: one sample a row."""

    seq_len: int
    rows: int
    packed: bool = True


@dataclass(frozen=True)
class Counts:
    """Of the whole plan. `samples` and `dropped` (longer than seq_len) by dataset; `epoch_ends`:
    the steps, from 1, that complete a pass over the first dataset; the last step is always one."""

    steps: int = 0
    tokens: int = 0
    samples: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)


class Plan:
    """Rows of samples by step. A row is a list of (dataset, number)."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.counts = Counts(**json.loads((folder / "plan.json").read_text()))
        self._samples = np.memmap(folder / "samples", np.int64, "r")
        self._ends = np.memmap(folder / "ends", np.int64, "r")

    def rows(self, step: int) -> list[list[tuple[int, int]]]:
        """The rows of step `step`, counted from 0; some may be empty in the last one."""
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
    """The plan of `epochs` passes over the first dataset, or of `steps` steps where that is less,
    made in `folder` where it is not there yet. ValueError when the data does not fill one step."""
    if not (folder / "plan.json").exists():
        hidden = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        _write(lengths, shares, shape, epochs, steps, seed, hidden)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(hidden, folder)
    return Plan(folder, shape)


def _write(
    lengths: list[np.ndarray],
    shares: list[float],
    shape: Shape,
    epochs: int,
    steps: int | None,
    seed: int,
    folder: Path,
) -> None:
    fitting, dropped = [], []
    for i, each in enumerate(lengths):
        fits = np.flatnonzero(each <= shape.seq_len).astype(np.int32)
        if not len(fits):
            raise ValueError(
                f"dataset {i}: none of its {len(each)} samples has at most "
                f"seq_len={shape.seq_len} tokens"
                if len(each)
                else f"dataset {i}: its select keeps no row; set datasets.{i}.select=null, or "
                "select by what its rows have in extra"
            )
        fitting.append(fits)
        dropped.append(len(each) - len(fits))
    counts: dict[str, Any] = {
        "steps": 0,
        "tokens": 0,
        "samples": [0] * len(lengths),
        "dropped": dropped,
    }
    open_passes = [len(fitting[0])] * epochs
    ended: list[int] = []
    chosen = _stream(fitting, lengths, shares, epochs, seed)
    filled = _packed(chosen, shape) if shape.packed else _one_a_row(chosen, shape)
    total = 0
    with open(folder / "samples", "wb") as samples, open(folder / "ends", "wb") as ends:
        for rows in tqdm(filled, desc="plan", unit="step", total=steps, delay=2):
            # the longest packs must not all be one rank's
            order = np.random.default_rng([seed, counts["steps"]]).permutation(len(rows))
            for row in (rows[i] for i in order):
                np.array([s.place for s in row], np.int64).tofile(samples)
                total += len(row)
                np.array([total], np.int64).tofile(ends)
                for sample in row:
                    counts["samples"][sample.place >> _DATASET_BITS] += 1
                    counts["tokens"] += sample.length
                    if sample.turn >= 0:
                        open_passes[sample.turn] -= 1
            counts["steps"] += 1
            while (done := len(ended)) < epochs and not open_passes[done]:
                ended.append(counts["steps"])
            if counts["steps"] == 1 and not all(rows):
                raise ValueError(
                    f"the data fills {sum(map(bool, rows))} rows of {shape.seq_len} tokens, less "
                    f"than one batch of {shape.rows}: lower batch_size or seq_len, or add data"
                )
            if counts["steps"] == steps:
                break
    ended = ended[: epochs - 1]  # other datasets may have samples left after the last pass
    if not ended or ended[-1] < counts["steps"]:
        ended.append(counts["steps"])
    counts["epoch_ends"] = ended
    artifact.write_json(folder / "plan.json", asdict(Counts(**counts)))


@dataclass(frozen=True, slots=True)
class _Sample:
    length: int
    place: int  # dataset << 40 | number
    turn: int  # which pass over the first dataset; -1 for samples of the others


def _stream(
    fitting: list[np.ndarray],
    lengths: list[np.ndarray],
    shares: list[float],
    epochs: int,
    seed: int,
) -> Iterator[_Sample]:
    """All samples in order. The k-th of a dataset with share s comes at time (k + 1/2) / s: at any
    time each dataset is within half a sample of its share."""
    horizon = epochs * len(fitting[0]) / shares[0]
    orders: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int32))] * len(fitting)
    for start in range(0, int(np.ceil(horizon)), BLOCK):
        end = min(float(start + BLOCK), horizon)
        times, places, sizes, turns = [], [], [], []
        for dataset, share in enumerate(shares):
            first, last = (int(np.ceil(time * share - 0.5)) for time in (start, end))
            positions = np.arange(first, last)
            turn, at = np.divmod(positions, len(fitting[dataset]))
            numbers = np.empty(len(positions), np.int64)
            for each in np.unique(turn):
                if orders[dataset][0] != each:
                    shuffled = np.random.default_rng([seed, dataset, each]).permutation(
                        fitting[dataset]
                    )
                    orders[dataset] = int(each), shuffled
                numbers[turn == each] = orders[dataset][1][at[turn == each]]
            times.append((positions + 0.5) / share)
            places.append(numbers + (dataset << _DATASET_BITS))
            sizes.append(lengths[dataset][numbers])
            turns.append(turn if dataset == 0 else np.full(len(turn), -1))
        order = np.argsort(np.concatenate(times), kind="stable")
        block = (np.concatenate(each)[order].tolist() for each in (sizes, places, turns))
        yield from map(_Sample, *block)


def _one_a_row(samples: Iterator[_Sample], shape: Shape) -> Iterator[list[list[_Sample]]]:
    """Steps of one sample a row."""
    rows: list[list[_Sample]] = []
    for sample in samples:
        rows.append([sample])
        if len(rows) == shape.rows:
            yield rows
            rows = []
    if rows:
        yield rows + [[] for _ in range(shape.rows - len(rows))]


def _packed(samples: Iterator[_Sample], shape: Shape) -> Iterator[list[list[_Sample]]]:
    """Steps of packs."""
    waiting: list[_Sample] = []
    while True:
        packs: list[list[_Sample]] = [[] for _ in range(shape.rows)]
        room = [(shape.seq_len, pack) for pack in range(shape.rows)]
        left = shape.rows * shape.seq_len - sum(sample.length for sample in waiting)
        taken = []
        while left > 0 and (sample := next(samples, None)):
            taken.append(sample)
            left -= sample.length
        # those that waited go first, or the shortest, which go last, might wait for ever
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
    """Put samples into packs; `room` is (tokens left, pack), sorted. Returns what finds no room."""
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
