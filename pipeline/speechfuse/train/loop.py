"""The training loop of both stages and of the base model.

In: a recipe (the keys of config.Finetune). Out, in the run's folder: metrics.jsonl and
TensorBoard's files (one entry a step), state/ (for resuming), epoch_0/, epoch_1/ ... (Hugging Face
files) and manifest.json. Started again after a stop it goes on from its last state and ends as if
nothing had happened.
"""

import hashlib
import os
import signal
import sys
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchtune.training import get_cosine_schedule_with_warmup
from tqdm import tqdm

from speechfuse import artifact, provenance
from speechfuse.samples import datasets
from speechfuse.train import checkpoint, gpus, guards, optimizers, state
from speechfuse.train.config import Finetune
from speechfuse.train.metrics import Metrics, read
from speechfuse.train.new_rows import WATCHED, NewRows
from speechfuse.train.plan import RunPlan, plan_run
from speechfuse.train.preflight.data import positions
from speechfuse.train.trainer import Trainer


def join(device: str, mixed: bool) -> None:
    """Join torchrun's process group on `device` (runtime.device); a process alone makes its own
    where it needs one: for `mixed` precision, which is FSDP2's."""
    alone = "RANK" not in os.environ
    if alone and not mixed:
        return
    group: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    place, backend = gpus.device_of(device), "gloo"
    if place.type == "cuda":
        gpus.check_ranks(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.cuda.set_device(place)
        # gloo for what the background thread that writes states has to agree on
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=state.PATIENCE, **group)


