"""Guards: a step whose loss or gradient is not finite, or a spike, does not reach the weights.

In: loss and gradient norm of every step, and of the steps before. Out: what is wrong with a step,
in words, and a file with its rows. The run then stops (`policy: stop`, with its state saved), or
leaves the step out and goes on (`policy: quarantine`), which is counted.
"""

import json
import math
from collections import deque
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
        good = [line for line in earlier if "quarantined" not in line]
        self.quarantined = len(earlier) - len(good)
        numbers = ((line["step"], line["loss"], line["grad_norm"]) for line in good)
        self._good: deque[tuple[int, float, float]] = deque(numbers, WINDOW)

    def fault(self, step: int, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step; None for a good one, which is remembered."""
        comparable = [each for each in self._good if (each[0] > self.first) == (step > self.first)]
        for place, name, value in ((1, "loss", loss), (2, "gradient norm", norm)):
            earlier = [each[place] for each in comparable]
            if not math.isfinite(value):
                return f"{name} is {value}"
            if len(earlier) >= self.guards.enough and value > self.guards.spike * median(earlier):
                return (
                    f"{name} {value:.3g} is more than {self.guards.spike:g} times the median of "
                    f"the last {len(earlier)} steps, {median(earlier):.3g}"
                )
        self._good.append((step, loss, norm))
        return None


def write_rows(folder: Path, step: int, fault: str, mixture: Mixture) -> None:
    """Write the samples of step `step` (from 1), one a line, to <folder>/step_<n>.jsonl."""
    lines: list[dict[str, Any]] = [{"step": step, "fault": fault}]
    for number, row in enumerate(mixture.plan.rows(step - 1)):
        for dataset, place in row:
            content, sample = mixture.indexes[dataset].row(place), mixture.indexes[dataset][place]
            line = {"row": number, "dataset": mixture.paths[dataset], "id": content["id"]}
            line |= {"tokens": sample.tokens.tolist(), "targets": int(sample.targets[1:].sum())}
            lines.append(line | {"source": content.get("source")})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    artifact.write_atomic(folder / f"step_{step}.jsonl", text)


def check_rejected(guards: Guards, mixture: Mixture) -> list[str]:
    """Return lines that say what was left out of the datasets. Raises ValueError for broken rows
    (codes the checkpoint does not have, no answer), unless they are few and go to quarantine."""
    lines = []
    for path, index in zip(mixture.paths, mixture.indexes, strict=True):
        lines += [f"{path}: {each}" for each in index.said()]
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
