"""Metrics by name: the published values, intervals that hold them, numbers an item."""

import math

import jiwer
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from speechfuse.report.results import lower_is_better
from speechfuse.scores import intervals, metrics
from speechfuse.scores.metrics import METRICS

REFERENCES = [
    "The cat sat on the mat and looked at the dog.",
    "It rained all day in the north of the country.",
    "She bought three apples, two pears and a melon.",
    "Nobody knew where the old man had gone.",
]
PREDICTIONS = [
    "The cat sat on a mat and looked at the dog.",
    "It was raining all day in the country's north.",
    "She bought three apples, two pears and a melon.",
    "nothing",
]
OF_TEXTS = [name for name in METRICS if name != "hallucination"]


@pytest.mark.parametrize("name", OF_TEXTS)
def test_every_metric_is_perfect_on_the_truth_and_has_numbers_an_item(name):
    best = METRICS[name](REFERENCES, REFERENCES, None)
    zero, hundred = ("wer", "cer", "wer_whisper", "wer_written"), ("bleu", "bleu_zh")
    perfect = 0 if name in zero else 100 if name in hundred else 1
    for _, value, low, high in best.scores:
        assert value == low == high == pytest.approx(perfect)
    worse = METRICS[name](REFERENCES, PREDICTIONS, None)
    _, value, low, high = worse.scores[0]
    assert low <= value <= high and low < high and value != pytest.approx(perfect)
    assert len(worse.items) == 4
    ids = [{"id": str(i), **item} for i, item in enumerate(worse.items)]
    truth = [{"id": str(i), **item} for i, item in enumerate(best.items)]
    assert intervals.paired(truth, truth)[0] == 0 and intervals.paired(ids, truth)[0] != 0


@pytest.mark.parametrize("name", OF_TEXTS)
def test_clusters_widen_and_bad_input_is_refused(name):
    references = REFERENCES * 10
    predictions = [p for _ in range(10) for p in PREDICTIONS]
    clusters = [str(i % 4) for i in range(40)]
    alone = METRICS[name](references, predictions, None).scores[0]
    together = METRICS[name](references, predictions, clusters).scores[0]
    assert together[1] == alone[1] and together[3] - together[2] > 1.5 * (alone[3] - alone[2])
    with pytest.raises(ValueError, match="split is empty"):
        METRICS[name]([], [], None)
    with pytest.raises(ValueError, match="1 references and 2"):
        METRICS[name](["a"], ["a", "b"], None)
    with pytest.raises(ValueError, match="1 clusters for 2 items"):
        METRICS[name](["a", "b"], ["a", "b"], ["x"])


def test_bleu_is_sacrebleus_corpus_bleu():
    value = METRICS["bleu"](REFERENCES, PREDICTIONS, None).scores[0][1]
    assert value == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score, abs=1e-9)
    assert 20 < value < 80
    assert METRICS["bleu"](REFERENCES, [""] * 4, None).scores[0][1] == 0
    chinese, heard = ["我们今天去北京看长城。"], ["我们今天去上海看长城。"]
    value = METRICS["bleu_zh"](chinese, heard, None).scores[0][1]
    expected = sacrebleu.corpus_bleu(heard, [chinese], tokenize="zh").score
    assert value == pytest.approx(expected) and value > 20


def test_the_interval_of_bleu_is_that_of_resampled_corpora():
    rng, many = np.random.default_rng(1), 40
    kept = rng.random(many) < 0.7
    references = [f"{REFERENCES[i % 4]} {i}" for i in range(many)]
    predictions = [r if k else "quite another text" for r, k in zip(references, kept, strict=True)]
    _, _, low, high = METRICS["bleu"](references, predictions, None).scores[0]
    drawn = []
    for _ in range(300):
        picks = rng.integers(0, many, many)
        ours, theirs = [predictions[i] for i in picks], [references[i] for i in picks]
        drawn.append(sacrebleu.corpus_bleu(ours, [theirs]).score)
    expected = np.percentile(drawn, [2.5, 97.5])
    assert (low, high) == (pytest.approx(expected[0], abs=4), pytest.approx(expected[1], abs=4))


