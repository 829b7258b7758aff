"""The training loop of both stages and of the base model.

In: a checkpoint with a manifest, datasets, and a recipe (the `Finetune` keys). Out, in the run's folder: metrics.jsonl (one line a step),
state/ (for resuming), epoch_0/, epoch_1/ ... (Hugging Face files) and manifest.json. Losses are divided by the number of target tokens of the whole
step, over all ranks and micro-batches. Started again after a stop it goes on from its last state and ends as if nothing had happened.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtune.training import get_cosine_schedule_with_warmup
from tqdm import tqdm

from speechfuse import artifact, config, datasets
from speechfuse.train import model as models
from speechfuse.train import state


@dataclass
class Runtime:
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where present"})
    threads: int = field(default=0, metadata={"help": "CPU threads a rank; 0 divides the cores among ranks"})
    state_every: int = field(default=200, metadata={"help": "steps between saved states"})


@dataclass
class Finetune:
    out: str = field(metadata={"help": "folder of the run"})
    checkpoint: str = field(metadata={"help": "Hugging Face folder to start from, made by a job here"})
    model: dict[str, Any] = field(metadata={"help": "torchtune builder of that checkpoint's shape"})
    datasets: list[dict[str, Any]] = field(metadata={"help": "entries {_component_, path, share, ...}"})
    seq_len: int = field(metadata={"help": "tokens of a pack"})
    batch_size: int = field(metadata={"help": "packs of an optimizer step, over all ranks"})
    epochs: int = field(metadata={"help": "passes over the first dataset"})
    optimizer: dict[str, Any] = field(metadata={"help": "torch optimizer with its lr"})
    warmup_steps: int = field(metadata={"help": "linear warm-up, then cosine to 0"})
    micro_batch_size: int = field(default=0, metadata={"help": "packs of one forward a rank; 0: all"})
    clip_grad_norm: float | None = field(default=None, metadata={"help": "null: no clipping"})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions of parameter names not trained"}
    )
    dtype: str = field(default="fp32", metadata={"help": "of the weights and moments: fp32 or bf16"})
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
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def _check(job: Finetune, ranks: int) -> int:
    """The micro-batch size; ValueError for sizes that do not divide and names that do not exist."""
    for key in ("dtype", "compute_dtype"):
        if getattr(job, key) not in models.DTYPES:
            raise ValueError(f"{key}={getattr(job, key)!r}: choose one of {sorted(models.DTYPES)}")
    if job.compute_dtype != job.dtype and ranks == 1 and not dist.is_initialized():
        raise ValueError(
            f"compute_dtype={job.compute_dtype} differs from dtype={job.dtype}: that needs torchrun "
            "(FSDP2's mixed precision); start with torchrun --nproc-per-node 1, or make them equal"
        )
    if job.batch_size % ranks:
        raise ValueError(f"batch_size={job.batch_size} is not a multiple of the {ranks} ranks")
    own = job.batch_size // ranks
    micro = job.micro_batch_size or own
    if own % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {own} packs that each of {ranks} ranks has"
        )
    return micro


class Metrics:
    """metrics.jsonl: one line a step, on rank 0. Lines after the restored step are taken back."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        artifact.write_atomic(path, "".join(f"{line}\n" for line in kept))

    def add(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def run(job: Finetune) -> None:
    """Train as `job` says. Under torchrun call it on every rank, with the process group initialised."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    micro = _check(job, ranks)
    checkpoint, out = Path(job.checkpoint), Path(job.out)
    models.check_shape(job.model, checkpoint)
    inputs = {"checkpoint": artifact.fingerprint_of(checkpoint)}
    inputs |= {s["path"]: artifact.fingerprint_of(Path(s["path"])) for s in job.datasets if "path" in s}
    work = artifact.Artifact(out, "finetune", 1, asdict(job), inputs)
    if rank == 0:
        todo = work.begin(fresh=job.fresh)
    if dist.is_initialized():
        answer = [todo if rank == 0 else None]
        dist.broadcast_object_list(answer)
        todo = bool(answer[0])
    if not todo:
        return
    device = _device(job.runtime.device)
    torch.set_num_threads(job.runtime.threads or max(1, (os.cpu_count() or 1) // ranks))
    vocabulary, mixture = datasets.load(
        job.datasets, checkpoint, job.seq_len, job.batch_size, job.seed
    )
    if mixture.dropped and rank == 0:
        print(f"{mixture.dropped} samples longer than seq_len={job.seq_len} tokens are left out")
    model = models.build(
        job.model, checkpoint, device, job.dtype, job.compute_dtype, job.recompute
    )
    if job.compile:
        model.compile()
    models.freeze(model, job.freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = config.instantiate(job.optimizer, params=trained)
    epochs = [mixture.batches(epoch) for epoch in range(job.epochs)]
    total = sum(map(len, epochs))
    schedule = get_cosine_schedule_with_warmup(optimizer, job.warmup_steps, total)
    done = state.restore(out / "state", model, optimizer)
    schedule.last_epoch = done - 1
    schedule.step()
    metrics = Metrics(out / "metrics.jsonl", done) if rank == 0 else None
    step_function = config.resolve(job.step)
    bar = tqdm(total=total, initial=done, desc=out.name, unit="step", disable=rank != 0)
    step = 0
    for epoch, batches in enumerate(epochs):
        for packs in batches:
            step += 1
            if step <= done:
                continue
            started = time.perf_counter()
            own = packs[rank::ranks]
            parts = [
                {k: v.to(device) for k, v in datasets.collate(own[i : i + micro], job.seq_len, vocabulary.end).items()}
                for i in range(0, len(own), micro)
            ]  # fmt: skip
            targets = sum(int((part["labels"] != datasets.IGNORE).sum()) for part in parts)
            count = torch.tensor([float(targets)], device=device)
            if dist.is_initialized():
                dist.all_reduce(count)
            loss_sum = torch.zeros(1, device=device)
            for part in parts:
                losses = step_function(model, part)
                loss = sum(value for value, _ in losses.values())
                # FSDP2 averages gradients over ranks, so each rank multiplies by their number
                (loss * ranks / count).backward()
                loss_sum += loss.detach()
            if dist.is_initialized():
                dist.all_reduce(loss_sum)
            limit = job.clip_grad_norm if job.clip_grad_norm is not None else float("inf")
            norm = torch.nn.utils.clip_grad_norm_(trained, limit)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_value = float(loss_sum / count)
            if metrics:
                useful = sum(len(s.tokens) for pack in packs for s in pack)
                seconds = time.perf_counter() - started
                metrics.add(step=step, epoch=epoch, loss=loss_value, lr=lr, grad_norm=float(norm),
                            tokens=useful, targets=int(count), seconds=round(seconds, 4))  # fmt: skip
                bar.set_postfix(loss=f"{loss_value:.3f}", tok_s=f"{useful / seconds:,.0f}")
            bar.update()
            if step % job.runtime.state_every == 0 and step < total:
                state.save(out / "state", step, model, optimizer)
        folder = out / f"epoch_{epoch}"
        if step > done or not folder.exists():
            if step <= done:
                raise ValueError(f"{folder} is gone, and the state is past it: start with fresh=true")
            if not folder.exists():
                name = hashlib.sha256(f"{work.fingerprint}/{epoch}".encode()).hexdigest()
                about = {"job": "finetune", "fingerprint": name, "run": work.fingerprint, "epoch": epoch}
                models.export(model, checkpoint, folder, about)
    bar.close()
    if rank == 0:
        outputs = [out / "metrics.jsonl", *sorted(out.glob("epoch_*/*.safetensors"))]
        useful = sum(len(s.tokens) for e in epochs for b in e for pack in b for s in pack)
        totals = {
            "steps": total, "samples": sum(mixture.counts) * job.epochs, "dropped": mixture.dropped, "tokens": useful,
            "useful_share": round(useful / (total * job.batch_size * job.seq_len), 4), "ranks": ranks,
        }  # fmt: skip
        work.finish(totals, outputs)
        print(f"{out}: {total} steps, last loss {loss_value:.3f}, {useful:,} tokens "
              f"({totals['useful_share']:.0%} of the packs), {job.epochs} epochs")  # fmt: skip
