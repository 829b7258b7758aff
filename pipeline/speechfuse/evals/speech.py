"""Any speech task as a record: a dataset of codes, a prompt, a reference, a metric.

In: a checkpoint and a dataset that stages.tokenize_speech wrote, made once for all checkpoints.
Out: scores by split and the items behind them. AudioBench's tasks are such records, in
recipes/early_fusion_8b/evaluate.yaml.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speechfuse import artifact, config, workers
from speechfuse.evals import generation
from speechfuse.evals.contamination import check_training, contamination, seen_in
from speechfuse.evals.generation import Generator
from speechfuse.evals.tasks import Scored, json_digest, take_evenly
from speechfuse.rows import shards
from speechfuse.scores import audiobench_wer
from speechfuse.scores.intervals import Score, mean
from speechfuse.scores.judge import BlogJudge, Judge
from speechfuse.scores.metrics import METRICS
from speechfuse.tokens.vocabulary import check_quantizer

SPEECH = "{speech}"
OWN = ("id", "text", "speaker", "language", "seconds")  # columns of a row; all else is in `extra`
INPUTS, PROTOCOLS = ("speech", "transcript", "shuffled"), ("clean", "blog")


@dataclass
class Speech:
    """A speech task.

    `data`: folder of the dataset. `metric`: wer, cer, bleu, bleu_zh, rouge, accuracy, or judge with
    a `judge` beside it. `prompt`: the user's turn; {speech} stands for the audio and {column} for a
    column of the row or a key of its `extra`. `reference` and `question` (what the judge reads) are
    such columns; `cluster` is one whose values belong together in the interval. `splits`: name ->
    `extra` values of its rows; without them all rows are the split "all".
    `input`: transcript shows the text instead of the audio (an upper bound), that of `transcripts`
    ({id, text} a line, of any recognizer) if given (a cascade); shuffled gives each item the audio
    of another (a floor). `contamination`: training datasets to be searched for the items.
    """

    data: str
    metric: str
    prompt: str = SPEECH
    reference: str = "text"
    question: str = "text"
    input: str = "speech"
    transcripts: str | None = None
    splits: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all": {}})
    cluster: str | None = None
    judge: dict[str, Any] | None = None
    contamination: list[str] = field(default_factory=list)
    max_new_tokens: int = 256
    batch_size: int = 32
    protocol: str = "clean"
    limit: int | None = None

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of any split by id; `extra` is read."""
        every = {}
        for row in shards.read_rows(Path(self.data)):
            row["extra"] = json.loads(row["extra"] or "{}")
            if any(wanted.items() <= row["extra"].items() for wanted in self.splits.values()):
                every[row["id"]] = row
        if not every:
            raise ValueError(f"data={self.data} has no row of the splits {', '.join(self.splits)}")
        return {id: every[id] for id in take_evenly(list(every), self.limit)}

    @cached_property
    def heard(self) -> dict[str, str]:
        """Transcripts by id, of a recognizer or the dataset's own."""
        if self.transcripts is None:
            return {id: row["text"] for id, row in self.rows.items()}
        lines = Path(self.transcripts).read_text("utf-8").split("\n")
        try:
            found = [json.loads(line) for line in lines if line.strip()]
            return {str(line["id"]): str(line["text"]) for line in found}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"transcripts={self.transcripts}: not JSON lines of id and text ({error})"
            ) from error

    @cached_property
    def rater(self) -> Judge | None:
        return config.instantiate(self.judge) if self.judge is not None else None

    @cached_property
    def hits(self) -> list[dict[str, Any]]:
        """Items found in the training data; the same for every checkpoint."""
        return seen_in(self.contamination, self.rows)

    def column(self, row: dict[str, Any], name: str) -> str:
        """ValueError when the row has no such column, or nothing in it."""
        value = row[name] if name in OWN else row["extra"].get(name)
        if value is None:
            known = ", ".join([*OWN, *row["extra"]])
            raise ValueError(f"{self.data}: row {row['id']} has no {name!r}; there are {known}")
        return str(value)

    def inputs(self) -> dict[str, Any]:
        settings = asdict(self)
        named = ("prompt", "input", "max_new_tokens", "batch_size", "protocol")
        return {
            "task": "speech",
            "data": artifact.fingerprint_of(Path(self.data)),
            "decoding": generation.VERSION,
            "items": json_digest(list(self.rows)),
            "transcripts": json_digest(self.heard) if self.transcripts else None,
            **{key: settings[key] for key in named},
        }

    def scoring(self) -> dict[str, Any]:
        training = check_training(self.contamination)
        return {
            **({"judge": self.rater.identity()} if self.rater else {}),
            **({"training": training} if training else {}),
        }

    def check(self, checkpoint: Path) -> None:
        choices = {"metric": (*METRICS, "judge"), "input": INPUTS, "protocol": PROTOCOLS}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value}: choose one of {', '.join(allowed)}")
        if (self.metric == "judge") != (self.rater is not None):
            raise ValueError("metric judge and a judge belong together: give both, or none")
        if self.rater:
            self.rater.check()
            if isinstance(self.rater, BlogJudge) != (self.protocol == "blog"):
                raise ValueError(
                    f"protocol={self.protocol} needs another judge: BlogJudge is for blog alone"
                )
        if self.prompt.count(SPEECH) != 1:
            raise ValueError(f"prompt={self.prompt!r} must hold {SPEECH} once")
        if self.transcripts and self.input != "transcript":
            raise ValueError(f"transcripts are given, but input={self.input}; set input=transcript")
        if self.input != "transcript":
            stream = shards.read_stream(Path(self.data))
            check_quantizer(checkpoint, stream.get("quantizer", ""), self.data)
        elif lost := [id for id in self.rows if not self.heard.get(id)]:
            raise ValueError(
                f"{self.transcripts or self.data} has no transcript of {len(lost)} of "
                f"{len(self.rows)} items, {lost[0]!r} the first of them"
            )
        check_training(self.contamination)
        for row in self.rows.values():
            self.turns(row, row["codes"])
            self.column(row, self.reference)
            if self.cluster:
                self.column(row, self.cluster)
            if self.rater:
                self.column(row, self.question)
            if self.input != "transcript" and row["codes"] is None:
                raise ValueError(f"{self.data}: row {row['id']} has no codes: tokenize its audio")
        references = [self.column(row, self.reference) for row in self.rows.values()]
        if self.metric in METRICS:
            METRICS[self.metric](references[:50], references[:50], None)  # says what does not fit

    def turns(self, row: dict[str, Any], codes: Any) -> list[dict[str, Any]]:
        """The user's turn about a row, with these codes as its audio."""

        def filled(text: str) -> str:
            return re.sub(r"\{(\w+)\}", lambda match: self.column(row, match[1]), text)

        before, _, after = self.prompt.partition(SPEECH)
        before, after = filled(before), filled(after)
        if self.input == "transcript":  # one text, which is tokenized as one
            segments = [{"text": f"{before}{self.heard.get(row['id'], '')}{after}"}]
        else:
            texts: list[dict[str, Any]] = [
                {"text": before},
                {"speech": {"codes": codes}},
                {"text": after},
            ]
            segments = [part for part in texts if part.get("text") != ""]
        return [{"role": "user", "segments": segments}]

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """{"id", "reply", "tokens", "capped"}."""
        identity = None
        if self.input != "transcript":
            identity = shards.read_stream(Path(self.data))["quantizer"]
        blog = self.protocol == "blog"
        listener = Generator(checkpoint, identity, self.data, workers.device(), blog)
        audio = self._others() if self.input == "shuffled" else {id: id for id in self.rows}
        asked = {
            id: self.turns(row, self.rows[audio[id]]["codes"]) for id, row in self.rows.items()
        }
        yield from listener.replies(asked, todo, self.max_new_tokens, self.batch_size)

    def _others(self) -> dict[str, str]:
        """Whose audio each item gets: half the list away, or the next with another reference."""
        ids, given = list(self.rows), {}
        said = [self.column(row, self.reference) for row in self.rows.values()]
        for place, id in enumerate(ids):
            steps = [len(ids) // 2 + i for i in range(len(ids))]
            places = [(place + step) % len(ids) for step in steps]
            given[id] = ids[next((p for p in places if said[p] != said[place]), place)]
        return given

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        replies = {said["id"]: said["reply"] for said in predictions}
        items = {id: self._item(row, replies[id]) for id, row in self.rows.items()}
        ends = (said["capped"] for said in predictions)
        details = generation.of_replies(list(replies.values()), ends)
        if self.rater:
            asked = [
                {
                    "id": id,
                    "question": self.column(row, self.question),
                    "answer": replies[id],
                    "reference": self.column(row, self.reference),
                }
                for id, row in self.rows.items()
            ]
            for id, rating in self.rater.verdicts(asked).items():
                items[id]["value"] = rating
            details |= {"coverage": self.rater.usage.coverage, "judging": asdict(self.rater.usage)}
        scores: list[Score] = []
        for split, wanted in self.splits.items():
            rows = [row for row in self.rows.values() if wanted.items() <= row["extra"].items()]
            if rows:
                scores += self._scores(split, [items[row["id"]] for row in rows], details)
        if self.contamination:
            without = self._without_hits(items, scores[0])
            details["contamination"] = contamination(self.hits, without)
        return Scored(scores, list(items.values()), details)

    def _item(self, row: dict[str, Any], reply: str) -> dict[str, Any]:
        match = (name for name, of in self.splits.items() if of.items() <= row["extra"].items())
        cluster = {"cluster": self.column(row, self.cluster)} if self.cluster else {}
        return {
            "id": row["id"],
            "question": row["text"],
            "answer": reply,
            "split": next(match),
            "expected": self.column(row, self.reference),
            "speaker": row["speaker"],
            **cluster,
            "audio": (row["source"] or {}).get("uri") or "",
        }

    def _scores(self, split: str, items: list[dict[str, Any]], details: dict[str, Any]) -> list:
        """Of one split; each item is given its own numbers."""
        if self.rater:
            items = [item for item in items if item["value"] is not None]
            if not items:
                raise ValueError(f"the judge rated none of {split}: {self.rater.usage}")
        clusters = [item["cluster"] for item in items] if self.cluster else None
        if self.rater:
            rated = mean([item["value"] for item in items], clusters)
            return [Score("", split, "judge", *rated, len(items))]
        expected, said = ([item[side] for item in items] for side in ("expected", "answer"))
        found = METRICS[self.metric](expected, said, clusters)
        for item, numbers in zip(items, found.items, strict=True):
            item |= numbers
        about = dict(found.details)
        if self.metric == "wer":
            seconds = [float(self.rows[item["id"]]["seconds"]) for item in items]
            about["by_duration"] = audiobench_wer.score(expected, said, seconds).by_duration
        details.setdefault("by_split", {})[split] = about
        return [Score("", split, *row, len(items)) for row in found.scores]

    def _without_hits(self, items: dict[str, dict[str, Any]], head: Score) -> float | None:
        """The headline of the items that the training data does not hold."""
        hit, wanted = {found["id"] for found in self.hits}, self.splits[head.split]
        rest = [
            dict(item)
            for id, item in items.items()
            if id not in hit and wanted.items() <= self.rows[id]["extra"].items()
        ]
        return self._scores(head.split, rest, {})[0].value if rest else None
