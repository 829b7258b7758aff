"""Turn a corpus of speech into a dataset of codes.

    python -m stages.tokenize_speech recipes/demo/tokenize_train.yaml

In: a corpus (speechfuse.corpora) and a quantizer. Out: Parquet shards of speech rows, one reject
list per shard and a manifest. A shard is made whole by one worker process or not at all; after a
stop only missing shards are made. Audio longer than the quantizer's window is split at quiet
places; what was split, resampled, mixed down, filtered or rejected is counted and said.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, config, workers
from speechfuse.corpora.clip import Clip
from speechfuse.hub import data as hub_data
from speechfuse.quantizer import tokenize
from speechfuse.quantizer.model import QuantizerSpec
from speechfuse.rows import making, shards
from speechfuse.rows.making import Runtime
from speechfuse.rows.rejects import FILTERED, Rejects, by_reason, rejects_of, write_rejects
from speechfuse.workers import prefetch


@dataclass
class TokenizeSpeech:
    out: str = field(metadata={"help": "folder of the dataset"})
    corpus: dict[str, Any] = field(metadata={"help": "a corpus of speechfuse.corpora"})
    quantizer: QuantizerSpec = field(metadata={"help": "what makes the codes"})
    filters: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "of speechfuse.audio.filters, in order"}
    )
    drop_duplicate_audio: bool = field(
        default=False, metadata={"help": "keep the first of clips with the same samples"}
    )
    shard_size: int = field(default=500, metadata={"help": "clips of a shard"})
    batch_size: int = field(default=16, metadata={"help": "clips of one encoder pass"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


@cache
def _corpus(spec: str) -> Any:
    return config.instantiate(json.loads(spec))


def tokenize_shard(job: TokenizeSpeech, index: int, shard: dict[str, Any]) -> int:
    """Make shard `index` in a worker process; returns its index."""
    quantizer = job.quantizer.load(workers.device())
    clips = _corpus(json.dumps(job.corpus)).clips(shard)
    same = shard.get("same_audio", {})
    made = tokenize.tokenize(
        (_unless_known(clip, same) for clip in clips),
        quantizer,
        job.batch_size,
        [config.instantiate(spec) for spec in job.filters],
        job.runtime.decode_threads,
        job.runtime.prefetch,
    )
    path = Path(job.out) / shards.shard_name(index)
    write_rejects(path, made.rejects)
    shards.write_shard(path, made.rows, shards.SPEECH, quantizer.stream, made.counts)
    return index


def _unless_known(clip: Any, same: dict[str, str]) -> Any:
    if clip.id not in same:
        return clip
    return tokenize.Reject(clip.id, f"{FILTERED}duplicate audio: same as {same[clip.id]}")


def digests_of(job: TokenizeSpeech, index: int, shard: dict[str, Any]) -> tuple[int, list]:
    """(id, hash of the 16 kHz samples) of a shard's clips that decode, in a worker process."""

    def digest(clip: Any) -> tuple[str, str] | None:
        try:
            waveform = tokenize.decode(clip).waveform if isinstance(clip, Clip) else None
        except ValueError:
            return None
        if waveform is None:
            return None
        return clip.id, hashlib.sha256(waveform.tobytes()).hexdigest()

    clips = _corpus(json.dumps(job.corpus)).clips(shard)
    runtime = job.runtime
    found = prefetch(digest, clips, runtime.decode_threads, runtime.prefetch)
    return index, [pair for pair in found if pair]


def _mark_duplicates(job: TokenizeSpeech, plan: list[dict[str, Any]]) -> None:
    tasks = [(job, i, shard) for i, shard in enumerate(plan)]
    found: dict[int, list] = {}
    with tqdm(total=len(tasks), desc="duplicates", unit="shard") as bar:
        for index, pairs in making.run(job.runtime, digests_of, tasks):
            found[index] = pairs
            bar.update()
    first: dict[str, str] = {}
    for index, pairs in sorted(found.items()):
        for id, digest in pairs:
            if first.setdefault(digest, id) != id:
                plan[index].setdefault("same_audio", {})[id] = first[digest]


def totals_of(paths: list[Path], rejects: Rejects) -> dict[str, Any]:
    """What the finished shards hold, counted from disk, so that a resumed job counts the same."""
    counts = making.counts_of(paths)
    speech = (
        (row["seconds"], len(row["codes"]))
        for path in paths
        for row in shards.read_shard(path, ["seconds", "codes"])
    )
    named = ("split", "pieces", "resampled", "mixed_down", "without_text")
    return {
        **making.totals_of(paths, "rows", speech),
        **{name: counts[name] for name in named},
        **by_reason(rejects),
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
    workers.gpus(job.runtime.device)
    for spec in job.filters:
        config.instantiate(spec)
    corpus = config.instantiate(job.corpus)
    quantizer = job.quantizer.load("cpu")
    if job.runtime.dry_run:
        shard_list = plan_of(job, corpus)["shards"]
        clips = sum(shard["count"] for shard in shard_list)
        said = f"{clips:,} clips of {corpus.source_name} in {len(shard_list)} shards"
        print(f"{out}: {said}; not started")
        return
    begun = None if job.fresh else out
    found = hub_data.pinned_commit(corpus.fingerprint, "corpus", begun)
    inputs = {"corpus": found, "quantizer": quantizer.identity}
    work = artifact.Artifact(out, "tokenize_speech", 2, asdict(job), inputs)
    if not work.begin(lambda: plan_of(job, corpus), fresh=job.fresh):
        return
    plan = work.plan["shards"]
    clips = sum(shard["count"] for shard in plan)
    paths, rejects = making.make(job, plan, tokenize_shard, "clip")
    totals = totals_of(paths, rejects) | {
        "clips": clips,
        "dtype": job.quantizer.dtype,
        "ignored": work.plan["ignored"],
        "source": corpus.source_name,
        "licence": corpus.licence,
        "quantizer": quantizer.identity,
        "token_rate": quantizer.token_rate,
    }
    if job.quantizer.dtype != "float32":
        on = (workers.gpus(job.runtime.device) or ["cpu"])[0]
        equal, codes = tokenize.exactness(
            corpus.clips(plan[0]), job.quantizer.load(on), job.batch_size
        )
        totals["equal_to_float32"] = {"codes": codes, "equal": equal}
    work.finish(totals, [*paths, *rejects_of(paths)])
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
    happened += making.describe_rejects(out, totals, ("ignored",))
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
