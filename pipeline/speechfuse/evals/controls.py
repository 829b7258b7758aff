"""What is scored of a speech task beside its splits: controls, what was heard, refusals.

In: items of speechfuse.evals.speech with their answers. Out: scores. No model is asked again.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from speechfuse.evals.items import column, others
from speechfuse.rows import shards
from speechfuse.scores.intervals import Score, mean
from speechfuse.scores.metrics import METRICS, lower_case
from speechfuse.scores.word_errors import word_error_rate

Items = list[dict[str, Any]]


def clusters(items: Items) -> list[str] | None:
    """Return the cluster of each item; None where the task has none."""
    return [item["cluster"] for item in items] if "cluster" in items[0] else None


def score(split: str, metric: str, items: Items, answers: list[str]) -> Score:
    """Return the headline of `metric`, had the items got these answers."""
    row = METRICS[metric]([item["expected"] for item in items], answers, clusters(items)).scores[0]
    return Score("", split, *row, len(items))


def controls(metric: str, items: Items, commonest: str | None) -> list[Score]:
    """Return scores of a split's `items` with the answers to others' audio ("shuffled_audio"), and
    with the `commonest` reference of the training ("majority_answer"). Empty where all share a
    cluster."""
    owners = clusters(items) or [item["id"] for item in items]
    if len({*owners}) < 2:
        return []
    answers = [items[other]["answer"] for other in others(owners)]
    scores = [score("shuffled_audio", metric, items, answers)]
    if commonest is not None:
        scores.append(score("majority_answer", metric, items, [commonest] * len(items)))
    return scores


def commonest(train: str, reference: str) -> str:
    """Return the value that most rows of the dataset `train` have in the column `reference`. Raises
    ValueError when no row has one."""
    values: Counter[str] = Counter()
    for row in shards.read_rows(Path(train)):
        row["extra"] = json.loads(row["extra"] or "{}")
        if (value := column(row, reference)) is not None:
            values[str(value)] += 1
    if not values:
        raise ValueError(f"train={train}: no row has {reference!r}, so no answer is the commonest")
    return values.most_common(1)[0][0]


def heard_exactly(split: str, metric: str, items: Items) -> list[Score]:
    """Return the score of those of a split's items whose transcript has no error."""
    exact = [i for i in items if lower_case(i.get("heard", "")) == lower_case(i["question"])]
    answers = [item["answer"] for item in exact]
    return [score(f"{split}_heard_exactly", metric, exact, answers)] if exact else []


def transcripts(split: str, items: Items) -> Score:
    """Return the word error rate of the transcripts that the model wrote."""
    texts, transcripts = ([item[side] for item in items] for side in ("question", "heard"))
    rate = word_error_rate(texts, transcripts, clusters(items))
    return Score("question_transcript", split, "wer", *rate, len(items))


def refusals(split: str, items: Items) -> Score:
    """Return the share of items whose answer is a refusal."""
    rate = mean([float(item["refused"]) for item in items], clusters(items))
    return Score("", split, "refusal_rate", *rate, len(items))
