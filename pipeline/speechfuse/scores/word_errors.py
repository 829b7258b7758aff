"""Word errors: alignment of reference and prediction, and the word error rate of a split."""

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jiwer
import numpy as np
import regex

from speechfuse.scores.intervals import ratio
from speechfuse.scores.words import plain, words

_MARKED = regex.compile(r"([\p{L}--\p{Script=Latin}])\p{M}+", regex.V1)
_ACCENTED = regex.compile(r"[\p{Script=Latin}--[a-z]]", regex.V1)
_COMMON = {*"the and that with are this what which she they you his from were would".split()}
_BORROWED = {  # what English writes with accents, at times
    *"café cafés naïve naïvely naïveté fiancé fiancée cliché clichés résumé résumés façade".split(),
    *"déjà décor entrée sauté sautéed purée puréed soufflé touché exposé blasé risqué".split(),
    *"crème brûlée protégé pâté matinée émigré communiqué divorcée piñata jalapeño".split(),
    *"doppelgänger über coöperate noël zoë chloë brontë renée beyoncé".split(),
}


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
    """Return the errors of each utterance, by a minimal alignment of the texts as they are; any
    white space is one separator.

    `align` is jiwer.process_words or jiwer.process_characters. Raises ValueError when there is not
    one hypothesis for each reference, or no utterance at all.
    """
    _check(references, hypotheses)
    sides = ([" ".join(text.split()) for text in side] for side in (references, hypotheses))
    aligned = align(*sides)
    counts = []
    for reference, chunks in zip(aligned.references, aligned.alignments, strict=True):
        spans = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in chunks:
            spans[chunk.type] += max(
                chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            )
        counts.append(Errors(spans["substitute"], spans["delete"], spans["insert"], len(reference)))
    return counts


def _check(references: list[str], hypotheses: list[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one for each"
        )
    if not references:
        raise ValueError("an error rate of no utterances: the split is empty")


def word_error_rate(
    references: list[str], hypotheses: list[str], clusters: list[str] | None = None
) -> tuple[float, float, float]:
    """Return (corpus WER, low, high): errors over words of all references, a fraction that may
    exceed 1.

    Both sides pass Whisper's English normaliser first (of other languages see `normalised`). An
    empty hypothesis is all deletions; a reference that the normaliser empties ("um") counts its
    insertions and no words. Raises ValueError for a blank reference, for no utterances, and for
    references of which nothing is left. Sources: jiwer; whisper.normalizers of openai-whisper.
    """
    for i, text in enumerate(references):
        if not text.strip():
            raise ValueError(f"reference {i} of {len(references)} is blank: give what was said")
    truths, heard, _ = normalised(references, hypotheses, whisper_english())
    counts = errors(truths, heard)
    if not sum(each.words for each in counts):
        raise ValueError("the normaliser leaves nothing of any reference: no word error rate")
    total, words = [each.total for each in counts], [each.words for each in counts]
    return ratio(np.asarray(total, float), np.asarray(words, float), clusters)


def normalised(
    references: list[str], hypotheses: list[str], english: Callable[[str], str]
) -> tuple[list[str], list[str], int]:
    """Return both sides as they are compared, and how many pairs are not compared as English.

    The reference decides for its pair: both pass `english`, or scores.words.plain where it is of
    another script or the references are of another language, from which `english` would take marks
    and accents.
    """
    _check(references, hypotheses)
    foreign = _of_another_language(references)
    ways = [plain if foreign or of_another_script(text) else english for text in references]
    truths = [way(text) for way, text in zip(ways, references, strict=True)]
    heard = [way(text) for way, text in zip(ways, hypotheses, strict=True)]
    return truths, heard, sum(way is plain for way in ways)


@cache
def whisper_english() -> Callable[[str], str]:
    """Return Whisper's English normaliser, which reads its tables once. In words of another script,
    which it would cut at their marks, the letters alone are left."""
    from whisper.normalizers import EnglishTextNormalizer  # brings torch: a second

    english = EnglishTextNormalizer()
    return lambda text: english(text if text.isascii() else _MARKED.sub(r"\1", text))


def of_another_script(text: str) -> bool:
    """Return True if most letters are not Latin, or one that is not has marks."""
    if text.isascii():
        return False
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    names = (unicodedata.name(c, "") for c in letters)
    pairs = zip(letters, names, strict=True)
    others = "".join(c for c, name in pairs if not name.startswith(("LATIN", "COMBINING")))
    marks = [c for c in unicodedata.normalize("NFKD", others) if unicodedata.category(c)[0] == "M"]
    return 2 * len(others) > len(letters) or bool(marks)


def _of_another_language(references: list[str]) -> bool:
    """Return True if the references are not English: two words or more, and over one in fifty, have
    accents and are none that English borrowed, and under one in twenty is as common as "the"."""
    every = [word for text in references for word in words(text)]
    accented = [word for word in every if _ACCENTED.search(word) and word not in _BORROWED]
    common = sum(word in _COMMON for word in every)
    return len(accented) > max(1, 0.02 * len(every)) and common < 0.05 * len(every)
