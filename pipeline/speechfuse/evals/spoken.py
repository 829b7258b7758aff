"""Tasks by ear with exact answers: spoken questions, and transcription of word lists.

In: a checkpoint and a dataset of speech rows whose `extra` names split, voices and (for questions)
fact and answer. Out: scores and the items behind them. For speech of any other kind, and metrics as
published, see speechfuse.evals.speech.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speechfuse import artifact, workers
from speechfuse.evals import generation
from speechfuse.evals.contamination import check_training, contamination, seen_in
from speechfuse.evals.generation import Generator
from speechfuse.evals.tasks import Scored, json_digest, take_evenly
from speechfuse.rows import shards
from speechfuse.samples import instructions
from speechfuse.scores.intervals import Score, mean
from speechfuse.scores.word_errors import errors, whisper_english, word_error_rate
from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import check_quantizer

Rows = dict[str, dict[str, Any]]


def read_kind(path: str, kind: str) -> Rows:
    """Speech rows by id whose `extra` says `kind`; `extra` is read."""
    rows = {}
    for row in shards.read_rows(Path(path)):
        row["extra"] = json.loads(row["extra"])
        if row["extra"].get("kind") == kind:
            rows[row["id"]] = row
    if not rows:
        raise ValueError(f"{path} holds no rows of kind {kind!r}")
    return rows


def groups(rows: Rows, splits: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Split name -> ids of the rows whose `extra` matches; a split without rows is left out."""
    found = {
        name: [id for id, row in rows.items() if wanted.items() <= row["extra"].items()]
        for name, wanted in splits.items()
    }
    return {name: ids for name, ids in found.items() if ids}


def subset(rows: Rows, found: list[list[str]], limit: int | None) -> Rows:
    """`limit` of the rows in `found`, at equal distances split by split: voices take turns in a
    corpus, and equal distances in it could meet one alone."""
    used = dict.fromkeys(id for ids in found for id in ids)
    kept = {*take_evenly(list(used), limit)}
    return {id: row for id, row in rows.items() if id in kept}


def equal_text(reply: str, answer: str) -> bool:
    return " ".join(reply.lower().split()) == " ".join(answer.lower().split())


