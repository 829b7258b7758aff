"""Turn instruction text into spoken training data.

    python -m stages.synthesize_instructions recipes/demo/synthesize.yaml

In: finished artifacts of text (stages.curate_texts), kinds of sample with their shares
(synthesis.kinds), voices with theirs (synthesis.engines), augmentation, a quantizer. Out: Parquet
shards of conversations whose user turns hold speech, one reject list per shard and a manifest.
plan.json says of every sample what is spoken by whom before the first is made. A shard is made
whole by one worker process or not at all; after a stop only missing shards are made.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechfuse import artifact, config, workers
from speechfuse.audio import augmentation
from speechfuse.quantizer.spec import QuantizerSpec, check_files, settled
from speechfuse.rows import making, shards, statistics
from speechfuse.rows.rejects import Rejects, by_reason
from speechfuse.synthesis import plan as synthesis_plan
from speechfuse.synthesis.engines import Engine
from speechfuse.synthesis.plan import Entry

if TYPE_CHECKING:  # torch is imported when work starts
    from speechfuse.synthesis.round_trip import RoundTrip


@dataclass
class Runtime(making.Workers):
    prefetch: int = config.key("samples spoken ahead of the encoder", 32, least=1, most=4096)


@dataclass
class SynthesizeInstructions:
    out: str = config.key("folder of the dataset")
    kinds: dict[str, dict[str, Any]] = config.key(
        "name: a kind of speechfuse.synthesis with its share, texts and select"
    )
    voices: dict[str, dict[str, Any]] = config.key(
        "name: an engine of speechfuse.synthesis with its share; its voices share"
    )
    quantizer: QuantizerSpec = config.key("what makes the codes")
    texts: str | None = config.key("finished artifact of text, for kinds that name none", None)
    samples: int | None = config.key("of all kinds; null: no text twice for a kind", None, least=1)
    augmentation: list[dict[str, Any]] = config.key("steps, of speechfuse.audio, in order", [])
    round_trip: dict[str, Any] | None = config.key(
        "{listener, max_wer}: leaves out speech that says another text", None
    )
    seed: int = config.key("of every choice", 0, least=0)
    shard_size: int = config.key("samples of a shard", 500, least=1)
    batch_size: int = config.key("pieces of speech of one encoder pass", 16, least=1, most=4096)
    fresh: bool = config.key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)


def plan_of(
    job: SynthesizeInstructions, kinds: dict[str, Entry], speakers: dict[str, float]
) -> dict[str, Any]:
    """What plan.json holds: the shards and their samples."""
    nobody = {"": 1.0}
    plan = synthesis_plan.plan(kinds, job.samples, speakers or nobody, job.seed, job.shard_size)
    if not plan:
        raise ValueError(f"samples={job.samples}: nothing is left to be made of so few texts")
    for sample in (sample for shard in plan for sample in shard["samples"]):
        if any(part["voice"] == "" for part in sample["speech"]):
            raise ValueError(f"voices is empty, but kinds.{sample['kind']} speaks: name an engine")
    return {"shards": plan}


def planned_of(plan: synthesis_plan.Plan, names: Iterable[str]) -> dict[str, int]:
    """How many samples of each kind are planned; 0 of one whose share is too small for one."""
    many = Counter(sample["kind"] for shard in plan for sample in shard["samples"])
    return {name: many[name] for name in names}


def totals_of(
    job: SynthesizeInstructions,
    kinds: dict[str, Entry],
    plan: synthesis_plan.Plan,
    paths: list[Path],
    rejects: Rejects,
) -> dict[str, Any]:
    """What the finished shards hold, for the manifest. Raises ValueError when nothing was made of a
    kind that was planned."""
    by_kind, sources, speakers = Counter[str](), Counter[str](), Counter[str]()
    licences: dict[str, str | None] = {}
    for path in paths:
        for batch in statistics.batches(path):
            for extra in map(json.loads, batch["extra"].to_pylist()):
                by_kind[extra["kind"]] += 1
                sources[extra["source"]] += 1
                licences[extra["source"]] = extra.get("licence")
            speakers.update(statistics.speech_of(batch)["speaker"].drop_null().to_pylist())
    planned = planned_of(plan, sorted(kinds))
    for kind in (kind for kind, many in planned.items() if many and not by_kind[kind]):
        raise ValueError(_nothing_made(Path(job.out), kind, planned[kind], rejects))
    counts = making.counts_of(paths)
    folders = sorted({kind.texts for kind in kinds.values()})
    steps = {f.name: artifact.manifest_of(f)["totals"].get("steps", []) for f in folders}
    samples = [sample for shard in plan for sample in shard["samples"]]
    return {
        "rows": by_kind.total(),
        **making.speech_totals(paths, "pieces_of_speech"),
        "kinds": {name: {"planned": n, "made": by_kind[name]} for name, n in planned.items()},
        "voices": dict(sorted(speakers.items())),
        "round_trip": _by_voice(counts),
        "sources": dict(sorted(sources.items())),
        "licence": " and ".join(sorted({name or "unknown" for name in licences.values()})),
        "licences": dict(sorted(licences.items())),
        "split": counts["split"],
        "pieces": counts["pieces"],
        **by_reason(rejects),
        "curation": {name: done for name, done in steps.items() if done},
        "samples": len(samples),
        "most_uses": max(Counter((s["kind"], s["text"]) for s in samples).values()),
        "source": ", ".join(folder.name for folder in folders),
    }


def _nothing_made(out: Path, kind: str, planned: int, rejects: Rejects) -> str:
    """The error for a kind without a row: the commonest reason, and its first sample."""
    of_kind = [reject for reject in rejects if reject["id"].partition("/")[0] == kind]
    reasons = [reject["reason"].partition(":")[0] for reject in of_kind]
    ((reason, many),) = Counter(reasons).most_common(1)
    first = of_kind[reasons.index(reason)]
    return (
        f"{out}: nothing was made of the kind {kind}: of {planned} samples {many} were left out "
        f"for {reason}; first: {first['id']}: {first['reason']}; all are in "
        f"{out}/shard-*.rejects.jsonl, and shards are kept; change what leaves them out, and "
        "start anew with fresh=true"
    )


def _by_voice(counts: Counter[str]) -> dict[str, dict[str, Any]]:
    """The round trip's result for each voice, the worst first; {} without a round trip."""
    voices = {}
    for voice in (key.partition("/")[2] for key in counts if key.startswith("heard/")):
        wer = round(counts[f"wrong/{voice}"] / max(1, counts[f"words/{voice}"]), 4)
        pieces, refused = counts[f"heard/{voice}"], counts[f"refused/{voice}"]
        voices[voice] = {"pieces": pieces, "refused": refused, "wer": wer}
    return dict(sorted(voices.items(), key=lambda item: (-item[1]["wer"], item[0])))


