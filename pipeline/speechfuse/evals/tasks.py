"""What a task is to stages/evaluate.py: items, predictions of a checkpoint, scores of predictions.

A task is a dataclass that a recipe names by its dotted path. `predict` needs the model and is done
once for each (checkpoint content, `inputs()`); `score` needs only what `predict` wrote.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from speechfuse import artifact
from speechfuse.artifact import json_digest as json_digest
from speechfuse.scores.intervals import Score


@dataclass
class Scored:
    """Scores, an entry for each item, and details.

    `scores`: the first is the headline; task "" stands for the name the recipe gives. `items`:
    {"id", "split", "cluster"} and the number of a paired test: "correct", "value", or "errors" and
    "words". Scores that these numbers give are marked `paired`.
    """

    scores: list[Score]
    items: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """See the module. `protocol`: "clean" or "blog", which never stand in one table; `limit`: so
    many items at equal distances instead of all."""

    protocol: str
    limit: int | None

    def inputs(self) -> dict[str, Any]:
        """Return JSON of all that predictions depend on besides the checkpoint; "data" is the
        data's fingerprint."""
        ...

    def scoring(self) -> dict[str, Any]:
        """Return JSON of what scores depend on besides predictions and settings: "judge",
        "training"."""
        ...

    def check(self, checkpoint: Path) -> None:
        """Raise ValueError, before any work is spent, where `predict` or `score` could not
        succeed."""
        ...

    def ids(self) -> list[str]:
        """Return the ids of the items, in order."""
        ...

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of predictions {"id", ...}. Which items share a batch does not depend on
        `todo` where that holds whole batches."""
        ...

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        """Return the scores of the predictions of all items, in the order of `ids`."""
        ...


def take_evenly(values: list[Any], limit: int | None) -> list[Any]:
    """Return `limit` of the values at equal distances; all when None. Raises ValueError for less
    than 1."""
    if limit is None:
        return values
    if limit < 1:
        raise ValueError(f"limit={limit}: at least 1 item is needed; leave it out for all")
    return artifact.take_evenly(values, limit)
