"""Turn a corpus of speech into a dataset of codes.

    python -m stages.tokenize_speech recipes/demo/tokenize_train.yaml

In: a corpus (speechfuse.corpora) and a quantizer. Out: Parquet shards of speech rows, one reject
list per shard and a manifest. A shard is made whole by one worker process or not at all; after a
stop only missing shards are made. Audio longer than the quantizer's window is split at quiet
places, and counted.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from speechfuse import artifact, audio, config, shards, workers
from speechfuse.corpora import Reject, Utterance
from speechfuse.quantizer import Quantizer


@dataclass
class Runtime:
    workers: int = field(
        default=2, metadata={"help": "processes, each with one thread and one quantizer"}
    )
    max_reject_rate: float = field(
        default=0.1, metadata={"help": "more rejects than this fail the job"}
    )


@dataclass
class TokenizeSpeech:
    out: str = field(metadata={"help": "folder of the dataset"})
    corpus: dict[str, Any] = field(metadata={"help": "a corpus of speechfuse.corpora"})
    quantizer: str = field(
        metadata={"help": "folder of ours, or a published WhisperVQ .model file"}
    )
    whisper: str | None = field(
        default=None, metadata={"help": "openai-whisper .pt beside a .model"}
    )
    shard_size: int = field(default=500, metadata={"help": "corpus items of a shard"})
    batch_size: int = field(default=16, metadata={"help": "clips of one encoder pass"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


@cache
def _quantizer(path: str, whisper: str | None) -> Quantizer:
    torch.set_num_threads(1)
    return Quantizer.load(Path(path), Path(whisper) if whisper else None)


@cache
def _corpus(spec: str) -> Any:
    return config.instantiate(json.loads(spec))


def _row(
    utterance: Utterance, pieces: int, part: int, seconds: float, offset: float
) -> dict[str, Any]:
    whole = pieces == 1
    return {
        "id": utterance.id if whole else f"{utterance.id}#{part}",
        "seconds": seconds,
        "text": utterance.text if whole else None,  # which words fall into which piece is not known
        "speaker": utterance.speaker,
        "language": utterance.language,
        "source": {**utterance.source, "offset": offset, "seconds": seconds},
        "parent": None if whole else utterance.id,
        "part": None if whole else part,
        "extra": json.dumps(utterance.extra, sort_keys=True),
    }


def tokenize_shard(job: TokenizeSpeech, index: int, items: list[Any]) -> int:
    """Make shard `index` in a worker process; returns the number of its rows."""
    quantizer = _quantizer(job.quantizer, job.whisper)
    shortest = 1 / quantizer.token_rate
    rows, clips, rejects = [], [], []
    for utterance in _corpus(json.dumps(job.corpus)).utterances(items):
        if isinstance(utterance, Reject):
            rejects.append({"id": utterance.id, "reason": utterance.reason})
            continue
        pieces = audio.split(utterance.waveform, quantizer.window)
        offset = 0.0
        for part, piece in enumerate(pieces):
            seconds = len(piece) / audio.SAMPLE_RATE
            row = _row(utterance, len(pieces), part, seconds, offset)
            offset += seconds
            if seconds < shortest:
                rejects.append(
                    {"id": row["id"], "reason": f"{seconds:.3f} s is less than one token"}
                )
                continue
            rows.append(row)
            clips.append(piece)
    for row, codes in zip(rows, quantizer.encode(clips, job.batch_size), strict=True):
        row["codes"] = codes
    path = Path(job.out) / shards.shard_name(index)
    shards.write_rejects(path, rejects)
    shards.write_shard(path, rows, shards.SPEECH, quantizer.stream)
    return len(rows)


def totals_of(paths: list[Path], job: TokenizeSpeech) -> dict[str, Any]:
    """What the finished shards hold, counted from disk, so that a resumed job counts the same."""
    rejects = [reject for path in paths for reject in shards.read_rejects(path)]
    rows = [
        row for path in paths for row in shards.read_shard(path, ["seconds", "parent", "codes"])
    ]
    items = len({row["parent"] for row in rows if row["parent"]}) + sum(
        not row["parent"] for row in rows
    )
    if len(rejects) > job.runtime.max_reject_rate * max(1, items + len(rejects)):
        raise ValueError(
            f"{job.out}: {len(rejects)} of {items + len(rejects)} items were rejected, more than "
            f"runtime.max_reject_rate={job.runtime.max_reject_rate}; first: {rejects[0]['id']}: "
            f"{rejects[0]['reason']}"
        )
    return {
        "items": items,
        "rows": len(rows),
        "split": len({row["parent"] for row in rows if row["parent"]}),
        "rejected": len(rejects),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "codes": sum(len(row["codes"]) for row in rows),
    }


def main(job: TokenizeSpeech) -> None:
    out = Path(job.out)
    if job.shard_size < 1 or job.batch_size < 1:
        raise ValueError(
            f"shard_size={job.shard_size}, batch_size={job.batch_size}: both must be at least 1"
        )
    corpus = config.instantiate(job.corpus)
    quantizer = _quantizer(job.quantizer, job.whisper)
    inputs = {"corpus": corpus.fingerprint, "quantizer": quantizer.identity}
    plan = corpus.plan(job.shard_size)
    if not plan:
        raise ValueError(
            f"corpus {job.corpus['_component_']} has no audio to tokenize: {job.corpus}"
        )
    work = artifact.Artifact(out, "tokenize_speech", 1, asdict(job), inputs)
    if not work.begin(plan, fresh=job.fresh):
        return
    paths = [out / shards.shard_name(i) for i in range(len(work.plan))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    bar = tqdm(total=len(paths), initial=len(paths) - len(missing), desc=out.name, unit="shard")
    tasks = [(job, i, work.plan[i]) for i in missing]
    with workers.pool(job.runtime.workers) as pool:
        for _ in pool.map(tokenize_shard, *zip(*tasks, strict=True)) if tasks else ():
            bar.update()
    bar.close()
    totals = totals_of(paths, job) | {"quantizer": quantizer.identity}
    work.finish(totals, [*paths, *(p.with_suffix("").with_suffix(".rejects.jsonl") for p in paths)])
    print(
        f"{out}: {totals['hours']:.2f} h of speech, {totals['codes']:,} codes in "
        f"{totals['rows']:,} rows; "
        f"{totals['split']} utterances split, {totals['rejected']} rejected"
    )


if __name__ == "__main__":
    config.main(main, TokenizeSpeech, __doc__)
