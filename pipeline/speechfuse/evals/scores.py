"""Scores with intervals: means and word error rates, each with a 95 % bootstrap interval.

In: the values or transcripts of one split. Out: (value, low, high). Items that are not independent
(one fact asked three times, one speaker heard fifty times) share a cluster, and a resample takes or
leaves them together. Seeded: the same items in the same order give the same interval.
"""

from dataclasses import dataclass
from functools import cache

import jiwer
import numpy as np
from whisper.normalizers import EnglishTextNormalizer

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """One number of a checkpoint: `metric` over `n` items of `split` of `task`, 95 % interval."""

    task: str
    split: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int


def mean(values: list[float], clusters: list[str] | None) -> tuple[float, float, float]:
    """(mean, low, high). `clusters` names each item's cluster; None: every item is its own.

    One cluster, or equal values, give an interval of no width. ValueError without values.
    """
    if not len(values):
        raise ValueError("a mean of no values: the split is empty")
    numbers = np.asarray(values, dtype=float)
    return _ratio(numbers, np.ones_like(numbers), clusters)


def word_error_rate(
    references: list[str], hypotheses: list[str], clusters: list[str] | None = None
) -> tuple[float, float, float]:
    """(corpus WER, low, high): errors over words of all references, a fraction that may exceed 1.

    Both sides pass Whisper's English normaliser first. An empty hypothesis is all deletions; a
    reference that the normaliser empties ("um") counts its insertions and no words. ValueError for
    a blank reference, for no utterances, and for references of which nothing is left. Sources:
    jiwer; whisper.normalizers of openai-whisper.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one for each"
        )
    if not references:
        raise ValueError("a word error rate of no utterances: the split is empty")
    for i, text in enumerate(references):
        if not text.strip():
            raise ValueError(f"reference {i} of {len(references)} is blank: give what was said")
    normalise = _normaliser()
    aligned = jiwer.process_words(
        [normalise(text) for text in references], [normalise(text) for text in hypotheses]
    )
    words = [len(found) for found in aligned.references]
    errors = [
        sum(
            max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            for chunk in chunks
            if chunk.type != "equal"
        )
        for chunks in aligned.alignments
    ]
    if not sum(words):
        raise ValueError("the normaliser leaves nothing of any reference: no word error rate")
    return _ratio(np.asarray(errors, float), np.asarray(words, float), clusters)


@cache
def _normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


def _ratio(
    above: np.ndarray, below: np.ndarray, clusters: list[str] | None
) -> tuple[float, float, float]:
    """sum(above) / sum(below) and its percentile interval over resampled clusters."""
    if clusters is not None:
        if len(clusters) != len(above):
            raise ValueError(f"{len(clusters)} clusters for {len(above)} items: name one for each")
        _, member = np.unique(clusters, return_inverse=True)
        above, below = np.bincount(member, above), np.bincount(member, below)
    rng, count = np.random.default_rng(0), len(above)
    drawn = np.empty((RESAMPLES, 2))
    for row in drawn:  # one at a time: all at once would take 2000 x items of memory
        picks = rng.integers(0, count, count)
        row[:] = above[picks].sum(), below[picks].sum()
    drawn = drawn[drawn[:, 1] > 0]  # a resample of wordless references has no rate
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(above.sum() / below.sum()), float(low), float(high)
