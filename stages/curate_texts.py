"""Choose and clean instruction text before it is spoken.

    python -m stages.curate_texts recipes/demo/curate_texts.yaml

In: instruction or chat datasets (texts.sources) and steps (texts.curation), in order. Out:
Parquet shards of conversations in text, one reject list per shard that gives the step and the
reason for every dropped row, and a manifest that counts what each step kept, rewrote and dropped. A
rewritten row keeps its original text in `extra`. A step that compares all rows (duplicates) decides
when the work is planned; a shard is then a pure function of plan and configuration.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.hub import data as hub_data
from speechfuse.rows import making, shards
from speechfuse.rows.rejects import FILTERED, Rejects, by_reason
from speechfuse.texts.conversations import conversation_of
from speechfuse.texts.curation.shard import curate_shard, is_global, sketches_of


@dataclass
class Runtime(making.Workers):
    device: str = key("cpu: nothing here uses a GPU", "cpu")


@dataclass
class CurateTexts:
    out: str = key("folder of the dataset")
    texts: list[dict[str, Any]] = key("sources, of speechfuse.texts")
    steps: list[dict[str, Any]] = key("steps, of speechfuse.texts, in order")
    shard_size: int = key("rows of the sources in a shard", 10_000, least=1)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)


def _facts(step: Any) -> dict[str, Any]:
    return getattr(step, "facts", {})


def _decide(job: CurateTexts, plan: list[dict[str, Any]], number: int, step: Any) -> None:
    """Note in each shard of `plan` what step `number`, a global one, drops of it."""
    sketch = partial(sketches_of, texts=job.texts, steps=job.steps[: number + 1])
    sketches = making.gather(job.runtime, sketch, plan, step.name)
    dropped = step.decide(chain.from_iterable(sketches))
    for shard, of_shard in zip(plan, sketches, strict=True):
        if reasons := {id: dropped[id] for id, _ in of_shard if id in dropped}:
            shard["dropped"][str(number)] = reasons


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
            if is_global(step):
                _decide(job, plan, number, step)
    return plan


def totals_of(paths: list[Path], rejects: Rejects, steps: list[Any], given: int) -> dict[str, Any]:
    """Totals of the manifest, counted from disk: rows, words of the prompts, and of each step what
    it kept, rewrote and dropped. `given`: rows of the plan."""
    kinds = by_reason(rejects)
    rewrites: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    words = 0
    for path in paths:
        for row in shards.read_shard(path):
            conversation = conversation_of(row)
            rows[conversation.source] += 1
            rewrites.update(conversation.extra.get("rewrites", ()))
            words += sum(len(prompt.split()) for prompt in conversation.prompts)
    left = rows.total() + sum(kinds["filtered"].values())
    unselected = given - left - sum(kinds["rejected"].values())
    table = []
    for step in steps:
        dropped = _by_kind(kinds["filtered"], f"{FILTERED}{step.name} ")
        changed = _by_kind(rewrites, f"{step.name} ")
        left -= sum(dropped.values())
        line = {"step": step.name, "kept": left, "rewritten": changed, "dropped": dropped}
        table.append(line | _facts(step))
    return {
        "rows": rows.total(),
        "rows_in": given - unselected,
        "not_selected": unselected,
        "prompt_words": words,
        "steps": table,
        "kept_by_source": dict(sorted(rows.items())),
        **kinds,
    }


def _by_kind(counts: dict[str, int], prefix: str) -> dict[str, int]:
    """The counts whose names begin with `prefix`, without it, sorted."""
    named = sorted(counts.items())
    return {name.removeprefix(prefix): n for name, n in named if name.startswith(prefix)}


def main(job: CurateTexts) -> None:
    out = Path(job.out)
    if not job.texts:
        raise ValueError("texts is empty: name at least one source of speechfuse.texts")
    sources, steps = list(map(making.component, job.texts)), list(map(making.component, job.steps))
    named = {"texts": [s.source_name for s in sources], "steps": [s.name for s in steps]}
    for what, names in named.items():
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{what}: two are named {twice[0]!r}; give one another name=...")
    if job.runtime.dry_run:
        try:
            plan = plan_of(job, sources, steps)
            rows = f"{sum(shard['count'] for shard in plan):,} rows in {len(plan)} shards"
        except hub_data.NoConnection as error:
            rows = f"rows are not known ({error})"
        print(f"{out}: {rows}; not started")
        return
    started = None if job.fresh else out
    inputs = {
        f"texts.{number}": hub_data.pinned_commit(source.fingerprint, f"texts.{number}", started)
        for number, source in enumerate(sources)
    }
    specs = []  # as the workers get them: what is on the Hub at the commits that are inputs
    for spec, step in zip(job.steps, steps, strict=True):
        commits = {
            key: hub_data.pinned_commit(value, f"{step.name}.{key}", started)
            for key, value in getattr(step, "inputs", {}).items()
        }
        inputs |= {f"{step.name}.{key}": value for key, value in commits.items()}
        specs.append({**spec, **step.at(commits)} if hasattr(step, "at") else spec)
    work = artifact.Artifact(out, "curate_texts", 3, asdict(job), inputs)
    job = replace(job, steps=specs)
    steps = list(map(making.component, job.steps))

    def totals(paths: list[Path], rejects: Rejects) -> dict[str, Any]:
        figures = totals_of(paths, rejects, steps, sum(shard["count"] for shard in work.plan))
        if not figures["rows"]:
            raise ValueError(nothing_left(out, figures))
        licences = {sources[shard["texts"]].source_name: shard["licence"] for shard in work.plan}
        licence = " and ".join(sorted({each or "unknown" for each in licences.values()}))
        return figures | {"source": ", ".join(licences), "licence": licence, "licences": licences}

    making.make_dataset(
        job,
        work,
        lambda: plan_of(job, sources, steps),
        partial(curate_shard, texts=job.texts, steps=job.steps),
        "row",
        shards.CONVERSATIONS,
        None,
        totals,
        summary,
    )


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
    """One line: the rows that are left, and what each step did."""
    phrases = [f"{n:,} {kind}" for kind, n in totals["rejected"].items()]
    for step in totals["steps"]:
        dropped, changed = sum(step["dropped"].values()), sum(step["rewritten"].values())
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in step["dropped"].items())
        phrase = f"{step['step']} dropped {dropped:,}" + f" ({kinds})" * bool(kinds)
        phrases.append(phrase + f" and made {changed:,} rewrites" * bool(changed))
    return (
        f"{out}: {totals['rows']:,} of {totals['rows_in']:,} rows are left; "
        f"{'; '.join(phrases) or 'no step'}; listed in {out}/shard-*.rejects.jsonl"
    )


if __name__ == "__main__":
    config.main(main, CurateTexts, __doc__)
