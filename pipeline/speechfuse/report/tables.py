"""Tables of a report, from the results of one protocol.

In: checkpoints with their scores and details. Out: page.Table, one cell a text. A number is shown
with half its 95 % interval, and beside it stands what makes it less than it seems: a share of the
base, a tie, missing verdicts, a part of the items, items that the training has seen.
"""

from dataclasses import dataclass, field
from typing import Any

from speechfuse.report.blocks import Table, TableCell
from speechfuse.report.choice import of_base
from speechfuse.report.results import Key, ResultsByCheckpoint, key, lower_is_better
from speechfuse.report.results import ResultFile as Result
from speechfuse.scores.intervals import Score


@dataclass
class Column:
    task: str
    split: str
    metric: str
    degradation: bool = field(
        default=False, metadata={"help": "a further column: how much worse than the base, in %"}
    )


def shown(score: Score) -> str:
    if score.ci_low is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} \u00b1 {(score.ci_high - score.ci_low) / 2:.3f}"


def caveats(cell: Result, of: Key) -> list[str]:
    """What to know beside a number. Contamination is that of the file's first score: its items that
    are in the training data, each counted once."""
    told, details = [], cell.details
    if (coverage := details.get("coverage", 1.0)) < 1:
        told.append(f"coverage {int(1000 * coverage) / 10:g}%")  # never rounded up to 100
    if details.get("partial"):
        told.append("partial")
    seen = details.get("contamination", {})
    if seen and of == next(iter(cell.scores)):
        split = {item["id"] for item in cell.items if item.get("split") in (of[1], None)}
        hits = len(split & {hit["id"] for hit in seen.get("hits", [])})
        without = seen.get("without_hits")
        rest = f", without them {without:.3f}" if hits and without is not None else ""
        told.append(f"{hits} hits in training{rest}")
    return told


def results(
    found: ResultsByCheckpoint,
    names: list[str],
    columns: list[Column],
    base: str,
    chosen: str | None,
    ties: dict[tuple[str, Key], str] | None = None,
) -> Table:
    """A row for each checkpoint that has any of `columns`, the chosen one marked. `ties` are words
    beside a cell. ValueError for a column that no result has."""
    head, marked = ["checkpoint"], set()
    rows: list[list[TableCell]] = []
    for column in columns:
        of = key(column)
        counts = sorted({found[name].scores[of].n for name in names if of in found[name].scores})
        if not counts:
            known = sorted({" ".join(k) for name in names for k in found[name].scores})
            raise ValueError(f"no result has {' '.join(of)}; there are: {', '.join(known)}")
        n = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else counts[0]
        head.append("\n".join([*of, f"n = {n}"]))
        if column.degradation:
            head.append(f"{of[0]}\n% worse than {base}")
    for name in names:
        scores = found[name].scores
        row: list[TableCell] = [name]
        for column in columns:
            of, lines = key(column), []
            share = of_base(found, name, of, base) if of in scores and name != base else None
            if of in scores:
                lines = [shown(scores[of]), *caveats(found[name].cell(of), of)]
                if share and not column.degradation:
                    lines.insert(1, f"{share:.0%} of {base}")
                lines += [ties[name, of]] if ties and (name, of) in ties else []
            row.append("\n".join(lines))
            if column.degradation:
                sign = -1 if lower_is_better(of[2]) else 1
                row.append("" if share is None else f"{100 * sign * (1 - share):.2f}")
        if any(row[1:]):
            marked |= {len(rows)} if name == chosen else set()
            rows.append(row)
    return Table(head, rows, marked)


def training(metrics: dict[str, list[dict[str, Any]]]) -> Table:
    rows: list[list[TableCell]] = []
    for name, lines in metrics.items():
        tokens, seconds = (sum(line[what] for line in lines) for what in ("tokens", "seconds"))
        last = [str(lines[-1]["step"]), f"{tokens:,}", f"{seconds / 60:.1f}"]
        rows.append([name, *last, f"{lines[-1]['loss']:.3f}"])
    return Table(["run", "steps", "tokens", "minutes of steps", "last loss"], rows)
