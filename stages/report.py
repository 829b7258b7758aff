"""Table, plots and the chosen epoch, from the result files of an evaluation.

    python -m stages.report recipes/demo/report.yaml check=true

In: <evals>/<checkpoint>/<task>.json as stages.evaluate writes them, and metrics.jsonl of each run.
Out, made anew each time: report.json (every score, and which checkpoint is chosen), report.md,
loss.png and text_mmlu.png. With check=true the job fails when the chosen epoch misses a floor.
"""

import html
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from speechfuse import artifact, config
from speechfuse.evals.scores import Score

Key = tuple[str, str, str]  # task, split, metric
SAMPLES = 10
CHANCE = 0.25  # of a 4-choice question


@dataclass
class Run:
    name: str
    path: str


@dataclass
class Column:
    task: str
    split: str
    metric: str


@dataclass
class Rule:
    """Chosen is the epoch of run `choose_from` with the highest value; of equals the earliest."""

    choose_from: str = field(metadata={"help": "run whose epochs compete; the highest value wins"})
    task: str = field(metadata={"help": "task of the value"})
    split: str = field(metadata={"help": "its split, which no column of the table may be of"})
    metric: str = field(metadata={"help": "its metric, of which more is better"})


@dataclass
class Floor:
    """A bound on one score of the chosen epoch: exactly one of the last three keys."""

    task: str
    split: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    of_base_at_least: float | None = None


@dataclass
class Report:
    out: str = field(metadata={"help": "folder of the report"})
    evals: str = field(metadata={"help": "folder of the result files"})
    base: str = field(metadata={"help": "checkpoint that the percentages refer to"})
    runs: list[Run] = field(metadata={"help": "trainings in order, {name, path}"})
    rule: Rule
    table: list[Column] = field(metadata={"help": "{task, split, metric} of the first table"})
    samples: str = field(metadata={"help": "split of the rule's task whose items are shown"})
    text: str = field(default="text_mmlu", metadata={"help": "4-choice task that is plotted"})
    floors: list[Floor] = field(
        default_factory=list,
        metadata={"help": "{task, split, metric, at_least | at_most | of_base_at_least}"},
    )
    check: bool = field(default=False, metadata={"help": "fail when a floor is missed"})


@dataclass
class Checkpoint:
    """Scores by (task, split, metric), and the items of each task."""

    scores: dict[Key, Score]
    items: dict[str, list[dict[str, Any]]]


Found = dict[str, Checkpoint]


def key(entry: Score | Column | Rule | Floor) -> Key:
    return entry.task, entry.split, entry.metric


