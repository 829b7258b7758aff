"""The first values of new rows of an embedding or a head, before anything has trained them.

In: the rows that are there, the quantizer's codebook and a source of chance. Out: rows for
sound_start, sound_end, every code and the mask code, in this order. Chosen by dotted path, as
`initialize` of expand_vocab. Every choice here takes memory for a block of old rows at a time, and
gives the same bytes with any number of threads (see `new_rows`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from speechfuse import config

BLOCK = 16_384  # old rows in float32 at a time


@dataclass(frozen=True)
class NewRowContext:
    """What a choice may use. `rows`: the old ones (n, width), of any dtype; `codes`: how many,
    without the mask code; `codebook`: their vectors (codes, dim), None where they are not known;
    `std`: of the model's own initialisation; `chance`: all that is drawn is drawn from it."""

    rows: Tensor
    codes: int
    codebook: Tensor | None
    std: float
    chance: torch.Generator

    @property
    def count(self) -> int:
        """How many rows are new."""
        return self.codes + 3

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def draw(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=self.chance)

    @cached_property
    def mean(self) -> Tensor:
        """Of the old rows, (width)."""
        total = torch.zeros(self.width, dtype=torch.float64)
        for block in self.rows.split(BLOCK):
            total += block.sum(0, dtype=torch.float64)
        return (total / len(self.rows)).float()

    def covariance_noise(self, count: int) -> Tensor:
        """So many rows drawn with mean 0 and the covariance of the old ones: random mixtures of
        them, so that the covariance itself, and its root, need not be computed."""
        total = torch.zeros(count, self.width)
        for block in self.rows.split(BLOCK):
            total += self.draw(count, len(block)) @ (block.float() - self.mean)
        return total / len(self.rows) ** 0.5


def normal(given: NewRowContext) -> Tensor:
    """As the rows of an untrained model: mean 0, the standard deviation `initializer_range` of
    config.json. Transformers did this before 4.46, and so the original."""
    return given.draw(given.count, given.width) * given.std


def mean(given: NewRowContext) -> Tensor:
    """All the mean of the old rows."""
    return given.mean.repeat(given.count, 1)


def mean_and_covariance(given: NewRowContext, scale: float = 1e-9) -> Tensor:
    """Drawn from the mean and `scale` times the covariance of the old rows (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    The default is that of transformers: the rows then differ from their mean by 3e-5 of the old
    rows' spread, which bfloat16 mostly rounds away. 1.0 spreads them as the old rows are spread.
    """
    if not scale > 0:
        raise ValueError(f"initialize.scale={scale}: it must be above 0; for no spread choose mean")
    return given.mean + scale**0.5 * given.covariance_noise(given.count)


def codebook(given: NewRowContext) -> Tensor:
    """Codes as their vectors in the quantizer's codebook, through one random projection, so that
    codes that are near in it begin near; with the mean and covariance of the old rows on average.
    The other three rows are drawn from mean and covariance."""
    if given.codebook is None:
        raise ValueError("initialize: codebook needs the vectors of the quantizer's codebook")
    vectors = given.codebook.float() - given.codebook.float().mean(0)
    length = vectors.square().sum(1).mean().sqrt()
    if not length > 0:
        raise ValueError(
            "initialize: all vectors of the quantizer's codebook are equal: it is not trained, or "
            "choose another initialize"
        )
    projection, others = given.covariance_noise(vectors.shape[1] + 3).split([vectors.shape[1], 3])
    codes = vectors / length @ projection
    return given.mean + torch.cat([others[:2], codes, others[2:]])


def new_rows(spec: dict[str, Any], given: NewRowContext) -> Tensor:
    """The rows that `spec` ({_component_, ...}) chooses, float32 (codes + 3, width).

    In one thread: with two, the last bits of sums and products are others, and they decide over
    every later number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return config.instantiate(spec, given=given)
    finally:
        torch.set_num_threads(threads)
