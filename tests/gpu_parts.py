"""The parts of the GPU hour, in a process that bench_gpu.py starts and may kill.

    python -m tests.gpu_parts DEVICE RESULTS UNIT.json ...

Each unit is {part, unit, ...}. Lines of JSON go to RESULTS: {"begin"} before a unit; then its row,
or {"failed"}. On the CPU (the rehearsal) every size is tiny and nothing is compiled. The process
ends after a failure, and where memory of the GPU is not given back: the next unit then gets
another.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from speechfuse import provenance
from speechfuse.evals import generation
from speechfuse.tokens import expansion
from speechfuse.train import loop, state
from speechfuse.train.config import Finetune
from speechfuse.train.head import linear_cross_entropy
from tests import bench_tokenize, bench_train, small_training
from tests.bench_train import FAST, SIZES, job_of, micro_batches, rows_of, trainer_of
from tests.prove_preflight import shape_of

Row = dict[str, Any]
LAYERS = 2  # of 8B's, whose gradients are compared in fp32
GIB = 2**30
GOALS = {"bf16": 12_900, "fp32 master": 9_900}  # useful tokens/s of 8B on one H200
REAL_TIME = 4_000  # goal of tokenizing in bf16


def config_folder(size: str) -> str:
    return bench_train.config_folder(Path(tempfile.mkdtemp()), size)


def gradients_of(
    job: Finetune, parts: list[dict[str, Tensor]], weights: Any = None
) -> tuple[Any, float, dict[str, Tensor]]:
    """(trainer, mean loss, gradients by name) of one forward and backward. The weights follow from
    the seed, unless they are given."""
    trainer = trainer_of(job)
    if weights is not None:
        trainer.model.load_state_dict(weights)
    losses, _ = trainer.backward(parts)
    mean = sum(value for value, _ in losses.values()) / sum(count for _, count in losses.values())
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return trainer, mean, gradients


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of tensors, as a share of the first's norm."""
    assert one.keys() == other.keys()
    squares = [
        (float((a.float() - other[n].to(a.device).float()).square().sum()), float(a.norm()) ** 2)
        for n, a in one.items()
    ]
    return (sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5


def verdict(loss: float, other: float, gradient: float, limit: float) -> Row:
    """The row of a comparison: relative differences of the losses and gradients."""
    off = abs(loss - other) / abs(loss)
    return {
        "ok": off < limit and gradient < limit,
        "loss": loss,
        "loss_off": off,
        "gradient_off": gradient,
        "measured": f"loss {loss:.4f} +- {off:.1e}, gradient +- {gradient:.1e}",
        "beside": f"at most {limit:g}",
    }


def same_gradients(device: str, one: Row, other: Row, alone: bool = False) -> Row:
    """Compare two ways of the same step in fp32: keys of a recipe `one` and `other`; `alone`: the
    other has every sample in a row of its own."""
    size = "tiny" if device == "cpu" else "8b, 2 layers"
    SIZES.setdefault("8b, 2 layers", SIZES["8b"] | {"num_layers": LAYERS})
    base = FAST | {"dtype": "fp32", "compute_dtype": "fp32", "compile": False}
    base |= {"seq_len": 512 if device == "cpu" else 2048, "micro_batch_size": 1}
    folder = config_folder(size)
    first, second = (job_of(size, base | keys, device, folder) for keys in (one, other))
    rows = rows_of(first, 2, 1)[0]
    others = [[sample] for row in rows for sample in row] if alone else rows
    _, loss, gradients = gradients_of(first, micro_batches(first, rows))
    _, loss2, gradients2 = gradients_of(second, micro_batches(second, others))
    return verdict(loss, loss2, apart(gradients, gradients2), 1e-3)


def attention(unit: Row, device: str) -> Row:
    kind = "varlen" if device == "cpu" else "flex"  # a CPU has no flex
    return same_gradients(device, {"attention": "dense"}, {"attention": kind})


def compiled(unit: Row, device: str) -> Row:
    keys = {"attention": "dense"} if device == "cpu" else {}
    return same_gradients(device, keys, keys | {"compile": True})


def packed(unit: Row, device: str) -> Row:
    keys = {"attention": "auto"}
    return same_gradients(device, keys, keys | {"packed": False}, alone=True)


def fused(unit: Row, device: str) -> Row:
    """Our chunked cross-entropy against torch's on whole logits, with 8B's head in bf16."""
    torch.manual_seed(0)
    rows, width, vocabulary = (64, 32, 1000) if device == "cpu" else (4096, 4096, 128_771)
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) / width**0.5
    weight.requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=device)
    ours = linear_cross_entropy(hidden, weight, labels, torch.zeros_like(labels), 1, 1024).sum()
    found = dict(enumerate(torch.autograd.grad(ours, (hidden, weight))))
    plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    expected = dict(enumerate(torch.autograd.grad(plain, (hidden, weight))))
    return verdict(plain.item() / rows, ours.item() / rows, apart(expected, found), 2e-2)


