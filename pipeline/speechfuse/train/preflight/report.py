"""What a run will need and cost, known before it starts.

In: a recipe, config.json of its checkpoint and the plan of its data. Out: a report in lines
(parameters, memory of a GPU part by part, data, disk, hours, dollars), and a refusal where it
cannot work. Nothing is loaded: parameters are counted on the meta device. Speed comes from what was
measured here (`just bench train` adds to recipes/measurements.jsonl) for the same model, GPU and
settings; where nothing was, from an assumption that is marked as one. Without data hours and price
follow from what the recipe expects of it (runtime.expected), or are unknown.
"""

import json
import os
import re
import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speechfuse.train import attention, gpus, metrics, state
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.config import Finetune
from speechfuse.train.preflight import memory
from speechfuse.train.preflight.data import Data
from speechfuse.train.preflight.machine import free_memory

MEASUREMENTS = Path("recipes/measurements.jsonl")
# keys of a recipe in which a measurement must agree to count for it
SETTINGS = "seq_len packed dtype compute_dtype activation_checkpointing compile".split()
ASSUMED_MFU = 0.4  # share of a GPU's peak, with padding and recomputation as work
PROCESS = 3 * gpus.GIB  # of the machine, for each rank: libraries and the driver; assumed
EXPORTED = 1.1  # of its weights, what an epoch takes while it is gathered and written
RESERVE, FRAGMENTS = 2 * gpus.GIB, 0.04  # of the driver and NCCL, and of what is in use
GROUPS = {"adapters": r"lora_|magnitude", "speech encoder": r"emb\w*\.encoder\."}
GROUPS |= {"initial state": r"time_state$", "speech adapter": r"emb\w*\.adapter\."}
GROUPS |= {"embeddings": r"embed|^emb\.", "head": r"^(output|head)\."}


