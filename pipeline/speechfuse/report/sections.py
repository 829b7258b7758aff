"""Write the sections of a report: each a heading with its tables, or nothing where they are empty.

In: the results of one protocol. Out: blocks of Markdown, in order.
"""

from typing import Any

from speechfuse import artifact
from speechfuse.report import appendix, choice, page, plots, tables
from speechfuse.report.media import Media
from speechfuse.report.results import Checkpoint, Checkpoints, Curve, Items, Key
from speechfuse.report.tables import Column

EXCERPTS = 10
FIELDS = ("question", "text", "heard", "answer", "expected")


def section(title: str, *blocks: str | None) -> list[str]:
    """Return the blocks under a heading; nothing if there are none."""
    return [f"## {page.escape(title)}", *filter(None, blocks)] if any(blocks) else []


def partial(results: Checkpoints, swept: str) -> str:
    """Return a sentence where numbers are of parts of tasks; `swept`: what a sweep was limited to.
    Empty where they are of whole tasks."""
    files = appendix.files(results)
    cut = sum(bool(file.details.get("partial")) for _, file in files)
    limit = f" The sweep was limited by `{swept}`; what it left out is of earlier ones, or absent."
    return (
        f"**Partial**: {cut} of {len(files)} results are of a part of their task's items; n in the "
        f"heads counts them.{limit if swept else ''}"
        if cut or swept
        else ""
    )


def tie_labels(
    results: Checkpoints, epochs: list[str], keys: list[Key]
) -> dict[tuple[str, Key], str]:
    """Return words beside the best epoch of each score and those that are not significantly worse,
    where there are items to test."""
    words: dict[tuple[str, Key], str] = {}
    for of in keys:
        scored = [name for name in epochs if of in results[name].scores]
        if len(scored) > 1:
            ties, _, tested = choice.best(results, scored, of, test=True)
            top = choice.first(results, scored, of)
            for name in ties if tested else []:
                words[name, of] = "best" if name == top else "ties with the best"
    return words


def replies(checkpoint: Checkpoint, of: Key, split: str | None, media: Media) -> list[str]:
    """Return items of the chosen epoch: of the task that chose it those of `split` (None: of all),
    then of every other task that has replies."""
    first = checkpoint.file(of)
    title = ", ".join(filter(None, (of[0], split)))
    blocks = section(f"What it says: {title}", excerpts(first.items, split, media))
    for file in checkpoint.files.values():
        if file is not first:
            blocks += section(f"What it says: {file.name}", excerpts(file.items, None, media))
    left_out = f"{media.left_out} recordings are left out to keep the page small."
    return [*blocks, left_out] if media.left_out else blocks


def excerpts(items: Items, split: str | None, media: Media) -> str | None:
    """Return a table of items of `split` (None: of all) at equal distances, so that nobody picked
    them; None where they hold no replies. Raises ValueError for a split without items."""
    of_split = [item for item in items if split is None or item.get("split") == split]
    if not of_split and split is not None:
        splits = ", ".join(sorted({str(item.get("split")) for item in items}))
        raise ValueError(f"samples={split}: the epoch has no such items; there are: {splits}")
    picked = artifact.take_evenly(of_split, EXCERPTS)
    fields = [f for f in FIELDS if any(isinstance(item.get(f), str) for item in picked)]
    if len(fields) < 2:
        return None
    audio = [media.recording(str(item.get("audio") or "")) for item in picked]
    columns = [[" ".join(str(item.get(name, "")).split()) for item in picked] for name in fields]
    columns += [[*audio]] if any(audio) else []
    head = [*fields, *(["audio"] if any(audio) else []), ""]
    return page.table(head, zip(*columns, map(verdict, picked), strict=True))


def verdict(item: dict[str, Any]) -> str:
    """Return an item's number in words."""
    if "correct" in item:
        return "right" if item["correct"] else "wrong"
    if "errors" in item:
        return f"{item['errors']} wrong of {item['words']}"
    return "" if item.get("value") is None else f"{item['value']:g}"


def curves(
    results: Checkpoints, curves: list[Curve], chosen: str, whole: bool, media: Media
) -> list[str]:
    """Return each curve as a table and a plot, with a line for each run: its last epoch, or the
    chosen one. A curve of which no checkpoint has all points is a sentence.

    Raises ValueError for such a curve if the results are `whole`.
    """
    blocks: list[str] = []
    for number, curve in enumerate(curves):
        keys = list(curve.keys.values())
        last: dict[str, str] = {}
        for name in results:
            run = name.split("/")[0]
            if all(key in results[name].scores for key in keys) and last.get(run) != chosen:
                last[run] = name
        if not last:
            points = ", ".join(" ".join(key) for key in keys)
            lacks = f"curves.{number}: no checkpoint has all of its points: {points}"
            if whole:
                raise ValueError(lacks)
            blocks += section(curve.title, page.escape(lacks))
            continue
        names = list(last.values())
        rows = [[n, *(tables.shown(results[n].scores[key]) for key in keys)] for n in names]
        figure = plots.curve(results, names, curve)
        plot = media.plot(f"curve{number}", figure, curve.title)
        blocks += section(curve.title, page.table([curve.x, *curve.keys], rows), plot)
    return blocks


def every_score(results: Checkpoints, base: str | None, chosen: str | None) -> list[str]:
    """Return a table for each task with all its splits and metrics."""
    keys = dict.fromkeys(of for checkpoint in results.values() for of in checkpoint.scores)
    blocks: list[str] = []
    for task in dict.fromkeys(of[0] for of in keys):
        columns = [Column(*of) for of in keys if of[0] == task]
        table = tables.results(results, list(results), columns, base, chosen)
        blocks += [f"### {page.escape(task)}", table]
    return blocks


def appendix_sections(results: Checkpoints, media: Media, suffix: str = "") -> list[str]:
    """Return word errors, diagnostics, contamination and provenance; `suffix` ends each heading."""
    errors = appendix.word_errors(results), appendix.by_duration(results)
    return [
        *section(f"Word errors{suffix}", *errors),
        *section(f"Diagnostics{suffix}", appendix.diagnostics(results)),
        *section(f"Contamination{suffix}", *appendix.contamination(results, media)),
        *section(f"Provenance{suffix}", appendix.provenance(results)),
    ]
