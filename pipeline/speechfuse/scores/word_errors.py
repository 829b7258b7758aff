"""Word errors: alignment of reference and prediction, and the word error rate of a split."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jiwer
import numpy as np

from speechfuse.scores.intervals import ratio


class Errors(NamedTuple):
    """Edits that turn one reference into its hypothesis, and the reference's length in words."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def errors(
    references: list[str], hypotheses: list[str], align: Callable[..., Any] = jiwer.process_words
) -> list[Errors]:
    """Return the errors of each utterance, by a minimal alignment of the texts as they are.

    `align` is jiwer.process_words or jiwer.process_characters. Raises ValueError when there is not
    one hypothesis for each reference, or no utterance at all.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one for each"
        )
    if not references:
        raise ValueError("an error rate of no utterances: the split is empty")
    aligned = align(references, hypotheses)
    counts = []
    for reference, chunks in zip(aligned.references, aligned.alignments, strict=True):
        spans = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in chunks:
            spans[chunk.type] += max(
                chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            )
        counts.append(Errors(spans["substitute"], spans["delete"], spans["insert"], len(reference)))
    return counts


def word_error_rate(
    references: list[str], hypotheses: list[str], clusters: list[str] | None = None
) -> tuple[float, float, float]:
    """Return (corpus WER, low, high): errors over words of all references, a fraction that may
    exceed 1.

    Both sides pass Whisper's English normaliser first. An empty hypothesis is all deletions; a
    reference that the normaliser empties ("um") counts its insertions and no words. Raises
    ValueError for a blank reference, for no utterances, and for references of which nothing is
    left. Sources: jiwer; whisper.normalizers of openai-whisper.
    """
    for i, text in enumerate(references):
        if not text.strip():
            raise ValueError(f"reference {i} of {len(references)} is blank: give what was said")
    normalise = whisper_english()
    counts = errors([normalise(t) for t in references], [normalise(t) for t in hypotheses])
    if not sum(each.words for each in counts):
        raise ValueError("the normaliser leaves nothing of any reference: no word error rate")
    total, words = [each.total for each in counts], [each.words for each in counts]
    return ratio(np.asarray(total, float), np.asarray(words, float), clusters)


@cache
def whisper_english() -> Callable[[str], str]:
    """Return Whisper's English normaliser; it reads its tables once."""
    from whisper.normalizers import EnglishTextNormalizer  # brings torch: a second

    return EnglishTextNormalizer()
