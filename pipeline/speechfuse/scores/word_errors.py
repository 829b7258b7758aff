"""Word errors: alignment of reference and prediction, and the word error rate of a split."""

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jiwer
import numpy as np

from speechfuse.scores.intervals import ratio
from speechfuse.scores.words import plain


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

    Both sides pass Whisper's English normaliser first (of other languages see `fitting`). An empty
    hypothesis is all deletions; a reference that the normaliser empties ("um") counts its
    insertions and no words. Raises ValueError for a blank reference, for no utterances, and for
    references of which nothing is left. Sources: jiwer; whisper.normalizers of openai-whisper.
    """
    for i, text in enumerate(references):
        if not text.strip():
            raise ValueError(f"reference {i} of {len(references)} is blank: give what was said")
    normalise = fitting(references, whisper_english())
    counts = errors([normalise(t) for t in references], [normalise(t) for t in hypotheses])
    if not sum(each.words for each in counts):
        raise ValueError("the normaliser leaves nothing of any reference: no word error rate")
    total, words = [each.total for each in counts], [each.words for each in counts]
    return ratio(np.asarray(total, float), np.asarray(words, float), clusters)


@cache
def whisper_english() -> Callable[[str], str]:
    """Return Whisper's English normaliser, which reads its tables once. A text of another script,
    from which it would take marks and letters, passes `plain` in its place."""
    from whisper.normalizers import EnglishTextNormalizer  # brings torch: a second

    english = EnglishTextNormalizer()
    return lambda text: plain(text) if _of_another_script(text) else english(text)


def _of_another_script(text: str) -> bool:
    """Return True if most letters are not Latin, or one that is not has marks."""
    if text.isascii():
        return False
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    names = (unicodedata.name(c, "") for c in letters)
    pairs = zip(letters, names, strict=True)
    others = "".join(c for c, name in pairs if not name.startswith(("LATIN", "COMBINING")))
    marks = [c for c in unicodedata.normalize("NFKD", others) if unicodedata.category(c)[0] == "M"]
    return 2 * len(others) > len(letters) or bool(marks)


def fitting(references: list[str], english: Callable[[str], str]) -> Callable[[str], str]:
    """Return the normaliser `english`, or `plain` where the references are of another language: it
    takes the accents from letters, and more than one word in fifty, in two references or more, has
    some."""
    accented = [
        sum(not word.isascii() and any(map(_accented, word)) for word in text.split())
        for text in references
    ]
    few = sum(map(bool, accented)) < 2 or sum(accented) <= 0.02 * sum(
        len(text.split()) for text in references
    )
    return english if few else plain


def _accented(character: str) -> bool:
    return character.isalpha() and not character.isascii()
