"""Packed rows against single samples padded to the longest of four, in one run.

    just bench packing          (after just demo; about 10 minutes on two cores)

On the demo's stage 2, and on samples as long as the original's (mean about 294 tokens, 1,024 at
most) with a small model: useful share (tokens of samples among all positions), useful tokens a
second (medians of steps that alternate between both) and, on the demo, what the validation loss is
after as many samples of training. One micro-batch has about as many positions either way.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechfuse import artifact, config
from speechfuse.rows import shards
from speechfuse.samples import datasets
from speechfuse.samples.view import Sample, collate
from speechfuse.train import optimizers, plan
from speechfuse.train.config import Finetune
from speechfuse.train.model import decoder_of
from speechfuse.train.preflight.data import positions
from speechfuse.train.trainer import Trainer
from tests.small_training import STREAM, make_parts, recipe

TIMED, TRAINED = 30, 9_600  # steps; samples


def runs(job: Finetune, packed_rows: int, padded_rows: int) -> dict[str, Finetune]:
    """The same job packed and padded: four samples a forward, or rows with as many positions; and
    packed with products of all pairs of a row."""
    packed = replace(job, batch_size=packed_rows, micro_batch_size=0)
    padded = replace(job, packed=False, batch_size=padded_rows, micro_batch_size=4)
    dense = replace(packed, attention="dense")
    return {"packed": packed, "padded": padded, "packed, dense mask": dense}


def compared(jobs: dict[str, Finetune]) -> dict[str, tuple[float, float]]:
    """(useful share, useful tokens/s) of each."""
    parts: dict[str, Any] = {}
    for name, job in jobs.items():
        mixture = plan.load_data(job, {})
        micro = job.micro_batch_size or job.batch_size
        parts[name] = (
            mixture,
            datasets.Batches(mixture, 0, 1, micro),
            Trainer(job, decoder_of(job)),
        )
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    tokens: dict[str, list[int]] = {name: [] for name in jobs}
    places: dict[str, int] = dict.fromkeys(jobs, 0)
    for step in range(TIMED + 3):
        for name, (mixture, batches, trainer) in parts.items():
            batch, rows = batches[step], mixture.lengths(step)
            useful = sum(map(sum, rows))
            began = time.perf_counter()
            trainer.backward(batch)
            trainer.clipped_norm()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if step >= 3:
                seconds[name].append((time.perf_counter() - began) / useful)
                tokens[name].append(useful)
                micro = jobs[name].micro_batch_size or jobs[name].batch_size
                places[name] += positions(rows, mixture.plan.shape, 1, micro)
    return {
        name: (sum(tokens[name]) / places[name], 1 / statistics.median(seconds[name]))
        for name in jobs
    }


def trained_loss(job: Finetune, held_out: list[Sample]) -> float:
    """Loss on samples of no training after so many that train."""
    mixture, trainer = plan.load_data(job, {}), Trainer(job, decoder_of(job))
    batches = datasets.Batches(mixture, 0, 1, job.micro_batch_size or job.batch_size)
    (peak,) = optimizers.rates(trainer.optimizer)
    seen = step = 0
    while seen < TRAINED:
        optimizers.set_rates(trainer.optimizer, [peak * min(1.0, (seen + 1) / 1600)])
        trainer.backward(batches[step])
        trainer.clipped_norm()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        seen += sum(map(len, mixture.plan.rows(step)))
        step += 1
    total, targets = 0.0, 0
    layout, end = mixture.vocabulary.layout, mixture.vocabulary.end
    with torch.no_grad():
        for start in range(0, len(held_out), 8):
            rows = [[sample] for sample in held_out[start : start + 8]]
            part = collate(rows, datasets.longest(rows), end, layout)
            for value, count in trainer.step(trainer.model, trainer.on_device(part)).values():
                total, targets = total + float(value), targets + int(count)
    return total / targets


def as_long_as_the_original(folder: Path) -> Finetune:
    """Samples of a mean of about 294 tokens and 1,024 at most, for a model of 6 M parameters."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5.5, 0.55, 6000), 20, 1000).astype(int)
    rows = [
        {"id": str(i), "codes": rng.integers(0, 16, size, dtype=np.uint16), "extra": "{}"}
        for i, size in enumerate(sizes)
    ]
    parts = make_parts(folder, width=256, layers=4, heads=4)
    work = artifact.Artifact(folder / "long", "bench", 1, {}, {})
    work.begin()
    shards.write_shard(folder / "long" / shards.shard_name(0), rows, shards.SPEECH, STREAM)
    work.finish({}, [folder / "long" / shards.shard_name(0)])
    entry = {"_component_": "speechfuse.samples.sound", "path": str(folder / "long"), "share": 1}
    path = recipe(parts, folder / "run", seq_len=2048, datasets=[entry])
    return config.load(Finetune, path, [])


def main() -> None:
    demo = config.load(
        Finetune, Path("recipes/demo/stage2.yaml"), ["runtime.device=cpu", *sys.argv[1:]]
    )
    torch.set_num_threads(demo.runtime.threads or torch.get_num_threads())
    longer = runs(replace(demo, seq_len=2 * demo.seq_len), 8, 48)
    print("| lengths | rows | useful share | useful tokens/s | ratio | by the shares |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for lengths, jobs in (
            (f"demo, rows of {demo.seq_len}", runs(demo, 16, 48)),
            (f"demo, rows of {2 * demo.seq_len}", longer),
            ("original, rows of 2,048", runs(as_long_as_the_original(Path(place)), 2, 12)),
        ):
            found = compared(jobs)
            for name, (share, speed) in found.items():
                times, shares = speed / found["padded"][1], share / found["padded"][0]
                print(
                    f"| {lengths} | {name} | {share:.1%} | {speed:,.0f} | {times:.2f} | "
                    f"{shares:.2f} |",
                    flush=True,
                )
    entry = demo.datasets[0] | {
        "path": "out/data/speech_test",
        "select": {"split": "seen_facts", "kind": "question"},
    }
    unseen = plan.load_data(replace(demo, datasets=[entry], epochs=1), {})  # other voices
    held_out = [unseen.indexes[0][i] for i in range(len(unseen.indexes[0]))]
    for name, job in list(runs(demo, 16, 48).items())[:2]:
        losses = [trained_loss(replace(job, seed=seed), held_out) for seed in (0, 1)]
        said = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name}: loss after {TRAINED:,} samples {said} (two seeds)")


if __name__ == "__main__":
    main()
