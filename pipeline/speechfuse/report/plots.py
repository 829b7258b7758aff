"""Draw the plots of a report: the loss of each run, and scores by training with intervals.

In: lines of metrics.jsonl, or the results of one protocol. Out: matplotlib figures.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speechfuse.report.results import Checkpoints, Curve, Key
from speechfuse.scores.intervals import Score

ACCURACIES = ("acc", "exact_match")  # how their names begin
CHANCE = 0.25  # of a 4-choice question
POINTS = 2000  # of a line; more would not be seen
SPLITS = 8  # of a panel; more would hide each other


def loss(metrics: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw a panel for each run, as targets differ: each step, smoothed, and where epochs start."""
    figure = Figure(figsize=(5 * len(metrics), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, (name, lines) in zip(panels, metrics.items(), strict=True):
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        width, every = max(1, len(lines) // 50), max(1, len(lines) // POINTS)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        middle = steps[(width - 1) // 2 :][: len(smooth)]
        label = f"every {every} steps" if every > 1 else "every step"
        ax.plot(steps[::every], losses[::every], color="0.8", linewidth=0.8, label=label)
        ax.plot(middle[::every], smooth[::every], color="C0", label=f"mean of {width} steps")
        for before, line in pairwise(lines):
            if line.get("epoch") != before.get("epoch"):
                ax.axvline(line["step"], color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="step (dotted: a new epoch)", ylabel="loss (nats a target token)")
        ax.set_ylim(bottom=0)
        ax.legend()
    return figure


def text(results: Checkpoints, task: str, columns: list[Key], base: str | None) -> Figure:
    """Draw the text score of every checkpoint that has one, a line for each split, and the base as
    a level. The splits are those of `columns`; if none is of this task, the first few.

    Raises ValueError if no checkpoint was scored on `task`, or by another metric than accuracy.
    """
    scored = keys_of(results, list(results), task)
    keys = [of for of in columns if of in scored] or scored[:SPLITS]
    if not keys:
        raise ValueError(f"text={task}: no checkpoint was scored on it; run stages.evaluate")
    if others := [of[2] for of in keys if not of[2].startswith(ACCURACIES)]:
        raise ValueError(
            f"text={task}: it is scored by {others[0]}, and what is plotted is an accuracy: leave "
            "text out; its plot is under Speech"
        )
    names = [name for name in results if any(of in results[name].scores for of in keys)]
    figure = Figure(figsize=(max(6.0, 1.1 * len(names)), 4), layout="constrained")
    ax = figure.subplots()
    lines(ax, results, names, keys)
    for i, of in enumerate(keys):
        if base in results and of in results[base].scores:
            level = results[base].scores[of].value
            ax.axhline(level, color=f"C{i}", linewidth=0.8, linestyle=":")
    ax.axhline(CHANCE, color="0.5", linestyle="--", label=f"chance, {CHANCE}")
    title = "text knowledge by training" + (f" (dotted: {base})" if base else "")
    ax.set(ylabel=f"{task}, accuracy", ylim=(0, 1.05), title=title)
    ax.legend(loc="lower center", ncols=3)
    return figure


def speech(
    results: Checkpoints, names: list[str], columns: list[Key], text_task: str | None
) -> Figure | None:
    """Draw a panel for each metric of each task other than `text_task`, over the epochs `names`,
    with the splits of `columns`, or where it has none, the first few. None without such tasks."""
    panels: dict[tuple[str, str], list[Key]] = {}
    for of in keys_of(results, names):
        if of[0] != text_task:
            panels.setdefault((of[0], of[2]), []).append(of)
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax, ((task, metric), keys) in zip(axes, panels.items(), strict=False):
        lines(ax, results, names, [of for of in keys if of in columns] or keys[:SPLITS])
        ax.set(title=task, ylabel=metric)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="x-small")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def curve(results: Checkpoints, names: list[str], of: Curve) -> Figure:
    """Draw a line for each checkpoint of `names` over the points of `of`."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    high = 1.05  # all of a share; a word error rate or a rating may be more
    for name in names:
        scores = [results[name].scores[key] for key in of.keys.values()]
        with_intervals(ax, list(of.keys), scores, label=name)
        high = max(high, *(1.05 * (s.value if s.ci_high is None else s.ci_high) for s in scores))
    ax.set(title=of.title, xlabel=of.x, ylabel=next(iter(of.keys.values()))[2], ylim=(0, high))
    ax.legend()
    return figure


def fusions(points: dict[str, tuple[float, Score]], listening: str) -> Figure:
    """Draw each row of a comparison at the text that it keeps while it listens, and how well it
    listens."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    for name, (kept, score) in points.items():
        with_intervals(ax, [kept], [score], label=name)
    ax.set(xlabel="share of the base's text kept while listening", ylabel=listening)
    ax.set_title("what is heard, against what text is kept")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def keys_of(results: Checkpoints, names: list[str], task: str | None = None) -> list[Key]:
    keys = dict.fromkeys(of for name in names for of in results[name].scores)
    return [of for of in keys if task in (None, of[0])]


def lines(ax: Axes, results: Checkpoints, names: list[str], keys: list[Key]) -> None:
    """Draw a line of values over `names` for each of `keys`."""
    for i, of in enumerate(keys):
        places = [x for x, name in enumerate(names) if of in results[name].scores]
        scores = [results[names[x]].scores[of] for x in places]
        beside = np.array(places) + 0.08 * (i - (len(keys) - 1) / 2)  # bars beside each other
        with_intervals(ax, beside, scores, label=of[1], color=f"C{i}")
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")


def with_intervals(ax: Axes, xs: Any, scores: list[Score], **style: Any) -> None:
    """Draw values with their 95 % intervals, where they have any."""
    bars = [
        (0, 0) if s.ci_low is None else (s.value - s.ci_low, s.ci_high - s.value) for s in scores
    ]
    errors = np.maximum(np.transpose(bars), 0)
    values = [score.value for score in scores]
    ax.errorbar(xs, values, errors, marker="o", capsize=3, **style)
