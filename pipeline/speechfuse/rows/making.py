"""The jobs that make shards of rows: tokenize, curate, synthesize.

Each such job has a plan, which lists the shards as {count, ...}, and a function that makes one
shard. In: a job's config (`out`, `fresh`, `runtime`), its artifact, its plan and its function. Out:
a complete artifact of shard files and reject lists. One worker process writes a shard, whole or not
at all; after a stop only the missing shards are made. Totals are counted from the files, so a job
that was stopped and resumed has the same totals.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import config
from speechfuse.artifact import Artifact, write_atomic
from speechfuse.config import key
from speechfuse.rows import shards, statistics, verification
from speechfuse.rows.rejects import Rejects, faults_of, read_rejects, write_rejects
from speechfuse.rows.shards import Shard

Planned = dict[str, Any]  # a shard of the plan: `count` and what the job's function needs


@dataclass
class Workers:
    """The keys of `runtime` that every such job has."""

    workers: int = key("CPU processes, of one thread and one quantizer", 2, least=1, most=4096)
    device: str = key("cpu, cuda (a process per GPU), or auto", "auto")
    max_reject_rate: float = key("more rejects than this stop the job", 0.1, least=0, most=1)
    dry_run: bool = key("say what would be done, and stop", False)
    engine: dict[str, Any] = key(
        "speechfuse.ray_cluster.ray_actors for more machines than one",
        {"_component_": "speechfuse.workers.processes"},
    )


class Job(Protocol):
    """A job's config."""

    out: str
    fresh: bool
    runtime: Any


def make_dataset(
    job: Job,
    work: Artifact,
    plan: Callable[[], Any],
    function: Callable[[Planned], Shard],
    unit: str,
    schema: pa.Schema,
    stream: dict[str, Any] | None,
    totals: Callable[[list[Path], Rejects], dict[str, Any]],
    summary: Callable[[Path, dict[str, Any]], str],
) -> None:
    """Run a job from its plan to its manifest and its summary line, unless it is complete.

    `plan` is called at the first start, and what it returns is frozen: a list of shards, or
    {shards: list, ...}. `function` makes a shard in a worker. `unit` names what a shard's `count`
    counts. `schema` and `stream` are those of shards.write_shard. `totals(paths, rejects)` returns
    the totals of all shards, for the manifest. `summary(out, totals)` returns the line that is
    printed. Raises ValueError when too many units are rejected, see `make`, and when rows have one
    id: other jobs find rows by it.
    """
    if not work.begin(plan, fresh=job.fresh):
        return
    planned = work.plan["shards"] if isinstance(work.plan, dict) else work.plan
    write = partial(_write, function, work.out, schema, stream)
    paths, rejects = make(job, planned, write, unit)
    counted = totals(paths, rejects)
    if not any(pq.read_metadata(path).num_rows for path in paths):
        raise ValueError(
            f"{job.out}: of {sum(shard['count'] for shard in planned):,} {unit}s none is left: all "
            f"are in {job.out}/shard-*.rejects.jsonl with the reason"
        )
    if twice := verification.repeated_ids(paths):
        raise ValueError(f"{work.out}: {twice}: give the source other ids; fresh=true starts anew")
    work.finish(counted, [file for path in paths for file in work.out.glob(f"{path.stem}.*")])
    print(summary(work.out, counted))


def make(
    job: Job, plan: list[Planned], write: Callable[[int, Planned], int], unit: str
) -> tuple[list[Path], Rejects]:
    """Make the shards that `job.out` lacks, each by a call write(index, shard) in a worker. `write`
    returns the index and writes the shard's rejects before the shard. `unit` is what `count`
    counts.

    Returns the paths of all shards and all rejects, in order. Raises ValueError as soon as the
    rejected units are more than the share runtime.max_reject_rate of the whole plan.
    """
    out, total = Path(job.out), sum(shard["count"] for shard in plan)
    paths = [out / shards.shard_name(i) for i in range(len(plan))]
    rejects = {i: read_rejects(path) for i, path in enumerate(paths) if path.exists()}
    missing = [(i, shard) for i, shard in enumerate(plan) if i not in rejects]
    faults = [fault for i in sorted(rejects) for fault in faults_of(rejects[i])]
    _check_rejects(job, faults, total, unit)
    done = sum(plan[i]["count"] for i in rejects)
    with tqdm(total=total, initial=done, desc=out.name, unit=unit) as bar:
        for i in _run(job.runtime, write, missing):
            rejects[i] = read_rejects(paths[i])
            faults += faults_of(rejects[i])
            _check_rejects(job, faults, total, unit)
            bar.update(plan[i]["count"])
    return paths, [reject for i in sorted(rejects) for reject in rejects[i]]


