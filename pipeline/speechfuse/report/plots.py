"""Plots of a report: the loss of each run, and scores by training with their intervals.

In: lines of metrics.jsonl, or the results of one protocol. Out: matplotlib figures.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speechfuse.report.results import Curve, Key, ResultsByCheckpoint

CHANCE = 0.25  # of a 4-choice question
POINTS = 2000  # of a line; more would not be seen
SPLITS = 8  # of a panel; more would hide each other


def loss(metrics: dict[str, list[dict[str, Any]]]) -> Figure:
    """A panel for each run, as targets differ: every step, smoothed, and where epochs start."""
    figure = Figure(figsize=(5 * len(metrics), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, (name, lines) in zip(panels, metrics.items(), strict=True):
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        width, every = max(1, len(lines) // 50), max(1, len(lines) // POINTS)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        middle = (width - 1) // 2
        shown = f"every {every} steps" if every > 1 else "every step"
        ax.plot(steps[::every], losses[::every], color="0.8", linewidth=0.8, label=shown)
        ax.plot(
            steps[middle : middle + len(smooth)][::every],
            smooth[::every],
            color="C0",
            label=f"mean of {width} steps",
        )
        for before, line in pairwise(lines):
            if line.get("epoch") != before.get("epoch"):
                ax.axvline(line["step"], color="0.6", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="step (dotted: a new epoch)", ylabel="loss (nats a target token)")
        ax.set_ylim(bottom=0)
        ax.legend()
    return figure


def text(found: ResultsByCheckpoint, task: str, wanted: list[Key], base: str) -> Figure:
    """The text score of every checkpoint that has one, a line for each split, and where the base
    stands. `wanted` are the splits to show; none of this task: the first few."""
    known = keys_of(found, list(found), task)
    keys = [of for of in wanted if of in known] or known[:SPLITS]
    if not keys:
        raise ValueError(f"text={task}: no checkpoint was scored on it; run stages.evaluate")
    names = [name for name in found if any(of in found[name].scores for of in keys)]
    figure = Figure(figsize=(max(6.0, 1.1 * len(names)), 4), layout="constrained")
    ax = figure.subplots()
    lines(ax, found, names, keys)
    for i, of in enumerate(keys):
        if base in found and of in found[base].scores:
            ax.axhline(found[base].scores[of].value, color=f"C{i}", linewidth=0.8, linestyle=":")
    ax.axhline(CHANCE, color="0.5", linestyle="--", label=f"chance, {CHANCE}")
    ax.set(
        ylabel=f"{task}, accuracy",
        ylim=(0, 1.05),
        title=f"text knowledge by training (dotted: {base})",
    )
    ax.legend(loc="lower center", ncols=3)
    return figure


def speech(
    found: ResultsByCheckpoint, names: list[str], wanted: list[Key], but: str
) -> Figure | None:
    """A panel for each metric of each task other than `but`, over the epochs `names`, with the
    splits of `wanted`, or where it has none, the first few."""
    panels: dict[tuple[str, str], list[Key]] = {}
    for task, split, metric in keys_of(found, names):
        if task != but:
            panels.setdefault((task, metric), []).append((task, split, metric))
    panels = {
        panel: [of for of in keys if of in wanted] or keys[:SPLITS]
        for panel, keys in panels.items()
    }
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax, ((task, metric), keys) in zip(axes, panels.items(), strict=False):
        lines(ax, found, names, keys)
        ax.set(title=task, ylabel=metric)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="x-small")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def curve(found: ResultsByCheckpoint, names: list[str], of: Curve) -> Figure:
    """A line for each checkpoint of `names` over the points of `of`, with 95 % intervals."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for name in names:
        scores = [found[name].scores[key] for key in of.keys.values()]
        values = [score.value for score in scores]
        bars = [(s.value - s.ci_low, s.ci_high - s.value) for s in scores]
        ax.errorbar(
            list(of.keys),
            values,
            np.maximum(np.transpose(bars), 0),
            marker="o",
            capsize=3,
            label=name,
        )
    ax.set(title=of.title, xlabel=of.x, ylabel=next(iter(of.keys.values()))[2], ylim=(0, 1.05))
    ax.legend()
    return figure


def keys_of(found: ResultsByCheckpoint, names: list[str], task: str | None = None) -> list[Key]:
    keys = dict.fromkeys(of for name in names for of in found[name].scores)
    return [of for of in keys if task in (None, of[0])]


def lines(ax: Axes, found: ResultsByCheckpoint, names: list[str], keys: list[Key]) -> None:
    """A line of values over `names` for each of `keys`, with 95 % intervals where there are any."""
    for i, of in enumerate(keys):
        places = [x for x, name in enumerate(names) if of in found[name].scores]
        scores = [found[names[x]].scores[of] for x in places]
        bars = [
            (0, 0) if s.ci_low is None else (s.value - s.ci_low, s.ci_high - s.value)
            for s in scores
        ]
        ax.errorbar(
            np.array(places) + 0.08 * (i - (len(keys) - 1) / 2),  # bars beside each other
            [score.value for score in scores],
            np.maximum(np.transpose(bars), 0),
            marker="o",
            capsize=3,
            label=of[1],
            color=f"C{i}",
        )
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
