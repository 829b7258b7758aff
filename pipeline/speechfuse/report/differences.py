"""Differences between epochs, paired by item: is the later one better, or is it noise?

In: the results of one protocol. Out: the difference of two checkpoints with a 95 % interval, and a
page.Table of every epoch against the one before it and against the chosen one.
"""

from functools import lru_cache
from math import erfc, sqrt

from tqdm import tqdm

from speechfuse.report.blocks import Table, TableCell
from speechfuse.report.results import Items, Key, ResultsByCheckpoint, numbers
from speechfuse.report.results import ResultFile as Result
from speechfuse.scores import intervals

Difference = tuple[float, float, float]  # value, low, high
CAPTION = (
    "Differences are paired by item, with 95 % bootstrap intervals. p: McNemar's exact test where "
    "items are right or wrong and each its own, else from the interval; after Holm over the epochs "
    "of a row's score. tie: p is at least 0.05."
)


def both(first: Result, second: Result, of: Key) -> tuple[Items, Items] | None:
    """The items behind a score in two files; None unless both have them, and the same ones."""
    mine, others = numbers(first, of), numbers(second, of)
    if mine is None or others is None:
        return None
    same = {item["id"] for item in mine} == {item["id"] for item in others}
    return (mine, others) if same else None


@lru_cache(maxsize=4096)
def difference(first: Result, second: Result, of: Key) -> Difference | None:
    """What `second` has more than `first`; None without per-item numbers of the same items."""
    items = both(first, second, of)
    return intervals.paired(*items) if items else None


def p_value(first: Result, second: Result, of: Key) -> float | None:
    """Two-sided; None where `difference` is.

    McNemar's test takes items for independent, so items that share a cluster, as all that are not
    right or wrong, have it from the bootstrap interval, taken for normal.
    """
    items, found = both(first, second, of), difference(first, second, of)
    if items is None or found is None:
        return None
    mine, others = items
    if "correct" in mine[0] and len({item["cluster"] for item in mine}) == len(mine):
        right = {item["id"]: item["correct"] for item in others}
        alone = [bool(item["correct"]) for item in mine if item["correct"] != right[item["id"]]]
        return intervals.mcnemar(sum(alone), len(alone) - sum(alone))
    value, low, high = found
    error = (high - low) / (2 * 1.959964)
    return erfc(abs(value) / error / sqrt(2)) if error else float(value == 0)


def table(
    found: ResultsByCheckpoint, epochs: list[str], keys: list[Key], chosen: str
) -> Table | None:
    """A row for each score and epoch; None where there are no two epochs to compare."""
    rows: list[list[TableCell]] = []
    untested = []
    for of in tqdm(keys, "comparing epochs", unit="score", leave=False, delay=2):
        scored = [name for name in epochs if of in found[name].scores]
        before = dict(zip(scored[1:], scored, strict=False))
        against = [before, {name: chosen for name in scored if name != chosen and chosen in scored}]
        columns = [compared(found, pairs, of) for pairs in against]
        if not any(columns):
            untested += [" ".join(of)] if len(scored) > 1 else []
            continue
        for name in scored:
            value = f"{found[name].scores[of].value:.3f}"
            rows.append([" ".join(of), name, value, *(column.get(name, "") for column in columns)])
    if not rows and not untested:
        return None
    without = f" Without numbers of single items: {', '.join(untested)}." if untested else ""
    head = ["score", "epoch", "value", "against the one before", f"against {chosen}"]
    marked = {i for i, row in enumerate(rows) if row[1] == chosen}
    return Table(head, rows, marked, CAPTION + without)


def compared(found: ResultsByCheckpoint, pairs: dict[str, str], of: Key) -> dict[str, str]:
    """Of each checkpoint against its partner in `pairs`: difference, interval, adjusted p; nothing
    of those that cannot be paired."""
    told, ps = {}, {}
    for name, partner in pairs.items():
        cells = found[partner].cell(of), found[name].cell(of)
        p, between = p_value(*cells, of), difference(*cells, of)
        if p is not None and between is not None:
            ps[name] = p
            told[name] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*between)
    for name, p in zip(ps, intervals.holm(list(ps.values())), strict=True):
        shown = "< 0.001" if p < 0.001 else f"= {p:.3f}"
        told[name] += f"\np {shown}{', tie' if p >= 0.05 else ''}"
    return told