def gather(
    runtime: Workers, function: Callable[[Planned], Any], plan: list[Planned], title: str
) -> list[Any]:
    """Return the result of `function` for each shard, made by workers, in the order of `plan`."""
    numbered = _run(runtime, partial(_numbered, function), list(enumerate(plan)))
    results = dict(tqdm(numbered, title, len(plan), unit="shard"))
    return [results[i] for i in range(len(plan))]


@cache
def _component(spec: str) -> Any:
    return config.instantiate(json.loads(spec))


def component(spec: dict[str, Any]) -> Any:
    """Return the component that `spec` names, instantiated once in each process."""
    return _component(json.dumps(spec))


def _run(runtime: Workers, function: Callable[..., Any], tasks: list[tuple]) -> Iterator[Any]:
    """Yield the results of the tasks as they finish, run by `runtime.engine`."""
    where = {"workers": runtime.workers, "device": runtime.device}
    return config.instantiate(runtime.engine, function=function, tasks=tasks, **where)


def _numbered(function: Callable[[Planned], Any], index: int, shard: Planned) -> tuple[int, Any]:
    return index, function(shard)


def _write(
    function: Callable[[Planned], Shard],
    out: Path,
    schema: pa.Schema,
    stream: dict[str, Any] | None,
    index: int,
    planned: Planned,
) -> int:
    """Make shard `index`, write its files and return the index; runs in a worker process."""
    shard, path = function(planned), out / shards.shard_name(index)
    for stale in out.glob(f"{path.stem}.*"):  # of a try that was killed
        stale.unlink()
    write_rejects(path, shard.rejects)
    for name, content in shard.files.items():
        write_atomic(path.with_name(f"{path.stem}.{name}"), content)
    shards.write_shard(path, shard.rows, schema, stream, shard.counts)
    return index


def _check_rejects(job: Job, faults: Rejects, total: int, unit: str) -> None:
    if len(faults) > job.runtime.max_reject_rate * total:
        raise ValueError(
            f"{job.out}: {len(faults)} of {total} {unit}s were rejected, more than "
            f"runtime.max_reject_rate={job.runtime.max_reject_rate}; first: {faults[0]['id']}: "
            f"{faults[0]['reason']}; all are in {job.out}/shard-*.rejects.jsonl, and finished "
            "shards are kept"
        )


def speech_totals(paths: list[Path], name: str) -> dict[str, Any]:
    """Return totals of the pieces of speech in the shards at `paths`: {`name`: their number, hours,
    codes, bits_per_code: the bits that a code takes on disk}."""
    seconds, codes, pieces = 0.0, 0, 0
    for path in paths:
        columns = {"seconds", "codes", "turns"}.intersection(pq.read_schema(path).names)
        for batch in statistics.batches(path, sorted(columns)):
            speech = statistics.speech_of(batch)
            pieces += len(speech)
            codes += pc.sum(pc.list_value_length(speech["codes"])).as_py() or 0
            for length in speech["seconds"].to_pylist():  # one by one: order decides the rounding
                seconds += length
    size = sum(map(statistics.bytes_of_codes, paths))
    totals = {name: pieces, "hours": round(seconds / 3600, 4), "codes": codes}
    return totals | {"bits_per_code": round(8 * size / max(1, codes), 3)}


def counts_of(paths: Iterable[Path]) -> Counter[str]:
    """Return the sum of the `counts` that shards.write_shard stored in the shards."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(shards.read_counts(path))
    return counts


def describe_rejects(out: Path, totals: dict[str, Any], others: tuple[str, ...] = ()) -> list[str]:
    """Return phrases for a job's summary: how many units were rejected and filtered, by kind, and
    the same for the `others` among the keys of `totals`."""
    phrases = []
    for name in ("rejected", "filtered", *others):
        if totals[name]:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(totals[name].items()))
            phrases.append(f"{sum(totals[name].values()):,} {name} ({kinds})")
    if totals["rejected"] or totals["filtered"]:
        phrases.append(f"listed in {out}/shard-*.rejects.jsonl")
    return phrases
