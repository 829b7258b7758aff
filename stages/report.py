"""Tables, plots and the chosen epoch, from the result files of an evaluation.

    python -m stages.report recipes/demo/report.yaml check=true

In: <evals>/<checkpoint>/<task>.json as stages.evaluate writes them, and metrics.jsonl of each run.
Out, made anew each time: report.json (every score, and which checkpoint is chosen), report.md with
its plots, and report.html, which needs no other file. With check=true the job fails when the chosen
epoch misses a floor.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.evals import choice, page, plots, results, tables
from speechfuse.evals.choice import Floor, Rule
from speechfuse.evals.results import Baseline, Run, key
from speechfuse.evals.tables import Column

AUDIO = 3_000_000  # characters of recordings on the page


@dataclass
class Report:
    out: str = field(metadata={"help": "folder of the report"})
    evals: str = field(metadata={"help": "folder of the result files"})
    base: str = field(metadata={"help": "checkpoint that the percentages refer to"})
    runs: list[Run] = field(metadata={"help": "trainings in order, {name, path}"})
    rule: Rule
    table: list[Column] = field(
        metadata={"help": "{task, split, metric, degradation} of the first table"}
    )
    samples: str = field(metadata={"help": "split of the rule's task whose items are shown"})
    text: str = field(default="text_mmlu", metadata={"help": "4-choice task that is plotted"})
    baselines: list[Baseline] = field(
        default_factory=list,
        metadata={"help": "further rows {name, checkpoint, task, as_task} of the tables"},
    )
    floors: list[Floor] = field(
        default_factory=list,
        metadata={"help": "{task, split, metric, at_least | at_most | of_base_at_least}"},
    )
    check: bool = field(default=False, metadata={"help": "fail when a floor is missed"})


def metrics_of(run: Run) -> list[dict[str, Any]]:
    path = Path(run.path) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: train {run.name} first")
    return [json.loads(line) for line in lines]


def main(job: Report) -> None:
    read = results.read(Path(job.evals), job.base, job.runs, job.baselines)
    found, out, rule = read.of(job.rule.protocol), Path(job.out), job.rule
    if job.base not in found:
        raise ValueError(f"base={job.base} has no results; there are: {', '.join(sorted(found))}")
    if job.check and not job.floors:
        raise ValueError("check=true without floors checks nothing: add floors")
    if any(key(column)[:2] == key(rule)[:2] for column in job.table):
        raise ValueError(
            f"table: {rule.task} {rule.split} is what the epoch is chosen by, so it says "
            "nothing about the chosen one; take another split"
        )
    chose = choice.choose(found, rule, job.base, read.failures)
    judged = [choice.judge(floor, found, chose.checkpoint, job.base) for floor in job.floors]
    blocks = body(job, read, chose, [line for _, line in judged])
    for name, data in page.pictures(blocks).items():
        artifact.write_atomic(out / name, data)
    artifact.write_json(out / "report.json", rows(found, chose.checkpoint))
    artifact.write_atomic(out / "report.md", page.markdown(blocks))
    artifact.write_atomic(out / "report.html", page.document(out.name, blocks))
    if job.check:
        print("\n".join(line for _, line in judged))
    scores = found[chose.checkpoint].scores
    headline = [
        f"{' '.join(of)} {tables.shown(scores[of])}" for of in map(key, job.table) if of in scores
    ]
    print("\n".join(chose.reasons))
    print(f"{out / 'report.md'}: chosen {chose.checkpoint}; {', '.join(headline)}")
    missed = [line for good, line in judged if not good]
    if job.check and missed:
        raise ValueError(
            f"{chose.checkpoint} misses {len(missed)} of {len(judged)} floors: {'; '.join(missed)}"
        )


def rows(found: results.Found, chosen: str) -> list[dict[str, Any]]:
    return [
        {"checkpoint": name, "chosen": name == chosen, **asdict(score)}
        for name, checkpoint in found.items()
        for score in checkpoint.scores.values()
    ]


def body(
    job: Report, read: results.Results, chose: choice.Choice, floors: list[str]
) -> list[page.Block]:
    """The report, from top to bottom."""
    found, rule, out = read.of(job.rule.protocol), job.rule, Path(job.out)
    chosen, names = chose.checkpoint, list(found)
    epochs = results.of_run(found, rule.choose_from)
    metrics = {run.name: metrics_of(run) for run in job.runs}
    by = [Column(*key(entry)) for entry in (rule, *rule.then, *rule.under)]
    by = list({key(column): column for column in by}.values())
    cell = found[chosen].cell(key(rule))
    said, left = tables.samples(cell.items, job.samples, out, AUDIO)
    lines: list[page.Block] = [page.Heading(out.name, 1)]
    if read.failures:
        lines.append(page.Failed([
            f"failed: {f.checkpoint} {f.task}: {f.error}" for f in read.failures
        ]))  # fmt: skip
    lines += [
        page.Text(f"Chosen: **{chosen}**. {stated(rule)} {' '.join(chose.reasons)}"),
        tables.results(found, epochs, by, job.base, chosen),
        page.Heading("Results"),
        page.Text(
            "\u00b1: half of a 95 % bootstrap interval. wer: a fraction of words, lower is better."
        ),
        tables.results(found, names, job.table, job.base, chosen, ties(found, epochs, job.table)),
    ]
    if floors:
        lines += [page.Heading("Floors"), page.Code(floors)]
    lines += [
        page.Heading("Training"),
        page.Plot("loss", plots.loss(metrics), "loss by step"),
        tables.training(metrics),
        page.Heading("Text knowledge"),
        page.Plot(
            job.text, plots.text(found, job.text, [key(column) for column in job.table], job.base),
            "text score by training",
        ),
    ]  # fmt: skip
    if figure := plots.speech(found, epochs, job.text):
        lines += [page.Heading("Speech"), page.Plot("speech", figure, "speech scores by epoch")]
    lines += [page.Heading(f"What it says: {rule.task}, {job.samples}"), said]
    if left:
        lines.append(page.Text(f"{left} recordings are left out, to keep the page small."))
    for protocol, of in read.protocols.items():
        if protocol != rule.protocol:
            lines += [page.Heading(f"Results by the protocol {protocol}")]
        else:
            lines += [page.Heading("Every score")]
        lines += every_score(of, job.base, chosen)
    return lines


def stated(rule: Rule) -> str:
    """The rule in a sentence or two."""
    extreme = "lowest" if results.lower_is_better(rule.metric) else "highest"
    bounds = [
        f"{' '.join(key(floor))} {name} {limit}"
        for floor in rule.under
        for name, limit in asdict(floor).items()
        if name in choice.BOUNDS and limit is not None
    ]
    kept = f" that keep {' and '.join(bounds)}" if bounds else ""
    ties = "those not significantly worse" if rule.paired else "equals"
    then = "".join(f" the best {' '.join(key(measure))}, then" for measure in rule.then)
    return (
        f"The rule: among the epochs of {rule.choose_from}{kept} the one with the {extreme} "
        f"{rule.metric} on {rule.task}, split {rule.split}; of {ties}{then} the earliest. That "
        "split is not in the results."
    )


def ties(
    found: results.Found, epochs: list[str], columns: list[Column]
) -> dict[tuple[str, results.Key], str]:
    """Words beside the best epoch of each column and those that are not significantly worse."""
    words: dict[tuple[str, results.Key], str] = {}
    for of in map(key, columns):
        scored = [name for name in epochs if of in found[name].scores]
        if len(scored) > 1:
            tied, _ = choice.best(found, scored, of, test=True)
            best = choice.first(found, scored, of)
            words |= {(name, of): "best" if name == best else "ties with the best" for name in tied}
    return words


def every_score(found: results.Found, base: str, chosen: str) -> list[page.Block]:
    """A table for each task with all its splits and metrics."""
    keys = dict.fromkeys(of for checkpoint in found.values() for of in checkpoint.scores)
    tasks = dict.fromkeys(of[0] for of in keys)
    lines: list[page.Block] = []
    for task in tasks:
        columns = [Column(*of) for of in keys if of[0] == task]
        table = tables.results(found, list(found), columns, base, chosen)
        lines += [page.Heading(task, 3), table]
    return lines


if __name__ == "__main__":
    config.main(main, Report, __doc__)
