"""Recordings to rows: what the jobs that read a corpus have in common.

In: a corpus and what makes codes or frames of each clip. Out: a complete artifact of speech rows. A
shard is made whole by one worker process or not at all; after a stop only missing shards are made.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from speechfuse import artifact, config, workers
from speechfuse.config import key
from speechfuse.hub import data as hub_data
from speechfuse.quantizer.spec import EncoderSpec, QuantizerSpec, settled
from speechfuse.rows import making
from speechfuse.rows.rejects import Rejects, by_reason


@dataclass
class Runtime(making.Workers):
    decode_threads: int = key("of each process, beside the encoder", 2, least=1, most=4096)
    prefetch: int = key("clips decoded ahead of the encoder", 32, least=1, most=4096)


@dataclass(kw_only=True)
class Recordings:
    out: str = key("folder of the dataset")
    corpus: dict[str, Any] = key("a corpus of speechfuse.corpora")
    filters: list[dict[str, Any]] = key("filters, of speechfuse.audio, in order", [])
    drop_duplicate_audio: bool = key("keep the first of clips with the same samples", False)
    shard_size: int = key("clips of a shard", 500, least=1)
    batch_size: int = key("clips of one encoder pass", 16, least=1, most=4096)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)


def clips_of(job: Recordings) -> dict[str, Any]:
    """Where a shard's clips come from, and how they are decoded."""
    runtime = job.runtime
    return {"corpus": job.corpus, "threads": runtime.decode_threads, "depth": runtime.prefetch}


def mark_duplicates(job: Recordings, plan: list[dict[str, Any]]) -> None:
    """Note in each shard of `plan`, as `same_audio` {id: id of the first}, its clips whose samples
    an earlier clip has too."""
    from speechfuse.quantizer import tokenize

    function = partial(tokenize.audio_digests, **clips_of(job))
    digests_by_shard = making.gather(job.runtime, function, plan, "duplicates")
    first: dict[str, str] = {}
    for shard, digests in zip(plan, digests_by_shard, strict=True):
        for id, digest in digests:
            if first.setdefault(digest, id) != id:
                shard.setdefault("same_audio", {})[id] = first[digest]


def plan_of(job: Recordings, corpus: Any) -> dict[str, Any]:
    """Content of plan.json: the shards, and the files that the corpus ignores, by suffix. Raises
    ValueError for a corpus without audio."""
    plan = corpus.plan(job.shard_size)
    if not plan:
        raise ValueError(
            f"corpus {job.corpus['_component_']} has no audio to tokenize"
            + "".join(f", {k}={v}" for k, v in job.corpus.items() if k != "_component_")
            + (f"; ignored by suffix: {corpus.ignored}" if getattr(corpus, "ignored", {}) else "")
        )
    if job.drop_duplicate_audio and not job.runtime.dry_run:
        mark_duplicates(job, plan)
    return {"shards": plan, "ignored": dict(getattr(corpus, "ignored", {}))}


def make(
    job: Recordings,
    name: str,
    version: int,
    spec: QuantizerSpec | EncoderSpec,
    schema: pa.Schema,
    made: str,
) -> None:
    """Make the artifact `name` of a corpus: rows in `schema`, with what `spec` makes of each clip.
    Prints one line: hours and clips, `made`, which names totals in braces, and the counts of what
    was changed or left out."""
    out = Path(job.out)
    for each in job.filters:
        config.instantiate(each)
    corpus = config.instantiate(job.corpus)
    encoder = spec.load("cpu")
    workers.gpus(job.runtime.device)
    from speechfuse.quantizer import tokenize  # torch with it: what can be refused has been

    if job.runtime.dry_run:
        shard_list = plan_of(job, corpus)["shards"]
        clips = sum(shard["count"] for shard in shard_list)
        print(
            f"{out}: {clips:,} clips of {corpus.source_name} in {len(shard_list)} shards; "
            "not started"
        )
        return
    started = None if job.fresh else out
    fingerprint = hub_data.pinned_commit(corpus.fingerprint, "corpus", started)
    what = next(iter(encoder.stream), "recognizer")  # or quantizer or encoder
    inputs = {"corpus": fingerprint, what: encoder.identity}
    work = artifact.Artifact(out, name, version, settled(asdict(job)), inputs)

    def totals(paths: list[Path], rejects: Rejects) -> dict[str, Any]:
        counts, shard_list = making.counts_of(paths), work.plan["shards"]
        figures = making.speech_totals(paths, "rows") | by_reason(rejects)
        for name in ("split", "pieces", "resampled", "mixed_down", "without_text"):
            figures[name] = counts[name]
        if counts["one_channel"]:
            figures["one_channel"] = counts["one_channel"]
        if isinstance(spec, QuantizerSpec):
            figures["dtype"] = spec.dtype
            if spec.dtype != "float32":
                measure = partial(  # where the codes were made
                    tokenize.exactness_of_shard,
                    corpus=job.corpus,
                    quantizer=spec,
                    batch_size=job.batch_size,
                )
                ((equal, codes),) = making.gather(job.runtime, measure, shard_list[:1], "exactness")
                figures["equal_to_float32"] = {"codes": codes, "equal": equal}
        return figures | {
            "clips": sum(shard["count"] for shard in shard_list),
            "ignored": work.plan["ignored"],
            "source": corpus.source_name,
            "licence": corpus.licence,
            what: encoder.identity,
            "token_rate": encoder.token_rate,
        }

    making.make_dataset(
        job,
        work,
        lambda: plan_of(job, corpus),
        partial(
            tokenize.tokenize_shard,
            encoder=spec,
            filters=job.filters,
            batch_size=job.batch_size,
            **clips_of(job),
        ),
        "clip",
        schema,
        encoder.stream,
        totals,
        partial(describe, made=made),
    )


def describe(out: Path, totals: dict[str, Any], made: str) -> str:
    """Return the summary line of recordings; `made`: what was made of them, see `make`."""
    phrases = [
        f"{totals[name]:,} {words}"
        for name, words in (
            ("split", f"split into {totals['pieces']:,}"),
            ("resampled", "resampled"),
            ("mixed_down", "mixed down to mono"),
            ("one_channel", "of one channel, as a mix would cancel the sound"),
            ("without_text", "without a text"),
        )
        if totals.get(name)
    ]
    phrases += making.describe_rejects(out, totals, ("ignored",))
    if "equal_to_float32" in totals:
        equal, codes = totals["equal_to_float32"]["equal"], totals["equal_to_float32"]["codes"]
        share = equal / max(1, codes)
        phrases.append(f"{totals['dtype']} gave float32's code for {share:.2%} of {codes:,}")
    return (
        f"{out}: {totals['hours']:.2f} h of speech from {totals['clips']:,} clips"
        f"{made.format(**totals)}; "
        f"{'; '.join(phrases) or 'nothing split, changed or rejected'}"
    )
