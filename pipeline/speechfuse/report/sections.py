"""Sections of a report: each a heading with its tables, or nothing where there is nothing to say.

In: the results of one protocol. Out: page.Block, in order.
"""

from pathlib import Path
from typing import Any

from speechfuse.report import appendix, choice, plots, tables
from speechfuse.report.blocks import (
    Audio,
    Block,
    Heading,
    Markdown,
    Plot,
    Table,
    TableCell,
    recording,
)
from speechfuse.report.results import Checkpoint, Curve, Items, Key, ResultsByCheckpoint
from speechfuse.report.tables import Column


def section(title: str, *blocks: Block | None) -> list[Block]:
    there = [block for block in blocks if block]
    return [Heading(title), *there] if there else []


def partial(found: ResultsByCheckpoint, swept: str) -> str:
    """A sentence where numbers do not stand for whole tasks; `swept`: what a sweep was limited to.
    Empty where they do."""
    cells = [cell for checkpoint in found.values() for cell in checkpoint.cells.values()]
    cut = sum(bool(cell.details.get("partial")) for cell in cells)
    told = f" The sweep was limited by `{swept}`; what it left out is of earlier ones, or absent."
    return (
        f"**Partial**: {cut} of {len(cells)} results are of a part of their task's items; n in the "
        f"heads counts them.{told if swept else ''}"
        if cut or swept
        else ""
    )


def tie_labels(
    found: ResultsByCheckpoint, epochs: list[str], keys: list[Key]
) -> dict[tuple[str, Key], str]:
    """Words beside the best epoch of each score and those that are not significantly worse, where
    there are items to test."""
    words: dict[tuple[str, Key], str] = {}
    for of in keys:
        scored = [name for name in epochs if of in found[name].scores]
        if len(scored) > 1:
            tied, _, tested = choice.best(found, scored, of, test=True)
            top = choice.first(found, scored, of)
            tied = tied if tested else []
            words |= {(name, of): "best" if name == top else "ties with the best" for name in tied}
    return words


def said(checkpoint: Checkpoint, of: Key, split: str, folder: Path) -> list[Block]:
    """Items of the chosen epoch: of the task that chose it those of `split`, then of every other
    task that has replies. `folder` is where paths of audio start."""
    samples, first = Excerpts(folder), checkpoint.cell(of)
    lines = section(f"What it says: {of[0]}, {split}", samples.table(first.items, split))
    for cell in checkpoint.cells.values():
        if cell is not first:
            lines += section(f"What it says: {cell.name}", samples.table(cell.items, None))
    if samples.left_out:
        lines.append(
            Markdown(f"{samples.left_out} recordings are left out to keep the page small.")
        )
    return lines


def curves(
    found: ResultsByCheckpoint, wanted: list[Curve], chosen: str, whole: bool
) -> list[Block]:
    """Each curve as a table and a plot: the last epoch of every run, of its own run the chosen one.
    Where no checkpoint has all of its points this is said, and when the results are `whole` it is
    a ValueError."""
    lines: list[Block] = []
    for number, of in enumerate(wanted):
        keys = list(of.keys.values())
        last: dict[str, str] = {}
        for name in found:
            run = name.split("/")[0]
            if all(key in found[name].scores for key in keys) and last.get(run) != chosen:
                last[run] = name
        if not last:
            said = ", ".join(" ".join(key) for key in keys)
            lacks = f"curves.{number}: no checkpoint has all of its points: {said}"
            if whole:
                raise ValueError(lacks)
            lines += section(of.title, Markdown(lacks))
            continue
        rows: list[list[TableCell]] = [
            [name, *(tables.shown(found[name].scores[key]) for key in keys)]
            for name in last.values()
        ]
        table = Table([of.x, *of.keys], rows)
        figure = plots.curve(found, list(last.values()), of)
        lines += section(of.title, table, Plot(f"curve{number}", figure, of.title))
    return lines


def every_score(found: ResultsByCheckpoint, base: str, chosen: str | None) -> list[Block]:
    """A table for each task with all its splits and metrics."""
    keys = dict.fromkeys(of for checkpoint in found.values() for of in checkpoint.scores)
    lines: list[Block] = []
    for task in dict.fromkeys(of[0] for of in keys):
        columns = [Column(*of) for of in keys if of[0] == task]
        table = tables.results(found, list(found), columns, base, chosen)
        lines += [Heading(task, 3), table]
    return lines


def appendix_sections(found: ResultsByCheckpoint, more: str = "") -> list[Block]:
    """What stands behind the numbers. `more`: what to add to each heading."""
    return [
        *section(f"Word errors{more}", appendix.word_errors(found), appendix.by_duration(found)),
        *section(f"Diagnostics{more}", appendix.diagnostics(found)),
        *section(f"Contamination{more}", appendix.contamination(found)),
        *section(f"Provenance{more}", appendix.provenance(found)),
    ]


EXCERPTS = 10


BUDGET = 3_000_000  # characters of all recordings on a page


FIELDS = ("question", "text", "heard", "answer", "expected")


class Excerpts:
    """Tables of items that nobody picked. `left_out` counts the recordings over the budget; paths
    of audio start at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.budget, self.left_out = folder, BUDGET, 0

    def table(self, items: Items, split: str | None) -> Table | None:
        """Items of `split` (None: of all) at equal distances. None where they hold no replies;
        ValueError for a split without items."""
        found = [item for item in items if split is None or item.get("split") == split]
        if not found and split is not None:
            known = ", ".join(sorted({str(item.get("split")) for item in items}))
            raise ValueError(
                f"samples={split}: the chosen epoch has no such items; there are: {known}"
            )
        picked = [found[i * len(found) // EXCERPTS] for i in range(min(EXCERPTS, len(found)))]
        fields = [f for f in FIELDS if any(isinstance(item.get(f), str) for item in picked)]
        if len(fields) < 2:
            return None
        heard = [self._audio(str(item.get("audio") or "")) for item in picked]
        rows: list[list[TableCell]] = []
        for item, audio in zip(picked, heard, strict=True):
            texts: list[TableCell] = [" ".join(str(item.get(name, "")).split()) for name in fields]
            rows.append([*texts, *([audio or ""] if any(heard) else []), verdict(item)])
        return Table([*fields, *(["audio"] if any(heard) else []), ""], rows)

    def _audio(self, told: str) -> Audio | None:
        audio = recording(told, self.folder) if told else None
        if audio and len(audio.uri) > self.budget:
            self.left_out += 1
            return None
        self.budget -= len(audio.uri) if audio else 0
        return audio


def verdict(item: dict[str, Any]) -> str:
    """What an item's number says."""
    if "correct" in item:
        return "right" if item["correct"] else "wrong"
    if "errors" in item:
        return f"{item['errors']} wrong of {item['words']}"
    return "" if item.get("value") is None else f"{item['value']:g}"
