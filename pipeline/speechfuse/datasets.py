"""Samples, mixture and packing: from rows on disk to the batches of every optimizer step.

In: datasets of rows with a share each. Out: for any step, the same batch {tokens, labels,
input_pos, mask} whatever the number of ranks: batches are a pure function of (seed, step), so the
step alone is the data's position. Here codes become vocabulary ids.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechfuse import config, prompts, shards
from speechfuse.vocab import Vocabulary, check_quantizer

OPEN_PACKS = 16  # more would fill packs better, and mix samples over a longer stretch of the epoch
IGNORE = -100  # torch's cross-entropy leaves these labels out


@dataclass(frozen=True)
class Sample:
    """`tokens` int32 (n,); `targets` bool (n,): which tokens the model is to predict."""

    name: str
    tokens: np.ndarray
    targets: np.ndarray


def _selected(path: str, select: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    for row in shards.read_rows(Path(path)):
        row["extra"] = json.loads(row["extra"] or "{}")
        if all(row["extra"].get(key) == value for key, value in (select or {}).items()):
            yield row


def _samples(
    rows: Iterable[dict[str, Any]],
    render: Callable[[dict[str, Any]], tuple[list[int], list[bool]]],
    train_on: str,
) -> list[Sample]:
    if train_on not in ("answers", "all"):
        raise ValueError(f"train_on={train_on!r}: choose answers or all")
    samples = []
    for row in rows:
        tokens, targets = render(row)
        if train_on == "all":
            targets = [False] + [True] * (len(tokens) - 1)
        samples.append(Sample(row["id"], np.array(tokens, np.int32), np.array(targets)))
    return samples


def sound(vocabulary: Vocabulary, path: str, select: dict[str, Any] | None = None) -> list[Sample]:
    """Stage 1: every row's codes alone, all of them targets."""
    rows = _selected(path, select)
    return _samples(rows, lambda row: prompts.render_sound(vocabulary, row["codes"]), "answers")


