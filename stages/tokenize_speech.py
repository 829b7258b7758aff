"""Turn a corpus of speech into a dataset of codes.

    python -m stages.tokenize_speech recipes/demo/tokenize_train.yaml

In: a corpus (speechfuse.corpora) and a quantizer. Out: Parquet shards of speech rows, one reject
list per shard and a manifest. A shard is made whole by one worker process or not at all; after a
stop only missing shards are made. Audio longer than the quantizer's window is split at quiet
places; what was split, resampled, mixed down, filtered or rejected is counted and said.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from speechfuse import artifact, config, hub, shards, tokenizing, workers
from speechfuse.corpora import Clip
from speechfuse.inspection import FILTERED, bytes_of_codes
from speechfuse.quantizer import Quantizer


@dataclass
class QuantizerOf:
    checkpoint: str = field(
        metadata={"help": "folder of ours, or a published WhisperVQ .model file"}
    )
    whisper: str | None = field(
        default=None, metadata={"help": "openai-whisper .pt beside a .model"}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "float32 (exact) or bfloat16 (faster; changes some codes)"},
    )


@dataclass
class Runtime:
    workers: int = field(
        default=2, metadata={"help": "processes on the CPU, each with one thread and one quantizer"}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda (a process per GPU), or auto"}
    )
    decode_threads: int = field(default=2, metadata={"help": "of each process, beside the encoder"})
    prefetch: int = field(default=32, metadata={"help": "clips decoded ahead of the encoder"})
    max_reject_rate: float = field(
        default=0.1, metadata={"help": "more rejects than this stop the job"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what would be done, and stop"})
    engine: dict[str, Any] = field(
        default_factory=lambda: {"_component_": "speechfuse.workers.processes"},
        metadata={"help": "speechfuse.cluster.ray_actors for more machines than one"},
    )


@dataclass
class TokenizeSpeech:
    out: str = field(metadata={"help": "folder of the dataset"})
    corpus: dict[str, Any] = field(metadata={"help": "a corpus of speechfuse.corpora"})
    quantizer: QuantizerOf = field(metadata={"help": "what makes the codes"})
    filters: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "of speechfuse.filters, in order"}
    )
    drop_duplicate_audio: bool = field(
        default=False, metadata={"help": "keep the first of clips with the same samples"}
    )
    shard_size: int = field(default=500, metadata={"help": "clips of a shard"})
    batch_size: int = field(default=16, metadata={"help": "clips of one encoder pass"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


@cache
def _quantizer(path: str, whisper: str | None, dtype: str, device: str) -> Quantizer:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    quantizer = Quantizer.load(Path(path), Path(whisper) if whisper else None)
    quantizer.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return quantizer.to(device)


@cache
def _corpus(spec: str) -> Any:
    return config.instantiate(json.loads(spec))


def tokenize_shard(job: TokenizeSpeech, index: int, shard: dict[str, Any]) -> int:
    """Make shard `index` in a worker process; returns its index."""
    of = job.quantizer
    quantizer = _quantizer(of.checkpoint, of.whisper, of.dtype, workers.device())
    clips = _corpus(json.dumps(job.corpus)).clips(shard)
    same = shard.get("same_audio", {})
    made = tokenizing.tokenize(
        (_unless_known(clip, same) for clip in clips),
        quantizer,
        job.batch_size,
        [config.instantiate(spec) for spec in job.filters],
        job.runtime.decode_threads,
        job.runtime.prefetch,
    )
    path = Path(job.out) / shards.shard_name(index)
    shards.write_rejects(path, made.rejects)
    shards.write_shard(path, made.rows, shards.SPEECH, quantizer.stream, made.counts)
    return index


def _unless_known(clip: Any, same: dict[str, str]) -> Any:
    if clip.id not in same:
        return clip
    return tokenizing.Reject(clip.id, f"{FILTERED}duplicate audio: same as {same[clip.id]}")


def digests_of(job: TokenizeSpeech, index: int, shard: dict[str, Any]) -> tuple[int, list]:
    """(id, hash of the 16 kHz samples) of a shard's clips that decode, in a worker process."""

    def digest(clip: Any) -> tuple[str, str] | None:
        try:
            waveform = tokenizing.decode(clip).waveform if isinstance(clip, Clip) else None
        except ValueError:
            return None
        if waveform is None:
            return None
        return clip.id, hashlib.sha256(waveform.tobytes()).hexdigest()

    clips = _corpus(json.dumps(job.corpus)).clips(shard)
    runtime = job.runtime
    found = tokenizing.ahead(digest, clips, runtime.decode_threads, runtime.prefetch)
    return index, [pair for pair in found if pair]


