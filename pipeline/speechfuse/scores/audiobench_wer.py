"""Word error rate as AudioBench computes it for English, and what makes the number readable.

In: references and predictions. Out: `Wer`: the corpus rate with its interval, substitutions,
deletions and insertions, the rate with each utterance capped at 100 %, the share of utterances
above 100 %, the rate by duration, and each utterance's errors and words.

Facts: AudioBench e991641, the same since 2a6df31. Both sides are normalised, an empty side becomes
the word "empty", and the rate is the sum of errors over the sum of words: a fraction, which loops
can push above 1.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import jiwer
import numpy as np

from speechfuse.scores import intervals, word_errors

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
).split()
WORDS = dict(zip(map(str, [*range(21), *range(30, 100, 10)]), _SMALL, strict=True))
DURATIONS = (5, 10, 15, 20, 30)  # seconds; the bins end there
_punctuation = jiwer.RemovePunctuation()


def audiobench(text: str) -> str:
    """`text` as AudioBench compares it: "Mr. Lee's 20 percent" -> "mister lee is twenty".

    Lower case; Whisper's English normaliser; 0 to 20 and the tens back to words, where they stand
    alone; no punctuation; no uh, umm, um, er, ah. AudioBench also expands contractions (its own
    list, then jiwer's) and drops brackets (its own rule, then Kaldi's non-words); Whisper's
    normaliser leaves neither apostrophe nor bracket, so these have nothing to do.

    What it makes of odd texts is kept: possessives turn to "is", "$5.50" to "$fivefifty". Not
    idempotent ("$60" -> "$sixty" -> "sixty"; "9, 30" -> "nine thirty" -> "930"): never apply it to
    its own output, such as AudioBench's published logs.
    """
    text = word_errors.whisper_english()(text.lower())
    text = re.sub(r"\b(?:1?[0-9]|[2-9]0)\b", lambda number: WORDS[number[0]], text)
    text = re.sub(r"\b(?:uh|umm?|er|ah)\b", "", _punctuation(text))
    return " ".join(text.split())


def normalised_already(references: list[str], predictions: list[str]) -> tuple[bool, int]:
    """Return (whether the texts are AudioBench's output rather than raw, how many of them
    `audiobench` would change).

    Output is English, has no capital and no punctuation, and `audiobench` changes few of it (0.03
    to 0.4 % of the texts of ten published LibriSpeech logs); raw text of any size fails one of
    them.
    """
    texts = references + predictions
    changed = sum(" ".join(text.split()) not in (audiobench(text), "empty") for text in texts)
    used = set("".join(texts))
    raw = any(c != c.lower() or unicodedata.category(c).startswith("P") for c in used)
    others = sum(map(word_errors.of_another_script, references))
    few = changed <= 0.02 * len(texts) and others <= 0.02 * len(references)
    return not raw and few, changed


def characters(text: str) -> str:
    """Return `text` for a character error rate, in any script: NFKC, case folded, letters, marks
    and digits only (no spaces: Chinese has none, and punctuation leaves some behind)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


@dataclass(frozen=True)
class Wer:
    """`value` is a fraction with a 95 % interval; `by_duration` has (label, rate, utterances);
    `not_english`: how many references are not compared as English."""

    value: float
    low: float
    high: float
    totals: word_errors.Errors
    capped: float
    above_one: float
    by_duration: list[tuple[str, float, int]]
    per_item: list[tuple[int, int]]  # (errors, words)
    not_english: int


def score(
    references: list[str],
    predictions: list[str],
    seconds: list[float] | None = None,
    clusters: list[str] | None = None,
    normalise: Callable[[str], str] | None = None,
    align: Callable[..., object] = jiwer.process_words,
) -> Wer:
    """Return the word error rate of `predictions`, both sides through `normalise`, by default
    `audiobench` (of other languages see word_errors.normalised).

    `seconds` of each utterance gives the rate by duration; `clusters` (speakers) widen the
    interval. With `characters` and jiwer.process_characters it is a character error rate. Raises
    ValueError for no utterances, and for other than one prediction, second, cluster for each.
    """
    not_english = 0
    if normalise is None:
        references, predictions, not_english = word_errors.normalised(
            references, predictions, audiobench
        )
    else:
        references, predictions = [*map(normalise, references)], [*map(normalise, predictions)]
    truths, replies = ([t.strip() or "empty" for t in side] for side in (references, predictions))
    counts = word_errors.errors(truths, replies, align)
    per_item = [(each.total, each.words) for each in counts]
    errors, words = np.asarray(per_item, float).T
    return Wer(
        *intervals.ratio(errors, words, clusters),
        totals=word_errors.Errors(*map(sum, zip(*counts, strict=True))),
        capped=float(np.minimum(errors, words).sum() / words.sum()),
        above_one=float((errors > words).mean()),
        by_duration=by_duration(per_item, seconds) if seconds is not None else [],
        per_item=per_item,
        not_english=not_english,
    )


def by_duration(
    per_item: list[tuple[int, int]], seconds: list[float]
) -> list[tuple[str, float, int]]:
    """Return (label, rate, utterances) of each bin of durations that has any, from the (errors,
    words) and the seconds of each utterance. Raises ValueError when these are not equally many."""
    if len(seconds) != len(per_item):
        raise ValueError(f"{len(seconds)} durations of {len(per_item)} utterances: give one each")
    errors, words = np.asarray(per_item, float).T
    bins = np.digitize(seconds, DURATIONS, right=True)
    starts = [0, *DURATIONS]
    labels = [f"{a}-{b} s" for a, b in zip(starts, DURATIONS, strict=False)]
    labels.append(f"over {DURATIONS[-1]} s")
    return [
        (labels[b], float(errors[bins == b].sum() / words[bins == b].sum()), int((bins == b).sum()))
        for b in np.unique(bins)
    ]
