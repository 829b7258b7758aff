"""Test differences between epochs, paired by item: is the later one better, or is it noise?

In: the results of one protocol. Out: the difference of two checkpoints with a 95 % interval, and a
Markdown table of every epoch against the one before it and against the chosen one.
"""

from functools import lru_cache
from math import erfc, sqrt

from tqdm import tqdm

from speechfuse.report import page
from speechfuse.report.results import Checkpoints, Items, Key, ResultFile
from speechfuse.scores import intervals

Difference = tuple[float, float, float, float]  # value, low, high, p
CAPTION = (
    "Differences are paired by item, with 95 % bootstrap intervals. p: McNemar's exact test where "
    "items are right or wrong and each its own, else from the interval; after Holm over the epochs "
    "of a row's score. tie: p is at least 0.05."
)


def numbers(file: ResultFile, of: Key) -> Items:
    """Return the items that hold the numbers of a score: those of its split, or all where none is
    of that split; none where the score is not `paired`."""
    own = [item for item in file.items if item.get("split") == of[1]]
    return (own or file.items) if file.scores[of].paired else []


@lru_cache(maxsize=4096)
def difference(first: ResultFile, second: ResultFile, of: Key) -> Difference | None:
    """Return how much more `second` has; None unless both hold numbers of the same items.

    p is McNemar's where items are independent, and right or wrong. Items that share a cluster, or
    have other numbers, get it from the bootstrap interval, assumed normal.
    """
    mine, others = numbers(first, of), numbers(second, of)
    if not mine or {item["id"] for item in mine} != {item["id"] for item in others}:
        return None
    value, low, high = intervals.paired(mine, others)
    clusters = {item.get("cluster", item["id"]) for item in mine}
    if "correct" in mine[0] and len(clusters) == len(mine):
        right = {item["id"]: item["correct"] for item in others}
        only_first = [bool(i["correct"]) for i in mine if i["correct"] != right[i["id"]]]
        p = intervals.mcnemar(sum(only_first), len(only_first) - sum(only_first))
    else:
        error = (high - low) / (2 * 1.959964)
        p = erfc(abs(value) / error / sqrt(2)) if error else float(value == 0)
    return value, low, high, p


def table(results: Checkpoints, epochs: list[str], keys: list[Key], chosen: str) -> str | None:
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


def compared(results: Checkpoints, pairs: dict[str, str], of: Key) -> dict[str, str]:
    """Return, for each checkpoint that can be paired with its partner in `pairs`: difference,
    interval, adjusted p."""
    texts, ps = {}, {}
    for name, partner in pairs.items():
        if tested := difference(results[partner].file(of), results[name].file(of), of):
            texts[name] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*tested)
            ps[name] = tested[3]
    for name, p in zip(ps, intervals.holm(list(ps.values())), strict=True):
        shown = "< 0.001" if p < 0.001 else f"= {p:.3f}"
        texts[name] += f"\np {shown}{', tie' if p >= 0.05 else ''}"
    return texts
