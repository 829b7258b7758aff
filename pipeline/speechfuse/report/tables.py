"""Tables of a report, from the results of one protocol.

In: checkpoints with their scores and details. Out: Markdown tables. A number stands with half its
95 % interval and its caveats: its share of the base, a tie, missing verdicts, only a part of the
items, items that the training has seen.
"""

from dataclasses import dataclass
from typing import Any

from speechfuse import config
from speechfuse.report import page
from speechfuse.report.choice import of_base
from speechfuse.report.results import Checkpoints, Key, Measure, ResultFile, key, lower_is_better
from speechfuse.scores.intervals import Score


@dataclass
class Column(Measure):
    degradation: bool = config.key("a further column: how much worse than the base, in %", False)
    may_be_absent: bool = config.key("left out where nothing scores it", False)


def shown(score: Score) -> str:
    if score.ci_low is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} \u00b1 {(score.ci_high - score.ci_low) / 2:.3f}"


def caveats(file: ResultFile, of: Key) -> list[str]:
    """Return what to know beside a number. Contamination is that of the file's first score: its
    items that are in the training data, each counted once."""
    lines, details = [], file.details
    if (coverage := details.get("coverage", 1.0)) < 1:
        lines.append(f"coverage {int(1000 * coverage) / 10:g}%")  # never rounded up to 100
    if details.get("partial"):
        lines.append("partial")
    contamination = details.get("contamination", {})
    if contamination and of == next(iter(file.scores)):
        split = {item["id"] for item in file.items if item.get("split") in (of[1], None)}
        hits = len(split & {hit["id"] for hit in contamination.get("hits", [])})
        without = contamination.get("without_hits")
        rest = f", without them {without:.3f}" if hits and without is not None else ""
        lines.append(f"{hits} hits in training{rest}")
    return lines


def results(
    results: Checkpoints,
    names: list[str],
    columns: list[Column],
    base: str | None,
    chosen: str | None,
    ties: dict[tuple[str, Key], str] | None = None,
) -> str:
    """Return a table with a row for each checkpoint that has any of `columns`, the chosen one bold.
    `ties` are words beside a cell. Raises ValueError for a column that no result has."""
    head = ["checkpoint"]
    for column in columns:
        of = key(column)
        counts = sorted({results[n].scores[of].n for n in names if of in results[n].scores})
        if not counts:
            scored = sorted({" ".join(k) for name in names for k in results[name].scores})
            raise ValueError(f"no result has {' '.join(of)}; there are: {', '.join(scored)}")
        n = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else counts[0]
        head.append("\n".join([*of, f"n = {n}"]))
        if column.degradation:
            head.append(f"{of[0]}\n% worse than {base}")
    rows: list[list[str]] = []
    for name in names:
        scores, row = results[name].scores, [name]
        for column in columns:
            of, lines = key(column), []
            share = of_base(results, name, of, base) if of in scores and name != base else None
            if of in scores:
                lines = [shown(scores[of]), *caveats(results[name].file(of), of)]
                if share and not column.degradation:
                    lines.insert(1, f"{share:.0%} of {base}")
                lines += [ties[name, of]] if ties and (name, of) in ties else []
            row.append("\n".join(lines))
            if column.degradation:
                sign = -1 if lower_is_better(of[2]) else 1
                row.append("" if share is None else f"{100 * sign * (1 - share):.2f}")
        if any(row[1:]):
            rows.append(row)
    return page.table(head, rows, {i for i, row in enumerate(rows) if row[0] == chosen})


def training(metrics: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, lines in metrics.items():
        tokens, seconds = (sum(line[what] for line in lines) for what in ("tokens", "seconds"))
        steps, loss = str(lines[-1]["step"]), f"{lines[-1]['loss']:.3f}"
        rows.append([name, steps, f"{tokens:,}", f"{seconds / 60:.1f}", loss])
    return page.table(["run", "steps", "tokens", "minutes of steps", "last loss"], rows)