def read(evals: Path) -> Found:
    """All result files by checkpoint. ValueError when there is none, or one is of another form."""
    found: Found = {}
    for path in sorted(evals.rglob("*.json")):
        name = path.parent.relative_to(evals).as_posix()
        try:
            cell = json.loads(path.read_text("utf-8"))
            scores = [Score(**score) for score in cell["scores"]]
            said, items = cell["checkpoint"], cell["items"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no result file ({error}): move it and evaluate") from error
        if said != name:
            raise ValueError(f"{path} holds scores of {said}: its place is {evals / said}")
        checkpoint = found.setdefault(name, Checkpoint({}, {}))
        checkpoint.scores |= {key(score): score for score in scores}
        checkpoint.items[path.stem] = items
    if not found:
        raise ValueError(f"evals={evals} holds no <checkpoint>/<task>.json: run stages.evaluate")
    return found


def ordered(names: Iterable[str], base: str, runs: list[Run]) -> list[str]:
    """`base`, then what belongs to no run, then the runs in order; epoch_10 after epoch_9."""

    def place(name: str) -> tuple[int, list[str | int]]:
        of = [i for i, run in enumerate(runs) if f"{name}/".startswith(f"{run.name}/")]
        parts = re.split(r"(\d+)", name)  # text and numbers take turns, so any two names compare
        natural = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        return (-2 if name == base else of[0] if of else -1), natural

    return sorted(names, key=place)


def choose(found: Found, names: list[str], rule: Rule) -> str:
    """The epoch that `rule` picks; `names` are in order of training."""
    if rule.metric == "wer":
        raise ValueError("rule.metric=wer: the highest value wins, which would be the worst epoch")
    epochs = [name for name in names if name.startswith(f"{rule.choose_from}/")]
    if not epochs:
        raise ValueError(f"no results of rule.choose_from={rule.choose_from}: run stages.evaluate")
    if unscored := [name for name in epochs if key(rule) not in found[name].scores]:
        raise ValueError(
            f"rule: no {' '.join(key(rule))} of {', '.join(unscored)}: run stages.evaluate on it"
        )
    return max(epochs, key=lambda name: found[name].scores[key(rule)].value)  # first of equals


def table(found: Found, names: list[str], keys: list[Key], base: str, chosen: str) -> list[str]:
    """Markdown: a row for each checkpoint that has any of `keys`, the chosen one in bold."""
    heads, rows = ["checkpoint"], []
    for of in keys:
        counts = sorted({found[name].scores[of].n for name in names if of in found[name].scores})
        if not counts:
            known = sorted({" ".join(k) for name in names for k in found[name].scores})
            raise ValueError(f"no result has {' '.join(of)}; there are: {', '.join(known)}")
        heads.append("<br>".join([*of, f"n = {'-'.join(map(str, counts))}"]))
    for name in names:
        scores, cells = found[name].scores, [name]
        for of in keys:
            cells.append(shown(scores[of]) if of in scores else "")
            if cells[-1] and name != base and (share := of_base(found, name, of, base)):
                cells[-1] += f"<br>{share:.0%} of {base}"
        if any(cells[1:]):
            rows.append([f"**{cell}**" if name == chosen and cell else cell for cell in cells])
    return [row_of(heads), row_of(["---"] * len(heads)), *map(row_of, rows)]


def row_of(cells: list[str]) -> str:
    """One line of a Markdown table; a cell may hold any text."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"


def shown(score: Score) -> str:
    return f"{score.value:.3f} \u00b1 {(score.ci_high - score.ci_low) / 2:.3f}"


def of_base(found: Found, name: str, of: Key, base: str) -> float | None:
    """Value over the base's value; None where the base has none, or zero."""
    whole = found[base].scores[of].value if of in found[base].scores else 0.0
    return found[name].scores[of].value / whole if whole else None


def judge(floor: Floor, found: Found, chosen: str, base: str) -> tuple[bool, str]:
    """Whether the chosen epoch keeps `floor`, and a line that says so; no score is a miss."""
    what = " ".join(key(floor))
    bounds = {
        name: limit for name, limit in asdict(floor).items()
        if name in ("at_least", "at_most", "of_base_at_least") and limit is not None
    }  # fmt: skip
    if len(bounds) != 1:
        raise ValueError(
            f"floors: {what} needs exactly one of at_least, at_most, of_base_at_least; it has "
            f"{', '.join(bounds) or 'none'}"
        )
    [(bound, limit)] = bounds.items()
    value = None
    if key(floor) in found[chosen].scores:
        value = found[chosen].scores[key(floor)].value
        if bound == "of_base_at_least":
            value = of_base(found, chosen, key(floor), base)
    if value is None:
        return False, f"MISSING  {what}: no such score, {bound} {limit}"
    good = value <= limit if bound == "at_most" else value >= limit
    verdict = "ok" if good else "ABOVE" if bound == "at_most" else "BELOW"
    return good, f"{verdict:8} {what}: {value:.3f}, {bound} {limit}"


def metrics_of(run: Run) -> list[dict[str, Any]]:
    path = Path(run.path) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: train {run.name} first")
    return [json.loads(line) for line in lines]


def plot_loss(metrics: dict[str, list[dict[str, Any]]]) -> Figure:
    """A panel for each run, as targets differ: every step, smoothed, and where epochs start."""
    figure = Figure(figsize=(5 * len(metrics), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, (name, lines) in zip(panels, metrics.items(), strict=True):
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        width = max(1, len(lines) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        middle = (width - 1) // 2
        ax.plot(steps, losses, color="0.8", linewidth=0.8, label="every step")
        ax.plot(
            steps[middle : middle + len(smooth)], smooth, color="C0", label=f"mean of {width} steps"
        )
        for before, line in pairwise(lines):
            if line["epoch"] != before["epoch"]:
                ax.axvline(line["step"], color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="step (dotted: a new epoch)", ylabel="loss (nats a target token)")
        ax.set_ylim(bottom=0)
        ax.legend()
    return figure


def plot_text(found: Found, names: list[str], task: str) -> Figure:
    """The text score of every checkpoint that has one, a line for each split."""
    names = [name for name in names if any(of[0] == task for of in found[name].scores)]
    keys = list(dict.fromkeys(of for name in names for of in found[name].scores if of[0] == task))
    if not keys:
        raise ValueError(f"text={task}: no checkpoint was scored on it; run stages.evaluate")
    figure = Figure(figsize=(max(6.0, 1.1 * len(names)), 4), layout="constrained")
    ax = figure.subplots()
    for i, of in enumerate(keys):
        places = [x for x, name in enumerate(names) if of in found[name].scores]
        scores = [found[names[x]].scores[of] for x in places]
        bars = [(s.value - s.ci_low, s.ci_high - s.value) for s in scores]
        ax.errorbar(
            np.array(places) + 0.08 * (i - (len(keys) - 1) / 2),  # bars beside each other
            [score.value for score in scores], np.maximum(np.transpose(bars), 0),
            marker="o", capsize=3, label=of[1],
        )  # fmt: skip
    ax.axhline(CHANCE, color="0.5", linestyle="--", label=f"chance, {CHANCE}")
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    ax.set(ylabel=f"{task}, accuracy", ylim=(0, 1.05), title="text knowledge by training")
    ax.legend(loc="lower center", ncols=3)
    return figure


def png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def sample_lines(items: list[dict[str, Any]], split: str) -> list[str]:
    """Items of `split` at equal distances, so that nobody picked them."""
    found = [item for item in items if item["split"] == split]
    if not found:
        known = ", ".join(sorted({item["split"] for item in items}))
        raise ValueError(f"samples={split}: the chosen epoch has no such items; there are: {known}")
    picked = [found[i * len(found) // SAMPLES] for i in range(min(SAMPLES, len(found)))]
    rows = [["question", "heard", "answer", "expected", ""], ["---"] * 5]
    for item in picked:
        fields = [html.escape(item[name]) for name in ("question", "heard", "answer", "expected")]
        rows.append([*fields, "right" if item["correct"] else "wrong"])
    return [row_of(row) for row in rows]


def training_lines(metrics: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = [["run", "steps", "tokens", "minutes of steps", "last loss"], ["---"] * 5]
    for name, lines in metrics.items():
        tokens, seconds = (sum(line[what] for line in lines) for what in ("tokens", "seconds"))
        last = [str(lines[-1]["step"]), f"{tokens:,}", f"{seconds / 60:.1f}"]
        rows.append([name, *last, f"{lines[-1]['loss']:.3f}"])
    return [row_of(row) for row in rows]


def main(job: Report) -> None:
    found = read(Path(job.evals))
    if job.base not in found:
        raise ValueError(f"base={job.base} has no results; there are: {', '.join(sorted(found))}")
    if job.check and not job.floors:
        raise ValueError("check=true without floors checks nothing: add floors")
    if any(key(column)[:2] == key(job.rule)[:2] for column in job.table):
        raise ValueError(
            f"table: {job.rule.task} {job.rule.split} is what the epoch is chosen by, so it says "
            "nothing about the chosen one; take another split"
        )
    names = ordered(found, job.base, job.runs)
    chosen = choose(found, names, job.rule)
    judged = [judge(floor, found, chosen, job.base) for floor in job.floors]
    metrics = {run.name: metrics_of(run) for run in job.runs}
    out, rule, main_keys = Path(job.out), job.rule, list(map(key, job.table))
    epochs = [name for name in names if name.startswith(f"{rule.choose_from}/")]
    every: dict[str, dict[Key, None]] = {}
    for name in names:
        for of in found[name].scores:
            every.setdefault(of[0], {})[of] = None
    lines = [
        f"# {out.name}", "",
        f"Chosen: **{chosen}**. The rule: among the epochs of {rule.choose_from} the one with the "
        f"highest {rule.metric} on {rule.task}, split {rule.split}; of equals the earliest. That "
        "split is not in the results.", "",
        *table(found, epochs, [key(rule)], job.base, chosen), "",
        "## Results", "",
        "\u00b1: half of a 95 % bootstrap interval. wer: a fraction of words, lower is better.", "",
        *table(found, names, main_keys, job.base, chosen), "",
        *(["## Floors", "", "```", *(line for _, line in judged), "```", ""] if judged else []),
        "## Training", "", "![loss by step](loss.png)", "", *training_lines(metrics), "",
        "## Text knowledge", "", "![text score by training](text_mmlu.png)", "",
        f"## What it says: {rule.task}, {job.samples}", "",
        *sample_lines(found[chosen].items.get(rule.task, []), job.samples), "",
        "## Every score", "",
    ]  # fmt: skip
    for task, keys in every.items():
        lines += [f"### {task}", "", *table(found, names, list(keys), job.base, chosen), ""]
    rows = [
        {"checkpoint": name, "chosen": name == chosen, **asdict(score)}
        for name in names
        for score in found[name].scores.values()
    ]
    artifact.write_atomic(out / "loss.png", png(plot_loss(metrics)))
    artifact.write_atomic(out / "text_mmlu.png", png(plot_text(found, names, job.text)))
    artifact.write_json(out / "report.json", rows)
    artifact.write_atomic(out / "report.md", "\n".join(lines))
    if job.check:
        print("\n".join(line for _, line in judged))
    headline = [
        f"{' '.join(of)} {shown(found[chosen].scores[of])}"
        for of in main_keys
        if of in found[chosen].scores
    ]
    print(f"{out / 'report.md'}: chosen {chosen}; {', '.join(headline)}")
    missed = [line for good, line in judged if not good]
    if job.check and missed:
        raise ValueError(
            f"{chosen} misses {len(missed)} of {len(judged)} floors: {'; '.join(missed)}"
        )


if __name__ == "__main__":
    config.main(main, Report, __doc__)
