"""Scores: the values are the usual ones, and the intervals are as wide as they should be."""

import time

import jiwer
import numpy as np
import pytest
from scipy.stats import binomtest
from whisper.normalizers import EnglishTextNormalizer

from speechfuse.scores.intervals import holm, mcnemar, mean, paired
from speechfuse.scores.word_errors import errors, word_error_rate

TRICKY = [  # what was said, what was heard
    ("What's Dr. Smith's colour?", "what is doctor smith color"),
    ("Twenty-one, please!", "21 please"),
    ("three plus four", "three plus nine"),
    ("um, the [noise] cat (sighs) sat", "the cat sat on"),
    ("It costs $5.50, and 20 percent more.", "it costs five dollars and twenty per cent more"),
    ("the capital of Peru", ""),
    ("Zo\u00eb wouldn't go", "zoe would not go go go go go"),
    ("hmm", "him"),
    ("one two three", "one two tree"),
]


def width(score: tuple[float, float, float]) -> float:
    return score[2] - score[1]


def test_a_mean_is_the_mean_inside_its_interval():
    values = [1.0] * 30 + [0.0] * 70
    value, low, high = mean(values, None)
    assert value == pytest.approx(0.3)
    # the normal interval of 100 coin tosses of 0.3 is 0.3 +- 0.0898
    assert low == pytest.approx(0.21, abs=0.02) and high == pytest.approx(0.39, abs=0.02)
    assert mean([0.25, 0.75], None)[0] == 0.5
    assert mean([1.0] * 5, None) == (1.0, 1.0, 1.0)


def test_the_same_items_give_the_same_interval():
    values = list(np.random.default_rng(1).random(50))
    assert mean(values, None) == mean(values, None)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    mean(values, None)
    assert (np.random.get_state()[1] == state).all()  # and nobody else's numbers are disturbed


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        _, low, high = mean(list((rng.random(80) < 0.7).astype(float)), None)
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_clusters_widen_the_interval_of_items_that_agree():
    rng = np.random.default_rng(3)
    per_cluster = rng.random(40) < 0.5
    values = [float(right) for right in per_cluster for _ in range(9)]
    clusters = [f"fact-{i}" for i in range(40) for _ in range(9)]
    ratio = width(mean(values, clusters)) / width(mean(values, None))
    assert ratio == pytest.approx(3, rel=0.15)  # 40 items, not 360: wider by the root of 9
    assert mean(values, clusters)[0] == mean(values, None)[0]
    covered = 0  # and it is the clustered one that covers the truth
    for _ in range(100):
        values = [float(right) for right in rng.random(40) < 0.5 for _ in range(9)]
        _, low, high = mean(values, clusters)
        covered += low <= 0.5 <= high
    assert covered >= 87


def test_clusters_of_one_item_change_nothing():
    values = list(np.random.default_rng(4).random(30))
    assert mean(values, [f"{i:02}" for i in range(30)]) == mean(values, None)
    spread = mean(values, ["a", "b", "c"] * 10)
    assert spread[0] == pytest.approx(np.mean(values)) and width(spread) > 0


def test_word_error_rate_is_jiwer_after_whispers_normaliser():
    normalise = EnglishTextNormalizer()
    references, hypotheses = [list(texts) for texts in zip(*TRICKY, strict=True)]
    value, low, high = word_error_rate(references, hypotheses)
    expected = jiwer.wer([normalise(r) for r in references], [normalise(h) for h in hypotheses])
    assert value == pytest.approx(expected, abs=1e-12) and low <= value <= high
    for reference, hypothesis in TRICKY:
        if normalise(reference):
            alone, *_ = word_error_rate([reference], [hypothesis])
            assert alone == pytest.approx(jiwer.wer(normalise(reference), normalise(hypothesis)))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [
        ("Twenty-one, please!", "21 please", 0),
        ("What's his colour?", "what is his color", 0),
        ("the dog says woof", "the dog says", 1 / 4),
        ("the dog says woof", "a cat says woof meow", 3 / 4),
        ("the dog", "", 1),
        ("dog", "dog dog dog dog", 3),  # a loop: more errors than words
    ],
)
def test_word_error_rates_by_hand(reference, hypothesis, rate):
    assert word_error_rate([reference], [hypothesis]) == (rate, rate, rate)


def test_long_utterances_weigh_by_their_words():
    references = ["dog", "the cat and the cow and the pig"]
    assert word_error_rate(references, ["cow", references[1]])[0] == pytest.approx(1 / 9)


def test_clusters_widen_the_interval_of_a_speaker():
    rng = np.random.default_rng(5)
    references, hypotheses, speakers = [], [], []
    for speaker in range(20):
        bad = rng.random() < 0.4
        for _ in range(10):
            references.append("the dog says woof")
            hypotheses.append("the cat says" if bad else "the dog says woof")
            speakers.append(f"speaker {speaker}")
    alone = word_error_rate(references, hypotheses)
    together = word_error_rate(references, hypotheses, speakers)
    assert together[0] == alone[0] and width(together) > 2 * width(alone)


