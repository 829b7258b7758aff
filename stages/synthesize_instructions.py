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
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse import artifact, config, workers
from speechfuse.audio import augmentation
from speechfuse.quantizer.model import QuantizerSpec
from speechfuse.rows import making, shards, statistics
from speechfuse.rows.rejects import Rejects, by_reason, write_rejects
from speechfuse.synthesis import plan as synthesis_plan
from speechfuse.synthesis.engines import Engine
from speechfuse.synthesis.plan import Entry
from speechfuse.synthesis.recording import Recorder, engines_of, speakers_of
from speechfuse.synthesis.round_trip import RoundTrip
from speechfuse.synthesis.shard import synthesize


@dataclass
class Runtime(making.Workers):
    prefetch: int = field(default=32, metadata={"help": "samples spoken ahead of the encoder"})


@dataclass
class SynthesizeInstructions:
    out: str = field(metadata={"help": "folder of the dataset"})
    kinds: dict[str, dict[str, Any]] = field(
        metadata={
            "help": "name: a kind of speechfuse.synthesis.kinds with its share, texts and select"
        }
    )
    voices: dict[str, dict[str, Any]] = field(
        metadata={"help": "name: an engine of synthesis.engines with its share; its voices share"}
    )
    quantizer: QuantizerSpec = field(metadata={"help": "what makes the codes"})
    texts: str | None = field(
        default=None, metadata={"help": "finished artifact of text, for kinds that name none"}
    )
    samples: int | None = field(
        default=None, metadata={"help": "of all kinds; null: no text twice for a kind"}
    )
    augmentation: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "of speechfuse.audio.augmentation, in order"}
    )
    round_trip: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "of speechfuse.synthesis.round_trip: leaves out what says another text"},
    )
    seed: int = field(default=0, metadata={"help": "of every choice"})
    shard_size: int = field(default=500, metadata={"help": "samples of a shard"})
    batch_size: int = field(default=16, metadata={"help": "pieces of speech of one encoder pass"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


@cache
def _round_trip(spec: str) -> RoundTrip | None:
    known = json.loads(spec)
    component = {"_component_": "speechfuse.synthesis.round_trip.RoundTrip"}
    return config.instantiate(component | known) if known else None


def synthesize_shard(job: SynthesizeInstructions, index: int, shard: dict[str, Any]) -> int:
    """Make shard `index` in a worker process; returns its index."""
    quantizer = job.quantizer.load(workers.device())
    kinds, engines = synthesis_plan.entries_of(job.kinds, job.texts), engines_of(job.voices)
    with Recorder(kinds, engines, job.augmentation, job.seed, quantizer) as recorder:
        made = synthesize(
            synthesis_plan.with_texts(shard["samples"], kinds),
            recorder,
            quantizer,
            job.batch_size,
            _round_trip(json.dumps(job.round_trip)),
            job.runtime.prefetch,
            shard.get("examples", ()),
        )
    path = Path(job.out) / shards.shard_name(index)
    write_rejects(path, made.rejects)
    for name, content in made.files.items():
        artifact.write_atomic(path.with_name(f"{path.stem}.{name}"), content)
    shards.write_shard(path, made.rows, shards.CONVERSATIONS, quantizer.stream, made.counts)
    return index


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
    found = Counter(sample["kind"] for shard in plan for sample in shard["samples"])
    return {name: found[name] for name in names}


def totals_of(paths: list[Path], rejects: Rejects, planned: dict[str, int]) -> dict[str, Any]:
    """What the finished shards hold, counted from disk, so that a resumed job counts the same."""
    kinds, sources, speakers = Counter[str](), Counter[str](), Counter[str]()
    licences: dict[str, str | None] = {}
    for path in paths:
        for batch in statistics.batches(path):
            for extra in map(json.loads, batch["extra"].to_pylist()):
                kinds[extra["kind"]] += 1
                sources[extra["source"]] += 1
                licences[extra["source"]] = extra.get("licence")
            rows = statistics.speech_of(batch)
            speakers.update(rows["speaker"].drop_null().to_pylist())
    counts = making.counts_of(paths)
    return {
        "rows": kinds.total(),
        **making.speech_totals(paths, "pieces_of_speech"),
        "kinds": {name: {"planned": n, "made": kinds[name]} for name, n in planned.items()},
        "voices": dict(sorted(speakers.items())),
        "round_trip": _by_voice(counts),
        "sources": dict(sorted(sources.items())),
        "licence": " and ".join(sorted({each or "unknown" for each in licences.values()})),
        "licences": dict(sorted(licences.items())),
        **{name: counts[name] for name in ("split", "pieces")},
        **by_reason(rejects),
    }


def _by_voice(counts: Counter[str]) -> dict[str, dict[str, Any]]:
    """What a listener made of each voice, the worst first; {} without a round trip."""
    found = {}
    for voice in (key.partition("/")[2] for key in counts if key.startswith("heard/")):
        heard, words, wrong, refused = (
            counts[f"{what}/{voice}"] for what in ("heard", "words", "wrong", "refused")
        )
        wer = round(wrong / max(1, words), 4)
        found[voice] = {"pieces": heard, "refused": refused, "wer": wer}
    return dict(sorted(found.items(), key=lambda item: (-item[1]["wer"], item[0])))


def settings_of(
    job: SynthesizeInstructions, engines: dict[str, Engine], trip: RoundTrip | None
) -> dict[str, Any]:
    """The job's configuration. What changes nothing of what engines say and the listener hears
    goes to `runtime`, which is no part of an artifact's fingerprint."""
    settings = asdict(job)

    def moved(spec: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
        return {key: spec.pop(key) for key in keys if key in spec}

    voices = {n: moved(settings["voices"][n], of.not_identity) for n, of in engines.items()}
    settings["runtime"]["voices"] = {name: rest for name, rest in voices.items() if rest}
    if trip:
        spec = settings["round_trip"]["listener"]
        settings["runtime"]["listener"] = moved(spec, trip.listener.not_identity)
    return settings


def check_made(out: Path, kinds: dict[str, dict[str, int]], rejects: Rejects) -> None:
    """ValueError when nothing was made of a kind that was planned."""
    for kind, of in kinds.items():
        if not of["planned"] or of["made"]:
            continue
        mine = [each for each in rejects if each["id"].partition("/")[0] == kind]
        reasons = [each["reason"].partition(":")[0] for each in mine]
        ((why, many),) = Counter(reasons).most_common(1)
        first = mine[reasons.index(why)]
        raise ValueError(
            f"{out}: nothing was made of the kind {kind}: of {of['planned']} samples {many} were "
            f"left out for {why}; first: {first['id']}: {first['reason']}; all are in "
            f"{out}/shard-*.rejects.jsonl, and shards are kept; change what leaves them out, and "
            "start anew with fresh=true"
        )


def main(job: SynthesizeInstructions) -> None:
    out = Path(job.out)
    least = {"shard_size": job.shard_size, "batch_size": job.batch_size, "samples": job.samples}
    if low := [f"{key}={n}" for key, n in least.items() if n is not None and n < 1]:
        raise ValueError(f"{', '.join(low)}: at least 1 is needed")
    workers.gpus(job.runtime.device)
    kinds, engines = synthesis_plan.entries_of(job.kinds, job.texts), engines_of(job.voices)
    quantizer, listener = job.quantizer.load("cpu"), _round_trip(json.dumps(job.round_trip))
    complete = (out / "manifest.json").exists() and not job.fresh
    if not complete and not job.runtime.dry_run:  # else no engine is needed
        for engine in engines.values():
            engine.check()
        if listener:
            listener.listener.check(quantizer.identity)
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
    if listener:
        identities["round_trip"] = listener.listener.identity()
    inputs = {
        "quantizer": quantizer.identity,
        **{f"texts.{name}": artifact.fingerprint_of(kind.texts) for name, kind in kinds.items()},
        **{name: json.dumps(value, sort_keys=True) for name, value in identities.items()},
    }
    if sounds := augmentation.check(job.augmentation):
        inputs["augmentation"] = sounds
    if job.runtime.dry_run:
        plan = plan_of(job, kinds, speakers)["shards"]
        said = describe_kinds(planned_of(plan, kinds))
        print(
            f"{out}: {said} in {len(plan)} shards and {len(speakers)} voices; not started: voices "
            "and listener were not asked whether they work"
        )
        return
    settings = settings_of(job, engines, listener)
    work = artifact.Artifact(out, "synthesize_instructions", 1, settings, inputs)
    if not work.begin(lambda: plan_of(job, kinds, speakers), fresh=job.fresh):
        return
    plan = work.plan["shards"]
    paths, rejects = making.make(job, plan, partial(synthesize_shard, job), "sample")
    folders = sorted({kind.texts for kind in kinds.values()})
    chosen = {f.name: artifact.manifest_of(f)["totals"].get("steps", []) for f in folders}
    totals = totals_of(paths, rejects, planned_of(plan, sorted(kinds))) | {
        "curation": {name: steps for name, steps in chosen.items() if steps},
        "samples": sum(shard["count"] for shard in plan),
        "most_uses": max(
            Counter((s["kind"], s["text"]) for shard in plan for s in shard["samples"]).values()
        ),
        "source": ", ".join(folder.name for folder in folders),
        "quantizer": quantizer.identity,
        "token_rate": quantizer.token_rate,
    }
    check_made(out, totals["kinds"], rejects)
    work.finish(totals, sorted(out.glob("shard-*")))
    print(summary(out, totals))


def describe_kinds(kinds: dict[str, int]) -> str:
    """How many samples of each kind; the others have shares too small for one."""
    some = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)
    none = ", ".join(kind for kind, n in kinds.items() if not n)
    return f"{some} (too small a share for a sample: {none})" if none else some


def summary(out: Path, totals: dict[str, Any]) -> str:
    """One line: what was made and everything that happened on the way."""
    happened = [describe_kinds({name: of["made"] for name, of in totals["kinds"].items()})]
    if totals["most_uses"] > 1:
        happened.append(f"texts used up to {totals['most_uses']} times for a kind")
    if totals["split"]:
        happened.append(f"{totals['split']:,} texts spoken in {totals['pieces']:,} pieces")
    if heard := totals["round_trip"]:
        voice = next(iter(heard))
        mean = np.average(
            [v["wer"] for v in heard.values()], weights=[v["pieces"] for v in heard.values()]
        )
        happened.append(f"round trip {mean:.1%} WER, the worst {heard[voice]['wer']:.1%} ({voice})")
    happened += making.describe_rejects(out, totals)
    return (
        f"{out}: {totals['rows']:,} of {totals['samples']:,} samples, {totals['hours']:.2f} h of "
        f"speech in {len(totals['voices'])} voices, {totals['codes']:,} codes, "
        f"{totals['bits_per_code']} bits a code; {'; '.join(happened)}"
    )


if __name__ == "__main__":
    from stages import (
        synthesize_instructions as this,
    )  # under its own name workers elsewhere find it too

    config.main(this.main, this.SynthesizeInstructions, __doc__)
