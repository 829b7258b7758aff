"""Spoken conversations: is the last question answered, and is a reply a refusal.

In: a checkpoint and a dataset of conversations with speech in any turn (stages.
synthesize_instructions), whose last turn is what should be said. Earlier turns are given as they
are. Out: for each split the share of right answers, and of refusals: in a split of noise that is
what is wanted, in one of clean questions it is the price.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speechfuse import artifact, workers
from speechfuse.evals import generation
from speechfuse.evals.generation import Generator
from speechfuse.evals.spoken import Rows, equal_text, groups, subset
from speechfuse.evals.tasks import Scored, json_digest
from speechfuse.rows import shards
from speechfuse.scores.intervals import Score, mean
from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import check_quantizer


@dataclass
class SpokenConversations:
    """`splits`: name -> the `extra` values of its rows. `refusals`: replies that count as one,
    compared without case. `cluster`: the key of `extra` by which intervals are clustered, the row
    itself where it is not there. `history`: false drops all turns before the last question, a
    control for what needs them.
    """

    path: str
    splits: dict[str, dict[str, Any]]
    refusals: list[str] = field(default_factory=list)
    cluster: str = "fact"
    history: bool = True
    max_new_tokens: int = 32
    batch_size: int = 64
    limit: int | None = None
    protocol = "clean"

    @cached_property
    def rows(self) -> Rows:
        """Those of any split, with `extra` read; ValueError for a split without rows, and for rows
        that do not end in an answer."""
        rows = {}
        for row in shards.read_rows(Path(self.path)):
            row["extra"] = json.loads(row["extra"])
            if [turn["role"] for turn in row["turns"]][-2:] != ["user", "assistant"]:
                raise ValueError(f"{self.path}: row {row['id']} does not end in an answer")
            rows[row["id"]] = row
        found = groups(rows, self.splits)
        if empty := [name for name in self.splits if name not in found]:
            raise ValueError(f"splits: no row of {self.path} is in {', '.join(empty)}")
        return subset(rows, [*found.values()], self.limit)

    def inputs(self) -> dict[str, Any]:
        settings = asdict(self)
        return {
            "task": "spoken_conversations",
            "data": artifact.fingerprint_of(Path(self.path)),
            "decoding": generation.VERSION,
            "items": json_digest(list(self.rows)),
            **{key: settings[key] for key in ("history", "max_new_tokens", "batch_size")},
        }

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        check_quantizer(checkpoint, shards.read_stream(Path(self.path))["quantizer"], self.path)
        self.ids()  # reads the rows

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """{"id", "reply", "tokens", "capped"}."""
        identity = shards.read_stream(Path(self.path))["quantizer"]
        asked = {
            id: row["turns"][:-1] if self.history else row["turns"][-2:-1]
            for id, row in self.rows.items()
        }
        listener = Generator(checkpoint, identity, self.path, workers.device())
        yield from listener.replies(asked, todo, self.max_new_tokens, self.batch_size)

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        said = {each["id"]: each["reply"] for each in predictions}
        found = groups(self.rows, self.splits)
        items = {id: self._item(row, said[id], found) for id, row in self.rows.items()}
        scores = []
        for measure, metric in (("correct", "acc"), ("refused", "refusal_rate")):
            for name, ids in found.items():
                values = [float(items[id][measure]) for id in ids]
                clusters = [items[id]["cluster"] for id in ids]
                if measure == "correct" or self.refusals:
                    scores.append(Score("", name, metric, *mean(values, clusters), len(ids)))
        ends = (each["capped"] for each in predictions)
        answers = [item["answer"] for item in items.values()]
        return Scored(scores, list(items.values()), generation.of_replies(answers, ends))

    def _item(self, row: dict[str, Any], reply: str, found: dict[str, list[str]]) -> dict[str, Any]:
        *before, asked, last = row["turns"]
        expected = prompts.read_spoken_answer(_said(last))[1]
        answer = prompts.read_spoken_answer(reply)[1]
        return {
            "id": row["id"],
            "question": " / ".join(_said(turn) for turn in [*before, asked]),
            "heard": reply,
            "answer": answer,
            "expected": expected,
            "cluster": row["extra"].get(self.cluster, row["id"]),
            "split": next(name for name, ids in found.items() if row["id"] in ids),
            "correct": equal_text(answer, expected),
            "refused": any(equal_text(answer, refusal) for refusal in self.refusals),
        }


def _said(turn: dict[str, Any]) -> str:
    """A turn as text; sound without words is (sound)."""
    parts = []
    for segment in turn["segments"]:
        speech = segment.get("speech")
        parts.append(segment["text"] if speech is None else speech["text"] or "(sound)")
    return " ".join(part.strip() for part in parts)
