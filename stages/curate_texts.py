"""Choose and clean the instruction text that is to be spoken.

    python -m stages.curate_texts recipes/demo/curate_texts.yaml

In: instruction or chat datasets (texts.sources) and steps (texts.curation), in order. Out:
Parquet shards of conversations in text, one reject list per shard that says of every row left out
which step did it and why, and a manifest that counts what each step kept, rewrote and dropped. What
a step changed keeps its first text in `extra`. A step that compares all rows (duplicates) decides
when the work is planned; a shard is then a pure function of plan and configuration.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.hub import data as hub_data
from speechfuse.rows import making, shards
from speechfuse.rows.rejects import FILTERED, Reject, by_reason, rejects_of, write_rejects
from speechfuse.texts.conversations import Conversation, row_of
from speechfuse.texts.curation.step import Dropped


@dataclass
class Runtime:
    workers: int = field(default=2, metadata={"help": "processes on the CPU"})
    device: str = field(default="cpu", metadata={"help": "cpu: nothing here uses a GPU"})
    max_reject_rate: float = field(
        default=0.1, metadata={"help": "more unreadable rows than this stop the job"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what would be done, and stop"})
    engine: dict[str, Any] = field(
        default_factory=lambda: {"_component_": "speechfuse.workers.processes"},
        metadata={"help": "speechfuse.ray_cluster.ray_actors for more machines than one"},
    )


@dataclass
class CurateTexts:
    out: str = field(metadata={"help": "folder of the dataset"})
    texts: list[dict[str, Any]] = field(metadata={"help": "sources, of speechfuse.texts.sources"})
    steps: list[dict[str, Any]] = field(metadata={"help": "of speechfuse.texts.curation, in order"})
    shard_size: int = field(default=10_000, metadata={"help": "rows of the sources in a shard"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


@cache
def _made(spec: str) -> Any:
    return config.instantiate(json.loads(spec))


def _all(specs: list[dict[str, Any]]) -> list[Any]:
    return [_made(json.dumps(spec)) for spec in specs]


def _is_global(step: Any) -> bool:
    return hasattr(step, "decide")


def curated(job: CurateTexts, shard: dict[str, Any], steps: int) -> Iterator[Conversation | Reject]:
    """Each row of a shard behind the first `steps` of the steps; of global ones, what the plan says
    they decided."""
    chosen = _all(job.steps)[:steps]
    for item in _made(json.dumps(job.texts[shard["texts"]])).conversations(shard):
        for number, step in enumerate(chosen):
            if isinstance(item, Reject):
                break
            if _is_global(step):
                why = shard["dropped"].get(str(number), {}).get(item.id)
                after = Dropped(why) if why else item
            else:
                after = step(item)
            if isinstance(after, Dropped):
                after = Reject(item.id, f"{FILTERED}{step.name} {after.reason}")
            item = after
        yield item


def curate_shard(job: CurateTexts, index: int, shard: dict[str, Any]) -> int:
    """Make shard `index` in a worker process; returns its index."""
    rows, rejects = [], []
    for item in curated(job, shard, len(job.steps)):
        if isinstance(item, Reject):
            rejects.append({"id": item.id, "reason": item.reason})
        else:
            rows.append(row_of(item))
    path = Path(job.out) / shards.shard_name(index)
    write_rejects(path, rejects)
    shards.write_shard(path, rows, shards.CONVERSATIONS)
    return index


def sketches_of(
    job: CurateTexts, index: int, shard: dict[str, Any], number: int
) -> tuple[int, list[tuple[str, Any]]]:
    """What step `number`, a global one, wants to know of each row that reaches it."""
    step = _all(job.steps)[number]
    reached = (item for item in curated(job, shard, number) if isinstance(item, Conversation))
    return index, [(item.id, step.sketch(item)) for item in reached]


def _facts(step: Any) -> dict[str, Any]:
    return getattr(step, "facts", {})


def _decide(job: CurateTexts, plan: list[dict[str, Any]], number: int, step: Any) -> None:
    tasks = [(job, i, shard, number) for i, shard in enumerate(plan)]
    found: dict[int, list[tuple[str, Any]]] = {}
    with tqdm(total=len(tasks), desc=step.name, unit="shard") as bar:
        for index, sketches in making.run(job.runtime, sketches_of, tasks):
            found[index] = sketches
            bar.update()
    ordered = (each for i in range(len(plan)) for each in found[i])
    dropped = step.decide(ordered)
    for i, shard in enumerate(plan):
        mine = {id: dropped[id] for id, _ in found[i] if id in dropped}
        if mine:
            shard["dropped"][str(number)] = mine


def plan_of(job: CurateTexts, sources: list[Any], steps: list[Any]) -> list[dict[str, Any]]:
    """What plan.json holds: shards {texts: number of the source, root, file, row, start, count,
    licence, dropped: {number of a global step: {id: why}}}."""
    plan = [
        {**shard, "texts": number, "dropped": {}}
        for number, source in enumerate(sources)
        for shard in source.plan(job.shard_size)
    ]
    for number, source in enumerate(sources):
        if not any(shard["texts"] == number for shard in plan):
            raise ValueError(f"texts: there is not one row in {source.documents.path}")
    for step in steps:
        _facts(step)  # now, not after hours
    if not job.runtime.dry_run:
        for number, step in enumerate(steps):
            if _is_global(step):
                _decide(job, plan, number, step)
    return plan


def totals_of(
    paths: list[Path], rejects: Iterable[dict[str, str]], steps: list[Any], rows_in: int
) -> dict[str, Any]:
    """What became of the rows, counted from disk."""
    kinds = by_reason(list(rejects))
    rewrites: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    words = 0
    for path in paths:
        for row in _rows(path):
            extra = json.loads(row["extra"])
            kept[extra["source"]] += 1
            rewrites.update(extra.get("rewrites", ()))
            words += sum(
                len(segment["text"].split())
                for turn in row["turns"]
                if turn["role"] == "user"
                for segment in turn["segments"]
            )
    left = sum(kept.values()) + sum(kinds["filtered"].values())
    unselected = rows_in - left - sum(kinds["rejected"].values())
    table = []
    for step in steps:
        mine = f"{FILTERED}{step.name} "
        dropped = {
            k.removeprefix(mine): n for k, n in kinds["filtered"].items() if k.startswith(mine)
        }
        left -= sum(dropped.values())
        changed = {
            k.removeprefix(f"{step.name} "): n
            for k, n in sorted(rewrites.items())
            if k.startswith(f"{step.name} ")
        }
        table.append(
            {"step": step.name, "kept": left, "rewritten": changed, "dropped": dropped}
            | _facts(step)
        )
    return {
        "rows": sum(kept.values()),
        "rows_in": rows_in - unselected,
        "not_selected": unselected,
        "prompt_words": words,
        "steps": table,
        "kept_by_source": dict(sorted(kept.items())),
        **kinds,
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from shards.read_shard(path)
    except (pa.ArrowException, OSError) as error:
        raise shards.damaged(path, error) from None


def main(job: CurateTexts) -> None:
    out = Path(job.out)
    if job.shard_size < 1:
        raise ValueError(f"shard_size={job.shard_size}: it must be at least 1")
    if not job.texts:
        raise ValueError("texts is empty: name at least one source of speechfuse.texts.sources")
    sources, steps = _all(job.texts), _all(job.steps)
    for what, names in (
        ("texts", [s.source_name for s in sources]),
        ("steps", [s.name for s in steps]),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{what}: two are named {twice[0]!r}; give one of them another name=..."
            )
    if job.runtime.dry_run:
        plan = plan_of(job, sources, steps)
        rows = sum(shard["count"] for shard in plan)
        print(f"{out}: {rows:,} rows in {len(plan)} shards; not started")
        return
    begun = None if job.fresh else out
    numbers = count()
    inputs = {
        f"texts.{n}": hub_data.pinned_commit(s.fingerprint, f"texts.{n}", begun)
        for n, s in zip(numbers, sources, strict=False)
    }
    specs = []  # as the workers get them: what is on the Hub at the commits that are inputs
    for spec, step in zip(job.steps, steps, strict=True):
        read = {
            key: hub_data.pinned_commit(value, f"{step.name}.{key}", begun)
            for key, value in getattr(step, "inputs", {}).items()
        }
        inputs |= {f"{step.name}.{key}": value for key, value in read.items()}
        specs.append({**spec, **step.at(read)} if hasattr(step, "at") else spec)
    work = artifact.Artifact(out, "curate_texts", 1, asdict(job), inputs)
    job = replace(job, steps=specs)
    steps = _all(job.steps)
    if not work.begin(lambda: plan_of(job, sources, steps), fresh=job.fresh):
        return
    paths, rejects = making.make(job, work.plan, curate_shard, "row")
    totals = totals_of(paths, rejects, steps, sum(shard["count"] for shard in work.plan))
    if not totals["rows"]:
        raise ValueError(nothing_left(out, totals))
    licences = {sources[shard["texts"]].source_name: shard["licence"] for shard in work.plan}
    totals["source"] = ", ".join(licences)
    totals["licence"] = " and ".join(sorted({each or "unknown" for each in licences.values()}))
    totals["licences"] = licences
    work.finish(totals, [*paths, *rejects_of(paths)])
    print(summary(out, totals))


def nothing_left(out: Path, totals: dict[str, Any]) -> str:
    if not totals["rows_in"]:
        return f"{out}: select chose none of {totals['not_selected']:,} rows of texts: correct it"
    dropped = {f"the step {s['step']}": sum(s["dropped"].values()) for s in totals["steps"]}
    dropped["what could not be read"] = sum(totals["rejected"].values())
    what, many = max(dropped.items(), key=lambda pair: pair[1])
    return (
        f"{out}: not one of {totals['rows_in']:,} rows is left, most were lost to {what} "
        f"({many:,}): see {out}/shard-*.rejects.jsonl, and change that"
    )


def summary(out: Path, totals: dict[str, Any]) -> str:
    """One line: what is left, and what each step did."""
    said = [f"{n:,} {kind}" for kind, n in totals["rejected"].items()]
    for step in totals["steps"]:
        dropped, changed = sum(step["dropped"].values()), sum(step["rewritten"].values())
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in step["dropped"].items())
        said.append(
            f"{step['step']} dropped {dropped:,}"
            + (f" ({kinds})" if kinds else "")
            + (f" and made {changed:,} rewrites" if changed else "")
        )
    return (
        f"{out}: {totals['rows']:,} of {totals['rows_in']:,} rows are left; "
        f"{'; '.join(said) or 'no step'}; listed in {out}/shard-*.rejects.jsonl"
    )


if __name__ == "__main__":
    from stages import curate_texts as this  # under its own name workers elsewhere find it too

    config.main(this.main, this.CurateTexts, __doc__)
