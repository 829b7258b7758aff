"""What stands behind the numbers of a report: errors, diagnostics, contamination, provenance.

In: the results of one protocol. Out: page.Table for each, or None where no result says anything.
"""

import re
from typing import Any

from speechfuse.report.page import Table, TableCell
from speechfuse.report.results import ResultFile as Result
from speechfuse.report.results import ResultsByCheckpoint

HITS, FOLDED = 3, 1000  # shown of each task, and of all on the page
ERRORS = ("substitutions", "deletions", "insertions", "words")


def cells(found: ResultsByCheckpoint) -> list[tuple[str, Result]]:
    """Every result with the name of its row, in order."""
    return [(name, cell) for name, of in found.items() for cell in of.cells.values()]


def diagnostics(found: ResultsByCheckpoint) -> Table | None:
    """Replies that are no answers: a rise here moves scores for reasons other than knowledge."""
    shown = ("empty", "loops", "refusals", "mean_words")
    rows: list[list[TableCell]] = [
        [
            name,
            cell.name,
            str(len(cell.items)),
            *(number(cell.details.get(key)) for key in shown),
            f"{cell.details['coverage']:.1%}" if "coverage" in cell.details else "",
        ]
        for name, cell in cells(found)
        if any(key in cell.details for key in shown)
    ]
    head = ["checkpoint", "task", "items", "empty", "loops", "refusals", "mean words", "coverage"]
    caption = (
        "Of the replies: how many are empty, loop or never end, refuse; how long they are; and the "
        "share that has a verdict."
    )
    return Table(head, rows, caption=caption) if rows else None


def word_errors(found: ResultsByCheckpoint) -> Table | None:
    """Substitutions, deletions, insertions, and the share of utterances worse than all wrong."""
    rows: list[list[TableCell]] = []
    for name, cell, split, about in by_split(found):
        if all(kind in about for kind in ERRORS) and about["words"]:
            shares = [f"{about[kind]:,}\n{about[kind] / about['words']:.1%}" for kind in ERRORS[:3]]
            above = f"{about['above_one']:.1%}" if "above_one" in about else ""
            rows.append([name, f"{cell.name} {split}", *shares, f"{about['words']:,}", above])
    head = ["checkpoint", "task", *ERRORS, "utterances above 100 %"]
    caption = "Loops show as insertions and as utterances above 100 %."
    return Table(head, rows, caption=caption) if rows else None


def by_duration(found: ResultsByCheckpoint) -> Table | None:
    """Error rate by length of the audio: what is longer than the training's audio fails first."""
    told, labels = [], set[str]()
    for name, cell, split, about in by_split(found):
        bins = {label: f"{rate:.3f}\nn = {n}" for label, rate, n in about.get("by_duration", [])}
        told += [(name, f"{cell.name} {split}", bins)] if bins else []
        labels |= bins.keys()
    order = sorted(labels, key=lambda label: int(re.findall(r"\d+", label)[0]))  # where it starts
    rows: list[list[TableCell]] = [
        [name, task, *(bins.get(label, "") for label in order)] for name, task, bins in told
    ]
    return Table(["checkpoint", "task", *order], rows) if rows else None


def by_split(found: ResultsByCheckpoint) -> list[tuple[str, Result, str, dict[str, Any]]]:
    return [
        (name, cell, split, about)
        for name, cell in cells(found)
        for split, about in cell.details.get("by_split", {}).items()
    ]


def contamination(found: ResultsByCheckpoint) -> Table | None:
    """Items that the training has seen, each once, whatever checkpoint and task asked; the first
    few of each task are shown, the others folded."""
    tasks: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for _, cell in cells(found):
        for hit in cell.details.get("contamination", {}).get("hits", []):
            shared = " ".join(str(hit.get("shared", "")).split())[:300]
            of = str(hit["id"]), hit["kind"], str(hit["training_id"]), shared
            tasks.setdefault(of, {})[cell.name] = None
    of_task: dict[str, list[list[TableCell]]] = {}
    for of, names in tasks.items():
        of_task.setdefault("\n".join(names), []).append(["\n".join(names), *of])
    rows = [row for every in of_task.values() for row in every[:HITS]]
    folded = [row for every in of_task.values() for row in every[HITS:]]
    counted = "; ".join(f"{len(e):,} of {n.replace(chr(10), ', ')}" for n, e in of_task.items())
    caption = (
        f"Evaluation items that training rows hold: all of it, a long n-gram, or codes: {counted}. "
        f"The first {HITS} of each; all are in the result files under details.contamination."
    )
    head = ["task", "item", "kind", "training row", "shared"]
    return Table(head, rows, caption=caption, folded=folded[:FOLDED]) if rows else None


def provenance(found: ResultsByCheckpoint) -> Table:
    """What each number was made from."""
    kinds = dict.fromkeys(kind for _, cell in cells(found) for kind in cell.fingerprints)
    rows: list[list[TableCell]] = []
    for name, cell in cells(found):
        prints = [cell.fingerprints.get(kind, "")[:12] for kind in kinds]
        versions = cell.details.get("versions", {})
        minutes = cell.details.get("minutes")
        rows.append(
            [
                name,
                cell.name,
                "\n".join(filter(None, [cell.protocol, cell.details.get("protocol")])),
                *prints,
                ", ".join(f"{library} {v}" for library, v in versions.items()),
                "" if minutes is None else f"{minutes:.1f}",
                price(cell.details.get("judging", {})),
            ]
        )
    named = ["weights" if kind == "checkpoint" else kind for kind in kinds]
    head = ["checkpoint", "task", "protocol", *named, "versions", "minutes", "verdicts"]
    return Table(head, rows, caption="Fingerprints are of content, cut to 12 digits.")


def price(judging: dict[str, Any]) -> str:
    """What the verdicts took."""
    if not judging:
        return ""
    cost = judging.get("price")
    told = [f"{judging.get('calls', 0)} calls", f"{judging.get('cached', 0)} verdicts from cache"]
    told += [] if cost is None else [f"${cost:.2f}"]
    return ", ".join(told + [f"{n} {why}" for why, n in judging.get("failures", {}).items()])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
