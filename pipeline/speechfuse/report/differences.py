"""Test differences between epochs, paired by item: is the later one better, or is it noise?

In: the results of one protocol. Out: the difference of two checkpoints with a 95 % interval, and a
Markdown table of every epoch against the one before it and against the chosen one.
"""

from functools import lru_cache
from math import erfc, sqrt

from tqdm import tqdm

from speechfuse.report import page
from speechfuse.report.results import Items, Key, ResultFile, ResultsByCheckpoint, numbers
from speechfuse.scores import intervals

Difference = tuple[float, float, float]  # value, low, high
CAPTION = (
    "Differences are paired by item, with 95 % bootstrap intervals. p: McNemar's exact test where "
    "items are right or wrong and each its own, else from the interval; after Holm over the epochs "
    "of a row's score. tie: p is at least 0.05."
)


def both(first: ResultFile, second: ResultFile, of: Key) -> tuple[Items, Items] | None:
    """Return the items behind a score in two files; None unless both have the same ones."""
    mine, others = numbers(first, of), numbers(second, of)
    if mine is None or others is None:
        return None
    same = {item["id"] for item in mine} == {item["id"] for item in others}
    return (mine, others) if same else None


@lru_cache(maxsize=4096)
def difference(first: ResultFile, second: ResultFile, of: Key) -> Difference | None:
    """Return how much more `second` has; None without per-item numbers of the same items."""
    items = both(first, second, of)
    return intervals.paired(*items) if items else None


def p_value(first: ResultFile, second: ResultFile, of: Key) -> float | None:
    """Return the two-sided p; None where `difference` is.

    McNemar's test assumes independent items. Items that share a cluster, or are not right or wrong,
    get it from the bootstrap interval, assumed normal.
    """
    items, interval = both(first, second, of), difference(first, second, of)
    if items is None or interval is None:
        return None
    mine, others = items
    if "correct" in mine[0] and len({item["cluster"] for item in mine}) == len(mine):
        right = {item["id"]: item["correct"] for item in others}
        only_first = [bool(i["correct"]) for i in mine if i["correct"] != right[i["id"]]]
        return intervals.mcnemar(sum(only_first), len(only_first) - sum(only_first))
    value, low, high = interval
    error = (high - low) / (2 * 1.959964)
    return erfc(abs(value) / error / sqrt(2)) if error else float(value == 0)


def table(
    results: ResultsByCheckpoint, epochs: list[str], keys: list[Key], chosen: str
) -> str | None:
    """Return a row for each score and epoch; None where there are no two epochs to compare."""
    rows: list[list[str]] = []
    untested = []
    for of in tqdm(keys, "comparing epochs", unit="score", leave=False, delay=2):
        scored = [name for name in epochs if of in results[name].scores]
        before = dict(zip(scored[1:], scored, strict=False))
        against = [before, {name: chosen for name in scored if name != chosen and chosen in scored}]
        columns = [compared(results, pairs, of) for pairs in against]
        if not any(columns):
            untested += [" ".join(of)] if len(scored) > 1 else []
            continue
        for name in scored:
            value = f"{results[name].scores[of].value:.3f}"
            rows.append([" ".join(of), name, value, *(column.get(name, "") for column in columns)])
    if not rows and not untested:
        return None
    names = page.escape(", ".join(untested))
    without = f" Without numbers of single items: {names}." if untested else ""
    head = ["score", "epoch", "value", "against the one before", f"against {chosen}"]
    bold = {i for i, row in enumerate(rows) if row[1] == chosen}
    return page.table(head, rows, bold, CAPTION + without)


def compared(results: ResultsByCheckpoint, pairs: dict[str, str], of: Key) -> dict[str, str]:
    """Return, for each checkpoint that can be paired with its partner in `pairs`: difference,
    interval, adjusted p."""
    texts, ps = {}, {}
    for name, partner in pairs.items():
        files = results[partner].file(of), results[name].file(of)
        p, interval = p_value(*files, of), difference(*files, of)
        if p is not None and interval is not None:
            ps[name] = p
            texts[name] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)
    for name, p in zip(ps, intervals.holm(list(ps.values())), strict=True):
        shown = "< 0.001" if p < 0.001 else f"= {p:.3f}"
        texts[name] += f"\np {shown}{', tie' if p >= 0.05 else ''}"
    return texts
