"""Result files as stages.evaluate writes them, with made-up scores."""

import json
from pathlib import Path

import pytest

from speechfuse.evals.tasks import Scored
from speechfuse.report.differences import numbers
from speechfuse.report.results import ResultFile, key


def score(
    task: str,
    split: str,
    value: float,
    metric: str = "acc",
    n: int = 100,
    width: float | None = 0.05,
) -> dict:
    """A score with an interval of `width` to each side; None: without one."""
    low, high = (None, None) if width is None else (max(0.0, value - width), value + width)
    return {
        "task": task,
        "split": split,
        "metric": metric,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": n,
        "paired": False,
    }


def result(checkpoint: str, task: str, scores: list[dict], items=(), **more) -> dict:
    head = scores[0]
    details = {"coverage": 1.0, "minutes": 0.5, "versions": {"torch": "2.13.0"}}
    return {
        "checkpoint": checkpoint,
        "task": task,
        "protocol": "clean",
        "metric": head["metric"],
        "value": head["value"],
        "interval": [head["ci_low"], head["ci_high"]],
        "n": head["n"],
        "fingerprint": "ab" * 32,
        "scores": scores,
        "items": list(items),
        "fingerprints": {"checkpoint": "c0" * 32, "predictions": "d0" * 32, "data": "da" * 32},
        **more,
        "details": {**details, **more.get("details", {})},
    }


def write(evals: Path, checkpoint: str, task: str, scores: list[dict], items=(), **more) -> Path:
    path = evals / checkpoint / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(checkpoint, task, scores, items, **more)))
    return path


def write_failure(evals: Path, checkpoint: str, task: str, error: str) -> None:
    path = evals / checkpoint / f"{task}.failed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"checkpoint": checkpoint, "task": task, "error": error}))


def scored(task: str, split: str, numbers: list[float | bool], **more) -> tuple[dict, list[dict]]:
    """A score and the items behind it: of bools "correct", of floats "value"."""
    kind = "correct" if isinstance(numbers[0], bool) else "value"
    items = [{"id": f"{split}-{i}", "split": split, kind: x} for i, x in enumerate(numbers)]
    whole = score(task, split, sum(numbers) / len(numbers), n=len(numbers), **more)
    return whole | {"paired": True}, items


def worded(task: str, split: str, errors: list[int], words: int = 10) -> tuple[dict, list[dict]]:
    """A word error rate and the utterances behind it."""
    items = [
        {"id": f"{split}-{i}", "split": split, "errors": e, "words": words}
        for i, e in enumerate(errors)
    ]
    rate = sum(errors) / (words * len(errors))
    return score(task, split, rate, metric="wer", n=len(errors)) | {"paired": True}, items


def paired(result: Scored) -> set[tuple[str, str]]:
    """(split, metric) of the paired scores; each must be what its items' numbers give."""
    scores = {key(score): score for score in result.scores}
    file = ResultFile("", "", "clean", scores, result.items, {}, {})
    for of, score in scores.items():
        items = [i for i in numbers(file, of) if i.get("value", 0) is not None]
        above = sum(
            i["errors"] if "errors" in i else i.get("correct", i.get("value")) for i in items
        )
        if score.paired:
            assert len(items) == score.n
            assert score.value == pytest.approx(above / sum(i.get("words", 1) for i in items))
        else:
            assert not items
    return {(score.split, score.metric) for score in result.scores if score.paired}
