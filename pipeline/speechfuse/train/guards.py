"""Guards: a step whose loss or gradient is not credible does not reach the weights.

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
    """Compares every step with the last hundred good ones; `earlier`: the lines of metrics.jsonl of
    a run that is resumed. Up to step `first` other weights train, so what follows is compared with
    what follows only."""

    def __init__(self, guards: Guards, earlier: list[dict[str, Any]], first: int = 0) -> None:
        self.guards, self.first = guards, first
        self.quarantined = sum("quarantined" in line for line in earlier)
        self._seen: list[tuple[int, float, float]] = []
        for line in earlier:
            if "quarantined" not in line:
                self._remember(line["step"], line["loss"], line["grad_norm"])

    def _remember(self, step: int, loss: float, norm: float) -> None:
        self._seen = [*self._seen, (step, loss, norm)][-WINDOW:]

    def fault(self, step: int, loss: float, norm: float) -> str | None:
        """What is wrong with a step, None for a good one, which is remembered."""
        comparable = [each for each in self._seen if (each[0] > self.first) == (step > self.first)]
        for name, value, seen in (
            ("loss", loss, [each[1] for each in comparable]),
            ("gradient norm", norm, [each[2] for each in comparable]),
        ):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if len(seen) >= self.guards.enough and value > self.guards.spike * median(seen):
                return (
                    f"{name} {value:.3g} is more than {self.guards.spike:g} times the median of "
                    f"the last {len(seen)} steps, {median(seen):.3g}"
                )
        self._remember(step, loss, norm)
        return None


def write_rows(folder: Path, step: int, fault: str, mixture: Mixture) -> Path:
    """What step `step` (from 1) was made of, a sample a line, to <folder>/step_<n>.jsonl."""
    lines = [json.dumps({"step": step, "fault": fault})]
    for number, row in enumerate(mixture.plan.rows(step - 1)):
        for dataset, sample in row:
            index = mixture.indexes[dataset]
            content = index.row(sample)
            rendered = index[sample]
            lines.append(
                json.dumps(
                    {
                        "row": number,
                        "dataset": mixture.paths[dataset],
                        "id": content["id"],
                        "tokens": rendered.tokens.tolist(),
                        "targets": int(rendered.targets[1:].sum()),
                        "source": content.get("source"),
                    }
                )
            )
    path = folder / f"step_{step}.jsonl"
    artifact.write_atomic(path, "".join(f"{line}\n" for line in lines))
    return path


def check_rejected(guards: Guards, mixture: Mixture) -> list[str]:
    """Lines that say what was left out of the datasets. ValueError for rows that are broken (codes
    the checkpoint does not have, no answer), unless they are few and go to quarantine."""
    said = []
    for path, index in zip(mixture.paths, mixture.indexes, strict=True):
        if index.left_out:
            said.append(f"{path}: {index.left_out:,} rows without a transcript are left out")
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
        said.append(f"{path}: {count:,} rows in quarantine; first {first}")
    return said