def _mark_duplicates(job: TokenizeSpeech, plan: list[dict[str, Any]]) -> None:
    tasks = [(job, i, shard) for i, shard in enumerate(plan)]
    found: dict[int, list] = {}
    with tqdm(total=len(tasks), desc="duplicates", unit="shard") as bar:
        for index, pairs in _run(job, digests_of, tasks):
            found[index] = pairs
            bar.update()
    first: dict[str, str] = {}
    for index, pairs in sorted(found.items()):
        for id, digest in pairs:
            if first.setdefault(digest, id) != id:
                plan[index].setdefault("same_audio", {})[id] = first[digest]


def _run(job: TokenizeSpeech, function: Any, tasks: list[tuple]) -> Any:
    runtime = job.runtime
    return config.instantiate(
        runtime.engine, function=function, tasks=tasks, workers=runtime.workers,
        device=runtime.device,
    )  # fmt: skip


def _kinds(rejects: list[dict[str, str]], filtered: bool) -> dict[str, int]:
    kinds = [reject["reason"].partition(":")[0] for reject in rejects]
    wanted = [kind for kind in kinds if kind.startswith(FILTERED) == filtered]
    return dict(sorted(Counter(wanted).items()))


def _faults(rejects: list[dict[str, str]]) -> list[dict[str, str]]:
    return [reject for reject in rejects if not reject["reason"].startswith(FILTERED)]


def _check_rejects(job: TokenizeSpeech, faults: list[dict[str, str]], clips: int) -> None:
    """ValueError once more clips are rejected than may be in the whole corpus of so many clips."""
    if len(faults) > job.runtime.max_reject_rate * clips:
        raise ValueError(
            f"{job.out}: {len(faults)} of {clips} clips were rejected, more than "
            f"runtime.max_reject_rate={job.runtime.max_reject_rate}; first: {faults[0]['id']}: "
            f"{faults[0]['reason']}; all are in {job.out}/shard-*.rejects.jsonl, and finished "
            "shards are kept"
        )


def totals_of(paths: list[Path], rejects: list[dict[str, str]]) -> dict[str, Any]:
    """What the finished shards hold, counted from disk, so that a resumed job counts the same."""
    counts: Counter[str] = Counter()
    seconds, codes, rows, size = 0.0, 0, 0, 0
    for path in paths:
        counts.update(shards.read_counts(path))
        for row in shards.read_shard(path, ["seconds", "codes"]):
            seconds, codes, rows = seconds + row["seconds"], codes + len(row["codes"]), rows + 1
        size += bytes_of_codes(path)
    named = ("split", "pieces", "resampled", "mixed_down", "without_text")
    return {
        "rows": rows,
        "hours": round(seconds / 3600, 4),
        "codes": codes,
        "bits_per_code": round(8 * size / max(1, codes), 3),
        **{name: counts[name] for name in named},
        "rejected": _kinds(rejects, filtered=False),
        "filtered": _kinds(rejects, filtered=True),
    }


def plan_of(job: TokenizeSpeech, corpus: Any) -> dict[str, Any]:
    """What plan.json holds: the shards, and how many files of which suffix the corpus ignores."""
    plan = corpus.plan(job.shard_size)
    if not plan:
        raise ValueError(
            f"corpus {job.corpus['_component_']} has no audio to tokenize"
            + "".join(f", {k}={v}" for k, v in job.corpus.items() if k != "_component_")
            + (f"; ignored by suffix: {corpus.ignored}" if getattr(corpus, "ignored", {}) else "")
        )
    if job.drop_duplicate_audio and not job.runtime.dry_run:
        _mark_duplicates(job, plan)
    return {"shards": plan, "ignored": dict(getattr(corpus, "ignored", {}))}


