"""The training loop of both stages and of the base model.

In: a checkpoint with a manifest, datasets, and a recipe (the `Finetune` keys). Out, in the run's
folder: metrics.jsonl and TensorBoard's files (one entry a step), state/ (for resuming), epoch_0/,
epoch_1/ ... (Hugging Face files) and manifest.json. Losses are divided by the number of target
tokens of the whole step, over all ranks and micro-batches. Started again after a stop it goes on
from its last state and ends as if nothing had happened.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchtune.training import get_cosine_schedule_with_warmup
from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.hub import data as hub_data
from speechfuse.samples import datasets, packing
from speechfuse.tokens.vocabulary import read_config
from speechfuse.train import attention, gpus, guards, optimizers, state
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.config import Finetune
from speechfuse.train.metrics import Flops, Meter, Metrics, read
from speechfuse.train.new_rows import WATCHED, NewRows
from speechfuse.train.preflight import assumed
from speechfuse.train.preflight import report as preflight_report

VERSION = 2
# how a step is computed on the GPUs at hand: other values change the rounding of a run, no more
ROUNDING = (
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    "attention",
    "loss_chunk",
    "shard_group",
)
Step = Callable[[nn.Module, dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]


def join(job: Finetune) -> None:
    """Join torchrun's process group; a process alone makes its own where it needs one."""
    alone = "RANK" not in os.environ
    if alone and job.compute_dtype == job.dtype:
        return
    # mixed precision is FSDP2's, which needs a process group, be it of one
    place: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    if torch.cuda.is_available() and job.runtime.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # gloo for what the background thread that writes states has to agree on
        dist.init_process_group("cpu:gloo,cuda:nccl", **place)
    else:
        dist.init_process_group("gloo", **place)