def test_rouge_is_rouge_score():
    result = METRICS["rouge"](REFERENCES, PREDICTIONS, None)
    scorer = rouge_scorer.RougeScorer(["rougeL", "rouge1", "rouge2"])
    each = [scorer.score(r, p) for r, p in zip(REFERENCES, PREDICTIONS, strict=True)]
    found = {name: value for name, value, _, _ in result.scores}
    assert result.scores[0][0] == "rougeL" and found.keys() == {"rougeL", "rouge1", "rouge2"}
    for name in found:
        expected = np.mean([e[name].fmeasure for e in each])
        assert found[name] == pytest.approx(expected, abs=1e-9)


def test_wer_as_written_is_jiwers_and_accuracy_is_a_count():
    """Upper case and points are errors, as in NeMo without remove_text_pc."""
    heard = [PREDICTIONS[0].upper(), *PREDICTIONS[1:3], "nothing "]
    (_, value, _, _), *_ = METRICS["wer_written"](REFERENCES, heard, None).scores
    assert value == pytest.approx(jiwer.wer(REFERENCES, heard), abs=1e-9)
    assert value > METRICS["wer"](REFERENCES, heard, None).scores[0][1]
    same = sum(a == b for a, b in zip(REFERENCES, PREDICTIONS, strict=True))
    value = METRICS["accuracy"](REFERENCES, PREDICTIONS, None).scores[0][1]
    assert value == pytest.approx(same / 4, abs=1e-9)


@pytest.mark.parametrize(
    ("reference", "prediction", "same"),
    [
        ("Paris", " paris.", True),
        ("the  Nile", "\u201cThe Nile!\u201d", True),
        ("\uff11\uff12", "12", True),
        ("-5", "5", False),
        ("3.5", "35", False),
        ("Paris", "Paris, France", False),
        ("?", "", False),
    ],
)
def test_what_counts_as_the_same_answer(reference, prediction, same):
    assert METRICS["accuracy"]([reference], [prediction], None).items == [{"correct": same}]


def test_word_errors_bring_their_kinds():
    result = METRICS["wer"](["the cat sat", "dog"], ["the cat", "dog dog dog dog"], None)
    assert [name for name, *_ in result.scores] == ["wer", "wer_capped"]
    assert math.isclose(result.scores[1][1], 2 / 4)
    assert result.details == {
        "substitutions": 0,
        "deletions": 1,
        "insertions": 3,
        "words": 4,
        "above_one": 0.5,
    }
    assert result.items == [{"errors": 1, "words": 3}, {"errors": 3, "words": 1}]


def test_the_normaliser_of_other_languages_is_said():
    for name in ("wer", "wer_whisper"):
        result = METRICS[name](["It's colouring", "एक दिन"], ["it's colouring दिन", "एक दान"], None)
        assert [(item["errors"], item["words"]) for item in result.items] == [(1, 3), (1, 2)]
        assert result.details["normaliser"].startswith("none of English for 1 of 2 references: ")
        assert "normaliser" not in METRICS[name](["a dog"], ["a दिन"], None).details


def test_a_metric_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"metric wer does not fit.*use metric cer"):
        METRICS["wer"](["今天天气很好"], ["今天"], None)
    with pytest.raises(ValueError, match="metric rouge does not fit"):
        METRICS["rouge"](["今天天气很好"], ["今天"], None)
    mixed = ["今天", "a dog", "a cat"]
    for name in ("wer", "rouge"):
        assert METRICS[name](mixed, mixed, None).items[1] in (
            {"errors": 0, "words": 2},
            {"value": 1},
        )
    assert METRICS["wer"](["the word 天 is day"], ["the word 天 is day"], None).scores[0][1] == 0
    assert metrics.plain("...") == "..."


def test_hallucination_counts_characters_a_minute():
    """All characters over all minutes: the mean of the clips' rates would be 39."""
    (row,) = METRICS["hallucination"](["30", "10.0"], ["thank you", "who is it?"], None).scores
    assert row[:2] == ("hallucination", pytest.approx(28.5))
    assert METRICS["hallucination"](["5"], [""], None).scores[0][1] == 0
    with pytest.raises(ValueError, match=r"such as 'a cat': it takes .* reference=seconds"):
        METRICS["hallucination"](["a cat"], [""], None)
    assert lower_is_better("hallucination")
