"""Find the row that spoils a training step.

    python -m stages.bisect_batch recipes/demo/stage2.yaml at=123

In: the recipe of a run that was stopped at a step, or had one in quarantine, and the newest state
before it. Out: loss and gradient norm of every sample of the step alone, worst first, printed and
in <run>/quarantine/step_<n>.samples.jsonl. The run itself is not touched.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.train.config import Finetune

SHOWN = 10


@dataclass
class BisectBatch(Finetune):
    at: int = config.key("the step, counted from 1 as in metrics.jsonl", 0, least=0)


def main(job: BisectBatch) -> None:
    from tqdm import tqdm  # these not above: --help and a misspelt key answer at once

    from speechfuse.train import loop, plan, state
    from speechfuse.train.model import decoder_of
    from speechfuse.train.trainer import Trainer

    out = Path(job.out)
    mixture = plan.load_data(job, plan.pins_of(job))
    total = mixture.plan.counts.steps
    if not 1 <= job.at <= total:
        raise ValueError(f"at={job.at}: the run has the steps 1 to {total}")
    # what takes the least room, and is not compiled again for every length
    job = replace(
        job, compile=False, attention="dense", activation_checkpointing="full", clip_grad_norm=None
    )
    loop.join(job.runtime.device, mixed=job.compute_dtype != job.dtype)
    trainer = Trainer(job, decoder_of(job))
    states = state.States(out / "state", trainer.model, trainer.optimizer)
    start = states.restore_weights(job.at - 1)
    print(f"{out}: weights after step {start}, rows of step {job.at}")
    samples: list[dict[str, Any]] = []
    places = [place for row in mixture.plan.rows(job.at - 1) for place in row]
    for dataset, number in tqdm(places, unit="sample"):
        sample, vocabulary = mixture.sample(job.at - 1, dataset, number), mixture.vocabulary
        part = mixture.collate([[sample]], len(sample.tokens), vocabulary.end, vocabulary.layout)
        losses, _ = trainer.backward([part])
        targets = sum(count for _, count in losses.values())
        samples.append(
            {
                "dataset": mixture.paths[dataset],
                "id": sample.name,
                "loss": sum(value for value, _ in losses.values()) / max(1, targets),
                "grad_norm": trainer.clipped_norm(),
                "targets": targets,
                "tokens": len(sample.tokens),
            }
        )
        trainer.optimizer.zero_grad(set_to_none=True)
    samples.sort(key=_rank)
    path = out / "quarantine" / f"step_{job.at}.samples.jsonl"
    artifact.write_atomic(path, "".join(json.dumps(each) + "\n" for each in samples))
    for each in samples[:SHOWN]:
        print(
            f"{each['dataset']}: {each['id']}: loss {each['loss']:.3g} over {each['targets']} "
            f"targets, gradient norm {each['grad_norm']:.3g}"
        )
    print(f"{path}: {len(samples)} samples, worst first")


def _rank(sample: dict[str, Any]) -> tuple[bool, float]:
    """First what is not finite, then by what a sample gives to the step's gradient."""
    finite = math.isfinite(sample["loss"] + sample["grad_norm"])
    return finite, -sample["grad_norm"] * sample["targets"]


if __name__ == "__main__":
    config.main(main, BisectBatch, __doc__, ("at",))
