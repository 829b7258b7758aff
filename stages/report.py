"""Write tables and plots, and select an epoch, from the result files of an evaluation.

    python -m stages.report recipes/demo/report.yaml check=true

In: <evals>/<checkpoint>/<task>.json as stages.evaluate writes them, and metrics.jsonl of each run.
Out, rewritten each time: report.json (every score, and which checkpoint is chosen), report.md with
its plots, and report.html, which needs no other file. With check=true the job fails when the chosen
epoch misses a floor.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.report import choice, differences, page, plots, results, sections, tables
from speechfuse.report.choice import Choice, Floor, Rule
from speechfuse.report.media import Media
from speechfuse.report.results import Curve, Results, ResultsByCheckpoint, Run, key
from speechfuse.report.sections import section
from speechfuse.report.tables import Column

LEGEND = (
    "\u00b1: half of a 95 % bootstrap interval. wer: a fraction of words, lower is better. n: "
    "items, a range where checkpoints differ in how many."
)
OTHER_PROTOCOL = "Measured in another way: these numbers compare with none above."


@dataclass
class Report:
    out: str = config.key("folder of the report")
    evals: str = config.key("folder of the result files")
    base: str = config.key("checkpoint that the percentages refer to")
    runs: list[Run] = config.key("trainings in order, {name, path}")
    rule: Rule = config.key("how the epoch is chosen")
    table: list[Column] = config.key("{task, split, metric, degradation} of the first table")
    samples: str = config.key("split of the rule's task whose items are shown")
    text: str = config.key("4-choice task that is plotted", "text_mmlu")
    floors: list[Floor] = config.key(
        "{task, split, metric, at_least | at_most | of_base_at_least}", []
    )
    curves: list[Curve] = config.key("{title, x, points} to be plotted", [])
    legend: dict[str, str] = config.key("what names in the tables mean, in Markdown", {})
    partial: str = config.key("what the sweep was limited to, e.g. limit=20; said on top", "")
    command: str = config.key("what makes the results, for the reader", "")
    check: bool = config.key("fail when a floor is missed", False)


def metrics_of(run: Run) -> list[dict[str, Any]]:
    path = Path(run.path) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: train {run.name} first")
    return [json.loads(line) for line in lines]


def main(job: Report) -> None:
    protocols = results.read(Path(job.evals), job.base, job.runs)
    checkpoints, out, rule = protocols.of(job.rule.protocol), Path(job.out), job.rule
    if sections.partial(checkpoints, job.partial):  # a few items need not be of every split
        scored = {of for checkpoint in checkpoints.values() for of in checkpoint.scores}
        job = replace(job, table=[column for column in job.table if key(column) in scored])
    if job.base not in checkpoints:
        names = ", ".join(sorted(checkpoints))
        raise ValueError(f"base={job.base} has no results; there are: {names}")
    if job.check and not job.floors:
        raise ValueError("check=true without floors checks nothing: add floors")
    if any(key(column)[:2] == key(rule)[:2] for column in job.table):
        raise ValueError(
            f"table: {rule.task} {rule.split} is what the epoch is chosen by, so it says "
            "nothing about the chosen one; take another split"
        )
    chosen = choice.choose(checkpoints, rule, job.base, protocols.failures)
    verdicts = [choice.judge(of, checkpoints, chosen.checkpoint, job.base) for of in job.floors]
    floors, media = "\n".join(line for _, line in verdicts), Media(out)
    markdown = "\n\n".join(filter(None, body(job, protocols, chosen, floors, media))) + "\n"
    for name, data in media.files.items():
        artifact.write_atomic(out / name, data)
    artifact.write_json(out / "report.json", rows(checkpoints, chosen.checkpoint))
    artifact.write_atomic(out / "report.md", markdown)
    artifact.write_atomic(out / "report.html", media.page(out.name, markdown))
    if job.check:
        print(floors)
    scores = checkpoints[chosen.checkpoint].scores
    headline = [
        f"{' '.join(of)} {tables.shown(scores[of])}" for of in map(key, job.table) if of in scores
    ]
    print("\n".join(chosen.reasons))
    print(f"{out / 'report.md'}: chosen {chosen.checkpoint}; {', '.join(headline)}")
    missed = [line for within, line in verdicts if not within]
    if job.check and missed:
        count = f"{len(missed)} of {len(verdicts)} floors"
        raise ValueError(f"{chosen.checkpoint} misses {count}: {'; '.join(missed)}")


def rows(checkpoints: ResultsByCheckpoint, chosen: str) -> list[dict[str, Any]]:
    return [
        {"checkpoint": name, "chosen": name == chosen}
        | {field: value for field, value in asdict(score).items() if field != "paired"}
        for name, checkpoint in checkpoints.items()
        for score in checkpoint.scores.values()
    ]


def body(job: Report, protocols: Results, choice: Choice, floors: str, media: Media) -> list[str]:
    """Return the report from top to bottom, in blocks of Markdown, of which some may be empty."""
    checkpoints, rule, chosen = protocols.of(job.rule.protocol), job.rule, choice.checkpoint
    epochs = results.of_run(checkpoints, rule.choose_from)
    columns = [key(column) for column in job.table]
    measures = list(dict.fromkeys(map(key, (rule, *rule.then, *rule.under))))
    compared = list(dict.fromkeys([*columns, *measures]))
    metrics = {run.name: metrics_of(run) for run in job.runs}
    ties = sections.tie_labels(checkpoints, epochs, columns)
    text = plots.text(checkpoints, job.text, columns, job.base)
    speech = plots.speech(checkpoints, epochs, compared, job.text)
    part = sections.partial(checkpoints, job.partial)
    failures = [page.escape(f"{f.checkpoint} {f.task}: {f.error}") for f in protocols.failures]
    whole = not (failures or part)
    blocks = [
        f"# {page.escape(media.folder.name)}",
        "\n".join(f"> failed: {failure}  " for failure in failures),
        part,
        f"Chosen: **{page.escape(chosen)}**. "
        + page.escape(f"{rule.stated()} {' '.join(choice.reasons)}"),
        tables.results(checkpoints, epochs, [Column(*of) for of in measures], job.base, chosen),
        "## Results",
        LEGEND,
        *(f"**{page.escape(name)}**: {meaning}" for name, meaning in job.legend.items()),
        tables.results(checkpoints, list(checkpoints), job.table, job.base, chosen, ties),
        *section("Floors", f"```\n{floors}\n```" if floors else None),
        *section(
            "Differences between epochs", differences.table(checkpoints, epochs, compared, chosen)
        ),
        "## Training",
        media.plot("loss", plots.loss(metrics), "loss by step"),
        tables.training(metrics),
        "## Text knowledge",
        media.plot(job.text, text, "text score by training"),
        *section("Speech", media.plot("speech", speech, "scores by epoch") if speech else None),
        *sections.curves(checkpoints, job.curves, chosen, whole, media),
        *sections.replies(checkpoints[chosen], key(rule), job.samples, media),
        *section("Every score", *sections.every_score(checkpoints, job.base, chosen)),
        *sections.appendix_sections(checkpoints, media),
        f"Results and report are made by `{job.command}`." if job.command else "",
    ]
    for protocol, others in protocols.protocols.items():
        if protocol != rule.protocol:
            scores = sections.every_score(others, job.base, None)
            blocks += section(f"Protocol {protocol}", OTHER_PROTOCOL, *scores)
            blocks += sections.appendix_sections(others, media, f", protocol {protocol}")
    return blocks


if __name__ == "__main__":
    config.main(main, Report, __doc__)