def as_cpu(unit: Row, device: str) -> Row:
    """A step of pure bf16 on the GPU and on the CPU, from the same weights."""
    size = "tiny" if device == "cpu" else "1b"
    keys = FAST | {"compile": False, "attention": "dense", "packed": False, "seq_len": 512}
    keys |= {"micro_batch_size": 1}
    folder, losses, found, weights = config_folder(size), [], [], None
    for place in (device, "cpu"):
        job = job_of(size, keys, place, folder)
        parts = micro_batches(job, rows_of(job, 2, 1)[0][:1])
        trainer, loss, gradients = gradients_of(job, parts, weights)
        if weights is None:
            weights = {n: t.to("cpu", copy=True) for n, t in trainer.model.state_dict().items()}
        found.append({n: g.to("cpu", copy=True) for n, g in gradients.items()})
        trainer.clipped_norm()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        after, _ = trainer.backward(parts)
        after_loss = sum(v for v, _ in after.values()) / sum(n for _, n in after.values())
        losses += [(loss, after_loss)]
    row = verdict(losses[0][0], losses[1][0], apart(*found), 5e-2)
    return row | {"after_step": [after for _, after in losses]}


def resume(unit: Row, device: str) -> Row:
    """A run killed in the middle and started again, against one that was left alone."""
    path = Path(tempfile.mkdtemp())
    parts = small_training.make_parts(path, width=64, heads=1)
    keys: Row = {"epochs": 6, "seq_len": 256, "batch_size": 2}
    recipes = [
        small_training.recipe(parts, path / name, runtime={"device": device}, **keys)
        for name in ("killed", "alone")
    ]
    out, alone = path / "killed", path / "alone"
    process = subprocess.Popen(
        small_training.command(recipes[0]), cwd=small_training.ROOT, stdout=sys.stderr
    )

    def kill_after_a_state() -> None:
        while not state.complete_steps(out / "state") and process.poll() is None:
            time.sleep(0.01)
        small_training.kill(process)

    watcher = threading.Thread(target=kill_after_a_state)
    watcher.start()
    loop.run(small_training.job(recipes[1]))  # meanwhile
    watcher.join()
    if process.returncode >= 0:
        raise RuntimeError(f"the run to be killed ended by itself: {process.returncode}")
    steps = len(small_training.losses(out))
    loop.run(small_training.job(recipes[0]))
    losses, expected = small_training.losses(out), small_training.losses(alone)
    weights, others = small_training.weights(alone), small_training.weights(out)
    off = apart(weights, others)
    equal = losses == expected and all(torch.equal(t, others[n]) for n, t in weights.items())
    row = verdict(expected[-1], losses[-1], off, 1e-2)
    row["ok"] &= steps < len(expected) == len(losses)
    row["measured"] = f"killed at step {steps} of {len(expected)}: " + (
        "bit-equal" if equal else f"last loss +- {row['loss_off']:.1e}, weights +- {off:.1e}"
    )
    return row | {"bit_equal": equal}


def train(unit: Row, device: str) -> Row:
    """A case of bench_train, and what preflight says of it: speed (thus hours) and memory."""
    size, name = "tiny" if device == "cpu" else unit["size"], unit["name"]
    options = {"size": size, "device": device, "steps": "1" if device == "cpu" else "3"}
    row = bench_train.measure(options, name, config_folder(size))
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    goal = GOALS.get(name) if size == "8b" else None
    said = f"{row['said_tokens_per_s']:,.0f} tokens/s, " if row["said_tokens_per_s"] else ""
    hours = [1e9 / s / 3600 for s in (row["said_tokens_per_s"], row["tokens_per_s"]) if s]
    return row | {
        "measured": f"{row['tokens_per_s']:,.0f} useful tokens/s{mfu}, peak {row['peak_gib']} GiB, "
        f"{hours[-1]:,.0f} h for 10^9 tokens",
        "beside": f"preflight: {said}{row['said_gib']} GiB"
        + (f", {hours[0]:,.0f} h" if said else "")
        + (f"; goal {goal:,} tokens/s" if goal else ""),
        "ok": None if goal is None else row["tokens_per_s"] >= goal,
    }


