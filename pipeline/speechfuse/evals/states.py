"""A task of learned states over one adapter: whether each does its own task where no word asks.

In: folders that share language model and adapter, each with the state of a task. Out: the share of
replies that are right for the task of their state, of those that are right for another's, and of
those that are of another's. Every recording is asked with every state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speechfuse import artifact, config, workers
from speechfuse.components import Batch, Count
from speechfuse.evals import generation
from speechfuse.evals.items import Rows, column, filled, read_items, subset, turn_text
from speechfuse.evals.tasks import Scored, json_digest
from speechfuse.fusion import folder
from speechfuse.rows import shards
from speechfuse.scores.intervals import Score, mean
from speechfuse.scores.word_errors import errors
from speechfuse.tokens.vocabulary import check_quantizer, read_speech


@dataclass
class States:
    """`states`: {name of a task: {checkpoint: the folder with its state, turns: the component that
    makes its turns in training}}. They are asked of the rows of `data` that `select` selects;
    `cluster`: see Speech. Splits of the scores: "own", replies that are right for the task of their
    state, and "own_NAME", those of one task; "other_state", replies that are right for the task of
    another state; "crossed", replies that are of the task of another state. A reply is of the task
    whose right reply to the recording has the nearest number of lines and, of several, differs by
    the fewest words; where it is wrong and another's is as near as its own, of the other's."""

    data: str
    states: dict[str, dict[str, Any]]
    select: dict[str, Any] = field(default_factory=dict)
    cluster: str = "id"
    max_new_tokens: Count = 32
    batch_size: Batch = 32
    limit: int | None = None
    protocol: str = "clean"

    @cached_property
    def rows(self) -> Rows:
        rows = read_items(Path(self.data), [self.select], None, lambda reply: (None, reply))
        return subset(rows, filled(rows, {"select": self.select}, [], self.data), self.limit)

    def inputs(self) -> dict[str, Any]:
        files = {n: Path(of["checkpoint"]) / folder.STATE for n, of in self.states.items()}
        return {
            "task": "states",
            "data": artifact.fingerprint_of(Path(self.data)),
            "decoding": generation.VERSION,
            "items": json_digest(self.ids()),
            "states": {name: artifact.sha256_of(path) for name, path in files.items()},
            "turns": {name: of["turns"] for name, of in self.states.items()},
            **{name: getattr(self, name) for name in ("max_new_tokens", "batch_size")},
        }

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        if len(self.states) < 2:
            raise ValueError(f"states: name two tasks or more, not {', '.join(self.states)}")
        check_quantizer(checkpoint, shards.maker_of(Path(self.data)), self.data)
        for name, of in self.states.items():
            path = Path(of["checkpoint"])
            if not folder.state_of(path):
                raise ValueError(f"states.{name}: {path} is not there, or has no learned state")
            if _shared(path) != _shared(checkpoint):
                raise ValueError(
                    f"states.{name}: {path} has another language model or adapter than "
                    f"{checkpoint}: what is compared are states over one adapter"
                )
        for row in self.rows.values():
            self.turns(row)

    def turns(self, row: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Return by task the turns of a row, the right reply the last. Raises ValueError for a row
        that has none."""
        return {n: config.instantiate(of["turns"], row=row) for n, of in self.states.items()}

    def ids(self) -> list[str]:
        return [f"{name} {id}" for name in self.states for id in self.rows]

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of {"id", "reply", "tokens", "capped"}."""
        identity = shards.maker_of(Path(self.data))
        generator = generation.generator(checkpoint, identity, self.data, workers.device())
        for name, of in self.states.items():
            folder.set_state(generator.model, Path(of["checkpoint"]))
            asked = {f"{name} {id}": self.turns(row)[name][:-1] for id, row in self.rows.items()}
            yield from generator.replies(asked, todo, self.max_new_tokens, self.batch_size)

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        said = {entry["id"]: entry["reply"] for entry in predictions}
        items, others = list[dict[str, Any]](), list[dict[str, Any]]()
        for id, row in self.rows.items():
            about = {"question": row["text"], "speaker": row["speaker"], "split": "own"}
            about["cluster"] = str(column(row, self.cluster))
            right = {name: turn_text(turns[-1]) for name, turns in self.turns(row).items()}
            for name, expected in right.items():
                reply = said[f"{name} {id}"]
                far = {task: _distance(text, reply) for task, text in right.items()}
                own, nearest = far.pop(name), min(far.values())
                item = {"id": f"{name} {id}", "state": name, "expected": expected, "answer": reply}
                item |= {"correct": not any(own), "crossed": any(own) and nearest <= own}
                items.append(item | about)
                others += [about | {"correct": not any(each)} for each in far.values()]
        of = {n: [each for each in items if each["state"] == n] for n in self.states}
        scores = [
            _share("own", items),
            *(_share(f"own_{name}", each) for name, each in of.items()),
            _share("other_state", others),
            _share("crossed", items, "crossed"),
        ]
        ends = (entry["capped"] for entry in predictions)
        return Scored(scores, items, generation.of_replies([*said.values()], ends))


def _share(split: str, items: list[dict[str, Any]], of: str = "correct") -> Score:
    shares = mean([float(item[of]) for item in items], [item["cluster"] for item in items])
    return Score("", split, "acc", *shares, len(items))


def _distance(right: str, reply: str) -> tuple[int, int]:
    """Return by how many lines and by how many words a reply differs from the right one, case
    aside."""
    one, other = ([each for each in text.lower().split("\n") if each] for text in (right, reply))
    (wrong,) = errors([" / ".join(one)], [" / ".join(other)])
    return abs(len(one) - len(other)), wrong.total


def _shared(checkpoint: Path) -> dict[str, str]:
    """Return the hashes of what a folder has in common with others of its training: all but its
    state."""
    hashes = (read_speech(checkpoint).get("sha256") or {}).items()
    return {name: sha for name, sha in hashes if name != folder.STATE}