def run(job: Finetune) -> None:
    """Train as `job` says. Under torchrun call it on every rank, in a process group."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(job.runtime.threads or max(1, (os.cpu_count() or 1) // ranks))
    plan = plan_run(job, rank, ranks)
    if plan is None:
        return
    resumed = plan.artifact.started() and not job.fresh
    identity = plan.mixture.plan.identity()
    begun = plan.artifact.begin(identity, job.fresh) if rank == 0 else None
    if state.broadcast_from_rank0(begun):
        _train(plan, resumed)


def _train(plan: RunPlan, resumed: bool) -> None:
    job, mixture, out, on_rank0 = plan.job, plan.mixture, Path(plan.job.out), plan.rank == 0
    counts, shape, trainer = mixture.plan.counts, mixture.plan.shape, Trainer(job, plan.decoder)
    optimizer = trainer.optimizer
    peaks = optimizers.rates(optimizer)
    schedule = get_cosine_schedule_with_warmup(optimizer, job.warmup_steps, counts.steps)
    factor = schedule.lr_lambdas[0]  # the same for every group
    alone = job.new_rows_first, job.new_rows_only
    rows = NewRows(trainer.model, mixture.vocabulary.layout, *alone)
    states = state.States(out / "state", trainer.model, optimizer)
    done = states.restore()
    if on_rank0 and resumed:
        print(f"{out}: goes on at step {done + 1:,} of {counts.steps:,}")
    earlier = [line for line in read(out / "metrics.jsonl") if line["step"] <= done]
    watch = guards.Watch(job.runtime.guards, earlier, job.new_rows_first)
    run = job.runtime.tracker, plan.artifact.fingerprint, asdict(job)
    metrics = Metrics(out, done, plan.meter, *run) if on_rank0 else None
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop", True))
    bar = tqdm(total=counts.steps, initial=done, desc=out.name, unit="step", disable=not on_rank0)
    loader, interrupted = _loader(plan, done, job.runtime.loader_workers), False
    began = time.perf_counter()
    for step, parts in enumerate(loader, done + 1):
        if isinstance(parts, Exception):
            raise parts
        losses, stop = trainer.backward(parts)
        rows.before_step(step)
        norm = trainer.clipped_norm()
        targets = sum(count for _, count in losses.values())
        loss = sum(value for value, _ in losses.values()) / max(1, targets)
        optimizers.set_rates(optimizer, [peak * factor(step - 1) for peak in peaks])
        fault = watch.fault(step, loss, norm)
        if fault:
            _leave_out(step, fault, plan, states, watch)
        else:
            optimizer.step()
        rows.after_step(step)
        measured = rows.measure(step)
        optimizer.zero_grad(set_to_none=True)
        if metrics:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            lengths, epoch = mixture.lengths(step - 1), sum(end < step for end in counts.epoch_ends)
            values = {"grad_norm": norm, "lr": optimizers.rates(optimizer)[0], "targets": targets}
            values |= {"epoch": epoch, **measured}
            values["positions"] = positions(lengths, shape, plan.ranks, plan.micro)
            values |= {f"loss_{name}": value / n for name, (value, n) in losses.items() if n}
            quarantined = {"quarantined": fault} if fault else {}
            metrics.add(step, loss, list(chain(*lengths)), seconds, **values, **quarantined)
            bar.set_postfix(metrics.shown())
        bar.update()
        if metrics and step == min(WATCHED, counts.steps):
            if verdict := rows.verdict(read(metrics.path)):
                bar.write(verdict)
        # the epoch is written before the state that would let a resumed run go past it
        for epoch, end in enumerate(counts.epoch_ends):
            if end == step:
                states.wait()  # or the machine's memory would hold both at once
                _export(plan, epoch)
        interrupted = stop and step < counts.steps
        if interrupted or (step % job.runtime.state_every == 0 and step < counts.steps):
            states.save(step)
        if interrupted:
            break
    states.wait()
    bar.close()
    if metrics:
        metrics.close()
    if interrupted:
        if on_rank0:
            print(f"{out}: stopped by SIGTERM; step {step} is saved: run again to resume")
        sys.exit(128 + signal.SIGTERM)
    if on_rank0:
        _finish(plan.artifact, mixture, rows.count_trained(trainer.trained))


def _loader(plan: RunPlan, done: int, workers: int) -> DataLoader:
    """Return the micro-batches of this rank by step, after `done` steps."""
    return DataLoader(
        datasets.Batches(plan.mixture, plan.rank, plan.ranks, plan.micro),
        batch_size=None,
        sampler=range(done, plan.mixture.plan.counts.steps),
        num_workers=workers,
        pin_memory=gpus.device_of(plan.job.runtime.device).type == "cuda",
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # or every start would draw from the model's own chance
    )


def _leave_group(worker: int) -> None:
    """Leave the process group, so that torchrun's SIGTERM to the group does not end a worker of the
    loader: the rank, which is to save its state, would be stopped by the death of its worker."""
    os.setpgid(0, 0)


def _leave_out(
    step: int, fault: str, plan: RunPlan, states: state.States, watch: guards.Watch
) -> None:
    """Write the rows of a step that may not reach the weights to <run>/quarantine. Raises
    ValueError where the run is to stop, after its state before the step is saved."""
    out = plan.artifact.out
    watch.quarantined += 1
    if plan.rank == 0:
        guards.write_rows(out / "quarantine", step, fault, plan.mixture)
    many = watch.quarantined > watch.guards.most
    if watch.guards.policy == "quarantine" and not many:
        return
    states.save(step - 1)
    states.wait()
    raise ValueError(
        f"{out}: step {step}: {fault}"
        + (f", and {watch.quarantined - 1} steps before it were left out" if many else "")
        + f"; its rows are in {out}/quarantine/step_{step}.jsonl, the state before is saved; "
        f"just bisect-batch RECIPE {step} finds the row; runtime.guards.policy=quarantine leaves "
        "such steps out"
    )


def _export(plan: RunPlan, epoch: int) -> None:
    """Write epoch_<n>/ where it is not there yet. Its manifest.json has a fingerprint of its own,
    and all that the run was started from."""
    work = plan.artifact
    out = work.out / f"epoch_{epoch}"
    if state.broadcast_from_rank0(out.exists()):
        return
    name = hashlib.sha256(f"{work.fingerprint}/{epoch}".encode()).hexdigest()
    manifest = {"fingerprint": name, "epoch": epoch, "run": work.record()}
    end, speech = plan.mixture.vocabulary.end_of_turn, None
    if plan.job.adapter:
        generator = "speechfuse.evals.SpliceGenerator"
        speech = {"generator": generator, "adapter": plan.job.adapter, "encoder": plan.encoder}
        speech["base"] = provenance.portable(plan.job.checkpoint)
        views = [each.view for each in plan.mixture.indexes]
        codecs = [codec for view in views if (codec := getattr(view, "codec", None))]
        speech |= {"codec": provenance.portable(codecs[0])} if codecs else {}
    checkpoint.export(plan.decoder, end, out, manifest, speech)


def _finish(work: artifact.Artifact, mixture: datasets.Mixture, trained: int) -> None:
    lines, counts = read(work.out / "metrics.jsonl"), mixture.plan.counts
    useful = counts.tokens / sum(line["positions"] for line in lines)
    good = [line["loss"] for line in lines if "quarantined" not in line]
    bad, last = len(lines) - len(good), good[-1] if good else None
    totals = asdict(counts) | {"useful_share": round(useful, 4), "last_loss": last}
    del totals["epoch_ends"]
    rejected = [len(each.rejected) for each in mixture.indexes]
    totals |= {"rejected": rejected, "quarantined_steps": bad}
    totals["trained_parameters"] = trained
    totals["left_out"] = [each.left_out for each in mixture.indexes]
    totals["without_target"] = [each.without_target for each in mixture.indexes]
    written = work.out.glob("epoch_*/**/*.safetensors")  # a LoRA's too
    work.finish(totals, [work.out / "metrics.jsonl", *written])
    print(
        f"{work.out}: {counts.steps:,} steps, last loss {last and round(last, 3)}, "
        f"{counts.tokens:,} tokens ({useful:.1%} of the positions), {len(counts.epoch_ends)} epochs"
        + (f", {bad} steps in quarantine" if bad else "")
    )