def device_of(name: str) -> torch.device:
    """The device of this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def _check(job: Finetune, ranks: int) -> int:
    """The micro-batch size; ValueError for sizes that do not divide and names that do not exist."""
    for key in ("dtype", "compute_dtype"):
        if getattr(job, key) not in DTYPES:
            raise ValueError(f"{key}={getattr(job, key)!r}: choose one of {sorted(DTYPES)}")
    for key, least in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("seq_len", 2)):
        if (value := getattr(job, key)) is not None and value < least:
            raise ValueError(f"{key}={value}: at least {least} is needed")
    return preflight_report.micro_batch(job, ranks)


def pins_of(job: Finetune) -> dict[str, str | None]:
    """The commit to read for each path of `datasets` that is on the Hub, None for folders."""
    paths = dict.fromkeys(spec["path"] for spec in job.datasets if "path" in spec)
    begun = None if job.fresh else Path(job.out)
    return {path: hub_data.pinned(path, begun) for path in paths}


def _artifact(job: Finetune, pins: dict[str, str | None]) -> artifact.Artifact:
    inputs = {"checkpoint": artifact.fingerprint_of(Path(job.checkpoint))}
    for path, pin in pins.items():
        inputs[path] = pin or artifact.fingerprint_of(Path(path))
    settings = asdict(job)
    settings["runtime"] |= {key: settings.pop(key) for key in ROUNDING}
    return artifact.Artifact(Path(job.out), "finetune", VERSION, settings, inputs)


def _begun(job: Finetune, work: artifact.Artifact) -> bool:
    """Whether the run is complete, which is said, as is what it was begun with otherwise; what
    belongs to another run is refused."""
    complete = work.complete()
    if (work.out / "plan.json").exists():
        begun = json.loads((work.out / "plan.json").read_text())["config"]["runtime"]
        for key in ROUNDING:
            if begun.get(key) != (now := getattr(job, key)):
                goes_on = f"and not {now}" if complete else f"goes on with {now}"
                print(
                    f"{work.out}: begun with {key}={begun.get(key)}, {goes_on}: the result "
                    "is equal but for rounding"
                )
    if complete:
        print(f"{work.out}: complete, nothing to do")
    return complete


def load_data(job: Finetune, pins: dict[str, str | None]) -> datasets.Mixture:
    """The mixture and the plan of all steps; what they need is read once and then kept."""
    here = {path: {"path": str(hub_data.local(pin))} for path, pin in pins.items() if pin}
    specs = [spec | here.get(spec.get("path", ""), {}) for spec in job.datasets]
    shape = packing.Shape(job.seq_len, job.batch_size, job.packed)
    return datasets.load(
        specs,
        Path(job.checkpoint),
        shape,
        job.epochs,
        job.steps,
        job.seed,
        Path(job.runtime.cache),
    )


def _about(work: artifact.Artifact, epoch: int) -> dict[str, Any]:
    """manifest.json of an epoch: its own fingerprint, and all that the run was started from."""
    name = hashlib.sha256(f"{work.fingerprint}/{epoch}".encode()).hexdigest()
    run = json.loads((work.out / "plan.json").read_text())
    return {"fingerprint": name, "epoch": epoch, "run": run}


@dataclass
class Trainer:
    """The parts of a run that every step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    attention: str
    device: torch.device
    clip: float | None

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.stop = False

    def on_device(self, part: dict[str, Tensor]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()
        }
        batch["mask"] = attention.mask_of(batch.pop("document"), self.attention)
        return batch

    def backward(self, parts: list[dict[str, Tensor]]) -> tuple[dict[str, tuple[float, int]], bool]:
        """Forward and backward of one optimizer step: ({name: (loss sum, targets)} over all ranks,
        whether a rank was asked to stop). Gradients are then of the mean over all targets."""
        names: list[str] = []
        sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        for part in parts:
            losses = self.step(self.model, self.on_device(part))
            torch.stack([value for value, _ in losses.values()]).sum().backward()
            found = torch.stack(
                [each.detach().double() for pair in losses.values() for each in pair]
            )
            sums = found if not names else sums + found
            names = list(losses)
        sums = torch.cat([sums, sums.new_tensor([float(self.stop)])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        *values, stop = sums.tolist()
        result = {name: (values[2 * i], int(values[2 * i + 1])) for i, name in enumerate(names)}
        # FSDP2 averages gradients over ranks, so their sum is that times the ranks
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        targets = max(1, sum(count for _, count in result.values()))
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.mul_(ranks / targets)
        return result, stop > 0

    def clipped_norm(self) -> float:
        """The norm of the gradient before clipping."""
        limit = self.clip if self.clip is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def prepare(job: Finetune) -> Trainer:
    """Model and optimizer as `job` says, with the checkpoint's weights."""
    device = device_of(job.runtime.device)
    torch.manual_seed(job.seed)
    model = models.build(
        job.model,
        Path(job.checkpoint),
        device,
        job.dtype,
        job.compute_dtype,
        activation_checkpointing=job.activation_checkpointing,
        compile=job.compile,
        shard_group=job.shard_group,
        loss_chunk=job.loss_chunk,
        seed=job.seed,
    )
    models.freeze(model, job.freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainer(
        model,
        optimizers.make(job.optimizer, trained),
        config.resolve(job.step),
        attention.kind_of(job.attention, device, job.packed, job.seq_len),
        device,
        job.clip_grad_norm,
    )


def meter_of(job: Finetune, trainer: Trainer, ranks: int) -> Meter:
    """What speed, utilisation and money are measured against."""
    flops = Flops.of(trainer.model, read_config(Path(job.checkpoint)))
    gpu = None
    if trainer.device.type == "cuda":
        about = torch.cuda.get_device_properties(trainer.device)
        gpu = gpus.reported(about.name, about.total_memory)
    return Meter(flops, gpu, ranks, job.runtime.dollars_per_gpu_hour)


def _leave_group(worker: int) -> None:
    """A loader worker that torchrun's SIGTERM to the group does not end: the rank, which wants to
    save its state, would be stopped by the death of its worker."""
    os.setpgid(0, 0)


def _bad_step(
    job: Finetune,
    step: int,
    fault: str,
    mixture: datasets.Mixture,
    states: state.States,
    watch: guards.Watch,
    rank: int,
) -> None:
    """Write out the rows of a step that may not reach the weights. ValueError where the run is to
    stop; its state before the step is then saved."""
    watch.quarantined += 1
    if rank == 0:
        guards.write_rows(Path(job.out) / "quarantine", step, fault, mixture)
    many = watch.quarantined > watch.guards.most
    if watch.guards.policy == "quarantine" and not many:
        return
    states.save(step - 1)
    states.wait()
    raise ValueError(
        f"{job.out}: step {step}: {fault}"
        + (f", and {watch.quarantined - 1} steps before it were left out" if many else "")
        + f"; its rows are in {job.out}/quarantine/step_{step}.jsonl, the state before is saved; "
        f"just bisect-batch RECIPE {step} finds the row; runtime.guards.policy=quarantine leaves "
        "such steps out"
    )


def check_and_plan(
    job: Finetune, rank: int, ranks: int
) -> tuple[artifact.Artifact, datasets.Mixture] | None:
    """The run's artifact and the plan of its data after all that can be refused was; None where
    there is nothing to train. Rank 0 says what the run takes. Nothing is written but the cache."""
    if job.runtime.dry_run and job.runtime.gpus:
        ranks = job.runtime.gpus
    micro, device = _check(job, ranks), device_of(job.runtime.device)
    pins = state.broadcast_from_rank0(pins_of(job) if rank == 0 else None)
    checkpoint = Path(job.checkpoint)
    lacks = assumed.missing(job, pins)
    if lacks and not job.runtime.dry_run:
        raise ValueError("; ".join(lacks))
    there = checkpoint.exists()
    shape = models.check_shape(job.model, checkpoint) if there else assumed.shape(job.model, lacks)
    if lacks:
        data, caveat = assumed.data(job)
        report = preflight_report.preflight(job, shape, data, ranks, device)
        print("\n".join([*lacks, caveat, *report.lines()]))  # not of this disk: no check
        return None
    work = _artifact(job, pins)
    if state.broadcast_from_rank0(_begun(job, work) if rank == 0 and not job.fresh else False):
        return None
    mixture = load_data(job, pins)
    said = guards.check_rejected(job.runtime.guards, mixture)
    if rank == 0:
        data = preflight_report.Data.of(mixture, ranks, micro)
        report = preflight_report.preflight(job, shape, data, ranks, device)
        print("\n".join([*said, *report.lines()]))
        report.check()
    return work, mixture


def run(job: Finetune) -> None:
    """Train as `job` says. Under torchrun call it on every rank, in a process group."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out = Path(job.out)
    torch.set_num_threads(job.runtime.threads or max(1, (os.cpu_count() or 1) // ranks))
    begun = (out / "plan.json").exists() and not job.fresh
    found = check_and_plan(job, rank, ranks)
    if found is None or job.runtime.dry_run:
        return
    work, mixture = found
    if not state.broadcast_from_rank0(work.begin(fresh=job.fresh) if rank == 0 else None):
        return
    micro, counts = preflight_report.micro_batch(job, ranks), mixture.plan.counts
    trainer = prepare(job)
    optimizer = trainer.optimizer
    peaks = optimizers.rates(optimizer)
    (factor,) = get_cosine_schedule_with_warmup(
        optimizer, job.warmup_steps, counts.steps
    ).lr_lambdas
    rows = NewRows(trainer.model, mixture.vocabulary.layout, job.new_rows_first)
    states = state.States(out / "state", trainer.model, optimizer)
    done = states.restore()
    if rank == 0 and begun:
        print(f"{out}: goes on at step {done + 1:,} of {counts.steps:,}")
    meter = meter_of(job, trainer, ranks)
    metrics = Metrics(
        out, done, meter, rank == 0, job.runtime.tracker, work.fingerprint, asdict(job)
    )
    watch = guards.Watch(job.runtime.guards, metrics.earlier, job.new_rows_first)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop", True))
    batches = datasets.Batches(mixture, rank, ranks, micro)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(done, counts.steps),
        num_workers=job.runtime.loader_workers,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # or every start would draw from the model's own chance
    )
    bar = tqdm(total=counts.steps, initial=done, desc=out.name, unit="step", disable=rank != 0)
    started = time.perf_counter()
    for step, parts in enumerate(loader, done + 1):
        losses, stop = trainer.backward(parts)
        rows.before_step(step)
        norm = trainer.clipped_norm()
        targets = sum(count for _, count in losses.values())
        loss = sum(value for value, _ in losses.values()) / max(1, targets)
        optimizers.set_rates(optimizer, [peak * factor(step - 1) for peak in peaks])
        fault = watch.fault(step, loss, norm)
        if fault:
            _bad_step(job, step, fault, mixture, states, watch, rank)
        else:
            optimizer.step()
        rows.after_step(step)
        measured = rows.measure(step)
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            lengths = mixture.lengths(step - 1)
            seconds, started = time.perf_counter() - started, time.perf_counter()
            metrics.add(
                step,
                loss,
                [n for row in lengths for n in row],
                seconds,
                grad_norm=norm,
                lr=optimizers.rates(optimizer)[0],
                targets=targets,
                epoch=sum(end < step for end in counts.epoch_ends),
                **measured,
                positions=preflight_report.positions(
                    list(map(sum, lengths)), job.packed, job.seq_len, ranks, micro
                ),
                **{f"loss_{name}": value / n for name, (value, n) in losses.items() if n},
                **({"quarantined": fault} if fault else {}),
            )
            bar.set_postfix(metrics.shown())
        bar.update()
        if rank == 0 and step == min(WATCHED, counts.steps):
            if said_of := rows.verdict(read(metrics.path)):
                bar.write(said_of)
        # the epoch is written before the state that would let a resumed run go past it
        for epoch, end in enumerate(counts.epoch_ends):
            if end == step and not state.broadcast_from_rank0((out / f"epoch_{epoch}").exists()):
                about = _about(work, epoch)
                models.export(trainer.model, Path(job.checkpoint), out / f"epoch_{epoch}", about)
        if step < counts.steps and (stop or step % job.runtime.state_every == 0):
            states.save(step)
        if step < counts.steps and stop:
            states.wait()
            metrics.close()
            bar.close()
            if rank == 0:
                print(f"{out}: stopped by SIGTERM; step {step} is saved: run again to resume")
            sys.exit(128 + signal.SIGTERM)
    states.wait()
    metrics.close()
    bar.close()
    if rank == 0:
        _finish(work, mixture)


def _finish(work: artifact.Artifact, mixture: datasets.Mixture) -> None:
    lines = read(work.out / "metrics.jsonl")
    counts = mixture.plan.counts
    useful = counts.tokens / sum(line["positions"] for line in lines)
    bad = sum("quarantined" in line for line in lines)
    last = next((line["loss"] for line in reversed(lines) if "quarantined" not in line), None)
    totals = {
        "steps": counts.steps,
        "tokens": counts.tokens,
        "useful_share": round(useful, 4),
        "samples": counts.samples,
        "dropped": counts.dropped,
        "left_out": [each.left_out for each in mixture.indexes],
        "rejected": [len(each.rejected) for each in mixture.indexes],
        "quarantined_steps": bad,
        "last_loss": last,
    }
    work.finish(totals, [work.out / "metrics.jsonl", *work.out.glob("epoch_*/*.safetensors")])
    print(
        f"{work.out}: {counts.steps:,} steps, last loss {last and round(last, 3)}, "
        f"{counts.tokens:,} tokens ({useful:.1%} of the positions), {len(counts.epoch_ends)} epochs"
        + (f", {bad} steps in quarantine" if bad else "")
    )