@dataclass
class SpokenQA:
    """Spoken questions: exact answers, what was heard, and two controls.

    `splits`: name -> the `extra` values of its rows. `shuffled_audio` scores the split
    `controls_of` with each question's audio replaced by that of another fact; `majority_answer`
    answers it with the commonest answer of the questions in `train`. Intervals are clustered by
    fact. `repeat_first`: replies hold the transcript, which is then scored; otherwise it is asked
    for separately. `input` transcript asks in text instead (an upper bound, for a base model).
    `contamination`: training datasets to be searched for the items.
    """

    path: str
    train: str
    splits: dict[str, dict[str, Any]]
    transcript_splits: dict[str, dict[str, Any]]
    controls_of: str
    repeat_first: bool
    transcribe_request: str
    input: str = "speech"
    contamination: list[str] = field(default_factory=list)
    max_new_tokens: int = 32
    batch_size: int = 64
    limit: int | None = None
    protocol = "clean"

    @cached_property
    def rows(self) -> Rows:
        """Those of any split."""
        rows = read_kind(self.path, "question")
        both = (groups(rows, self.splits), groups(rows, self.transcript_splits))
        used = subset(rows, [ids for found in both for ids in found.values()], self.limit)
        if not used:
            raise ValueError(f"splits: no row of {self.path} is in any of {', '.join(self.splits)}")
        return used

    @cached_property
    def hits(self) -> list[dict[str, Any]]:
        """Items found in the training data; the same for every checkpoint."""
        return seen_in(self.contamination, self.rows)

    def inputs(self) -> dict[str, Any]:
        settings = asdict(self)
        return {
            "task": "spoken_qa",
            "data": artifact.fingerprint_of(Path(self.path)),
            "decoding": generation.VERSION,
            "items": json_digest(list(self.rows)),
            **{
                key: settings[key]
                for key in (
                    "repeat_first",
                    "transcribe_request",
                    "input",
                    "max_new_tokens",
                    "batch_size",
                )
            },
        }

    def scoring(self) -> dict[str, Any]:
        return {"training": check_training([self.train, *self.contamination])}

    def check(self, checkpoint: Path) -> None:
        if self.input not in ("speech", "transcript"):
            raise ValueError(f"input={self.input}: choose speech or transcript")
        if self.input == "speech":
            check_quantizer(checkpoint, shards.read_stream(Path(self.path))["quantizer"], self.path)
        check_training([self.train, *self.contamination])
        if self.controls_of not in self.splits:
            raise ValueError(f"controls_of={self.controls_of}: choose one of {[*self.splits]}")
        for row in self.rows.values():
            instructions.answer(row, self.repeat_first)

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """{"id", "answer", "heard", "tokens", "capped"}."""
        heard = {id: row["text"] for id, row in self.rows.items()}
        if in_text := self.input == "transcript":
            identity = None
            asked = {id: [{"role": "user", "segments": [{"text": heard[id]}]}] for id in heard}
        else:
            identity = shards.read_stream(Path(self.path))["quantizer"]
            asked = {id: instructions.answer(row)[:1] for id, row in self.rows.items()}
        listener = Generator(checkpoint, identity, self.path, workers.device())
        size = self.batch_size
        for batch in listener.replies(asked, todo, self.max_new_tokens, size):
            if self.repeat_first:
                heard = {s["id"]: prompts.read_spoken_answer(s["reply"])[0] for s in batch}
            elif not in_text:
                request = [self.transcribe_request]
                again = [instructions.transcribe(self.rows[s["id"]], request)[:1] for s in batch]
                replies = listener.reply(again, self.max_new_tokens, size)
                heard = {s["id"]: reply for s, reply in zip(batch, replies, strict=True)}
            yield [
                {
                    "id": said["id"],
                    "answer": prompts.read_spoken_answer(said["reply"])[1],
                    "heard": heard[said["id"]],
                    "tokens": said["tokens"],
                    "capped": said["capped"],
                }
                for said in batch
            ]

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        said, rows = {each["id"]: each for each in predictions}, self.rows
        found = groups(rows, self.splits)

        def accuracy(name: str, given: list[str], ids: list[str]) -> Score:
            facts = [rows[id]["extra"]["fact"] for id in ids]
            pairs = zip(given, ids, strict=True)
            right = [float(equal_text(answer, rows[id]["extra"]["answer"])) for answer, id in pairs]
            return Score("spoken_qa", name, "acc", *mean(right, facts), len(right))

        scores = [
            accuracy(name, [said[id]["answer"] for id in ids], ids) for name, ids in found.items()
        ]
        controls = found.get(self.controls_of, [])
        if len({rows[id]["extra"]["fact"] for id in controls}) > 1:
            others = [said[id]["answer"] for id in shuffled(rows, controls)]
            scores.append(accuracy("shuffled_audio", others, controls))
            every = read_kind(self.train, "question").values()
            common = Counter(row["extra"]["answer"] for row in every).most_common(1)
            scores.append(accuracy("majority_answer", [common[0][0]] * len(controls), controls))
        for name, ids in groups(rows, self.transcript_splits).items():
            truth, made = [rows[id]["text"] for id in ids], [said[id]["heard"] for id in ids]
            error = word_error_rate(truth, made, [rows[id]["extra"]["fact"] for id in ids])
            scores.append(Score("question_transcript", name, "wer", *error, len(ids)))
        exact = [id for id in controls if equal_text(said[id]["heard"], rows[id]["text"])]
        if exact:
            name = f"{self.controls_of}_heard_exactly"
            scores.append(accuracy(name, [said[id]["answer"] for id in exact], exact))
        ends = (each["capped"] for each in predictions)
        details = generation.of_replies([each["answer"] for each in predictions], ends)
        if self.contamination:
            name, hit = scores[0].split, {each["id"] for each in self.hits}
            rest = [id for id in found[name] if id not in hit]
            clean = accuracy(name, [said[id]["answer"] for id in rest], rest) if rest else None
            details["contamination"] = contamination(self.hits, clean.value if clean else None)
        items = [self._item(row, said[id], found) for id, row in rows.items()]
        return Scored(scores, items, details)

    @staticmethod
    def _item(row: dict, said: dict, found: dict[str, list[str]]) -> dict[str, Any]:
        return {
            "id": row["id"],
            "question": row["text"],
            "heard": said["heard"],
            "answer": said["answer"],
            "expected": row["extra"]["answer"],
            "speaker": row["speaker"],
            "cluster": row["extra"]["fact"],
            "split": next((name for name, ids in found.items() if row["id"] in ids), None),
            "correct": equal_text(said["answer"], row["extra"]["answer"]),
        }


