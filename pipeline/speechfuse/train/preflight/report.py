"""What a run will need and cost, known before it starts.

In: a recipe, config.json of its checkpoint and the plan of its data. Out: a report in lines
(parameters, memory of a GPU part by part, data, disk, hours, dollars), and a refusal where it
cannot work. Nothing is loaded: parameters are counted on the meta device. Speed comes from what was
measured here (`just bench train` adds to recipes/measurements.jsonl) for the same model, GPU and
settings; where nothing was, from an assumption that is marked as one.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from speechfuse.samples.datasets import Mixture
from speechfuse.train import attention, gpus, metrics, state
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.config import Finetune
from speechfuse.train.preflight import memory

MEASUREMENTS = Path("recipes/measurements.jsonl")
SETTINGS = (  # of a recipe, in which a measurement must agree to count for it
    "seq_len",
    "packed",
    "dtype",
    "compute_dtype",
    "activation_checkpointing",
    "compile",
)
USED = 0.4  # share of a GPU's peak that is assumed, with padding and recomputation as work
RESERVE, FRAGMENTS = 2 * gpus.GIB, 0.04  # of the driver and NCCL, and of what is in use
SEEN = 64  # steps of the plan that averages are taken from
RENDERED = 256  # samples that the share of targets is taken from
GROUPS = {"adapters": r"lora_|magnitude", "embeddings": r"embed", "head": r"^output\."}


@dataclass(frozen=True)
class Data:
    """The plan of a run. `samples` and `dropped` (longer than seq_len) by dataset; `positions`:
    tokens and padding; `pairs`: see metrics.pairs_of; `targets`: about so many tokens are learned;
    `longest`: the most tokens of a row."""

    samples: list[int]
    dropped: list[int]
    tokens: int
    targets: int
    positions: int
    pairs: int
    longest: int
    steps: int
    epochs: int

    @classmethod
    def of(cls, mixture: Mixture, ranks: int, micro: int) -> "Data":
        """From a plan and the lengths of its samples; positions, pairs and targets are those of
        steps and samples that lie evenly in it."""
        counts, shape = mixture.plan.counts, mixture.plan.shape
        seen = np.linspace(0, counts.steps - 1, min(SEEN, counts.steps)).astype(int).tolist()
        rows = [
            [[mixture.indexes[d].lengths[n] for d, n in row] for row in mixture.plan.rows(step)]
            for step in seen
        ]
        lengths = [int(n) for step in rows for row in step for n in row]
        times = counts.tokens / max(1, sum(lengths))
        padded = sum(
            positions(
                [sum(map(int, row)) for row in step], shape.packed, shape.seq_len, ranks, micro
            )
            for step in rows
        )
        first = [sample for step in seen for row in mixture.plan.rows(step) for sample in row]
        chosen = [mixture.indexes[d][n] for d, n in first[:: max(1, len(first) // RENDERED)]]
        learned = sum(int(sample.targets[1:].sum()) for sample in chosen)
        fitting = [int(e.lengths[e.lengths <= shape.seq_len].max()) for e in mixture.indexes]
        return cls(
            counts.samples,
            counts.dropped,
            counts.tokens,
            int(counts.tokens * learned / max(1, sum(len(sample.tokens) for sample in chosen))),
            int(times * padded),
            int(times * metrics.pairs_of(lengths)),
            shape.seq_len if shape.packed else max(fitting),
            counts.steps,
            len(counts.epoch_ends),
        )


def positions(sizes: list[int], packed: bool, seq_len: int, ranks: int, micro: int) -> int:
    """Tokens and padding of a step whose rows have these `sizes`: packs are filled up to `seq_len`,
    single samples to the longest of their micro-batch."""
    if packed:
        return len(sizes) * seq_len
    parts = (
        sizes[rank::ranks][i : i + micro]
        for rank in range(ranks)
        for i in range(0, len(sizes) // ranks, micro)
    )
    return sum(len(part) * max(1, *part) for part in parts)


def micro_batch(job: Finetune, ranks: int) -> int:
    """Rows of one forward on a rank; ValueError when the batch does not divide."""
    if job.batch_size % ranks:
        low = job.batch_size // ranks * ranks
        raise ValueError(
            f"batch_size={job.batch_size} is not a multiple of the {ranks} ranks: "
            f"batch_size={low or ranks} or {(low or ranks) + ranks} is, and it divides among "
            f"{_divisors(job.batch_size)} ranks"
        )
    own = job.batch_size // ranks
    micro = job.micro_batch_size or own
    if own % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {own} rows of each of {ranks} ranks: "
            f"choose one of {_divisors(own)}"
        )
    return micro


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


@dataclass(frozen=True)
class PreflightReport:
    """`disk`: bytes that states and epochs take, `free`: those there are; `limit`: bytes of memory
    of a GPU, or of the machine for each rank; `speed`: tokens a second and GPU, None: not known."""

    job: Any
    parameters: dict[str, tuple[int, int]]
    memory: memory.Memory
    limit: int
    meter: metrics.Meter
    data: Data
    state_bytes: int
    epoch_bytes: int
    free: int
    speed: float | None
    source: str

    @property
    def needed(self) -> int:
        """Bytes of memory on each GPU, with a reserve for what cannot be counted."""
        return (
            int(self.memory.peak * (1 + FRAGMENTS)) + RESERVE
            if self.meter.gpu
            else self.memory.peak
        )

    @property
    def disk(self) -> int:
        return (state.KEEP + 1) * self.state_bytes + self.data.epochs * self.epoch_bytes

    @property
    def hours(self) -> float | None:
        if self.speed is None:
            return None
        return self.data.tokens / self.speed / self.meter.gpus / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.hours is None else self.meter.spent(self.hours * 3600)

    def lines(self) -> list[str]:
        """The table that is printed."""
        data, ranks, meter = self.data, self.meter.gpus, self.meter
        where = f"{ranks} x {meter.gpu.name}" if meter.gpu else f"the CPU, {ranks} ranks"
        total = sum(count for count, _ in self.parameters.values())
        groups = ", ".join(
            f"{name} {count:,}" + (f" (of these {trains:,} train)" if trains < count else "")
            for name, (count, trains) in self.parameters.items()
        )
        parts = {
            f"weights ({self.job.dtype})": self.memory.weights,
            "optimizer state": self.memory.optimizer,
            **self.memory.step,
        }
        if meter.gpu:
            parts["reserve (assumed)"] = self.needed - self.memory.peak
        fits = "fits" if self.needed <= self.limit else "DOES NOT FIT"
        rows = [
            ("run", f"{self.job.out} on {where}"),
            ("parameters", f"{total:,}: {groups}"),
            ("memory", f"{_gib(self.needed)} of {_gib(self.limit)} for each rank: {fits}"),
            *((f"  {name}", _gib(size)) for name, size in parts.items()),
            (
                "data",
                f"{' + '.join(f'{n:,}' for n in data.samples)} samples "
                f"({sum(data.dropped):,} too long), {data.tokens:,} tokens, about {data.targets:,} "
                f"of them targets; {data.tokens / max(1, data.positions):.1%} of positions useful",
            ),
            ("steps", f"{data.steps:,} of {self.job.batch_size} rows, epochs: {data.epochs}"),
            (
                "disk",
                f"{state.KEEP + 1} states of {_gb(self.state_bytes)}, {data.epochs} epochs "
                f"of {_gb(self.epoch_bytes)}: {_gb(self.disk)} of {_gb(self.free)}",
            ),
            (
                "speed",
                f"{self.speed:,.0f} tokens/s a GPU, {self.source}"
                if self.speed
                else f"not known: {self.source}",
            ),
        ]
        if self.hours is not None:
            each, every = self.hours, self.hours * ranks
            rows.append(
                (
                    "time",
                    f"{each:,.1f} h, {every:,.1f} GPU hours"
                    if each > 0.1
                    else f"{3600 * each:.3g} s, {3600 * every:.3g} GPU seconds",
                )
            )
        if self.dollars is not None:
            rows.append(("price", f"${self.dollars:,.2f} at ${meter.dollars:,.2f} a GPU hour"))
        rows.append(("formula", meter.about()))
        width = max(len(name) for name, _ in rows)
        return [f"{name.ljust(width)}  {text}" for name, text in rows]

    def check(self) -> None:
        """ValueError for a run that cannot work."""
        if self.needed > self.limit:
            one = self.meter.gpu.name if self.meter.gpu else "this machine"
            raise ValueError(
                f"{self.job.out} needs {_gib(self.needed)} of memory for each rank and {one} has "
                f"{_gib(self.limit)}: take more or larger GPUs, a smaller micro_batch_size or "
                "seq_len, activation_checkpointing=full, 8-bit optimizer states or dtype=bf16"
            )
        if self.disk > self.free:
            raise ValueError(
                f"{self.job.out} will take {_gb(self.disk)} and its disk has {_gb(self.free)} "
                "free: make room, set out to another disk, or take fewer epochs"
            )


def preflight(
    job: Finetune,
    model: nn.Module,
    meter: metrics.Meter,
    micro: int,
    data: Data,
    measurements: Path = MEASUREMENTS,
) -> PreflightReport:
    """The report of `job`, whose `model` has all its arguments, on the GPUs of `meter`. `model`:
    without memory, frozen as in training; `micro`: rows of a forward. Raises ValueError for no data
    and for names that do not exist."""
    if not data.steps or not data.tokens:
        raise ValueError(
            f"{job.out}: the datasets hold no sample to train on; see their paths, select"
        )
    gpu, ranks = meter.gpu, meter.gpus
    passes = job.batch_size // ranks // micro
    used = memory.of(job, micro, data.longest, passes, ranks, gpu is not None)
    size = DTYPES[job.dtype].itemsize
    shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    merged = sum(p.numel() for name, p in model.named_parameters() if _group(name) != "adapters")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trained * size + memory.optimizer_bytes(job, shapes)
    limit = gpu.memory if gpu else _machine_memory() // ranks
    speed, source = _speed(job, meter, data, _count(model), measurements)
    return PreflightReport(
        job,
        _count(model),
        used,
        limit,
        meter,
        data,
        saved,
        merged * size,
        _free(Path(job.out)),
        speed,
        source,
    )


def _gib(size: float) -> str:
    """Memory, so that there is something to read of a small model too."""
    return f"{size / gpus.GIB:,.2f} GiB" if size > gpus.GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def _group(name: str) -> str:
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, name))
    return next(found, "layers")


def _count(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(parameters, those that train) by group."""
    every: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        every[_group(name)] += parameter.numel()
        trained[_group(name)] += parameter.numel() * parameter.requires_grad
    return {group: (count, trained[group]) for group, count in every.items()}


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(out: Path) -> int:
    """Bytes that the run may use: what is free, and what it has taken already."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    own: Iterable[Path] = [p for name in ("state", "epoch_*") for p in out.glob(f"{name}/**/*")]
    return shutil.disk_usage(there).free + sum(p.stat().st_size for p in own if p.is_file())


def _speed(
    job: Any, meter: metrics.Meter, data: Data, groups: dict[str, tuple[int, int]], path: Path
) -> tuple[float | None, str]:
    """Tokens a second and GPU, and where that is known from."""
    if meter.gpu is None:
        return None, "runtime.gpu names the GPU to plan for"
    wanted: dict[str, Any] = {key: getattr(job, key) for key in SETTINGS}
    wanted["gpu"] = meter.gpu.name
    wanted["parameters"] = sum(count for count, _ in groups.values())
    wanted["trained"] = sum(trains for _, trains in groups.values())
    gpu = torch.device("cuda")
    wanted["attention"] = attention.kind_of(job.attention, gpu, job.packed, job.seq_len)
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed([json.loads(line) for line in lines]):
        if all(line.get(key) == value for key, value in wanted.items()):
            return line["tokens_per_s"], f"measured: {line['command']} ({line['date']})"
    if meter.gpu.peak is None:
        return None, f"no peak of {meter.gpu.name} is known and nothing was measured"
    every = models.RECOMPUTED[job.activation_checkpointing]
    again = 1 + (1 / every if every else 0) / 3  # a forward pass is a third of the work
    work = meter.flops.of_tokens(data.tokens, data.pairs) / data.tokens
    work *= again * data.positions / data.tokens
    return (
        USED * meter.gpu.peak / work,
        f"assumed: {USED:.0%} of {meter.gpu.peak / 1e12:g} TFLOP/s, padding and recomputation "
        "count as work; just bench train measures it",
    )
