"""The training loop of both stages and of the base model.

In: a checkpoint with a manifest, datasets, and a recipe (the `Finetune` keys). Out, in the run's
folder: metrics.jsonl (one line a step), state/ (for resuming), epoch_0/, epoch_1/ ... (Hugging Face
files) and manifest.json. Losses are divided by the number of target tokens of the whole step, over
all ranks and micro-batches. Started again after a stop it goes on from its last state and ends as
if nothing had happened.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.training import get_cosine_schedule_with_warmup
from tqdm import tqdm

from speechfuse import artifact, config, datasets, hub
from speechfuse.train import model as models
from speechfuse.train import state

VERSION = 1
Step = Callable[[nn.Module, dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]


@dataclass
class Runtime:
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where present"})
    threads: int = field(
        default=0, metadata={"help": "CPU threads a rank; 0 divides the cores among ranks"}
    )
    state_every: int = field(default=200, metadata={"help": "steps between saved states"})


@dataclass
class Finetune:
    out: str = field(metadata={"help": "folder of the run"})
    checkpoint: str = field(
        metadata={"help": "Hugging Face folder to start from, made by a job here"}
    )
    model: dict[str, Any] = field(metadata={"help": "torchtune builder of that checkpoint's shape"})
    datasets: list[dict[str, Any]] = field(
        metadata={"help": "entries {_component_, path, share, ...}; path: folder or repo@revision"}
    )
    seq_len: int = field(metadata={"help": "tokens of a pack"})
    batch_size: int = field(metadata={"help": "packs of an optimizer step, over all ranks"})
    epochs: int = field(metadata={"help": "passes over the first dataset"})
    optimizer: dict[str, Any] = field(metadata={"help": "torch optimizer with its lr"})
    warmup_steps: int = field(metadata={"help": "linear warm-up, then cosine to 0"})
    micro_batch_size: int = field(
        default=0, metadata={"help": "packs of one forward a rank; 0: all"}
    )
    clip_grad_norm: float | None = field(default=None, metadata={"help": "null: no clipping"})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "regular expressions of parameter names not trained"},
    )
    dtype: str = field(
        default="fp32", metadata={"help": "of the weights and moments: fp32 or bf16"}
    )
    compute_dtype: str = field(default="fp32", metadata={"help": "of the products: fp32 or bf16"})
    recompute: bool = field(default=False, metadata={"help": "full activation checkpointing"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    step: str = field(
        default="speechfuse.train.losses.next_token",
        metadata={"help": "dotted path of step(model, batch) -> {name: (loss sum, count)}"},
    )
    seed: int = field(default=0, metadata={"help": "of the data's order"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def _check(job: Finetune, ranks: int) -> int:
    """The micro-batch size; ValueError for sizes that do not divide and names that do not exist."""
    for key in ("dtype", "compute_dtype"):
        if getattr(job, key) not in models.DTYPES:
            raise ValueError(f"{key}={getattr(job, key)!r}: choose one of {sorted(models.DTYPES)}")
    if job.batch_size % ranks:
        raise ValueError(f"batch_size={job.batch_size} is not a multiple of the {ranks} ranks")
    own = job.batch_size // ranks
    micro = job.micro_batch_size or own
    if own % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {own} packs of each of {ranks} ranks"
        )
    return micro


class Metrics:
    """metrics.jsonl: one line a step, on rank 0. Lines after the restored step are taken back."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # the line that a kill cut short
                break
            kept.append(line)
        artifact.write_atomic(path, "".join(f"{line}\n" for line in kept))

    def add(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _agreed(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def _pins(job: Finetune, rank: int) -> dict[str, str | None]:
    """The commit to read for each path of `datasets` that is on the Hub, None for folders."""
    paths = dict.fromkeys(spec["path"] for spec in job.datasets if "path" in spec)
    begun = None if job.fresh else Path(job.out)
    return _agreed({path: hub.pinned(path, begun) for path in paths} if rank == 0 else None)


def _begin(
    job: Finetune, checkpoint: Path, pins: dict[str, str | None], rank: int
) -> tuple[artifact.Artifact, bool]:
    """The run's artifact and whether there is work; rank 0 decides, the others are told."""
    inputs = {"checkpoint": artifact.fingerprint_of(checkpoint)}
    for path, pin in pins.items():
        inputs[path] = pin or artifact.fingerprint_of(Path(path))
    work = artifact.Artifact(Path(job.out), "finetune", VERSION, asdict(job), inputs)
    return work, _agreed(work.begin(fresh=job.fresh) if rank == 0 else None)


def _about(work: artifact.Artifact, epoch: int) -> dict[str, Any]:
    """manifest.json of an epoch: its own fingerprint, and all that the run was started from."""
    name = hashlib.sha256(f"{work.fingerprint}/{epoch}".encode()).hexdigest()
    run = json.loads((work.out / "plan.json").read_text())
    return {"fingerprint": name, "epoch": epoch, "run": run}


def _total(value: Tensor) -> Tensor:
    """Sum over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _train_step(
    model: nn.Module, step: Step, parts: list[dict[str, Tensor]], trained: list[nn.Parameter]
) -> tuple[float, int]:
    """Forward and backward of one optimizer step: (loss per target, targets), over all ranks.

    Gradients are of the summed losses until the end, when the number of targets is known.
    """
    device = parts[0]["labels"].device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part in parts:
        losses = step(model, part)
        loss = torch.stack([value for value, _ in losses.values()]).sum()
        loss.backward()
        targets = torch.stack([count for _, count in losses.values()]).sum()
        sums += torch.stack([loss.detach().double(), targets.double()])
    total, count = _total(sums).tolist()
    # FSDP2 averages gradients over ranks, so their sum is that times the ranks
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad.mul_(ranks / count)
    return total / count, int(count)


def run(job: Finetune) -> None:
    """Train as `job` says. Under torchrun call it on every rank, in a process group."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    micro = _check(job, ranks)
    checkpoint, out = Path(job.checkpoint), Path(job.out)
    models.check_shape(job.model, checkpoint)
    pins = _pins(job, rank)
    work, todo = _begin(job, checkpoint, pins, rank)
    if not todo:
        return
    device = _device(job.runtime.device)
    torch.set_num_threads(job.runtime.threads or max(1, (os.cpu_count() or 1) // ranks))
    here = {path: {"path": str(hub.local(pin))} for path, pin in pins.items() if pin}
    specs = [spec | here.get(spec.get("path", ""), {}) for spec in job.datasets]
    vocabulary, mixture = datasets.load(specs, checkpoint, job.seq_len, job.batch_size, job.seed)
    if mixture.dropped and rank == 0:
        print(f"{mixture.dropped} samples longer than seq_len={job.seq_len} tokens are left out")
    model = models.build(job.model, checkpoint, device, job.dtype, job.compute_dtype, job.recompute)
    models.freeze(model, job.freeze)
    if job.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = config.instantiate(job.optimizer, params=trained)
    steps = [
        (epoch, i + 1 == len(batches), packs)
        for epoch, batches in enumerate(map(mixture.batches, range(job.epochs)))
        for i, packs in enumerate(batches)
    ]
    peaks = [group["lr"] for group in optimizer.param_groups]
    (factor,) = get_cosine_schedule_with_warmup(optimizer, job.warmup_steps, len(steps)).lr_lambdas
    done = state.restore(out / "state", model, optimizer)
    metrics = Metrics(out / "metrics.jsonl", done) if rank == 0 else None
    step_function = config.resolve(job.step)
    limit = job.clip_grad_norm if job.clip_grad_norm is not None else float("inf")
    bar = tqdm(total=len(steps), initial=done, desc=out.name, unit="step", disable=rank != 0)
    for step, (epoch, last, packs) in enumerate(steps[done:], done + 1):
        started = time.perf_counter()
        own = packs[rank::ranks]
        parts = [
            datasets.collate(own[i : i + micro], job.seq_len, vocabulary.end, device)
            for i in range(0, len(own), micro)
        ]
        loss, targets = _train_step(model, step_function, parts, trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if metrics:
            tokens = sum(len(sample.tokens) for pack in packs for sample in pack)
            seconds = round(time.perf_counter() - started, 4)
            metrics.add(
                step=step,
                epoch=epoch,
                loss=loss,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=float(norm),
                tokens=tokens,
                targets=targets,
                seconds=seconds,
            )
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens / seconds:,.0f}")
        bar.update()
        # the epoch is written before the state that would let a resumed run go past it
        if last and not (out / f"epoch_{epoch}").exists():
            models.export(model, checkpoint, out / f"epoch_{epoch}", _about(work, epoch))
        if step % job.runtime.state_every == 0 and step < len(steps):
            state.save(out / "state", step, model, optimizer)
    bar.close()
    if rank == 0:
        _finish(job, work, steps, mixture)


def _finish(
    job: Finetune, work: artifact.Artifact, steps: list[Any], mixture: datasets.Mixture
) -> None:
    lines = [json.loads(line) for line in (work.out / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["tokens"] for line in lines)
    useful = tokens / (len(steps) * job.batch_size * job.seq_len)
    totals = {
        "steps": len(steps), "samples": sum(mixture.counts) * job.epochs, "tokens": tokens,
        "dropped": mixture.dropped, "useful_share": round(useful, 4),
        "last_loss": lines[-1]["loss"],
    }  # fmt: skip
    work.finish(totals, [work.out / "metrics.jsonl", *work.out.glob("epoch_*/*.safetensors")])
    print(
        f"{work.out}: {len(steps)} steps, last loss {lines[-1]['loss']:.3f}, {tokens:,} tokens "
        f"({useful:.0%} of the packs), {job.epochs} epochs"
    )
