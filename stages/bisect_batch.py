"""Find the row that spoils a training step.

    python -m stages.bisect_batch recipes/demo/stage2.yaml at=123

In: the recipe of a run that was stopped at a step, or had one in quarantine, and the newest state
before it. Out: loss and gradient norm of every sample of the step alone, worst first, printed and
in <run>/quarantine/step_<n>.samples.jsonl. The run itself is not touched.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.samples import datasets
from speechfuse.train import loop, state
from speechfuse.train.config import Finetune

SHOWN = 10


@dataclass
class BisectBatch(Finetune):
    at: int = field(default=0, metadata={"help": "the step, counted from 1 as in metrics.jsonl"})


def main(job: BisectBatch) -> None:
    out = Path(job.out)
    mixture = loop.load_data(job, loop.pins_of(job))
    total = mixture.plan.counts.steps
    if not 1 <= job.at <= total:
        raise ValueError(f"at={job.at}: the run has the steps 1 to {total}")
    # what takes the least room, and is not compiled again for every length
    job = replace(
        job, compile=False, attention="dense", activation_checkpointing="full", clip_grad_norm=None
    )
    loop.join(job)
    trainer = loop.prepare(job)
    states = state.States(out / "state", trainer.model, trainer.optimizer)
    start = states.restore_weights(job.at - 1)
    print(f"{out}: weights after step {start}, rows of step {job.at}")
    vocabulary = mixture.vocabulary
    found: list[dict[str, Any]] = []
    places = [place for row in mixture.plan.rows(job.at - 1) for place in row]
    for dataset, number in tqdm(places, unit="sample"):
        index = mixture.indexes[dataset]
        sample = index[number]
        part = datasets.collate([[sample]], len(sample.tokens), vocabulary.end, vocabulary.layout)
        losses, _ = trainer.backward([part])
        targets = sum(count for _, count in losses.values())
        loss = sum(value for value, _ in losses.values()) / max(1, targets)
        norm = trainer.clipped_norm()
        trainer.optimizer.zero_grad(set_to_none=True)
        found.append(
            {
                "dataset": mixture.paths[dataset],
                "id": sample.name,
                "loss": loss,
                "grad_norm": norm,
                "targets": targets,
                "tokens": len(sample.tokens),
            }
        )
    # what a sample gives to the step's gradient
    found.sort(
        key=lambda each: (
            math.isfinite(each["loss"] + each["grad_norm"]),
            -each["grad_norm"] * each["targets"],
        )
    )
    path = out / "quarantine" / f"step_{job.at}.samples.jsonl"
    artifact.write_atomic(path, "".join(json.dumps(each) + "\n" for each in found))
    for each in found[:SHOWN]:
        print(
            f"{each['dataset']}: {each['id']}: loss {each['loss']:.3g} over {each['targets']} "
            f"targets, gradient norm {each['grad_norm']:.3g}"
        )
    print(f"{path}: {len(found)} samples, worst first")


if __name__ == "__main__":
    config.main(main, BisectBatch, __doc__)
