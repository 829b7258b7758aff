"""What the jobs that make shards of codes share: the quantizer of a worker, the engine that runs
tasks, what is left to do, rejects, totals.

In: a job's config (`out` and `runtime`) and its frozen plan, a list of shards {count, ...}. Out:
shard files and reject lists, each made whole by one task or not at all; after a stop only what is
missing is made. Totals are counted from disk, so that a resumed job counts the same.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from speechfuse import config
from speechfuse.rows import shards, statistics
from speechfuse.rows.rejects import Rejects, _faults, read_rejects


@dataclass
class Workers:
    """How any such job runs."""

    workers: int = field(
        default=2, metadata={"help": "processes on the CPU, each with one thread and one quantizer"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda (a process per GPU), or auto"})
    max_reject_rate: float = field(
        default=0.1, metadata={"help": "more rejects than this stop the job"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what would be done, and stop"})
    engine: dict[str, Any] = field(
        default_factory=lambda: {"_component_": "speechfuse.workers.processes"},
        metadata={"help": "speechfuse.ray_cluster.ray_actors for more machines than one"},
    )


@dataclass
class Runtime(Workers):
    """How a job that decodes recordings runs."""

    decode_threads: int = field(default=2, metadata={"help": "of each process, beside the encoder"})
    prefetch: int = field(default=32, metadata={"help": "clips decoded ahead of the encoder"})


class Job(Protocol):
    """A job's config."""

    out: str
    runtime: Any


def run(runtime: Any, function: Callable[..., Any], tasks: list[tuple]) -> Iterator[Any]:
    """Results of the tasks as they come, on the engine that `runtime` names."""
    return config.instantiate(
        runtime.engine,
        function=function,
        tasks=tasks,
        workers=runtime.workers,
        device=runtime.device,
    )


def make(
    job: Job, plan: list[dict[str, Any]], function: Callable[..., int], unit: str
) -> tuple[list[Path], Rejects]:
    """Make the shards of `plan` that `job.out` lacks, each by function(job, index, shard) in a
    worker, which writes its rejects first and returns the index. `unit`: what `count` counts.

    Returns all shards' paths and all rejects, in order. ValueError once more are rejected than
    runtime.max_reject_rate allows of the whole plan.
    """
    out, total = Path(job.out), sum(shard["count"] for shard in plan)
    paths = [out / shards.shard_name(i) for i in range(len(plan))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    rejects = {i: read_rejects(path) for i, path in enumerate(paths) if path.exists()}
    faults = [each for i in sorted(rejects) for each in _faults(rejects[i])]
    _check_rejects(job, faults, total, unit)
    done = sum(plan[i]["count"] for i in rejects)
    with tqdm(total=total, initial=done, desc=out.name, unit=unit) as bar:
        for i in run(job.runtime, function, [(job, i, plan[i]) for i in missing]):
            rejects[i] = read_rejects(paths[i])
            faults += _faults(rejects[i])
            _check_rejects(job, faults, total, unit)
            bar.update(plan[i]["count"])
    return paths, [each for i in sorted(rejects) for each in rejects[i]]


def _check_rejects(job: Job, faults: Rejects, total: int, unit: str) -> None:
    if len(faults) > job.runtime.max_reject_rate * total:
        raise ValueError(
            f"{job.out}: {len(faults)} of {total} {unit}s were rejected, more than "
            f"runtime.max_reject_rate={job.runtime.max_reject_rate}; first: {faults[0]['id']}: "
            f"{faults[0]['reason']}; all are in {job.out}/shard-*.rejects.jsonl, and finished "
            "shards are kept"
        )


def totals_of(paths: list[Path], what: str, speech: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """Totals of pieces of `speech`, (seconds, codes) each, kept in the shards at `paths`; their
    number is called `what`."""
    seconds, codes, pieces = 0.0, 0, 0
    for each, length in speech:
        seconds, codes, pieces = seconds + each, codes + length, pieces + 1
    size = sum(map(statistics.bytes_of_codes, paths))
    return {
        what: pieces,
        "hours": round(seconds / 3600, 4),
        "codes": codes,
        "bits_per_code": round(8 * size / max(1, codes), 3),
    }


def counts_of(paths: list[Path]) -> Counter[str]:
    """What the shards say happened on the way to them."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(shards.read_counts(path))
    return counts


def describe_rejects(out: Path, totals: dict[str, Any], others: tuple[str, ...] = ()) -> list[str]:
    """How many were left out and why, for a job's summary; `others` are further such totals."""
    said = []
    for what in ("rejected", "filtered", *others):
        if totals[what]:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(totals[what].items()))
            said.append(f"{sum(totals[what].values()):,} {what} ({kinds})")
    if totals["rejected"] or totals["filtered"]:
        said.append(f"listed in {out}/shard-*.rejects.jsonl")
    return said
