"""Build sessions of two channels in time, for models that listen while they speak.

    python -m stages.build_duplex recipes/demo/duplex_train.yaml

In: a source of sessions (speechfuse.synthesis.Sessions, which draws them from conversations, or
.Stereo, recordings with timed text) and the codec of the agent's voice. Out: Parquet shards of
conversations, one reject list per shard and a manifest; the user's channel of a shard is
shard-00007.user.flac beside it, one session behind the other. A turn's speech has its time in that
file as source.offset and source.seconds, an assistant's its codes; `extra` has offset and seconds
of the whole session. After a stop only missing shards are made.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.rows import making, shards, statistics
from speechfuse.rows.rejects import Reject, Rejects, by_reason
from speechfuse.rows.shards import Shard


@dataclass
class BuildDuplex:
    out: str = key("folder of the sessions")
    source: dict[str, Any] = key("of speechfuse.synthesis: Sessions, or Stereo for recordings")
    codec: dict[str, Any] = key("of speechfuse.codecs, that of the agent's voice")
    shard_size: int = key("sessions of a shard", 250, least=1)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: making.Workers = field(default_factory=making.Workers)


def build_shard(planned: Mapping[str, Any], source: dict[str, Any], codec: dict[str, Any]) -> Shard:
    """Make a shard, in a worker process."""
    from speechfuse.audio import decoding
    from speechfuse.codecs.codec import codec_of

    shard, waveforms, offset = Shard([], [], {}, {}), list[np.ndarray](), 0.0
    name = planned["name"]
    for session in making.component(source).made(planned, codec_of(codec)):
        if isinstance(session, Reject):
            shard.rejects.append({"id": session.id, "reason": session.reason})
            continue
        seconds, turns = len(session.waveform) / decoding.SAMPLE_RATE, []
        for turn in session.turns:
            length = turn["end"] - turn["start"]
            speech = {"id": session.id, "text": turn["text"], "speaker": turn.get("speaker")}
            at = {"uri": name, "offset": offset + turn["start"], "seconds": length}
            speech |= {"seconds": length, "source": at}
            if "codes" in turn:
                speech |= {"codes": turn["codes"].flatten()}
                speech |= {"extra": json.dumps({"cut": True})} if turn.get("cut") else {}
            turns.append({"role": turn["role"], "segments": [{"speech": speech}]})
        extra = session.extra | {"offset": offset, "seconds": seconds}
        shard.rows.append(
            {"id": session.id, "turns": turns, "extra": json.dumps(extra, sort_keys=True)}
        )
        waveforms.append(session.waveform)
        offset += seconds
    sound = np.concatenate([np.zeros(0, np.float32), *waveforms])
    return shard._replace(files={"user.flac": decoding.encode(sound, "FLAC")})


def totals_of(paths: list[Path], rejects: Rejects) -> dict[str, Any]:
    kinds, seconds = Counter[str](), 0.0
    for path in paths:
        for batch in statistics.batches(path):
            for extra in map(json.loads, batch["extra"].to_pylist()):
                kinds[extra.get("kind", "recorded")] += 1
                seconds += extra["seconds"]
    totals = {"rows": kinds.total(), "hours": round(seconds / 3600, 4), "kinds": dict(kinds)}
    return totals | by_reason(rejects)


def summary(out: Path, totals: dict[str, Any]) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(totals["kinds"].items()))
    phrases = [f"{out}: {totals['rows']:,} sessions, {totals['hours']:.2f} h: {kinds}"]
    return "; ".join(phrases + making.describe_rejects(out, totals))


def main(job: BuildDuplex) -> None:
    from speechfuse.codecs.codec import codec_of

    source, codec = config.instantiate(job.source), codec_of(job.codec)

    def plan() -> list[dict[str, Any]]:
        planned = enumerate(source.plan(job.shard_size))
        names = (shards.shard_name(i).replace(".parquet", ".user.flac") for i, _ in planned)
        return [s | {"name": n} for s, n in zip(source.plan(job.shard_size), names, strict=True)]

    if job.runtime.dry_run:
        parts = plan()
        print(f"{job.out}: {sum(s['count'] for s in parts):,} sessions in {len(parts)} shards")
        return
    inputs = {"source": source.fingerprint, "codec": codec.identity}
    work = artifact.Artifact(Path(job.out), "build_duplex", 1, asdict(job), inputs)
    make = partial(build_shard, source=job.source, codec=job.codec)
    making.make_dataset(
        job, work, plan, make, "session", shards.CONVERSATIONS, codec.stream, totals_of, summary
    )


if __name__ == "__main__":
    config.main(main, BuildDuplex, __doc__)