def main(job: TokenizeSpeech) -> None:
    out = Path(job.out)
    if job.shard_size < 1 or job.batch_size < 1:
        raise ValueError(
            f"shard_size={job.shard_size}, batch_size={job.batch_size}: both must be at least 1"
        )
    of = job.quantizer
    if of.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"quantizer.dtype={of.dtype!r}: choose float32 or bfloat16")
    workers.gpus(job.runtime.device)
    for spec in job.filters:
        config.instantiate(spec)
    corpus = config.instantiate(job.corpus)
    quantizer = _quantizer(of.checkpoint, of.whisper, of.dtype, "cpu")
    if job.runtime.dry_run:
        shard_list = plan_of(job, corpus)["shards"]
        clips = sum(shard["count"] for shard in shard_list)
        said = f"{clips:,} clips of {corpus.source_name} in {len(shard_list)} shards"
        print(f"{out}: {said}; not started")
        return
    begun = None if job.fresh else out
    found = hub.kept(corpus.fingerprint, "corpus", begun)
    inputs = {"corpus": found, "quantizer": quantizer.identity}
    work = artifact.Artifact(out, "tokenize_speech", 2, asdict(job), inputs)
    if not work.begin(lambda: plan_of(job, corpus), fresh=job.fresh):
        return
    plan = work.plan["shards"]
    clips = sum(shard["count"] for shard in plan)
    paths = [out / shards.shard_name(i) for i in range(len(plan))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    rejects = {i: shards.read_rejects(path) for i, path in enumerate(paths) if path.exists()}
    done = sum(plan[i]["count"] for i in rejects)
    faults = [each for i in sorted(rejects) for each in _faults(rejects[i])]
    _check_rejects(job, faults, clips)
    with tqdm(total=clips, initial=done, desc=out.name, unit="clip") as bar:
        for i in _run(job, tokenize_shard, [(job, i, plan[i]) for i in missing]):
            rejects[i] = shards.read_rejects(paths[i])
            faults += _faults(rejects[i])
            _check_rejects(job, faults, clips)
            bar.update(plan[i]["count"])
    every = [each for i in sorted(rejects) for each in rejects[i]]
    totals = totals_of(paths, every) | {
        "clips": clips,
        "dtype": of.dtype,
        "ignored": work.plan["ignored"],
        "source": corpus.source_name,
        "licence": corpus.licence,
        "quantizer": quantizer.identity,
        "token_rate": quantizer.token_rate,
    }
    if of.dtype != "float32":
        on = (workers.gpus(job.runtime.device) or ["cpu"])[0]
        equal, codes = tokenizing.exactness(
            corpus.clips(plan[0]),
            _quantizer(of.checkpoint, of.whisper, of.dtype, on),
            job.batch_size,
        )
        totals["equal_to_float32"] = {"codes": codes, "equal": equal}
    work.finish(totals, [*paths, *(p.with_suffix(".rejects.jsonl") for p in paths)])
    print(summary(out, totals))


def summary(out: Path, totals: dict[str, Any]) -> str:
    """One line: what was made and everything that happened on the way."""
    happened = [
        f"{totals[name]:,} {words}"
        for name, words in (
            ("split", f"split into {totals['pieces']:,}"),
            ("resampled", "resampled"),
            ("mixed_down", "mixed down to mono"),
            ("without_text", "without a text"),
        )
        if totals[name]
    ]
    for what in ("rejected", "filtered", "ignored"):
        if totals[what]:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(totals[what].items()))
            happened.append(f"{sum(totals[what].values()):,} {what} ({kinds})")
    if totals["rejected"] or totals["filtered"]:
        happened.append(f"listed in {out}/shard-*.rejects.jsonl")
    if "equal_to_float32" in totals:
        equal, codes = totals["equal_to_float32"]["equal"], totals["equal_to_float32"]["codes"]
        happened.append(
            f"{totals['dtype']} gave float32's code for {equal / max(1, codes):.2%} of {codes:,}"
        )
    return (
        f"{out}: {totals['hours']:.2f} h of speech from {totals['clips']:,} clips, "
        f"{totals['codes']:,} codes in {totals['rows']:,} rows, {totals['bits_per_code']} bits a "
        f"code; {'; '.join(happened) or 'nothing split, changed or rejected'}"
    )


if __name__ == "__main__":
    from stages import tokenize_speech as this  # under its own name workers elsewhere find it too

    config.main(this.main, this.TokenizeSpeech, __doc__)
