"""The plan of a run: all that is decided, and all that can be refused, before its first step.

In: the keys of a recipe and the number of ranks. Out: the artifact, the data of every step, the
decoder without its weights, and settings that follow from them. Rank 0 prints what the run will
need (memory, disk, hours, price). Only the cache is written.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speechfuse import artifact, config
from speechfuse.fusion import views as fusion_views
from speechfuse.fusion.recordings import recordings
from speechfuse.hub import data as hub_data
from speechfuse.samples import datasets, packing
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import check_quantizer, read_speech
from speechfuse.train import attention, backbone, gpus, guards, optimizers, state
from speechfuse.train.backbone import Decoder
from speechfuse.train.config import Finetune, check_warmup
from speechfuse.train.metrics import Flops, Meter
from speechfuse.train.model import decoder_of
from speechfuse.train.preflight import assumed
from speechfuse.train.preflight.data import Data
from speechfuse.train.preflight.report import PreflightReport, micro_batch

VERSION = 2
# keys for how a step is computed on the GPUs at hand: they change a run by rounding only
ROUNDING = (
    "micro_batch_size activation_checkpointing compile attention loss_chunk shard_group"
).split()
# keys that came later: a run that was begun without them goes on where they are not set
ADDED = ("adapter", "encoder", "joined", "keep", "new_rows_only", "rates")


@dataclass(frozen=True)
class RunPlan:
    """`micro` rows make one forward pass of a rank; `meter` measures speed and price."""

    job: Finetune
    artifact: artifact.Artifact
    mixture: datasets.Mixture
    decoder: Decoder
    meter: Meter
    micro: int
    rank: int
    ranks: int
    encoder: str | None = None  # identity of what made the frames


def plan_run(job: Finetune, rank: int, ranks: int) -> RunPlan | None:
    """Return the plan of `job`; None where there is nothing to train: a dry run, or a run that is
    complete. Rank 0 prints what the run will need. Raises ValueError for every mistake that can be
    found before the first step."""
    if job.runtime.dry_run and job.runtime.gpus:
        ranks = job.runtime.gpus
    micro, device = micro_batch(job, ranks), gpus.device_of(job.runtime.device)
    if ranks % (job.shard_group or 1):
        number = "1 rank" if ranks == 1 else f"{ranks} ranks"
        raise ValueError(f"shard_group={job.shard_group} does not divide the {number}")
    place = torch.device("cuda") if job.runtime.gpu else device
    attention.kind_of(job.attention, place, job.packed, job.seq_len)
    optimizers.check(job.optimizer, ranks > 1 or job.compute_dtype != job.dtype)
    pins = state.broadcast_from_rank0(pins_of(job) if rank == 0 else None)
    lacks = assumed.missing(job, pins)
    if lacks and not job.runtime.dry_run:
        raise ValueError("; ".join(lacks))
    absent = bool(lacks) and not Path(job.checkpoint).exists()
    decoder = decoder_of(job, assumed.shape(job.model, lacks) if absent else None)
    flops = Flops.of(decoder.model, decoder.shape)
    meter = Meter(flops, gpus.of(device), ranks, job.runtime.dollars_per_gpu_hour)
    gpu, full = job.runtime.gpu, replace(job, model=decoder.spec)
    planned = meter if gpu is None else replace(meter, gpu=gpus.named(gpu))
    report_of = partial(PreflightReport, full, decoder.model, planned, micro)
    if lacks:
        report = report_of(Data.expected_by(job, micro))
        print("\n".join([*lacks, *report.lines()]))  # no check(): inputs are not here
        return None
    work = _artifact(job, pins)
    if state.broadcast_from_rank0(rank == 0 and not job.fresh and _complete(work, job)):
        return None
    weights.headers(Path(job.checkpoint))
    mixture = load_data(job, pins)
    views = [each.view for each in mixture.indexes]
    encoder = fusion_views.check(views, job.adapter, job.encoder)
    if encoder and "encoder" in read_speech(Path(job.checkpoint)):
        check_quantizer(Path(job.checkpoint), encoder, "the speech of datasets")
    left_out = guards.check_rejected(job.runtime.guards, mixture)
    if rank == 0:
        report = report_of(Data.of(mixture, ranks, micro))
        print("\n".join([*left_out, *report.lines()]))
        report.check()
        check_warmup(job.warmup_steps, mixture.plan.counts.steps)
        begun = {} if job.fresh else work.record().get("plan") or {}
        if begun and begun != mixture.plan.identity():
            raise ValueError(
                f"{job.out}: it began with another plan of its data, so that some samples would "
                "come twice and others never: go on with the code and numpy of its start, or "
                "fresh=true"
            )
    if job.runtime.dry_run:
        return None
    return RunPlan(job, work, mixture, decoder, meter, micro, rank, ranks, encoder)


def pins_of(job: Finetune) -> dict[str, str | None]:
    """Return the commit to read for each path of `datasets` on the Hub, None for folders."""
    paths = dict.fromkeys(spec["path"] for spec in job.datasets if "path" in spec)
    begun = None if job.fresh else Path(job.out)
    return {path: hub_data.pinned(path, begun) for path in paths}


def _artifact(job: Finetune, pins: dict[str, str | None]) -> artifact.Artifact:
    inputs = {"checkpoint": artifact.fingerprint_of(Path(job.checkpoint))}
    for path, pin in pins.items():
        inputs[path] = pin or artifact.fingerprint_of(Path(path))
    settings = asdict(job)
    settings["runtime"] |= {key: settings.pop(key) for key in ROUNDING}
    begun = Path(job.out) / "plan.json"
    stated = json.loads(begun.read_text("utf-8"))["config"] if begun.is_file() else {}
    for key in ADDED:
        if not settings[key] and key not in stated:
            del settings[key]
    if job.encoder:
        inputs["encoder"] = backbone.encoder_of(job.encoder).identity
    return artifact.Artifact(Path(job.out), "finetune", VERSION, settings, inputs)


def _complete(work: artifact.Artifact, job: Finetune) -> bool:
    """Return whether the run is complete. Prints that it is, and each key of ROUNDING that had
    another value when it began. Raises ValueError for a folder that belongs to another run."""
    complete = work.complete()
    begun = work.record()["config"]["runtime"] if work.started() else vars(job)
    for key in ROUNDING:
        if (before := begun.get(key)) != (now := getattr(job, key)):
            goes_on = f"and not {now}" if complete else f"goes on with {now}"
            other = f"{work.out}: begun with {key}={before}, {goes_on}"
            print(f"{other}: the result is equal but for rounding")
    if complete:
        print(f"{work.out}: complete, nothing to do")
    return complete


def _given(job: Finetune, spec: dict[str, Any]) -> dict[str, Any]:
    """Return what a dataset of recordings is given beside its own keys."""
    if config.resolve(str(spec.get("_component_", "builtins.dict"))) is not recordings:
        return {}
    encoder = backbone.encoder_of(job.encoder) if job.encoder else None
    stream = encoder and encoder.stream | {"window": encoder.window, "steps": encoder.steps}
    return {"encoder": stream, "root": job.runtime.roots.get(spec.get("path", ""))}


def load_data(job: Finetune, pins: dict[str, str | None]) -> datasets.Mixture:
    """Return the data and the plan of all steps, from the cache where it has them."""
    here = {path: {"path": str(hub_data.local(pin))} for path, pin in pins.items() if pin}
    if unknown := job.runtime.roots.keys() - pins.keys():
        raise ValueError(f"runtime.roots: {min(unknown)} is no path of datasets, {', '.join(pins)}")
    specs = [spec | here.get(spec.get("path", ""), {}) | _given(job, spec) for spec in job.datasets]
    rows = packing.Shape(job.seq_len, job.batch_size, job.packed)
    checkpoint, cache = Path(job.checkpoint), Path(job.runtime.cache)
    what = specs, checkpoint, rows, job.epochs, job.steps, job.seed, cache
    return datasets.load(*what, job.joined)
