"""Scores with intervals: means and word error rates, each with a 95 % bootstrap interval, and
tests of the difference of two checkpoints.

In: the values or transcripts of one split. Out: (value, low, high). Items that are not independent
(one fact asked three times, one speaker heard fifty times) share a cluster, and a resample takes or
leaves them together. Seeded: the same items in the same order give the same interval.
"""

from dataclasses import dataclass
from itertools import compress
from math import comb
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """One number of a checkpoint: `metric` over `n` items of `split` of `task`, 95 % interval.

    `paired`: the items of this split in the result (all items, where none is of it) hold a number
    each, "correct", "value" or "errors" and "words", which together give this one.
    """

    task: str
    split: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    paired: bool = False


def mean(values: list[float], clusters: list[str] | None) -> tuple[float, float, float]:
    """Return (mean, low, high). `clusters` names each item's cluster; None: every item is its own.

    One cluster, or equal values, give an interval of no width. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("a mean of no values: the split is empty")
    numbers = np.asarray(values, dtype=float)
    return ratio(numbers, np.ones_like(numbers), clusters)


def ratio(
    above: np.ndarray, below: np.ndarray, clusters: list[str] | None
) -> tuple[float, float, float]:
    """Return (sum(above) / sum(below), low, high): the percentile interval over resampled
    clusters."""
    drawn = resampled(np.stack([above, below]), clusters)
    drawn = drawn[drawn[:, 1] > 0]  # a resample of wordless references has no rate
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(above.sum() / below.sum()), float(low), float(high)


def quantiles(
    values: list[float], clusters: list[str], shares: list[float]
) -> list[tuple[float, float, float]]:
    """Return (quantile, low, high) of `values` for each of `shares`, clusters as in `mean`."""
    numbers, rng = np.asarray(values), np.random.default_rng(0)
    names, member = np.unique(clusters, return_inverse=True)
    picks = (rng.integers(0, len(names), len(names)) for _ in range(RESAMPLES))
    times = (np.bincount(pick, minlength=len(names))[member] for pick in picks)
    drawn = [np.quantile(np.repeat(numbers, each), shares) for each in times]
    rows = np.quantile(numbers, shares), *np.percentile(drawn, [2.5, 97.5], axis=0)
    return [(float(a), float(b), float(c)) for a, b, c in zip(*rows, strict=True)]


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Return (difference, low, high) of two results of one task: what `second` has more than
    `first`.

    Items are {"id", "correct" | "value" | "errors" and "words"} as result files hold them. They are
    joined by id; one without a number on either side (a missing verdict) is left out. Every
    resample draws the same items of both, which is what makes a small difference visible. Items of
    `first` that have the same "cluster" are drawn together. Raises ValueError when the results are
    not of the same items, or no item has both numbers. Source: Bisani and Ney 2004.
    """
    partners = {item["id"]: item for item in second}
    if len(partners) != len(second) or {item["id"] for item in first} != partners.keys():
        raise ValueError(
            f"{len(first)} items against {len(second)}, or of other ids: two results can be paired "
            "only when they are of the same items, each once"
        )
    rows = [(*_parts(item), *_parts(partners[item["id"]])) for item in first]
    rated = [None not in row for row in rows]
    numbers = np.asarray([*compress(rows, rated)], dtype=float).reshape(-1, 4)
    if not (numbers[:, 1].any() and numbers[:, 3].any()):
        raise ValueError("no item has a number in both results: nothing to compare")
    clusters = [str(item.get("cluster", item["id"])) for item in first]
    drawn = resampled(numbers.T, [*compress(clusters, rated)])
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    low, high = np.percentile(drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    total = numbers.sum(0)
    return float(total[2] / total[3] - total[0] / total[1]), float(low), float(high)


def _parts(item: dict[str, Any]) -> tuple[Any, Any]:
    """Return numerator and denominator of an item's part in a score; the first is None without a
    number. Raises ValueError for an item that has no such field."""
    if "errors" in item:
        return item["errors"], item["words"]
    if "correct" not in item and "value" not in item:
        raise ValueError(
            f"item {item['id']!r} has none of correct, value, errors: its task keeps no number of "
            "each item, so it cannot be paired"
        )
    return item.get("correct", item.get("value")), 1


def resampled(numbers: np.ndarray, clusters: list[str] | None) -> np.ndarray:
    """Return sums (RESAMPLES, columns) of `numbers` (columns, items) over clusters drawn with
    replacement. Raises ValueError unless `clusters` names one for each item."""
    count = numbers.shape[1]
    if clusters is not None:
        if len(clusters) != count:
            raise ValueError(f"{len(clusters)} clusters for {count} items: name one for each")
        _, member = np.unique(clusters, return_inverse=True)
        numbers = np.stack([np.bincount(member, column) for column in numbers])
        count = numbers.shape[1]
    rng = np.random.default_rng(0)
    numbers = np.ascontiguousarray(numbers)
    # one at a time: all at once would take 2000 x items of memory
    picks = (rng.integers(0, count, count) for _ in range(RESAMPLES))
    return np.stack([numbers.take(pick, axis=1).sum(1) for pick in picks])


def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided p that two checkpoints are right equally often, when the first
    alone is right on `b` items and the second alone on `c`: a fair coin's chance to part as
    unevenly."""
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def holm(ps: list[float]) -> list[float]:
    """Return `ps` adjusted for being many, in their order: those below 0.05 hold together at 5
    %."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = adjusted[i] = max(worst, min(1.0, ps[i] * (len(ps) - rank)))
    return adjusted
