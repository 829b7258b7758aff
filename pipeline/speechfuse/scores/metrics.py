"""Metrics of texts against references, by name: the keys of METRICS.

In: references, predictions, and the cluster of each item or None. Out: `Metric`: scores with 95 %
intervals, the first of which is the headline, and each item's own numbers for paired tests. What
needs a judge is in scores.judge.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jiwer
import numpy as np

from speechfuse.scores import audiobench_wer, intervals
from speechfuse.scores.word_errors import errors, normalised, whisper_english, word_error_rate

Texts = list[str]
Clusters = list[str] | None
Row = tuple[str, float, float, float]  # metric, value, low, high


@dataclass(frozen=True)
class Metric:
    """`scores`: (metric, value, low, high), the headline first; `items`: one dict an item;
    `additive`: whether the headline is the mean of the items' numbers, or errors over words."""

    scores: list[Row]
    items: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    additive: bool = True


def word_errors(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return AudioBench's English WER, and the same with each utterance capped at 1 ("wer_capped").
    Pairs of another language pass scores.words.plain, and `details` say so ("normaliser").

    Raises ValueError for references most of whose letters are of a script without spaces between
    words.
    """
    if references and 2 * sum(map(_unspaced, references)) > len(references):
        raise ValueError(
            f"metric wer does not fit references such as {references[0]!r:.60}: their script has "
            "no spaces between words; use metric cer"
        )
    result = audiobench_wer.score(references, predictions, None, clusters)
    metric = _errors("wer", result, clusters)
    said = _normaliser(result.not_english, references)
    return replace(metric, details=metric.details | said)


def _normaliser(others: int, references: Texts) -> dict[str, Any]:
    """Return what `details` say where `others` of the references are not compared as English."""
    of = f"{others} of {len(references)} references"
    said = f"none of English for {of}: NFKC, case folded, no punctuation"
    return {"normaliser": said} if others else {}


def whisper_word_errors(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return the WER ("wer") after Whisper's English normaliser alone, as scores.word_errors has
    it."""
    rate = word_error_rate(references, predictions, clusters)
    truths, heard, others = normalised(references, predictions, whisper_english())
    items = [{"errors": each.total, "words": each.words} for each in errors(truths, heard)]
    return Metric([("wer", *rate)], items, _normaliser(others, references))


def written_word_errors(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return the WER ("wer") of the texts as they are written, as NeMo has it by default."""
    each = errors(references, predictions)
    total, words = ([float(getattr(e, name)) for e in each] for name in ("total", "words"))
    rate = intervals.ratio(np.asarray(total), np.asarray(words), clusters)
    items = [{"errors": e, "words": w} for e, w in zip(total, words, strict=True)]
    return Metric([("wer", *rate)], items)


def character_errors(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return the character error rate, by audiobench_wer.characters; for any script."""
    ways = audiobench_wer.characters, jiwer.process_characters  # to normalise and to align
    result = audiobench_wer.score(references, predictions, None, clusters, *ways)
    return _errors("cer", result, clusters)


def _errors(name: str, result: audiobench_wer.Wer, clusters: Clusters) -> Metric:
    errors, words = np.asarray(result.per_item, float).T
    capped = intervals.ratio(np.minimum(errors, words), words, clusters)
    return Metric(
        [(name, result.value, result.low, result.high), (f"{name}_capped", *capped)],
        [{"errors": e, "words": w} for e, w in result.per_item],
        {**result.totals._asdict(), "above_one": result.above_one},
    )


def _unspaced(text: str) -> bool:
    """Return True if most letters are of Chinese, Japanese or Thai, which write no spaces."""
    names = [unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha()]
    return 2 * sum(n in ("CJK", "HIRAGANA", "KATAKANA", "THAI") for n in names) > len(names)


def bleu(
    references: Texts, predictions: Texts, clusters: Clusters = None, tokenize: str = "13a"
) -> Metric:
    """Return the corpus BLEU of sacrebleu, 0 to 100. An item's value is its sentence's BLEU; their
    mean is another number."""
    import sacrebleu  # where it is used, as rouge_score below, which brings nltk and takes seconds

    _check(references, predictions)
    scorer = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
    each = [scorer.sentence_score(p, [r]) for r, p in zip(references, predictions, strict=True)]
    counts = np.asarray([[*e.counts, *e.totals, e.sys_len, e.ref_len] for e in each]).T

    def corpus(sums: np.ndarray) -> float:
        matched, total, lengths = sums[:4].tolist(), sums[4:8].tolist(), sums[8:].tolist()
        return sacrebleu.BLEU.compute_bleu(matched, total, *lengths).score

    drawn = [corpus(sums) for sums in intervals.resampled(counts, clusters).round().astype(int)]
    value = corpus(counts.sum(1))
    low, high = np.percentile(drawn, [2.5, 97.5])
    signature = f"sacrebleu {sacrebleu.__version__}, tokenize {tokenize}"
    items = [{"value": sentence.score} for sentence in each]
    scores = [("bleu", value, float(low), float(high))]
    return Metric(scores, items, {"signature": signature}, additive=False)


def bleu_zh(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return corpus BLEU into Chinese, by sacrebleu's zh tokenizer: each character is a word."""
    return bleu(references, predictions, clusters, "zh")


def rouge(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return the mean F1 of ROUGE-L, -1 and -2, 0 to 1, without stemming. Source: rouge-score.

    Raises ValueError where most references have neither a-z nor 0-9, all that it reads.
    """
    from rouge_score import rouge_scorer

    _check(references, predictions)
    scorer = rouge_scorer.RougeScorer(["rougeL", "rouge1", "rouge2"])
    blind = [text for text in references if not any(c.isascii() and c.isalnum() for c in text)]
    if 2 * len(blind) > len(references):
        raise ValueError(
            f"metric rouge does not fit references such as {blind[0]!r:.60}: it reads a-z and 0-9 "
            "only; use bleu_zh, cer or a judge"
        )
    each = [scorer.score(r, p) for r, p in zip(references, predictions, strict=True)]
    values = {name: [float(rouges[name].fmeasure) for rouges in each] for name in each[0]}
    rows = [(name, *intervals.mean(of, clusters)) for name, of in values.items()]
    return Metric(rows, [{"value": value} for value in values["rougeL"]])


def hallucination(references: Texts, predictions: Texts, clusters: Clusters = None) -> Metric:
    """Return the characters a minute that are said of sound in which nobody speaks. `references`:
    the seconds of each clip. Source: the model card of Canary-Qwen. Raises ValueError for others.
    """
    _check(references, predictions)
    try:
        minutes = np.asarray([float(seconds) / 60 for seconds in references])
    except ValueError:
        raise ValueError(
            f"metric hallucination does not fit references such as {references[0]!r:.60}: it takes "
            "the length of a clip, reference=seconds"
        ) from None
    characters = np.asarray([float(len(prediction)) for prediction in predictions])
    rate = intervals.ratio(characters, minutes, clusters)
    items = [{"value": value} for value in (characters / minutes).tolist()]
    return Metric([("hallucination", *rate)], items, additive=False)


def plain(answer: str) -> str:
    """Return `answer` for exact comparison: NFKC, case folded, single spaces, no quotes around it
    and no full stop at its end ("\u201cParis.\u201d" -> "paris"); signs and points inside stay."""
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    return text.strip("\"'\u201c\u201d\u2018\u2019.,!?;: ") or text


def lower_case(text: str) -> str:
    """Return `text` in lower case with single spaces."""
    return " ".join(text.lower().split())


def accuracy(
    references: Texts,
    predictions: Texts,
    clusters: Clusters = None,
    name: str = "accuracy",
    normalise: Callable[[str], str] = plain,
) -> Metric:
    """Return the share of predictions that equal their reference, both through `normalise`."""
    _check(references, predictions)
    pairs = zip(references, predictions, strict=True)
    right = [normalise(reference) == normalise(prediction) for reference, prediction in pairs]
    interval = intervals.mean([float(each) for each in right], clusters)
    return Metric([(name, *interval)], [{"correct": each} for each in right])


def _check(references: Texts, predictions: Texts) -> None:
    if len(references) != len(predictions):
        raise ValueError(
            f"{len(references)} references and {len(predictions)} predictions: give one for each"
        )
    if not references:
        raise ValueError("a score of no items: the split is empty")


METRICS: dict[str, Callable[[Texts, Texts, Clusters], Metric]] = {
    "wer": word_errors,
    "cer": character_errors,
    "bleu": bleu,
    "bleu_zh": bleu_zh,
    "rouge": rouge,
    "accuracy": accuracy,
    "acc": partial(accuracy, name="acc", normalise=lower_case),
    "hallucination": hallucination,
    "wer_whisper": whisper_word_errors,
    "wer_written": written_word_errors,
}
