"""Training speed on one GPU: useful tokens/s, MFU and peak memory, setting by setting.

    just bench train                         (8B's true dimensions; about 15 minutes on one H200)
    just bench train size=1b
    just bench train only="seed|bf16$"       (cases whose name this regular expression fits)
    just bench train size=tiny device=cpu    (tries the script itself)

Keys: size=8b|1b|tiny, device=cuda|cpu, only=PATTERN, steps=N timed, out=FILE. Weights are random
and drawn on the device, the vocabulary is Llama 3's with 515 sound tokens, samples are of random
tokens with the lengths of stage 1 (speech of 10 to 20 s) or of stage 2 (mean about 294, at most
1,024 tokens). Every case trains in a process of its own with the parts, the allocator and the
process group of the real loop. Useful: tokens of samples, without padding. Rows are added to
recipes/measurements.jsonl, where preflight reads them.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.samples import datasets, packing
from speechfuse.samples.view import PADDING, Sample, collate
from speechfuse.tokens.vocabulary import SoundLayout, read_config
from speechfuse.train import attention, gpus, loop, metrics
from speechfuse.train import model as models
from speechfuse.train import trainer as trainers
from speechfuse.train.backbone import Decoder
from speechfuse.train.config import Finetune, Runtime, set_allocator
from speechfuse.train.preflight import report as preflight_report
from speechfuse.train.preflight.data import Data
from tests.prove_preflight import shape_of

DEFAULTS = {
    "size": "8b",
    "device": "cuda",
    "only": "",
    "steps": "8",
    "out": str(preflight_report.MEASUREMENTS),
}
SIZES: dict[str, dict[str, Any]] = {
    "8b": {
        "_component_": "torchtune.models.llama3_1.llama3_1",
        "vocab_size": 128_771,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "embed_dim": 4096,
        "intermediate_dim": 14_336,
        "max_seq_len": 131_072,
    },
    "1b": {
        "_component_": "torchtune.models.llama3_2.llama3_2",
        "vocab_size": 128_771,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "embed_dim": 2048,
        "intermediate_dim": 8192,
        "max_seq_len": 131_072,
    },
    "tiny": {
        "_component_": "torchtune.models.llama3_1.llama3_1",
        "vocab_size": 1_000,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "embed_dim": 64,
        "intermediate_dim": 128,
        "max_seq_len": 4096,
    },
}
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True}
FAST = {
    "seq_len": 4096,
    "packed": True,
    "micro_batch_size": 2,
    "dtype": "bf16",
    "compute_dtype": "bf16",
    "activation_checkpointing": "none",
    "compile": True,
    "attention": "flex",
    "optimizer": ADAMW,
    "stage": 1,
}
SEED = FAST | {
    "packed": False,
    "activation_checkpointing": "full",
    "compile": False,
    "attention": "dense",
}
MASTER = {"8b": {"activation_checkpointing": "full", "micro_batch_size": 1}}  # what one H200 holds
CASES: dict[str, dict[str, Any]] = {
    "fp32 master": FAST | {"dtype": "fp32"},
    "fp32 master, 8-bit moments": FAST
    | {
        "dtype": "fp32",
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-5},
        "activation_checkpointing": "selective",
    },
    "bf16": FAST,
    "bf16, transformers' builder": FAST | {"builder": "speechfuse.train.llama"},
    "bf16, stage 2": FAST | {"stage": 2},
    "bf16, dense": FAST | {"attention": "dense"},
    "bf16, not compiled": FAST | {"compile": False},
    "bf16, half recomputed": FAST | {"activation_checkpointing": "selective"},
    "bf16, all recomputed": FAST | {"activation_checkpointing": "full"},
    "seed, stage 1": SEED | {"seq_len": 512, "micro_batch_size": 8},
    "seed, stage 2": SEED | {"seq_len": 1024, "micro_batch_size": 16, "stage": 2},
}
PASSES = 4  # micro-batches of a step
WARM_UP = 2  # steps that compile, choose kernels and allocate the optimizer's state


def lengths_of(stage: int, count: int) -> np.ndarray:
    """Tokens of samples: stage 1: speech of 10 to 20 s; 2: speech up to 10 s and a written answer,
    mean about 294."""
    rng = np.random.default_rng(0)
    if stage == 1:
        return rng.integers(250, 500, count).astype(np.int32) + 4
    answers = np.minimum(rng.lognormal(4.7, 0.7, count), 740).astype(np.int32)
    return rng.integers(25, 250, count).astype(np.int32) + answers + 14


def rows_of(job: Finetune, stage: int, count: int) -> list[list[list[Sample]]]:
    """The rows of `count` steps, packed by the real plan."""
    shape = packing.Shape(job.seq_len, job.batch_size, job.packed)
    lengths = lengths_of(stage, count * job.batch_size * (1 + job.seq_len // 150))
    rng = np.random.default_rng(1)

    def sample(length: int) -> Sample:
        tokens = rng.integers(0, job.model["vocab_size"], length).astype(np.int32)
        return Sample("", tokens, np.ones(length, bool))

    with tempfile.TemporaryDirectory() as folder:
        plan = packing.make([lengths], [1.0], shape, 1, count, 0, Path(folder) / "plan")
        return [
            [[sample(lengths[n]) for _, n in row] for row in plan.rows(step)]
            for step in range(count)
        ]


def micro_batches(job: Finetune, rows: list[list[Sample]]) -> list[dict[str, torch.Tensor]]:
    """The rows of a step as the loop gives them to the model."""
    codes = 16 if job.model["vocab_size"] < 2000 else 512
    first = job.model["vocab_size"] - codes - 1
    layout, size = SoundLayout(first - 2, first - 1, first, codes, "0" * 64), job.micro_batch_size
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [
        collate(part, job.seq_len if job.packed else datasets.longest(part), 0, layout)
        for part in parts
    ]


def config_folder(folder: Path, size: str) -> str:
    """A folder with config.json, all that is needed of a checkpoint whose weights are drawn."""
    (folder / "config.json").write_text(json.dumps(shape_of(SIZES[size])))
    return str(folder)


def random_weights(decoder: Decoder, job: Finetune, device: torch.device) -> None:
    """What model.load does, with weights that are drawn on the device instead of read."""
    models.place(decoder.model, job, device)
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.fill_(1.0) if own.ndim == 1 else own.normal_(std=0.02)


def trainer_of(job: Finetune) -> trainers.Trainer:
    """The parts of a run, in the process group that the loop would join, with random weights that
    follow from the seed."""
    if not dist.is_initialized():
        loop.join(job.runtime.device, mixed=job.compute_dtype != job.dtype)
    with patch.object(trainers, "load", random_weights):
        return trainers.Trainer(job, models.decoder_of(job))


def free() -> None:
    """Give back what a trainer took, once nothing names it any more."""
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def case_of(size: str, name: str, device: str) -> dict[str, Any]:
    """The keys of a case, as a device can train it."""
    case = CASES[name] | (MASTER.get(size, {}) if name == "fp32 master" else {})
    if device == "cpu":  # where flex attention and the compiler's kernels are not meant for
        small = {"seq_len": min(512, case["seq_len"]), "micro_batch_size": 1}
        case |= {"attention": "dense", "compile": False} | small
    return case


def job_of(size: str, case: dict[str, Any], device: str, folder: str) -> Finetune:
    """The recipe of a case."""
    case, model = dict(case), SIZES[size]
    case.pop("stage", None)
    builder = case.pop("builder", model["_component_"])
    return Finetune(
        out="",
        checkpoint=folder,
        model=model | {"_component_": builder},
        datasets=[],
        epochs=1,
        warmup_steps=0,
        batch_size=PASSES * case["micro_batch_size"],
        clip_grad_norm=1.0,
        runtime=Runtime(device=device),
        **case,
    )


def measure(options: dict[str, str], name: str, folder: str) -> dict[str, Any]:
    """One case, in this process."""
    device, timed = options["device"], int(options["steps"])
    case = case_of(options["size"], name, device)
    job = job_of(options["size"], case, device, folder)
    trainer = trainer_of(job)
    rows = rows_of(job, case["stage"], WARM_UP + timed)
    steps = [micro_batches(job, each) for each in rows]
    for number, parts in enumerate(steps):
        if number == WARM_UP:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
        trainer.backward(parts)
        trainer.clipped_norm()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    gpu = gpus.of(trainer.device)
    meter = metrics.Meter(metrics.Flops.of(trainer.model, read_config(Path(folder))), gpu)
    found = [p["input_pos"][p["document"] != PADDING] for s in steps[WARM_UP:] for p in s]
    tokens = sum(len(each) for each in found)
    pairs = sum(int(each.sum()) + len(each) for each in found)
    positions = sum(part["tokens"].numel() for step in steps[WARM_UP:] for part in step)
    most = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    counts = packing.Counts(timed, tokens, [timed], [0], [timed])
    data = Data(counts, tokens, positions, pairs, job.seq_len)
    unmeasured, spec = Path(os.devnull), models.decoder_of(job).spec
    said = preflight_report.PreflightReport(
        replace(job, model=spec), trainer.model, meter, job.micro_batch_size, data, unmeasured
    )
    return {
        "case": name,
        "model": options["size"],
        "gpu": gpu.name if gpu else None,
        "gpus": 1,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained": sum(p.numel() for p in trainer.trained),
        "builder": job.model["_component_"],
        **{key: getattr(job, key) for key in preflight_report.SETTINGS},
        "attention": attention.kind_of(job.attention, trainer.device, job.packed, job.seq_len),
        "micro_batch_size": job.micro_batch_size,
        "optimizer": job.optimizer["_component_"],
        "tokens_per_s": round(tokens / seconds, 1),
        "useful_share": round(tokens / positions, 4),
        "mfu": meter.mfu(tokens, pairs, seconds),
        "peak_gib": round(most / gpus.GIB, 2),
        "said_gib": round(said.memory.peak / gpus.GIB, 2),
        "said_tokens_per_s": said.speed and round(said.speed, 1),
        "seconds_per_step": round(seconds / timed, 4),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"just bench train size={options['size']} only='{name}'",
        "versions": {name: version(name) for name in ("torch", "torchtune", "torchao")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | useful tokens/s | preflight says | MFU | useful share | peak GiB | preflight says"
        " |\n|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        said = row["said_tokens_per_s"]
        lines.append(
            f"| {row['case']} | {row['tokens_per_s']:,.0f} | {f'{said:,.0f}' if said else ''} | "
            f"{mfu} | {row['useful_share']:.1%} | {row['peak_gib']:.1f} | {row['said_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    inner = given.pop("case", None), given.pop("folder", None)
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"error: unknown key {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    set_allocator()  # torch reads it when it first takes memory of a GPU
    if inner[0]:
        print(json.dumps(measure(options, *inner)))
        return
    names = [name for name in CASES if re.search(options["only"], name)]
    if options["device"] == "cuda" and not torch.cuda.is_available():
        print(f"There is no GPU here. Of {options['size']} it would measure: {'; '.join(names)}.")
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = config_folder(Path(temporary), options["size"])
        for name in tqdm(names, "cases"):
            command = [sys.executable, __file__, *(f"{k}={v}" for k, v in options.items())]
            done = subprocess.run(
                [*command, f"case={name}", f"folder={folder}"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                tqdm.write(f"{name}: failed: {done.stderr.strip().splitlines()[-1][:300]}")
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            if rows[-1]["gpu"]:
                out = Path(options["out"])
                before = out.read_text() if out.exists() else ""
                artifact.write_atomic(out, before + json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
