"""A speech task, described by settings alone: a dataset of codes, a prompt, a reference, a metric.

In: a checkpoint and a dataset that stages.tokenize_speech or stages.synthesize_instructions wrote,
made once for all checkpoints. Out: scores by split and the items behind them. AudioBench's tasks
are such settings, in recipes/early_fusion_8b/evaluate.yaml; the demo's are in recipes/demo.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from speechfuse import artifact, config, workers
from speechfuse.components import Batch, Count
from speechfuse.evals import controls, generation
from speechfuse.evals.contamination import contamination, training_hits
from speechfuse.evals.items import (
    SPEECH,
    Rows,
    Splits,
    as_trained,
    behind_another,
    by_prompt,
    filled,
    ids_by_split,
    others,
    read_items,
    subset,
    text_of,
    transcripts_of,
)
from speechfuse.evals.tasks import Scored, json_digest
from speechfuse.fusion import folder
from speechfuse.rows import shards
from speechfuse.rows.selection import matches
from speechfuse.rows.several import recordings_of
from speechfuse.scores import audiobench_wer
from speechfuse.scores.intervals import Score, mean
from speechfuse.scores.judge import BlogJudge, Judge
from speechfuse.scores.metrics import METRICS, lower_case
from speechfuse.tokens.vocabulary import check_quantizer

INPUTS, PROTOCOLS = ("speech", "transcript", "shuffled"), ("clean", "blog")
# settings that predictions depend on; the added ones are part of the key only where they are set
OF_PREDICTIONS = "prompt input max_new_tokens batch_size protocol".split()
ADDED = "history transcribe turns earlier sampling".split()
Items = list[dict[str, Any]]


@dataclass
class Speech:
    """A speech task.

    `data` is the folder of the dataset. `metric` is one of scores.metrics.METRICS, or "judge",
    which needs the component `judge`. `prompt` is the user's turn, in which {speech} stands for the
    audio and {column} for a column of the row or a key of its `extra`. A conversation is asked as
    it is; without `history` its last question alone. `turns` asks in place of `prompt`: the
    component that makes turns in training, of several questions the longest. `earlier` likewise
    makes what stands before each item, the item before it with its right reply. `reference` and
    `question` (which the judge reads) are columns, and so is `cluster`: items with equal values in
    it are resampled together for the interval. `splits` is {name: `select` of its rows}; by default
    all rows are the split "all". An empty one is an error unless in `may_be_empty`. With `input`
    "transcript" the text is asked instead of the audio: the dataset's own (an upper bound) or that
    in the file `transcripts` (lines {id, text} by any recognizer; a cascade). With "shuffled" each
    item gets the audio of another one (a floor). `contamination` lists training datasets that are
    searched for the items. `name` names the task in the scores, instead of the recipe's name.

    `reply` is a component that splits a reply into (what was heard, the answer); without it the
    whole reply is the answer. What was heard, or the reply to the prompt `transcribe`, is scored by
    word error rate on the `transcript_splits`, as the task "question_transcript". An answer that
    equals one of `refusals` but for case is a refusal; their share is scored as `refusal_rate`.
    `controls_of` names a split that is also scored with each item's answer replaced by that to
    another item's audio ("shuffled_audio"), with every answer replaced by the commonest reference
    of the dataset `train` ("majority_answer"), and on those items alone that were heard without an
    error ("_heard_exactly" behind the split's name). Without `speech_on` a checkpoint is asked in
    text, its speech part off; without `state` its learned initial state is zero; without `sampling`
    (generation.Sampling) replies are greedy.
    """

    data: str
    metric: str
    prompt: str = SPEECH
    reference: str = "text"
    question: str = "text"
    input: str = "speech"
    transcripts: str | None = None
    splits: Splits = field(default_factory=lambda: {"all": {}})
    cluster: str | None = None
    judge: dict[str, Any] | None = None
    contamination: list[str] = field(default_factory=list)
    max_new_tokens: Count = 256
    batch_size: Batch = 32
    protocol: str = "clean"
    limit: int | None = None
    name: str = ""
    history: bool = True
    reply: dict[str, Any] | None = None
    transcribe: str | None = None
    transcript_splits: Splits = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    controls_of: str | None = None
    train: str | None = None
    may_be_empty: list[str] = field(default_factory=list)
    speech_on: bool = True
    state: bool = True
    turns: dict[str, Any] | None = None
    earlier: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None

    @cached_property
    def rows(self) -> Rows:
        """Rows of any split by id, with `extra` as a dict."""
        splits = [*self.splits.values(), *self.transcript_splits.values()]
        rows = read_items(Path(self.data), splits, self.cluster, self.read)
        if not rows:
            raise ValueError(f"data={self.data} has no row of the splits {', '.join(self.splits)}")
        of_both = (self.splits, self.transcript_splits)
        ids = [of for each in of_both for of in filled(rows, each, self.may_be_empty, self.data)]
        return subset(rows, ids, self.limit)

    @cached_property
    def transcript_texts(self) -> dict[str, str]:
        """Transcripts by id, of a recognizer or the dataset's own."""
        return transcripts_of(self.rows, self.data, self.transcripts)

    @cached_property
    def identity(self) -> str | None:
        """The quantizer or encoder of the speech; None where a checkpoint is asked in text."""
        return None if self.input == "transcript" else shards.maker_of(Path(self.data)) or None

    @cached_property
    def rater(self) -> Judge | None:
        return config.instantiate(self.judge) if self.judge is not None else None

    @cached_property
    def hits(self) -> list[dict[str, Any]]:
        """Items found in the training data; the same for every checkpoint."""
        return training_hits(self.contamination, list(self.rows.values()))

    def read(self, reply: str) -> tuple[str | None, str]:
        """Return (what was heard or None, the answer) of a reply."""
        return config.instantiate(self.reply, text=reply) if self.reply else (None, reply)

    def column(self, row: dict[str, Any], name: str) -> str:
        return text_of(row, name, self.data)

    def inputs(self) -> dict[str, Any]:
        return {
            "task": "speech",
            "data": artifact.fingerprint_of(Path(self.data)),
            "decoding": generation.VERSION,
            "items": json_digest(list(self.rows)),
            "transcripts": json_digest(self.transcript_texts) if self.transcripts else None,
            **{name: getattr(self, name) for name in OF_PREDICTIONS},
            **{name: value for name in ADDED if (value := getattr(self, name))},
            **({"reference": self.reference} if self.input == "shuffled" else {}),  # pairs items
            **{name: False for name in ("speech_on", "state") if not getattr(self, name)},
        }

    def scoring(self) -> dict[str, Any]:
        paths = [*filter(None, [self.train]), *self.contamination]
        training = [artifact.fingerprint_of(Path(path)) for path in paths]
        judge = {"judge": self.rater.identity()} if self.rater else {}
        return judge | ({"training": training} if training else {})

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
                raise ValueError(f"protocol={self.protocol} needs another judge than BlogJudge")
        for name in ("prompt", "transcribe"):
            if (prompt := getattr(self, name)) is not None and prompt.count(SPEECH) != 1:
                raise ValueError(f"{name}={prompt!r} must hold {SPEECH} once")
        if self.turns and (self.prompt, self.input == "transcript") != (SPEECH, False):
            raise ValueError("turns ask in place of prompt, and with speech: leave out the others")
        if self.earlier and (self.input != "speech" or "turns" in next(iter(self.rows.values()))):
            raise ValueError("earlier stands before speech alone: leave out input, or ask no turns")
        generation.sampling(self.sampling)  # says what does not fit
        if self.transcripts and self.input != "transcript":
            raise ValueError(f"transcripts are given, but input={self.input}; set input=transcript")
        if self.transcript_splits and not (self.reply or self.transcribe):
            raise ValueError("transcript_splits need `reply`, which reads it, or `transcribe`")
        if self.controls_of and (self.rater or self.controls_of not in self.splits):
            raise ValueError(
                f"controls_of={self.controls_of}: choose one of {[*self.splits]}, and no judge"
            )
        if self.identity and not self.speech_on:
            raise ValueError(f"{self.data} holds speech, and speech_on=false asks in text alone")
        if not self.state and not (self.speech_on and folder.state_of(checkpoint)):
            raise ValueError(f"state=false: {checkpoint} has no learned state to leave out here")
        if self.identity:
            check_quantizer(checkpoint, self.identity, self.data)
        if self.input == "transcript":
            _ = self.transcript_texts  # says which are missing
        self.scoring()
        for row in self.rows.values():
            self._check_row(row)
        references = [self.column(row, self.reference) for row in self.rows.values()]
        if self.input == "shuffled":
            others(references)  # says where there are none
        if self.metric in METRICS:
            METRICS[self.metric](references[:50], references[:50], None)  # says what does not fit

    def _check_row(self, row: dict[str, Any]) -> None:
        judged = self.question if self.rater else None
        for name in filter(None, [self.reference, judged, self.cluster]):
            self.column(row, name)
        if "turns" in row:
            settings = self.prompt, self.input, self.transcribe, self.contamination, self.turns
            if settings != (SPEECH, "speech", None, [], None):
                raise ValueError(
                    f"{self.data} holds conversations, which are asked as they are: leave out "
                    "prompt, input, transcribe, contamination and turns"
                )
            return
        self.asked(row, row)
        without = self.input != "transcript" and row["codes"] is None and not row.get("frames")
        if without and recordings_of(row):
            raise ValueError(f"{self.data}: row {row['id']} has no codes: tokenize its audio")

    def asked(
        self, row: dict[str, Any], audio: dict[str, Any], prompt: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the turns to ask of a row: those of a conversation, or `prompt` with the speech
        of the row `audio`."""
        if "turns" in row:
            return row["turns"][:-1] if self.history else row["turns"][-2:-1]
        if self.turns and not prompt:
            return as_trained(self.turns, row, audio)
        heard = self.transcript_texts.get(row["id"], "") if self.input == "transcript" else audio
        return by_prompt(prompt or self.prompt, partial(self.column, row), heard)

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of {"id", "reply", "tokens", "capped"}, "transcript" where asked for."""
        blog = self.protocol == "blog"
        generator_of: Any = generation.generator if self.speech_on else generation.Generator
        generator = generator_of(checkpoint, self.identity, self.data, workers.device(), blog)
        generator.sampling = generation.sampling(self.sampling)
        if not self.state:
            generator.zero_state()
        rows = list(self.rows.values())
        references = [self.column(row, self.reference) for row in rows]
        audio = others(references) if self.input == "shuffled" else range(len(rows))
        pairs = zip(rows, audio, strict=True)
        asked = {row["id"]: self.asked(row, rows[other]) for row, other in pairs}
        if self.earlier:
            asked = behind_another(asked, self.earlier, rows)
        for batch in generator.replies(asked, todo, self.max_new_tokens, self.batch_size):
            if self.transcribe:
                of_batch = [self.rows[entry["id"]] for entry in batch]
                turns = [self.asked(row, row, self.transcribe) for row in of_batch]
                transcripts = generator.reply(turns, self.max_new_tokens, self.batch_size)
                for entry, transcript in zip(batch, transcripts, strict=True):
                    entry["transcript"] = transcript
            yield batch

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        items = {entry["id"]: self._item(self.rows[entry["id"]], entry) for entry in predictions}
        ends = (entry["capped"] for entry in predictions)
        details = generation.of_replies([item["answer"] for item in items.values()], ends)
        if self.rater:
            to_rate = [
                {"id": id, "answer": item["answer"], "reference": item["expected"]}
                | {"question": self.column(self.rows[id], self.question)}
                for id, item in items.items()
            ]
            for id, rating in self.rater.verdicts(to_rate).items():
                items[id]["value"] = rating
            details |= {"coverage": self.rater.usage.coverage, "judging": asdict(self.rater.usage)}
        ids_of = ids_by_split(self.rows, self.splits)
        by_split = {split: [items[id] for id in ids] for split, ids in ids_of.items()}
        scores = [s for split, of in by_split.items() for s in self._scores(split, of, details)]
        if self.refusals:
            scores += [controls.refusals(*pair) for pair in by_split.items()]
        control = self.controls_of or ""
        if control in by_split:
            commonest = controls.commonest(self.train, self.reference) if self.train else None
            scores += controls.controls(self.metric, by_split[control], commonest)
        for split, ids in ids_by_split(self.rows, self.transcript_splits).items():
            scores.append(controls.transcripts(split, [items[id] for id in ids]))
        if control in by_split:
            scores += controls.heard_exactly(control, self.metric, by_split[control])
        if self.contamination:
            without = self._without_hits(items, scores[0])
            details["contamination"] = contamination(self.hits, without)
        named = [replace(score, task=score.task or self.name) for score in scores]
        return Scored(named, list(items.values()), details)

    def _item(self, row: dict[str, Any], prediction: dict[str, Any]) -> dict[str, Any]:
        reply = prediction["reply"]
        transcript, answer = ("", reply) if row.get("whole") else self.read(reply)
        if self.reply and self.input == "transcript":
            transcript = self.transcript_texts[row["id"]]
        transcript = prediction.get("transcript", transcript)
        splits = (name for name, select in self.splits.items() if matches(row, select))
        refused = {lower_case(refusal) for refusal in self.refusals}
        return {
            "id": row["id"],
            "question": row["text"],
            **({} if transcript is None else {"heard": transcript}),
            "answer": answer,
            "split": next(splits, None),
            "expected": self.column(row, self.reference),
            "speaker": row["speaker"],
            **({"cluster": self.column(row, self.cluster)} if self.cluster else {}),
            **({"refused": lower_case(answer) in refused} if refused else {}),
            "audio": (row["source"] or {}).get("uri") or "",
        }

    def _scores(self, split: str, items: Items, details: dict[str, Any]) -> list[Score]:
        """Return the scores of one split; each item is given its own numbers. Raises ValueError
        when the judge rated none."""
        own = all(item["split"] == split for item in items)  # not of another split first
        if self.rater:
            items = [item for item in items if item["value"] is not None]
            if not items:
                raise ValueError(f"the judge rated none of {split}: {self.rater.usage}")
            rating = mean([item["value"] for item in items], controls.clusters(items))
            return [Score("", split, "judge", *rating, len(items), own)]
        references, answers = ([item[side] for item in items] for side in ("expected", "answer"))
        result = METRICS[self.metric](references, answers, controls.clusters(items))
        for item, numbers in zip(items, result.items, strict=True):
            item |= numbers
        about = dict(result.details)
        if self.metric == "wer":
            seconds = [float(self.rows[item["id"]]["seconds"]) for item in items]
            per_item = [(item["errors"], item["words"]) for item in items]
            about["by_duration"] = audiobench_wer.by_duration(per_item, seconds)
        if about:
            details.setdefault("by_split", {})[split] = about
        scores = [Score("", split, *row, len(items)) for row in result.scores]
        return [replace(scores[0], paired=own and result.additive), *scores[1:]]

    def _without_hits(self, items: dict[str, dict[str, Any]], head: Score) -> float | None:
        """Return the headline of the items that the training data does not hold."""
        hit = {hit["id"] for hit in self.hits}
        ids = ids_by_split(self.rows, self.splits)[head.split]
        rest = [dict(items[id]) for id in ids if id not in hit]
        return self._scores(head.split, rest, {})[0].value if rest else None
