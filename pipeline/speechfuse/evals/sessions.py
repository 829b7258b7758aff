"""A task of sessions of two channels: when a model speaks, what it writes, and what is heard of it.

In: a checkpoint, and sessions with the user's frames. Out: scores of turn-taking, by the marks of
begin and end that a model writes, which its sound follows by a frame; of the answers as text and of
those as sound, which a recognizer from elsewhere hears. Each session's clip is written, the user
left and the model right. In place of a model the built replies may speak, through a codec or in a
voice: what the recognizer makes of those is the ceiling.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from speechfuse import artifact, workers
from speechfuse.audio import decoding, espeak_ng
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.codecs.codec import codec_of
from speechfuse.components import Batch
from speechfuse.evals.duplex import Talker, write_stereo
from speechfuse.evals.items import Rows, Splits, filled, ids_by_split, others, read_items, subset
from speechfuse.evals.recognizer import Recognizer
from speechfuse.evals.tasks import Scored, json_digest
from speechfuse.fusion.views import frames_of
from speechfuse.rows import shards
from speechfuse.scores import turn_taking
from speechfuse.scores.intervals import Score
from speechfuse.scores.metrics import METRICS
from speechfuse.tokens.prompts import read_spoken_answer
from speechfuse.tokens.vocabulary import check_quantizer

Items = list[dict[str, Any]]
ROOM = 12  # frames at the end of a session, in which nobody speaks; they go on behind it
LAG = round(0.16 * SAMPLE_RATE)  # by so much the sound of a turn may end behind its text
TEXT, SOUND = ("expected", "answer"), ("sound", "last")  # of an item: what is wanted, what is there
Spoken = tuple[list[dict[str, Any]], np.ndarray]  # turns {text, start, end}, waveform at 16 kHz


@dataclass
class Sessions:
    """`data`: folder of the sessions with frames; `sound`: that of stages.build_duplex, where the
    user's sound is. The model speaks on for `tail` seconds. What is said is heard as the words of
    the rows in the folder `words`, see Recognizer for `spoken`. `clips`: folder of the clips.
    `splits`: {name: `select`}. With `codec` or `voice` (flite:rms) the built replies speak."""

    data: str
    sound: str
    words: str
    clips: str
    splits: Splits
    spoken: dict[str, str] = field(default_factory=dict)
    codec: dict[str, Any] | None = None
    voice: str | None = None
    tail: float = 3.0
    batch_size: Batch = 32
    limit: int | None = None
    protocol: str = "clean"

    @property
    def built(self) -> bool:
        return bool(self.codec or self.voice)

    @cached_property
    def rows(self) -> Rows:
        rows = read_items(Path(self.data), [*self.splits.values()], None, read_spoken_answer)
        return subset(rows, filled(rows, self.splits, [], self.data), self.limit)

    @cached_property
    def stream(self) -> dict[str, Any]:
        return shards.read_stream(Path(self.data))

    @cached_property
    def recognizer(self) -> Recognizer:
        texts = (row["text"] for row in shards.read_rows(Path(self.words), ["text"]))
        return Recognizer({word for text in texts for word in text.split()}, self.spoken)

    def inputs(self) -> dict[str, Any]:
        folders = {name: getattr(self, name) for name in ("data", "sound", "words")}
        hashes = {name: artifact.fingerprint_of(Path(path)) for name, path in folders.items()}
        own = {name: getattr(self, name) for name in ("spoken", "codec", "voice", "tail", "clips")}
        return {"task": "sessions", "items": json_digest([*self.rows]), **hashes, **own}

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        if not self.built:
            check_quantizer(checkpoint, self.stream["encoder"], self.data)
        if row := next((row for row in self.rows.values() if "turns" not in row["extra"]), None):
            raise ValueError(f"{self.data}: row {row['id']} is no session: encode .sessions")
        _ = self.recognizer  # says what it lacks

    def ids(self) -> list[str]:
        return [*self.rows]

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of {"id", "said", "audio"}: turns {text, heard, start, end}, the clip."""
        order = sorted(self.rows.values(), key=lambda row: row["seconds"])
        batches = (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))
        clips = Path(self.clips) / "-".join(checkpoint.parts[-2:])
        for batch in batches:
            if not (rows := [row for row in batch if row["id"] in todo]):
                continue
            entries = []
            for row, (turns, own) in zip(rows, self.speaks(rows, checkpoint), strict=True):
                for turn in turns:
                    first, last = (round(turn[at] * SAMPLE_RATE) for at in ("start", "end"))
                    turn["heard"] = self.recognizer.hear(own[first : last + LAG])
                path, source = clips / f"{row['id']}.flac", row["source"]
                at = source["offset"], row["seconds"]
                user = decoding.decode(Path(self.sound) / source["uri"], *at).waveform
                behind = max(0, len(own) - len(user))
                write_stereo(path, np.pad(user, (0, behind)), own, SAMPLE_RATE)
                audio = str(path.relative_to(Path(self.clips).parent))
                entries.append({"id": row["id"], "said": turns, "audio": audio})
            yield entries

    def speaks(self, rows: list[dict[str, Any]], checkpoint: Path) -> Iterator[Spoken]:
        """Yield what is said in each session."""
        if self.built:
            with espeak_ng.EspeakLibrary() as engine:
                yield from (self.replies(row, engine) for row in rows)
            return
        talker = Talker(checkpoint, self.stream["encoder"], workers.device())
        stack, rate = talker.adapter.stack, talker.codec.frame_rate
        frames = [frames_of(row, self.stream["width"]) for row in rows]
        length = round((max(row["seconds"] for row in rows) + self.tail) * rate) * stack
        rooms = (np.resize(each[-ROOM:], (length, each.shape[1])) for each in frames)
        heard = [np.concatenate(pair)[:length] for pair in zip(frames, rooms, strict=True)]
        parts = torch.from_numpy(np.stack(heard)).float().split(stack, 1)
        for row, text, codes in zip(rows, *talker.talk(parts), strict=True):
            until = round((row["seconds"] + self.tail) * rate)
            own = soxr.resample(talker.sound(codes[:until]), talker.codec.sample_rate, SAMPLE_RATE)
            yield talker.turns(text[:until]), own

    def replies(self, row: dict[str, Any], engine: espeak_ng.EspeakLibrary) -> Spoken:
        """Return the built replies of a session, in the voice or through the codec."""
        turns, own = [], np.zeros(round(row["seconds"] * SAMPLE_RATE), np.float32)
        for turn in (turn for turn in row["extra"]["turns"] if turn["role"] == "assistant"):
            if self.voice:
                voice, text = espeak_ng.EspeakVoice(self.voice, 150), " ".join(turn["text"].split())
                sound = espeak_ng.speak(engine, text, voice).waveform
            else:
                codec = codec_of(self.codec or {})
                sound = codec.decode(np.array(turn["codes"]).reshape(-1, codec.codebooks))
                sound = soxr.resample(sound, codec.sample_rate, SAMPLE_RATE)
            first = round(turn["start"] * SAMPLE_RATE)
            own = np.pad(own, (0, max(0, first + len(sound) - len(own))))
            own[first : first + len(sound)] += sound
            end = turn["start"] + len(sound) / SAMPLE_RATE
            turns.append({"text": turn["text"], "start": turn["start"], "end": end})
        return turns, own

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        """Return the scores; items are the sessions' first answers, unless cut."""
        by_id = {entry["id"]: entry for entry in predictions}
        scores, every = list[Score](), list[dict[str, Any]]()
        for split, ids in ids_by_split(self.rows, self.splits).items():
            extras = {id: self.rows[id]["extra"] for id in ids}
            sessions = [extras[id] | {"wanted": extras[id]["turns"]} | by_id[id] for id in ids]
            scores += [] if self.built else turn_taking.scores(sessions, split)
            items = [item for session in sessions if (item := self.item(session, split))]
            own = [item for item in items if item["text"]]
            scores.append(_score("spoken_answer", split, "acc", items, *SOUND))
            for metric in ("wer_written", "bleu"):
                scores.append(_score("spoken_answer", split, metric, items, "wanted", "plain"))
                if own and not self.built:
                    scores.append(_score("spoken_as_written", split, metric, own, "own", "plain"))
            if not self.built:
                scores.append(_score("text_answer", split, "acc", items, *TEXT))
            every += items
        if not self.built and len({item["expected"] for item in every}) > 1:
            places = others([item["expected"] for item in every])
            shuffled = [
                item | {name: every[place][name] for name in ("answer", "last")}
                for item, place in zip(every, places, strict=True)
            ]
            for task, *sides in ("text_answer", *TEXT), ("spoken_answer", *SOUND):
                scores.append(_score(task, "shuffled_audio", "acc", shuffled, *sides))
        return Scored(scores, every)

    def item(self, session: dict[str, Any], split: str) -> dict[str, Any] | None:
        """Return a session's first answer as an item; None where it was cut or is not wanted."""
        user, wanted, said = turn_taking.replies(session)[0]
        if not wanted or wanted.get("cut"):
            return None
        said, plain = said or {"text": "", "heard": ""}, self.recognizer.plain
        expected = read_spoken_answer(wanted["text"])[1]
        heard = plain(said["heard"])
        return {
            **{name: session[name] for name in ("id", "audio")},
            **{name: said[name] for name in ("text", "heard")},
            "split": split,
            "cluster": str(session.get("fact")),
            "question": user["text"],
            "expected": expected,
            "answer": read_spoken_answer(said["text"])[1],
            # with one spelling for what sounds alike
            "wanted": plain(wanted["text"]),
            "own": plain(said["text"]),
            "plain": heard,
            "sound": (sound := plain(expected)),
            "last": (last := " ".join(heard.split()[-len(expected.split()) :])),
            "correct": sound == last,
        }


def _score(task: str, split: str, metric: str, items: Items, reference: str, text: str) -> Score:
    references, texts, facts = ([i[name] for i in items] for name in (reference, text, "cluster"))
    _, *row = METRICS[metric](references, texts, facts).scores[0]
    value, low, high = row
    return Score(task, split, metric.partition("_")[0], value, low, high, len(items))
