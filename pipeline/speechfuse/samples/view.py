"""What a row becomes, and how rows become a batch: the seam between data and model.

In: rows of a dataset. Out: a Sample of each row, and a batch of many Samples. A recipe's dataset
entry names a function that makes a View; the index, packing and the loop need to know nothing else
of the dataset.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from speechfuse.rows.selection import matches
from speechfuse.tokens.vocabulary import SoundLayout

IGNORE = -100  # torch's cross-entropy leaves these labels out
PADDING = -1  # in `document`, for the tokens that fill a row up


@dataclass(frozen=True)
class Sample:
    """`tokens` is int32 (n,); `targets`, bool (n,), says which of them the model is to predict.
    `goes_on`: its turns follow those of the sample before it in a row, in one conversation."""

    name: str
    tokens: np.ndarray
    targets: np.ndarray
    goes_on: bool = field(default=False, kw_only=True)

    def going_on(self, begin: int) -> Self:
        """Return the sample as one that goes on, without the token `begin` of a conversation."""
        own = int(self.tokens[0] == begin)
        return replace(self, tokens=self.tokens[own:], targets=self.targets[own:], goes_on=True)


def collate(
    rows: list[list[Sample]], length: int, pad: int, layout: SoundLayout | None
) -> dict[str, Tensor]:
    """Return the batch of the samples in each of `rows`: {tokens, labels, input_pos, document:
    int64, sound: bool}, each of shape (rows, length). The token id `pad` fills rows up.

    The label at t is the token at t + 1 if that is a target of the same sample, else IGNORE.
    Positions (`input_pos`) restart with each sample, `document` numbers the samples of a row (one
    that goes on has the number of that before it, and its positions follow), and `sound` is true
    where the label is a sound token of `layout`. An example: three samples a, b and
    c of 5, 3 and 4 tokens, packed as [[a, b], [c]] into two rows of length 8, with pad=0. In a
    sample every token but the first is a target:

        a = 11 12 13 14 15    b = 21 22 23    c = 31 32 33 34

        tokens     11   12   13   14   15   21   22   23    31   32   33   34    0    0    0    0
        labels     12   13   14   15 -100   22   23 -100    32   33   34 -100 -100 -100 -100 -100
        input_pos   0    1    2    3    4    0    1    2     0    1    2    3    0    0    0    0
        document    0    0    0    0    0    1    1    1     0    0    0    0   -1   -1   -1   -1
    """
    tokens = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORE)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    document = torch.full((len(rows), length), PADDING)
    for number, row in enumerate(rows):
        start = first = 0
        for i, sample in enumerate(row):
            first = first if sample.goes_on else start
            end = start + len(sample.tokens)
            ids = torch.from_numpy(sample.tokens).long()
            no_target = ~torch.from_numpy(sample.targets[1:])
            tokens[number, start:end] = ids
            labels[number, start : end - 1] = ids[1:].masked_fill(no_target, IGNORE)
            positions[number, start:end] = torch.arange(start - first, end - first)
            document[number, start:end] = document[number, first] if sample.goes_on else i
            start = end
    sound_ids = range(0) if layout is None else layout.ids
    sound = (labels >= sound_ids.start) & (labels < sound_ids.stop)
    batch = {"tokens": tokens, "labels": labels, "input_pos": positions, "document": document}
    return batch | {"sound": sound}


Collate = Callable[[list[list[Sample]], int, int, SoundLayout | None], dict[str, Tensor]]


@dataclass(frozen=True)
class View:
    """A dataset as a training sees it.

    path     folder of a complete dataset
    select   {key: value, or a list of values}: the rows that belong to it, see rows.selection
    render   returns the Sample of a row, or None for a row that gives none; raises ValueError
             for a broken row
    collate  makes a batch of (samples by row, length, pad, layout); it is the same for all views
             of a recipe, because a row of the batch may hold samples of several views
    at_step  returns a rendered sample as it is in a step (from 0) of the training; None: always
             the same
    """

    path: Path
    select: dict[str, Any]
    render: Callable[[dict[str, Any]], Sample | None]
    collate: Collate = collate
    at_step: Callable[[Sample, int], Sample] | None = None

    def selects(self, row: dict[str, Any]) -> bool:
        """Return whether `row` belongs to the view. Parses the JSON of row["extra"] in place."""
        row["extra"] = json.loads(row["extra"] or "{}")
        return matches(row, self.select)