def shuffled(rows: Rows, ids: list[str]) -> list[str]:
    """Whose audio each item gets: that of the next item about another fact, half the list away."""
    given = []
    for position, id in enumerate(ids):
        step = len(ids) // 2
        while rows[ids[(position + step) % len(ids)]]["extra"]["fact"] == rows[id]["extra"]["fact"]:
            step += 1
        given.append(ids[(position + step) % len(ids)])
    return given


@dataclass
class Transcription:
    """Transcription of word lists, asked for in words (one of `requests`): corpus WER after
    Whisper's English normaliser."""

    path: str
    splits: dict[str, dict[str, Any]]
    requests: list[str]
    max_new_tokens: int = 32
    batch_size: int = 64
    limit: int | None = None
    protocol = "clean"

    @cached_property
    def rows(self) -> Rows:
        rows = read_kind(self.path, "phrase")
        used = subset(rows, [*groups(rows, self.splits).values()], self.limit)
        if not used:
            raise ValueError(f"splits: no row of {self.path} is in any of {', '.join(self.splits)}")
        return used

    def inputs(self) -> dict[str, Any]:
        return {
            "task": "transcription",
            "data": artifact.fingerprint_of(Path(self.path)),
            "decoding": generation.VERSION,
            "items": json_digest(list(self.rows)),
            "requests": self.requests,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        check_quantizer(checkpoint, shards.read_stream(Path(self.path))["quantizer"], self.path)
        for row in self.rows.values():
            instructions.transcribe(row, self.requests)

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """{"id", "heard", "tokens", "capped"}."""
        stream = shards.read_stream(Path(self.path))
        listener = Generator(checkpoint, stream["quantizer"], self.path, workers.device())
        asked = {id: instructions.transcribe(r, self.requests)[:1] for id, r in self.rows.items()}
        for batch in listener.replies(asked, todo, self.max_new_tokens, self.batch_size):
            yield [{"heard": said.pop("reply"), **said} for said in batch]

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        heard, rows = {said["id"]: said["heard"] for said in predictions}, self.rows
        found = groups(rows, self.splits)
        scores = []
        for name, ids in found.items():
            error = word_error_rate([rows[id]["text"] for id in ids], [heard[id] for id in ids])
            scores.append(Score("transcription", name, "wer", *error, len(ids)))
        normalise = whisper_english()
        each = errors(
            [normalise(row["text"]) for row in rows.values()], [normalise(heard[id]) for id in rows]
        )
        items = [
            {
                "id": id,
                "text": row["text"],
                "heard": heard[id],
                "errors": counted.total,
                "words": counted.words,
                "split": next((name for name, ids in found.items() if id in ids), None),
            }
            for (id, row), counted in zip(rows.items(), each, strict=True)
        ]
        ends = (said["capped"] for said in predictions)
        return Scored(scores, items, generation.of_replies(list(heard.values()), ends))
