"""The data of a run in numbers: samples, tokens, padding.

In: the plan of the data, or what the recipe expects of data that is not here yet. Out: totals from
which preflight tells time and price. Little of the data is read: some steps and samples stand for
all of them.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from speechfuse.samples import packing
from speechfuse.samples.datasets import Mixture
from speechfuse.samples.packing import Counts, Shape
from speechfuse.train import metrics
from speechfuse.train.config import Finetune

SAMPLED_STEPS = 64  # of the plan, from which positions and pairs are estimated
RENDERED = 256  # samples from which the share of targets is estimated
DRAWN = 20_000  # lengths that stand for the samples that a recipe expects


@dataclass(frozen=True)
class Data:
    """The data of a run. `targets`: tokens that are learned; `positions`: tokens and padding; both
    are estimates. `pairs`: see metrics.pairs_of; `longest`: the most tokens of a row. `expected`:
    it is not here, and these are the numbers that its recipe expects."""

    counts: Counts
    targets: int
    positions: int
    pairs: int
    longest: int
    expected: bool = False

    def __str__(self) -> str:
        counts = self.counts
        useful = f"{counts.tokens / max(1, self.positions):.1%} of positions useful"
        if self.expected:
            return (
                f"EXPECTED, for it is not here: {sum(counts.samples):,} samples, {counts.tokens:,} "
                f"tokens; {useful} (runtime.expected)"
            )
        return (
            f"{' + '.join(f'{n:,}' for n in counts.samples)} samples ({sum(counts.dropped):,} too "
            f"long), {counts.tokens:,} tokens, about {self.targets:,} of them targets; {useful}"
        )

    @classmethod
    def expected_by(cls, job: Finetune, micro: int) -> "Data | None":
        """Return the data that `runtime.expected` states; None where it states none. Raises
        ValueError where no sample of it fits a row, or they do not fill a batch."""
        expected = job.runtime.expected
        if not expected.samples:
            return None
        low, high = expected.tokens
        lengths = np.random.default_rng(0).integers(low, high + 1, DRAWN).astype(np.int32)
        shape = Shape(job.seq_len, job.batch_size, job.packed)
        with TemporaryDirectory() as folder:
            plan = packing.make([lengths], [1.0], shape, 1, None, job.seed, Path(folder))
            steps = [plan.rows(step) for step in range(plan.counts.steps)]
        rows = [[[int(lengths[n]) for _, n in row] for row in step] for step in steps]
        times, epochs = expected.samples / DRAWN * job.epochs, job.epochs
        if job.steps and job.steps < len(rows) * times:
            epochs = ceil(job.steps * epochs / (len(rows) * times))
            times = job.steps / len(rows)
        drawn, total = plan.counts, round(len(rows) * times)
        tokens, samples = int(drawn.tokens * times), int(drawn.samples[0] * times)
        counts = Counts(total, tokens, [samples], [int(drawn.dropped[0] * times)], [total] * epochs)
        padded = sum(positions(step, shape, 1, micro) for step in rows)
        pairs = metrics.pairs_of([length for step in rows for row in step for length in row])
        longest = job.seq_len if job.packed else int(lengths[lengths <= job.seq_len].max())
        return cls(counts, tokens, int(padded * times), int(pairs * times), longest, expected=True)

    @classmethod
    def of(cls, mixture: Mixture, ranks: int, micro: int) -> "Data":
        """Count the data of a plan; positions, pairs and targets are estimated from steps and
        samples at equal distances."""
        counts, shape, indexes = mixture.plan.counts, mixture.plan.shape, mixture.indexes
        steps = np.linspace(0, counts.steps - 1, min(SAMPLED_STEPS, counts.steps)).astype(int)
        rows = [mixture.lengths(step) for step in steps.tolist()]
        lengths = [length for step in rows for row in step for length in row]
        scale = counts.tokens / max(1, sum(lengths))
        padded = sum(positions(step, shape, ranks, micro) for step in rows)
        places = [p for step in steps.tolist() for row in mixture.plan.rows(step) for p in row]
        rendered = [indexes[d][n] for d, n in places[:: max(1, len(places) // RENDERED)]]
        targets = sum(int(sample.targets[1:].sum()) for sample in rendered)
        tokens = max(1, sum(len(sample.tokens) for sample in rendered))
        fitting = [int(e.lengths[e.lengths <= shape.seq_len].max()) for e in indexes]
        learned, pairs = counts.tokens * targets / tokens, scale * metrics.pairs_of(lengths)
        longest = shape.seq_len if shape.packed else max(fitting)
        return cls(counts, int(learned), int(scale * padded), int(pairs), longest)


def positions(rows: list[list[int]], shape: Shape, ranks: int, micro: int) -> int:
    """Count tokens and padding of a step whose rows have samples of these lengths: packs are filled
    up to `seq_len`, single samples to the longest of their micro-batch."""
    sizes = list(map(sum, rows))
    if shape.packed:
        return len(sizes) * shape.seq_len
    parts = (
        sizes[rank::ranks][i : i + micro]
        for rank in range(ranks)
        for i in range(0, len(sizes) // ranks, micro)
    )
    return sum(len(part) * max(1, *part) for part in parts)
