"""Write tables and plots, and select an epoch, from the result files of an evaluation.

    python -m stages.report recipes/demo/report.yaml check=true

In: <evals>/<checkpoint>/<task>.json as stages.evaluate writes them, and metrics.jsonl of each run.
Out, rewritten each time: report.json (every score, and which checkpoint is chosen), report.md with
its plots, and report.html, which needs no other file. With check=true the job fails when the chosen
epoch misses a floor. With plan=evaluate.yaml nothing is read or written: what the report names is
compared with what that evaluation will score.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.evals.sweep import Evaluate
from speechfuse.report import choice, differences, page, plots, results, sections, tables
from speechfuse.report.choice import Choice, Floor, Rule
from speechfuse.report.media import Media
from speechfuse.report.results import Checkpoints, Curve, Key, Results, Run, key
from speechfuse.report.sections import section
from speechfuse.report.tables import Column

LEGEND = (
    "\u00b1: half of a 95 % bootstrap interval. wer: a fraction of words, lower is better. n: "
    "items, a range where checkpoints differ in how many."
)
OTHER_PROTOCOL = "Measured in another way: these numbers compare with none above."


TEXT = "text_mmlu"
SCORED_AS = {  # metric of a task: as its scores are called, where that differs
    "wer": ("wer", "wer_capped"),
    "wer_whisper": ("wer",),
    "wer_written": ("wer",),
    "cer": ("cer", "cer_capped"),
    "rouge": ("rougeL", "rouge1", "rouge2"),
}


@dataclass
class Report:
    out: str = config.key("folder of the report")
    evals: str = config.key("folder of the result files")
    rule: Rule = config.key("how the epoch is chosen")
    base: str | None = config.key("checkpoint that the percentages refer to", None)
    runs: list[Run] = config.key("trainings in order, {name, path}", [])
    table: list[Column] = config.key("{task, split, metric, degradation} of the first table", [])
    samples: str | None = config.key("split of the rule's task to be shown; null: all", None)
    text: str | None = config.key("task of multiple choice that is plotted, if it is scored", TEXT)
    floors: list[Floor] = config.key(
        "{task, split, metric, at_least | at_most | of_base_at_least}", []
    )
    curves: list[Curve] = config.key("{title, x, points} to be plotted", [])
    legend: dict[str, str] = config.key("what names in the tables mean, in Markdown", {})
    partial: str = config.key("what the sweep was limited to, e.g. limit=20; said on top", "")
    command: str = config.key("what makes the results, for the reader", "")
    check: bool = config.key("fail when a floor is missed", False)
    plan: str | None = config.key("an evaluate.yaml: say what it will not score; stop", None)


def will_score(task: str, spec: dict[str, Any]) -> set[Key]:
    """Return the (task, split, metric) that a task of an evaluation gives; "*" is any, of a task
    whose scores are known when it runs."""
    if spec.get("_component_") != "speechfuse.evals.Speech":
        return {(task, "*", "*")}
    name, metric = spec.get("name") or task, str(spec.get("metric"))
    metrics = SCORED_AS.get(metric, (metric,))
    splits = [*spec.get("splits", {"all": {}})]
    found = {(name, split, each) for split in splits for each in metrics}
    found |= {(name, split, "refusal_rate") for split in splits if spec.get("refusals")}
    found |= {("question_transcript", split, "wer") for split in spec.get("transcript_splits", {})}
    if control := spec.get("controls_of"):
        controls = "shuffled_audio", "majority_answer", f"{control}_heard_exactly"
        found |= {(name, split, metrics[0]) for split in controls}
    return found


def check_plan(job: Report, plan: Evaluate, path: str) -> None:
    """Raise ValueError, before anything is evaluated, for what of the report is not scored yet, by
    other evaluations perhaps, and `plan` will not score."""
    if Path(job.evals) != Path(plan.out):
        raise ValueError(f"evals={job.evals}, but {path} writes to out={plan.out}: make them equal")
    scored: dict[str, set[Key]] = {}
    for entry in plan.checkpoints:
        of_tasks = [will_score(task, plan.tasks.get(task, {})) for task in entry.get("tasks", [])]
        scored[str(entry.get("name"))] = set().union(*of_tasks)
    rule, run = job.rule, job.rule.choose_from
    with suppress(ValueError):  # no results yet
        there = results.read(Path(job.evals), job.base, job.runs).of(rule.protocol)
        for name, checkpoint in there.items():
            scored.setdefault(name.partition("/")[0], set()).update(checkpoint.scores)
    named = {"base": [job.base] if job.base else [], "runs": [each.name for each in job.runs]}
    for what, names in {"rule.choose_from": [run], **named}.items():
        if lost := [name for name in names if name not in scored]:
            raise ValueError(
                f"{what}: {path} has no checkpoint {lost[0]}; it has {', '.join(scored)}"
            )
    every = set().union(*scored.values())
    of_run = [("rule", rule), *(("rule.under", floor) for floor in rule.under)]
    of_run += [*(("rule.then", of) for of in rule.then), *(("floors", of) for of in job.floors)]
    needs = [(what, key(of), scored[run]) for what, of in of_run]
    needs += [("table", key(of), every) for of in job.table]
    needs += [("curves", of, every) for curve in job.curves for of in curve.keys.values()]
    if job.samples:
        needs.append(("samples", (rule.task, job.samples, "*"), scored[run]))
    if job.text and job.text != TEXT:
        accuracies = {of for of in every if of[2].startswith(("*", *plots.ACCURACIES))}
        needs.append(("text, an accuracy", (job.text, "*", "*"), accuracies))
    for what, of, keys in needs:
        if not any(all(a == b or "*" in (a, b) for a, b in zip(of, k, strict=True)) for k in keys):
            of_task = [each for each in keys if each[0] == of[0]]
            near = of_task or [(each[0], "*", "*") for each in keys]
            listed = ", ".join(sorted({*map(_name, near)})) or "nothing"
            whose = f" of {run}" if keys is scored[run] else ""
            raise ValueError(f"{what}: {path} scores no '{_name(of)}'{whose}; it scores {listed}")


def _name(of: Key) -> str:
    return " ".join(of).replace(" *", "")


def metrics_of(run: Run) -> list[dict[str, Any]]:
    path = Path(run.path) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: train {run.name} first")
    return [json.loads(line) for line in lines]


def main(job: Report) -> None:
    of_base = [key(of) for of in (*job.floors, *job.rule.under) if of.of_base_at_least is not None]
    of_base += [key(column) for column in job.table if column.degradation]
    if of_base and not job.base:
        raise ValueError(f"base is not set, but {' '.join(of_base[0])} is compared with it: set it")
    if job.plan:
        check_plan(job, config.load(Evaluate, Path(job.plan), []), job.plan)
        return
    protocols = results.read(Path(job.evals), job.base, job.runs)
    checkpoints, out, rule = protocols.of(job.rule.protocol), Path(job.out), job.rule
    scored = {of for checkpoint in checkpoints.values() for of in checkpoint.scores}
    partial = bool(sections.partial(checkpoints, job.partial))  # a few items are not of every split
    columns = [of for of in job.table if key(of) in scored or not (partial or of.may_be_absent)]
    job = replace(job, table=columns)
    if job.base and job.base not in checkpoints:
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
    there = [of for of in map(key, job.table) if of in scores]
    headline = [f"{' '.join(of)} {tables.shown(scores[of])}" for of in there]
    print("\n".join(chosen.reasons))
    said = "; ".join(filter(None, [f"chosen {chosen.checkpoint}", ", ".join(headline)]))
    print(f"{out / 'report.md'}: {said}")
    missed = [line for within, line in verdicts if not within]
    if job.check and missed:
        count = f"{len(missed)} of {len(verdicts)} floors"
        raise ValueError(f"{chosen.checkpoint} misses {count}: {'; '.join(missed)}")


def rows(checkpoints: Checkpoints, chosen: str) -> list[dict[str, Any]]:
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
    loss = media.plot("loss", plots.loss(metrics), "loss by step") if metrics else None
    ties = sections.tie_labels(checkpoints, epochs, columns)
    every = list(checkpoints)
    table = [tables.results(checkpoints, every, job.table, job.base, chosen, ties)] * bool(columns)
    legend = [f"**{page.escape(name)}**: {meaning}" for name, meaning in job.legend.items()]
    there = any(of[0] == TEXT for checkpoint in checkpoints.values() for of in checkpoint.scores)
    text_task = job.text if there or job.text != TEXT else None
    speech = plots.speech(checkpoints, epochs, compared, text_task)
    text: list[str] = []
    if text_task:
        figure = plots.text(checkpoints, text_task, columns, job.base)
        text = [media.plot(text_task, figure, "text score by training")]
    part = sections.partial(checkpoints, job.partial)
    failures = [page.escape(f"{f.checkpoint} {f.task}: {f.error}") for f in protocols.failures]
    whole = not (failures or part)
    blocks = [
        f"# {page.escape(media.folder.name)}",
        "\n".join(f"> failed: {failure}  " for failure in failures),
        part,
        f"Chosen: **{page.escape(chosen)}**. "
        + page.escape(f"{rule.stated(bool(table))} {' '.join(choice.reasons)}"),
        tables.results(checkpoints, epochs, [Column(*of) for of in measures], job.base, chosen),
        *(section("Results", LEGEND, *legend, *table) if table else [LEGEND, *legend]),
        *section("Floors", f"```\n{floors}\n```" if floors else None),
        *section(
            "Differences between epochs", differences.table(checkpoints, epochs, compared, chosen)
        ),
        *section("Training", loss, tables.training(metrics) if metrics else None),
        *section("Text knowledge", *text),
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