def micro_batch(job: Finetune, ranks: int) -> int:
    """Return the rows of a forward on a rank. Raises ValueError when the batch does not divide."""
    batch, rest = divmod(job.batch_size, ranks)
    if rest:
        low = max(1, batch) * ranks
        raise ValueError(
            f"batch_size={job.batch_size} is not a multiple of the {ranks} ranks: batch_size={low} "
            f"or {low + ranks} is, and it divides among {_divisors(job.batch_size)} ranks"
        )
    micro = job.micro_batch_size or batch
    if batch % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {batch} rows of each of {ranks} ranks: "
            f"choose one of {_divisors(batch)}"
        )
    return micro


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class PreflightReport:
    """What a run needs and costs.

    parameters  (all, those that train) by group
    limit       bytes of memory of a GPU, or of the machine for each rank
    needed      bytes of memory on each, with a reserve for what cannot be counted
    written     bytes of the machine's memory that a state or an epoch takes on its way to the disk
    host        those and the processes', beside GPUs
    local       ranks of a machine; all where torchrun has not said
    host_limit  bytes of the machine's memory; None: another machine is planned for
    disk        bytes that the states and epochs of the run take, of `free` ones that it may use
    speed       tokens a second and GPU, None: not known; `source`: where that is from
    """

    def __init__(
        self,
        job: Finetune,
        model: nn.Module,
        meter: metrics.Meter,
        micro: int,
        data: Data | None,
        measurements: Path = MEASUREMENTS,
    ) -> None:
        """Plan `job`, whose key `model` has all its arguments, on the GPUs of `meter`. `model`:
        without memory, frozen as in training; `micro`: rows of a forward; `data`: None where some
        is not there yet. Raises ValueError for data without a sample and names that do not exist.
        """
        if data and not (data.counts.steps and data.counts.tokens):
            raise ValueError(f"{job.out}: the datasets hold no sample; see their paths, select")
        self.job, self.meter, self.data = job, meter, data
        gpu, ranks, size = meter.gpu, meter.gpus, DTYPES[job.dtype].itemsize
        longest, passes = data.longest if data else job.seq_len, job.batch_size // ranks // micro
        self.memory = memory.of(job, micro, longest, passes, ranks, gpu is not None)
        peak = self.memory.peak
        self.parameters = _count(model)
        trained = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        weights = size * sum(map(prod, trained))
        self.state_bytes = weights + memory.optimizer_bytes(job, trained)
        merged = [count for group, (count, _) in self.parameters.items() if group != "adapters"]
        self.epoch_bytes = size * sum(merged)
        # a state is copied before it is written, each rank's part of it on the rank's machine; an
        # epoch is gathered on one, and waits for the state before it
        self.local = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
        part = self.state_bytes * self.local // ranks
        self.written = max(part, int(EXPORTED * self.epoch_bytes))
        self.host = self.written + self.local * PROCESS
        own = self.written // self.local
        self.needed = int(peak * (1 + FRAGMENTS)) + RESERVE if gpu else peak + own
        self.limit = gpu.memory if gpu else free_memory() // self.local
        self.host_limit = None if job.runtime.gpu else free_memory()
        self.epochs = len(data.counts.epoch_ends) if data else job.epochs
        self.disk = (state.KEEP + 1) * self.state_bytes + self.epochs * self.epoch_bytes
        self.free = _free(Path(job.out))
        self.speed, self.source = self._speed(measurements)
        self.hours = self.dollars = None
        if self.speed and data:
            self.hours = data.counts.tokens / self.speed / ranks / 3600
            self.dollars = meter.spent(self.hours * 3600)

    def lines(self) -> list[str]:
        """Return the table that is printed."""
        meter, data, ranks = self.meter, self.data, self.meter.gpus
        where = f"{ranks} x {meter.gpu.name}" if meter.gpu else f"the CPU, {ranks} ranks"
        total = sum(count for count, _ in self.parameters.values())
        groups = ", ".join(
            f"{name} {count:,}" + (f" (of these {trained:,} train)" if trained < count else "")
            for name, (count, trained) in self.parameters.items()
        )
        fits = "fits" if self.needed <= self.limit else "DOES NOT FIT"
        parts = {f"weights ({self.job.dtype})": self.memory.weights}
        parts |= {"optimizer state": self.memory.optimizer, **self.memory.step}
        rest = "reserve (assumed)" if meter.gpu else "state or epoch on its way to the disk"
        parts[rest] = self.needed - self.memory.peak
        host = f"{_gib(self.host)} on a machine with {self.local} of the {ranks} ranks"
        if self.host_limit is not None:
            host += f", of {_gib(self.host_limit)}: {'fits' if self.host_fits else 'DOES NOT FIT'}"
        steps = data.counts.steps if data else self.job.steps
        number = f"{steps:,}" if steps else "unknown number,"
        short = f"; steps={steps} ends the last early" if data and steps == self.job.steps else ""
        speed = f"{self.speed:,.0f} tokens/s a GPU, " if self.speed else "not known: "
        rows = {
            "run": f"{self.job.out} on {where}",
            "parameters": f"{total:,}: {groups}",
            "memory": f"{_gib(self.needed)} of {_gib(self.limit)} for each rank: {fits}",
            **{f"  {name}": _gib(size) for name, size in parts.items()},
            **({"host memory": host} if meter.gpu else {}),
            "data": str(data or "unknown, and so are time and price"),
            "steps": f"{number} of {self.job.batch_size} rows, epochs: {self.epochs}{short}",
            "disk": f"{state.KEEP + 1} states of {_gb(self.state_bytes)}, {self.epochs} epochs "
            f"of {_gb(self.epoch_bytes)}: {_gb(self.disk)} of {_gb(self.free)} here: "
            + ("fits" if self.disk <= self.free else "DOES NOT FIT"),
            "speed": speed + self.source,
        }
        if (hours := self.hours) is not None:
            rows["time"] = (
                f"{hours:,.1f} h, {hours * ranks:,.1f} GPU hours"
                if hours > 0.1
                else f"{3600 * hours:.3g} s, {3600 * hours * ranks:.3g} GPU seconds"
            )
        if self.dollars is not None:
            rows["price"] = f"${self.dollars:,.2f} at ${meter.dollars:,.2f} a GPU hour"
        guesses = [
            *(["data as the recipe expects it"] if data and data.expected else []),
            *(["a speed that is assumed"] if self.source.startswith("assumed") else []),
        ]
        for name in {"time", "price"} & rows.keys() if guesses else ():
            rows[name] += f", for {' and '.join(guesses)}"
        rows["formula"] = meter.about()
        width = max(map(len, rows))
        return [f"{name.ljust(width)}  {text}" for name, text in rows.items()]

    @property
    def host_fits(self) -> bool:
        return self.host_limit is None or self.host <= self.host_limit

    def check(self) -> None:
        """Raise ValueError for a run that cannot work."""
        if self.needed > self.limit:
            one = self.meter.gpu.name if self.meter.gpu else "this machine"
            raise ValueError(
                f"{self.job.out} needs {_gib(self.needed)} of memory for each rank and {one} has "
                f"{_gib(self.limit)}: take more or larger GPUs, a smaller micro_batch_size or "
                "seq_len, activation_checkpointing=full, 8-bit optimizer states or dtype=bf16"
            )
        if self.meter.gpu and not self.host_fits:
            raise ValueError(
                f"{self.job.out} needs {_gib(self.host)} of the machine's memory while it writes a "
                f"state or an epoch, and {_gib(self.host_limit or 0)} are free: take more "
                "machines, free some, or take 8-bit optimizer states or dtype=bf16"
            )
        if self.disk > self.free:
            raise ValueError(
                f"{self.job.out} will take {_gb(self.disk)} and its disk has {_gb(self.free)} "
                "free: make room, set out to another disk, or take fewer epochs"
            )

    def _speed(self, measurements: Path) -> tuple[float | None, str]:
        """Return tokens a second and GPU, and where that is known from."""
        job, meter, data = self.job, self.meter, self.data
        if meter.gpu is None:
            return None, "runtime.gpu names the GPU to plan for"
        cuda = torch.device("cuda")
        settings: dict[str, Any] = {key: getattr(job, key) for key in SETTINGS} | {
            "gpu": meter.gpu.name,
            "builder": job.model["_component_"],
            "optimizer": job.optimizer["_component_"],
            "parameters": sum(count for count, _ in self.parameters.values()),
            "trained": sum(count for _, count in self.parameters.values()),
            "attention": attention.kind_of(job.attention, cuda, job.packed, job.seq_len),
        }
        lines = measurements.read_text().splitlines() if measurements.exists() else []
        for row in reversed([json.loads(line) for line in lines]):
            if settings.items() <= row.items():
                return row["tokens_per_s"], f"measured: {row['command']} ({row['date']})"
        if data is None:
            return None, "nothing was measured, and an assumption needs the data"
        if meter.gpu.peak is None:
            return None, f"no peak of {meter.gpu.name} is known and nothing was measured"
        every = models.RECOMPUTED[job.activation_checkpointing]
        again = 1 + (1 / every if every else 0) / 3  # a forward pass is a third of the work
        tokens, teraflops = data.counts.tokens, meter.gpu.peak / 1e12
        work = meter.flops.of_tokens(tokens, data.pairs) / tokens * again * data.positions / tokens
        source = (
            f"assumed: {ASSUMED_MFU:.0%} of {teraflops:g} TFLOP/s, padding and recomputation count "
            "as work; just bench train measures it"
        )
        return ASSUMED_MFU * meter.gpu.peak / work, source


def _gib(size: float) -> str:
    """Format memory, so that there is something to read of a small model too."""
    return f"{size / gpus.GIB:,.2f} GiB" if size > gpus.GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def _count(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (parameters, those that train) by group."""
    every, trained = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), "layers")
        every[group] += parameter.numel()
        trained[group] += parameter.numel() * parameter.requires_grad
    return {group: (count, trained[group]) for group, count in every.items()}


def _free(out: Path) -> int:
    """Return the bytes that the run may use: what is free, and what it has taken already."""
    folder = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    own = [path for name in ("state", "epoch_*") for path in out.glob(f"{name}/**/*")]
    return shutil.disk_usage(folder).free + sum(p.stat().st_size for p in own if p.is_file())
