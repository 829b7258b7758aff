"""Guards: a step whose loss or gradient is not finite, or a spike, does not reach the weights.

In: loss and gradient norm of every step, and of the steps before. Out: what is wrong with a step,
in words, and a file with its rows. The run then stops (`policy: stop`, with its state saved), or
leaves the step out and goes on (`policy: quarantine`), which is counted.
"""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from speechfuse import artifact
from speechfuse.samples.datasets import Mixture
from speechfuse.train.config import Guards

WINDOW = 100  # steps that a step is compared with


class Watch:
    """Compares every step with the last hundred good ones. `earlier`: the lines of metrics.jsonl of
    a run that is resumed. Up to step `first` other weights train, so that later steps are compared
    with steps after it alone."""

    def __init__(self, guards: Guards, earlier: list[dict[str, Any]], first: int = 0) -> None:
        self.guards, self.first = guards, first
        self.quarantined = sum("quarantined" in line for line in earlier)
        self._good: list[tuple[int, float, float]] = []
        for line in earlier:
            if "quarantined" not in line:
                self._remember(line["step"], line["loss"], line["grad_norm"])

    def _remember(self, step: int, loss: float, norm: float) -> None:
        self._good = [*self._good, (step, loss, norm)][-WINDOW:]

    def fault(self, step: int, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step; None for a good one, which is remembered."""
        comparable = [each for each in self._good if (each[0] > self.first) == (step > self.first)]
        for name, value, earlier in (
            ("loss", loss, [each[1] for each in comparable]),
            ("gradient norm", norm, [each[2] for each in comparable]),
        ):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if len(earlier) >= self.guards.enough and value > self.guards.spike * median(earlier):
                return (
                    f"{name} {value:.3g} is more than {self.guards.spike:g} times the median of "
                    f"the last {len(earlier)} steps, {median(earlier):.3g}"
                )
        self._remember(step, loss, norm)
        return None


def write_rows(folder: Path, step: int, fault: str, mixture: Mixture) -> None:
    """Write the samples of step `step` (from 1), one a line, to <folder>/step_<n>.jsonl."""
    lines: list[dict[str, Any]] = [{"step": step, "fault": fault}]
    for number, row in enumerate(mixture.plan.rows(step - 1)):
        for dataset, place in row:
            content, sample = mixture.indexes[dataset].row(place), mixture.indexes[dataset][place]
            lines.append(
                {
                    "row": number,
                    "dataset": mixture.paths[dataset],
                    "id": content["id"],
                    "tokens": sample.tokens.tolist(),
                    "targets": int(sample.targets[1:].sum()),
                    "source": content.get("source"),
                }
            )
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    artifact.write_atomic(folder / f"step_{step}.jsonl", text)


def check_rejected(guards: Guards, mixture: Mixture) -> list[str]:
    """Return lines that say what was left out of the datasets. Raises ValueError for broken rows
    (codes the checkpoint does not have, no answer), unless they are few and go to quarantine."""
    lines = []
    for path, index in zip(mixture.paths, mixture.indexes, strict=True):
        if index.left_out:
            lines.append(f"{path}: {index.left_out:,} rows without a transcript are left out")
        if not index.rejected:
            continue
        first = f"{index.rejected[0]['id']}: {index.rejected[0]['reason']}"
        count = len(index.rejected)
        if guards.policy == "stop" or count > guards.most:
            raise ValueError(
                f"{path}: {count:,} rows cannot be trained on; first {first}; make the dataset "
                "again without them, or guards.policy=quarantine with guards.most of so many "
                "leaves them out"
            )
        lines.append(f"{path}: {count:,} rows in quarantine; first {first}")
    return lines