def tokenize(unit: Row, device: str) -> Row:
    """Ways of bench_tokenize with the dimensions of Whisper medium."""
    small = {"size": "micro", "clips": "4", "batch": str(min(4, unit["batch"]))}
    large = {"size": "medium", "clips": str(unit["clips"]), "batch": str(unit["batch"])}
    options = bench_tokenize.DEFAULTS | (small if device == "cpu" else large)
    options |= {"device": device, "only": unit["only"], "repeats": "1"}
    options["threads"] = str(max(2, (os.cpu_count() or 2) - 4))
    _, speeds = bench_tokenize.speeds(options)
    best = speeds.get("pipeline, bfloat16", 0.0)
    return {
        "x_real_time": speeds,
        "options": options,
        "measured": ", ".join(f"{way}: {speed:,.0f} x" for way, speed in speeds.items()),
        "beside": f"goal {REAL_TIME:,} x real time in bf16" if best else "",
        "ok": best >= REAL_TIME if best and device == "cuda" else None,
    }


def latency(unit: Row, device: str) -> Row:
    """From the waveform of a question to the first token of the answer: quantizer, then decoder, as
    stages.ask calls them; both on the GPU."""
    size, speech = ("tiny", "micro") if device == "cpu" else ("8b", "medium")
    path = Path(tempfile.mkdtemp())
    small_training.make_parts(path)
    start = {"_component_": "speechfuse.tokens.mean_and_covariance"}
    expansion.expand(path / "init", path / "asked", 512, "0" * 64, 0, start)
    shape = LlamaConfig(**shape_of(SIZES[size]))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(shape).eval()
    torch.set_default_dtype(torch.float32)
    quantizer = bench_tokenize.quantizer_of(speech, device)
    with patch.object(generation, "load", lambda *_: model):
        generator = generation.Generator(path / "asked", None, "the question")
    seconds: dict[str, Any] = {}
    for length in (2, 10):
        waveform = np.random.default_rng(0).normal(0, 0.1, length * 16_000).astype(np.float32)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            (codes,) = quantizer.encode([waveform])
            heard = time.perf_counter()
            turns = [{"role": "user", "segments": [{"speech": {"codes": codes}}]}]
            generator.reply([turns], 1)
            times.append((heard - began, time.perf_counter() - began))
        encode, whole = (statistics.median(part) for part in zip(*times[2:], strict=True))
        seconds[f"{length} s"] = {"quantizer": round(encode, 4), "first_token": round(whole, 4)}
    shown = (
        f"{name} question: {s['first_token'] * 1000:,.0f} ms (quantizer "
        f"{s['quantizer'] * 1000:,.0f})"
        for name, s in seconds.items()
    )
    return {"latency": seconds, "measured": "; ".join(shown), "beside": "", "ok": None}


PARTS: dict[str, Callable[[Row, str], Row]] = {
    "flex = dense": attention,
    "compile = eager": compiled,
    "packed = unpacked": packed,
    "fused = plain cross-entropy": fused,
    "1B on the GPU = CPU": as_cpu,
    "kill and resume": resume,
    "train": train,
    "tokenize": tokenize,
    "latency": latency,
}


def main(device: str, results: str, *units: str) -> None:
    threads = 1 if device == "cpu" else os.cpu_count() or 1
    commit = Path("commit.txt")  # of a bundle
    about = {
        "code": commit.read_text() if commit.exists() else provenance.commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "libraries": provenance.libraries(),
    }
    if device == "cpu":
        torch.compiler.set_stance("force_eager")
    with open(results, "a", buffering=1) as file:
        for text in units:
            unit = json.loads(text)
            print(json.dumps({"begin": unit["unit"]}), file=file)
            torch.set_num_threads(threads)
            try:
                row = PARTS[unit["part"]](unit, device)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                print(json.dumps({"failed": f"{type(error).__name__}: {lines[0]}"}), file=file)
                raise
            print(json.dumps(about | row), file=file)
            bench_train.free()
            if device == "cuda" and torch.cuda.memory_allocated() > GIB:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
