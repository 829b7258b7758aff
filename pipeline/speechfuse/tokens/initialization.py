"""Initial values of the new rows of an embedding or a head.

In: the old rows, the quantizer's codebook and a random generator. Out: rows for sound_start,
sound_end, every code and the mask code, in this order. A recipe names one of these functions as
`initialize` of expand_vocab. Each holds a block of old rows in float32 at a time, and gives the
same bytes with any number of threads (see `new_rows`).
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
    """What an initialisation may use.

    rows      the old rows (n, width), of any dtype
    codes     number of codes without the mask code
    codebook  the codes' vectors (codes, dim), None where they are not known
    std       standard deviation of the model's own initialisation
    rng       the only source of random numbers
    """

    rows: Tensor
    codes: int
    codebook: Tensor | None
    std: float
    rng: torch.Generator

    @property
    def count(self) -> int:
        """Number of new rows."""
        return self.codes + 3

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def draw(self, rows: int, width: int) -> Tensor:
        """Standard normal values (rows, width)."""
        return torch.randn(rows, width, generator=self.rng)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the old rows, (width,)."""
        total = torch.zeros(self.width, dtype=torch.float64)
        for block in self.rows.split(BLOCK):
            total += block.sum(0, dtype=torch.float64)
        return (total / len(self.rows)).float()

    def covariance_noise(self, count: int) -> Tensor:
        """Sample `count` rows (count, width) from N(0, covariance of the old rows), as random
        linear combinations of the centred rows, without forming the covariance."""
        total = torch.zeros(count, self.width)
        for block in self.rows.split(BLOCK):
            total += self.draw(count, len(block)) @ (block.float() - self.mean)
        return total / len(self.rows) ** 0.5


def normal(context: NewRowContext) -> Tensor:
    """Normal values with mean 0 and standard deviation `initializer_range` of config.json, as in an
    untrained model. Transformers before 4.46 and the original Llama3-s do this."""
    return context.draw(context.count, context.width) * context.std


def mean(context: NewRowContext) -> Tensor:
    """Every row is the mean of the old rows."""
    return context.mean.repeat(context.count, 1)


def mean_and_covariance(context: NewRowContext, scale: float = 1e-9) -> Tensor:
    """Samples from N(mean, `scale` times covariance) of the old rows (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    The default is that of transformers: the rows then differ from their mean by 3e-5 of the old
    rows' spread, which bfloat16 mostly rounds away. 1.0 gives them the old rows' spread.
    """
    if not scale > 0:
        raise ValueError(f"initialize.scale={scale}: it must be above 0; for no spread choose mean")
    return context.mean + scale**0.5 * context.covariance_noise(context.count)


def codebook(context: NewRowContext) -> Tensor:
    """The codes' codebook vectors through one random projection, so that codes that are close in
    the codebook begin close. On average they have the mean and covariance of the old rows; the
    other three rows are samples from these."""
    if context.codebook is None:
        raise ValueError("initialize: codebook needs the vectors of the quantizer's codebook")
    vectors = context.codebook.float() - context.codebook.float().mean(0)
    length = vectors.square().sum(1).mean().sqrt()
    if not length > 0:
        raise ValueError(
            "initialize: all vectors of the quantizer's codebook are equal: it is not trained, or "
            "choose another initialize"
        )
    projection, others = context.covariance_noise(vectors.shape[1] + 3).split([vectors.shape[1], 3])
    codes = vectors / length @ projection
    return context.mean + torch.cat([others[:2], codes, others[2:]])


def new_rows(spec: dict[str, Any], context: NewRowContext) -> Tensor:
    """The rows that `spec` ({_component_, ...}) makes, float32 (codes + 3, width).

    Computed in one thread: the last bits of sums and products depend on the number of threads, and
    every later number of a training depends on them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return config.instantiate(spec, context=context)
    finally:
        torch.set_num_threads(threads)