def settings_of(
    job: SynthesizeInstructions, engines: dict[str, Engine], trip: "RoundTrip | None"
) -> dict[str, Any]:
    """The job's configuration. Arguments that change nothing of what engines and transcriber answer
    move to `runtime`, which is no part of an artifact's fingerprint."""
    settings = settled(asdict(job))

    def moved(spec: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
        return {key: spec.pop(key) for key in keys if key in spec}

    voices = {n: moved(settings["voices"][n], e.not_identity) for n, e in engines.items()}
    settings["runtime"]["voices"] = {name: keys for name, keys in voices.items() if keys}
    if trip:
        spec = settings["round_trip"]["listener"]
        settings["runtime"]["listener"] = moved(spec, trip.transcriber.not_identity)
    return settings


def main(job: SynthesizeInstructions) -> None:
    out = Path(job.out)
    kinds = synthesis_plan.entries_of(job.kinds, job.texts)
    texts = {f"texts.{n}": artifact.fingerprint_of(kind.texts) for n, kind in kinds.items()}
    check_files(job.quantizer.checkpoint, job.quantizer.whisper)
    from speechfuse.synthesis.recording import engines_of, speakers_of
    from speechfuse.synthesis.shard import ROUND_TRIP, synthesize_shard

    workers.gpus(job.runtime.device)
    engines = engines_of(job.voices)
    quantizer = job.quantizer.load("cpu")
    trip = making.component(ROUND_TRIP | job.round_trip) if job.round_trip else None
    complete = (out / "manifest.json").exists() and not job.fresh
    if not complete and not job.runtime.dry_run:  # else no engine is needed
        for engine in engines.values():
            engine.check()
        if trip:
            trip.transcriber.check(quantizer.identity)
    speakers = speakers_of(job.voices, engines)
    for name, engine in engines.items():
        if engine.codec not in (None, quantizer.identity):
            raise ValueError(
                f"voices.{name} makes codes of the codec {engine.codec[:12]}, the quantizer is "
                f"{quantizer.identity[:12]}: a model that learned one is deaf to the other; use "
                "the engine's own quantizer, or its route over a waveform"
            )
        if engine.codec and job.augmentation:
            print(f"voices.{name} makes codes: augmentation does not reach it")
    identities = {f"voices.{name}": engine.identity() for name, engine in engines.items()}
    if trip:
        identities["round_trip"] = trip.transcriber.identity()
    inputs = {"quantizer": quantizer.identity, **texts}
    inputs |= {name: json.dumps(of, sort_keys=True) for name, of in identities.items()}
    if sounds := augmentation.check(job.augmentation):
        inputs["augmentation"] = sounds
    if job.runtime.dry_run:
        plan = plan_of(job, kinds, speakers)["shards"]
        print(
            f"{out}: {describe_kinds(planned_of(plan, kinds))} in {len(plan)} shards and "
            f"{len(speakers)} voices; not started: voices and listener were not asked whether they "
            "work"
        )
        return
    settings = settings_of(job, engines, trip)
    work = artifact.Artifact(out, "synthesize_instructions", 2, settings, inputs)
    stream = {"quantizer": quantizer.identity, "token_rate": quantizer.token_rate}
    making.make_dataset(
        job,
        work,
        lambda: plan_of(job, kinds, speakers),
        partial(
            synthesize_shard,
            kinds=job.kinds,
            texts=job.texts,
            voices=job.voices,
            augmentation=job.augmentation,
            round_trip=job.round_trip,
            quantizer=job.quantizer,
            seed=job.seed,
            batch_size=job.batch_size,
            depth=job.runtime.prefetch,
        ),
        "sample",
        shards.CONVERSATIONS,
        quantizer.stream,
        lambda paths, rejects: totals_of(job, kinds, work.plan["shards"], paths, rejects) | stream,
        summary,
    )


def describe_kinds(kinds: dict[str, int]) -> str:
    """How many samples of each kind, and the kinds whose shares are too small for one."""
    counted = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)
    none = ", ".join(kind for kind, n in kinds.items() if not n)
    return f"{counted} (too small a share for a sample: {none})" if none else counted


def summary(out: Path, totals: dict[str, Any]) -> str:
    """One line: what was made, and how many texts were repeated, split, or left out and why."""
    phrases = [describe_kinds({name: of["made"] for name, of in totals["kinds"].items()})]
    if totals["most_uses"] > 1:
        phrases.append(f"texts used up to {totals['most_uses']} times for a kind")
    if totals["split"]:
        phrases.append(f"{totals['split']:,} texts spoken in {totals['pieces']:,} pieces")
    if voices := totals["round_trip"]:
        worst = next(iter(voices))
        rates, pieces = zip(*((v["wer"], v["pieces"]) for v in voices.values()), strict=True)
        mean = np.average(rates, weights=pieces)
        phrases.append(f"round trip {mean:.1%} WER, the worst {voices[worst]['wer']:.1%} ({worst})")
    phrases += making.describe_rejects(out, totals)
    return (
        f"{out}: {totals['rows']:,} of {totals['samples']:,} samples, {totals['hours']:.2f} h of "
        f"speech in {len(totals['voices'])} voices, {totals['codes']:,} codes, "
        f"{totals['bits_per_code']} bits a code; {'; '.join(phrases)}"
    )


if __name__ == "__main__":
    config.main(main, SynthesizeInstructions, __doc__)
