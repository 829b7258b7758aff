"""The first 50 losses, five ways that must agree.

    just prove losses       (about 2 minutes on two cores)

A global batch of 8 packed rows as one rank with 4 micro-batches and as two ranks with 2 each, in
float32 and float64; the same unpacked samples through torchtune's own single-device recipe; and
transformers' Llama under this loop. A line each says the largest relative difference.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset

from speechfuse.samples.view import IGNORE
from speechfuse.train import plan
from tests.small_training import ROOT, command, job, losses, make_parts, recipe

STEPS = 50
SETTINGS: dict[str, Any] = {"steps": STEPS, "epochs": 40, "warmup_steps": 5}
FLOAT64 = "FLOAT64"  # in the environment: everything that is float32 otherwise is float64


class Tokenizer:
    """All that torchtune's recipe asks of one when the dataset has ids already."""

    pad_id = 0


class Samples(Dataset):
    """The samples of an unpacked plan in its order, as torchtune's collation takes them."""

    def __init__(self, tokenizer: Tokenizer, config: str) -> None:
        settings = job(Path(config))
        self.mixture = plan.load_data(settings, plan.pins_of(settings))
        rows = self.mixture.plan.shape.rows
        self.places = [(n // rows, n % rows) for n in range(rows * self.mixture.plan.counts.steps)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        step, row = self.places[number]
        (sample,) = self.mixture.samples(step)[row]
        labels = np.where(sample.targets, sample.tokens, IGNORE)
        return {"tokens": sample.tokens.tolist(), "labels": labels.tolist()}


def ours(config: Path, ranks: int = 1, float64: bool = False) -> list[float]:
    launch = command(config, ranks)
    if float64:
        module = launch.index("stages.train")
        launch[module - 1 : module + 1] = ["tests/prove_losses.py"]
    environment = os.environ | ({FLOAT64: "1"} if float64 else {})
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{config}: {done.stderr[-2000:]}")
    return losses(config.with_suffix(""))


def in_float64() -> None:
    """Train as stages/train.py does, with every float32 of the product a float64: torchtune's
    layers turn to float32 what they are given, by name."""
    import runpy

    from speechfuse.train import backbone

    backbone.DTYPES["fp32"] = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    runpy.run_module("stages.train", run_name="__main__")


def torchtunes(config: Path, folder: Path) -> list[float]:
    """The losses of torchtune's full_finetune_single_device on the samples of `config`."""
    given = yaml.safe_load(config.read_text())
    content = {
        "output_dir": str(folder),
        "device": "cpu",
        "dtype": "fp32",
        "seed": 0,
        "shuffle": False,
        "model": given["model"],
        "optimizer": given["optimizer"],
        "tokenizer": {"_component_": "tests.prove_losses.Tokenizer"},
        "dataset": {"_component_": "tests.prove_losses.Samples", "config": str(config)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": given["checkpoint"],
            "checkpoint_files": ["model.safetensors"],
            "output_dir": str(folder),
            "model_type": "LLAMA3",
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.get_cosine_schedule_with_warmup",
            "num_warmup_steps": given["warmup_steps"],
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "batch_size": given["batch_size"],
        "epochs": 1,
        "max_steps_per_epoch": STEPS,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": given["clip_grad_norm"],
        "optimizer_in_bwd": False,
        "compile": False,
        "resume_from_checkpoint": False,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(folder),
            "filename": "losses.txt",
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from torchtune._cli.tune import main; main()",
            "run",
            "full_finetune_single_device",
            "--config",
            str(folder / "recipe.yaml"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"torchtune: {done.stderr[-2000:]}")
    return [float(x) for x in re.findall(r"loss:(\S+)", (folder / "losses.txt").read_text())]


def compare(what: str, first: list[float], second: list[float], limit: float) -> bool:
    assert len(first) == len(second) == STEPS, (what, len(first), len(second))
    assert first[-1] < 0.9 * first[0], "a training that learns nothing shows nothing"
    most = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    good = most <= limit
    print(
        f"{'ok' if good else 'MISSED':7} {what}: {most:.1e} at most, {limit:.0e} allowed "
        f"(loss {first[0]:.3f} -> {first[-1]:.3f})",
        flush=True,
    )
    return good


def main() -> None:
    good = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = make_parts(folder, width=64, layers=2, heads=4)
        packed = SETTINGS | {"batch_size": 8, "micro_batch_size": 2}
        for float64, limit in ((False, 1e-4), (True, 1e-9)):
            name = "float64" if float64 else "float32"
            one = ours(recipe(parts, folder / f"{name}_one", **packed), 1, float64)
            two = ours(recipe(parts, folder / f"{name}_two", **packed), 2, float64)
            said = f"1 rank x 4 micro-batches and 2 x 2, {name}"
            good.append(compare(said, one, two, limit))
        plain = SETTINGS | {"packed": False}
        alone = ours(recipe(parts, folder / "plain", **plain))
        theirs = torchtunes(folder / "plain.yaml", folder / "torchtune")
        good.append(compare("torchtune's own recipe, unpacked", alone, theirs, 1e-4))
        path = recipe(parts, folder / "exit", **plain)
        content = yaml.safe_load(path.read_text())
        content["model"]["_component_"] = "speechfuse.train.llama"
        path.write_text(yaml.safe_dump(content))
        good.append(compare("transformers' Llama in this loop", alone, ours(path), 1e-4))
    print(f"{sum(good)} of {len(good)} agree")
    sys.exit(not all(good))


if __name__ == "__main__":
    in_float64() if FLOAT64 in os.environ else main()