def test_a_reference_of_no_words_counts_what_was_put_in():
    assert word_error_rate(["um", "dog cat"], ["yes", "dog cat"])[0] == pytest.approx(1 / 2)


def items(values: list[float], key: str = "value") -> list[dict]:
    return [{"id": str(i), key: value} for i, value in enumerate(values)]


def test_errors_are_told_apart():
    found = errors(["a b c d", "a b", "", "a"], ["a x c", "a b b b", "y", "a"])
    assert found == [(1, 1, 0, 4), (0, 0, 2, 2), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert [each.total for each in found] == [2, 2, 1, 0]


def test_a_difference_is_what_the_second_has_more():
    first, second = items([0.0, 1.0, 0.0, 1.0] * 20), items([1.0, 1.0, 0.0, 1.0] * 20)
    difference, low, high = paired(first, second)
    assert difference == 0.25 and 0 < low < 0.25 < high < 0.4
    assert paired(second, first)[0] == -0.25
    assert paired(first, first) == (0, 0, 0)
    assert paired(first, second[::-1]) == paired(first, second)  # joined by id, not by place
    as_answers = paired(items([v == 1 for v in [0, 1] * 40], "correct"), items([1] * 80, "correct"))
    assert as_answers[0] == 0.5


def test_pairing_sees_what_two_intervals_hide():
    rng = np.random.default_rng(7)
    hard = rng.normal(3, 1.5, 200)  # items differ more than checkpoints do
    first, second = list(hard), list(hard + rng.normal(0.2, 0.3, 200))
    assert mean(first, None)[2] > mean(second, None)[1]  # the intervals overlap
    _, low, high = paired(items(first), items(second))
    assert 0 < low < high < 0.3


def test_paired_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(8), 0
    for _ in range(60):
        same = rng.random(60)
        first, second = same < 0.5, (same + rng.normal(0, 0.2, 60)) < 0.5
        _, low, high = paired(items(list(first)), items(list(second)))
        covered += low <= 0 <= high
    assert covered >= 50


def test_paired_word_errors_weigh_by_words_and_clusters_widen():
    first = [{"id": str(i), "errors": i % 3, "words": 4} for i in range(60)]
    second = [{"id": str(i), "errors": 0, "words": 4} for i in range(60)]
    speakers = [str(i % 3) for i in range(60)]
    difference, low, high = paired(first, second)
    assert difference == pytest.approx(-0.25) and low < -0.25 < high < 0
    named = [{**item, "cluster": s} for item, s in zip(first, speakers, strict=True)]
    wide = paired(named, second)
    assert width(wide) > 2 * (high - low) and wide[0] == difference


def test_items_without_a_number_on_either_side_are_left_out():
    first, second = items([1.0, None, 2.0, 0.0]), items([2.0, 5.0, None, 2.0])
    assert paired(first, second)[0] == 1.5


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(0, 1) == 1 and mcnemar(0, 6) == 2 / 2**6 and mcnemar(6, 0) == 2 / 2**6
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(3000, 3400) == pytest.approx(binomtest(3000, 6400).pvalue)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([0.03]) == [0.03] and holm([]) == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mean([], None), "mean of no values"),
        (lambda: mean([1.0, 0.0], ["a"]), "1 clusters for 2 items"),
        (lambda: word_error_rate([], []), "no utterances"),
        (lambda: word_error_rate(["a", " "], ["a", "b"]), "reference 1 of 2 is blank"),
        (lambda: word_error_rate(["um", "uh"], ["a", "b"]), "leaves nothing"),
        (lambda: word_error_rate(["a"], ["a", "b"]), "1 references and 2 hypotheses"),
        (lambda: word_error_rate(["a"], ["a"], ["x", "y"]), "2 clusters for 1 items"),
        (lambda: paired(items([1.0]), items([1.0, 0.0])), "1 items against 2"),
        (lambda: paired(items([1.0]), [{"id": "x", "value": 1.0}]), "of other ids"),
        (lambda: paired(items([None]), items([1.0])), "no item has a number in both"),
        (lambda: paired([{"id": "0"}], [{"id": "0"}]), "item '0' has none of correct"),
    ],
)
def test_what_has_no_score_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_400_items_take_well_under_a_second():
    values = list(np.random.default_rng(6).random(400))
    clusters = [str(i // 3) for i in range(400)]
    word_error_rate(["dog"], ["dog"])  # the normaliser reads its tables once
    started = time.process_time()
    mean(values, None)
    mean(values, clusters)
    word_error_rate(["the dog says woof"] * 400, ["the dog says"] * 400, clusters)
    assert time.process_time() - started < 1.5