def speech(
    vocabulary: Vocabulary,
    path: str,
    turns: dict[str, Any],
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
) -> list[Sample]:
    """Speech rows made into conversations by `turns` (a function of speechfuse.instructions). Rows
    without a transcript (pieces of a split recording) are left out, which is said."""

    rows = list(_selected(path, select))
    spoken = [row for row in rows if row["text"] is not None]
    if len(spoken) < len(rows):
        print(f"{path}: {len(rows) - len(spoken)} rows without a transcript are left out")

    def render(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        return prompts.render(vocabulary, config.instantiate(turns, row=row))

    return _samples(spoken, render, train_on)


def conversations(
    vocabulary: Vocabulary,
    path: str,
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
) -> list[Sample]:
    """Rows that are conversations already: text replay, and the text training of a base model."""
    rows = _selected(path, select)
    return _samples(rows, lambda row: prompts.render(vocabulary, row["turns"]), train_on)


class Mixture:
    """Samples of several datasets in fixed shares, packed.

    An epoch sees every sample of the first dataset once; the others give what their share asks for,
    in shuffled passes of their own that go on from epoch to epoch. Samples longer than `seq_len`
    are left out and counted in `dropped`; packs that do not fill the last batch of an epoch are
    left out of it.
    """

    def __init__(
        self,
        datasets: list[list[Sample]],
        shares: list[float],
        seq_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.datasets = [[s for s in group if len(s.tokens) <= seq_len] for group in datasets]
        self.dropped = sum(map(len, datasets)) - sum(map(len, self.datasets))
        for i, group in enumerate(self.datasets):
            if not group:
                raise ValueError(
                    f"dataset {i}: none of its {len(datasets[i])} samples has at most "
                    f"seq_len={seq_len} tokens"
                    if datasets[i]
                    else f"dataset {i}: its select keeps no row; set datasets.{i}.select=null, or "
                    "select by what its rows have in extra"
                )
        total = len(self.datasets[0]) / shares[0]
        self.counts = [len(self.datasets[0]), *(round(share * total) for share in shares[1:])]

    def _stream(self, dataset: int, start: int, count: int) -> Iterator[Sample]:
        samples, order, current = self.datasets[dataset], [], -1
        for position in range(start, start + count):
            turn, index = divmod(position, len(samples))
            if turn != current:
                current, order = turn, list(range(len(samples)))
                random.Random(f"{self.seed}/{dataset}/{turn}").shuffle(order)
            yield samples[order[index]]

    def packs(self, epoch: int) -> list[list[Sample]]:
        """All packs of an epoch: each sample goes into the first of the last few open packs that
        has room for it."""
        chosen = [
            sample
            for i, count in enumerate(self.counts)
            for sample in self._stream(i, epoch * count, count)
        ]
        random.Random(f"{self.seed}/{epoch}").shuffle(chosen)
        closed: list[list[Sample]] = []
        packs: list[list[Sample]] = []
        room: list[int] = []
        for sample in chosen:
            length = len(sample.tokens)
            i = next((i for i, left in enumerate(room) if left >= length), len(room))
            if i == len(room):
                if len(room) == OPEN_PACKS:
                    closed.append(packs.pop(0))
                    room.pop(0)
                packs.append([])
                room.append(self.seq_len)
                i = len(room) - 1
            packs[i].append(sample)
            room[i] -= length
        return closed + packs

    def batches(self, epoch: int) -> list[list[list[Sample]]]:
        """The steps of an epoch, each `batch_size` packs. ValueError when there is not one full
        batch."""
        packs = self.packs(epoch)
        full = len(packs) // self.batch_size
        if full == 0:
            raise ValueError(
                f"the data fills {len(packs)} packs of {self.seq_len} tokens, less than one batch "
                f"of {self.batch_size}: lower batch_size or seq_len, or add data"
            )
        return [packs[i * self.batch_size : (i + 1) * self.batch_size] for i in range(full)]


def collate(
    packs: list[list[Sample]], seq_len: int, pad: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Packs -> {tokens, labels, input_pos: (packs, seq_len), mask: (packs, seq_len, seq_len) bool}.

    Positions restart with each sample, attention stays inside it, and no label crosses into the
    next: label t is token t + 1 where that is a target of the same sample.
    """
    tokens = torch.full((len(packs), seq_len), pad)
    labels = torch.full((len(packs), seq_len), IGNORE)
    positions = torch.zeros((len(packs), seq_len), dtype=torch.long)
    document = torch.full((len(packs), seq_len), -1)
    for row, pack in enumerate(packs):
        start = 0
        for i, sample in enumerate(pack):
            end = start + len(sample.tokens)
            ids = torch.from_numpy(sample.tokens).long()
            tokens[row, start:end] = ids
            labels[row, start : end - 1] = ids[1:].masked_fill(
                ~torch.from_numpy(sample.targets[1:]), IGNORE
            )
            positions[row, start:end] = torch.arange(end - start)
            document[row, start:end] = i
            start = end
    same = document[:, :, None] == document[:, None, :]
    mask = same & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    batch = {"tokens": tokens, "labels": labels, "input_pos": positions, "mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def load(
    specs: list[dict[str, Any]], checkpoint: Path, seq_len: int, batch_size: int, seed: int
) -> tuple[Vocabulary, Mixture]:
    """The mixture that a recipe's `datasets` describe: entries {_component_, path, share, ...}.

    ValueError when codes were made with another quantizer than `checkpoint` knows, and for shares
    that are not positive.
    """
    vocabulary = Vocabulary.load(checkpoint)
    groups, shares = [], []
    for spec in specs:
        share = spec.get("share")
        if "path" not in spec or not isinstance(share, int | float) or share <= 0:
            raise ValueError(f"datasets entry {spec}: it needs a path and a share above 0")
        stream = shards.read_stream(Path(spec["path"]))
        if stream:
            check_quantizer(checkpoint, stream["quantizer"], spec["path"])
        arguments = {key: value for key, value in spec.items() if key != "share"}
        groups.append(config.instantiate(arguments, vocabulary=vocabulary))
        shares.append(share)
    total = sum(shares)
    return vocabulary, Mixture(groups, [s / total for s in shares], seq_len, batch_size, seed)
