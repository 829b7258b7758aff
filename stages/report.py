"""Tables, plots and the chosen epoch, from the result files of an evaluation.

    python -m stages.report recipes/demo/report.yaml check=true

In: <evals>/<checkpoint>/<task>.json as stages.evaluate writes them, and metrics.jsonl of each run.
Out, made anew each time: report.json (every score, and which checkpoint is chosen), report.md with
its plots, and report.html, which needs no other file. With check=true the job fails when the chosen
epoch misses a floor.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.report import blocks as page
from speechfuse.report import choice, differences, plots, results, sections, tables
from speechfuse.report.blocks import Block, Code, Failed, Heading, Markdown, Plot
from speechfuse.report.choice import Floor, Rule
from speechfuse.report.results import Baseline, Curve, Run, key
from speechfuse.report.sections import section
from speechfuse.report.tables import Column

HALF = (
    "\u00b1: half of a 95 % bootstrap interval. wer: a fraction of words, lower is better. n: "
    "items, a range where checkpoints differ in how many."
)
APART = "Measured in another way: these numbers compare with none above."


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
    curves: list[Curve] = field(
        default_factory=list, metadata={"help": "{title, x, points} to be plotted"}
    )
    legend: dict[str, str] = field(
        default_factory=dict, metadata={"help": "what names in the tables mean, a line each"}
    )
    partial: str = field(
        default="", metadata={"help": "what the sweep was limited to, e.g. limit=20; said on top"}
    )
    command: str = field(default="", metadata={"help": "what makes the results, for the reader"})
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
    if sections.partial(found, job.partial):  # a few items need not be of every split
        scored = {of for checkpoint in found.values() for of in checkpoint.scores}
        job = replace(job, table=[column for column in job.table if key(column) in scored])
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


def rows(found: results.ResultsByCheckpoint, chosen: str) -> list[dict[str, Any]]:
    return [
        {"checkpoint": name, "chosen": name == chosen, **asdict(score)}
        for name, checkpoint in found.items()
        for score in checkpoint.scores.values()
    ]


def body(
    job: Report, read: results.Results, chose: choice.Choice, floors: list[str]
) -> list[Block]:
    """The report, from top to bottom."""
    found, chosen, out = read.of(job.rule.protocol), chose.checkpoint, Path(job.out)
    epochs = results.of_run(found, job.rule.choose_from)
    measures = (job.rule, *job.rule.then, *job.rule.under)
    by = {key(entry): Column(*key(entry)) for entry in measures}
    metrics = {run.name: metrics_of(run) for run in job.runs}
    wanted = [key(column) for column in job.table]
    marks = sections.tie_labels(found, epochs, wanted)
    failed = [f"failed: {f.checkpoint} {f.task}: {f.error}" for f in read.failures]
    compared = differences.table(found, epochs, list(dict.fromkeys([*wanted, *by])), chosen)
    text = plots.text(found, job.text, wanted, job.base)
    speech = plots.speech(found, epochs, [*wanted, *by], job.text)
    lines: list[Block] = [
        Heading(out.name, 1),
        *([Failed(failed)] if failed else []),
        *([Markdown(part)] if (part := sections.partial(found, job.partial)) else []),
        Markdown(f"Chosen: **{chosen}**. {job.rule.stated()} {' '.join(chose.reasons)}"),
        tables.results(found, epochs, list(by.values()), job.base, chosen),
        *section(
            "Results",
            Markdown(HALF),
            *(Markdown(f"**{name}**: {text}") for name, text in job.legend.items()),
            tables.results(found, list(found), job.table, job.base, chosen, marks),
        ),
        *section("Floors", Code(floors) if floors else None),
        *section("Differences between epochs", compared),
        *section(
            "Training", Plot("loss", plots.loss(metrics), "loss by step"), tables.training(metrics)
        ),
        *section("Text knowledge", Plot(job.text, text, "text score by training")),
        *section("Speech", Plot("speech", speech, "scores by epoch") if speech else None),
        *sections.curves(found, job.curves, chosen, not (failed or part)),
        *sections.said(found[chosen], key(job.rule), job.samples, out),
        *section("Every score", *sections.every_score(found, job.base, chosen)),
        *sections.appendix_sections(found),
        *([Markdown(f"Results and report are made by `{job.command}`.")] if job.command else []),
    ]
    for protocol, other in read.protocols.items():
        if protocol != job.rule.protocol:
            scores = sections.every_score(other, job.base, None)
            lines += section(f"Protocol {protocol}", Markdown(APART), *scores)
            lines += sections.appendix_sections(other, f", protocol {protocol}")
    return lines


if __name__ == "__main__":
    config.main(main, Report, __doc__)
