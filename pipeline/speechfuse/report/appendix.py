"""Appendix of a report: word errors, diagnostics, contamination, provenance.

In: the results of one protocol. Out: a Markdown table for each, or None where no result has any.
"""

import re
from collections.abc import Iterator
from typing import Any

from speechfuse.report import page
from speechfuse.report.media import Media
from speechfuse.report.results import Checkpoints, ResultFile

HITS, FOLDED = 3, 1000  # of each task in the report, and of all tasks folded on its page
ERRORS = ("substitutions", "deletions", "insertions", "words")
DIAGNOSTICS = ("empty", "loops", "refusals", "mean_words")


def files(results: Checkpoints) -> list[tuple[str, ResultFile]]:
    """Return every result file with the name of its row, in order."""
    return [(name, file) for name, of in results.items() for file in of.files.values()]


def splits(results: Checkpoints) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (checkpoint, task and split, details) of every split that has details of its own."""
    for name, file in files(results):
        for split, details in file.details.get("by_split", {}).items():
            yield name, f"{file.name} {split}", details


def diagnostics(results: Checkpoints) -> str | None:
    """Return counts of replies that are no answers, which move scores without any knowledge."""
    rows = []
    for name, file in files(results):
        details = file.details
        if not details.keys().isdisjoint(DIAGNOSTICS):
            counts = [number(details.get(diagnostic)) for diagnostic in DIAGNOSTICS]
            coverage = f"{details['coverage']:.1%}" if "coverage" in details else ""
            rows.append([name, file.name, str(len(file.items)), *counts, coverage])
    head = ["checkpoint", "task", "items", "empty", "loops", "refusals", "mean words", "coverage"]
    caption = (
        "Of the replies: how many are empty, loop or never end, refuse; how long they are; and the "
        "share that has a verdict."
    )
    return page.table(head, rows, caption=caption) if rows else None


def word_errors(results: Checkpoints) -> str | None:
    """Return substitutions, deletions, insertions, and the share of utterances over 100 % WER."""
    rows = []
    for name, task, of in splits(results):
        if all(kind in of for kind in ERRORS) and of["words"]:
            shares = [f"{of[kind]:,}\n{of[kind] / of['words']:.1%}" for kind in ERRORS[:3]]
            above = f"{of['above_one']:.1%}" if "above_one" in of else ""
            rows.append([name, task, *shares, f"{of['words']:,}", above])
    head = ["checkpoint", "task", *ERRORS, "utterances above 100 %"]
    caption = "Loops show as insertions and as utterances above 100 %."
    return page.table(head, rows, caption=caption) if rows else None


def by_duration(results: Checkpoints) -> str | None:
    """Return the error rate by length of the audio: longer audio than in training fails first."""
    rows = [
        (name, task, {label: f"{rate:.3f}\nn = {n}" for label, rate, n in of["by_duration"]})
        for name, task, of in splits(results)
        if of.get("by_duration")
    ]
    labels = {label for _, _, bins in rows for label in bins}
    order = sorted(labels, key=lambda label: int(re.findall(r"\d+", label)[0]))  # where it starts
    cells = [[name, task, *(bins.get(label, "") for label in order)] for name, task, bins in rows]
    return page.table(["checkpoint", "task", *order], cells) if rows else None


def contamination(results: Checkpoints, media: Media) -> list[str]:
    """Return the items that are in the training data, each once, with all tasks that have it: the
    first few of each task in a table, the others folded."""
    tasks_of: dict[tuple[str, ...], dict[str, None]] = {}
    for _, file in files(results):
        for hit in file.details.get("contamination", {}).get("hits", []):
            shared = " ".join(str(hit.get("shared", "")).split())[:300]
            item = str(hit["id"]), hit["kind"], str(hit["training_id"]), shared
            tasks_of.setdefault(item, {})[file.name] = None
    rows_of: dict[str, list[list[str]]] = {}
    for hit_row, tasks in tasks_of.items():
        names = "\n".join(tasks)
        rows_of.setdefault(names, []).append([names, *hit_row])
    counts = "; ".join(f"{len(r):,} of {t.replace(chr(10), ', ')}" for t, r in rows_of.items())
    caption = (
        "Evaluation items that training rows hold: all of it, a long n-gram, or codes: "
        f"{page.escape(counts)}. The first {HITS} of each; all are in the result files under "
        "details.contamination."
    )
    head = ["task", "item", "kind", "training row", "shared"]
    rows = [row for of_task in rows_of.values() for row in of_task[:HITS]]
    more = [row for of_task in rows_of.values() for row in of_task[HITS:]][:FOLDED]
    tables = [page.table(head, rows, caption=caption)] if rows else []
    return tables + ([media.folded(head, more)] if more else [])


def provenance(results: Checkpoints) -> str:
    """Return, for each result file, its protocol, fingerprints, versions, minutes and verdicts."""
    kinds = dict.fromkeys(kind for _, file in files(results) for kind in file.fingerprints)
    rows = []
    for name, file in files(results):
        details = file.details
        protocol = "\n".join(filter(None, [file.protocol, details.get("protocol")]))
        digests = [file.fingerprints.get(kind, "")[:12] for kind in kinds]
        versions = ", ".join(f"{library} {v}" for library, v in details.get("versions", {}).items())
        minutes = f"{details['minutes']:.1f}" if details.get("minutes") is not None else ""
        work = versions, minutes, judging(details.get("judging", {}))
        rows.append([name, file.name, protocol, *digests, *work])
    fingerprints = ["weights" if kind == "checkpoint" else kind for kind in kinds]
    head = ["checkpoint", "task", "protocol", *fingerprints, "versions", "minutes", "verdicts"]
    return page.table(head, rows, caption="Fingerprints are of content, cut to 12 digits.")


def judging(details: dict[str, Any]) -> str:
    """Return what the verdicts of a judge took."""
    if not details:
        return ""
    parts = [f"{details.get('calls', 0)} calls", f"{details.get('cached', 0)} verdicts from cache"]
    parts += [] if details.get("price") is None else [f"${details['price']:.2f}"]
    return ", ".join(parts + [f"{n} {why}" for why, n in details.get("failures", {}).items()])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
