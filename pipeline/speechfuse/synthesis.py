"""One shard of a spoken dataset: planned samples in, conversations with speech out.

In: samples of speechfuse.samples with their texts, engines to speak them, a quantizer. Out: rows of
shards.CONVERSATIONS, rejects and counts. What is heard of a sample depends on the sample and the
recipe alone, so any can be made again by itself (`Studio.record`); batches have a fixed shape and
order, so the rows are a pure function of the plan, whatever the number of threads. A sample is
whole or rejected; text that is too long is spoken in several pieces, cut between sentences.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import BoundedSemaphore
from typing import Any

import numpy as np

from speechfuse import audio, augmentation, config, tokenizing
from speechfuse.corpora import Reject
from speechfuse.engines import Engine, Spoken, Unavailable, sentences
from speechfuse.quantizer import Quantizer
from speechfuse.roundtrip import Made, RoundTrip
from speechfuse.samples import Entry
from speechfuse.texts import Conversation


@dataclass
class Piece:
    """Speech of a row while it is made; `said` is what a listener should hear, None for a sound
    without words. `about` is kept in the segment's extra."""

    said: str | None
    voice: str | None
    language: str | None
    seed: int
    waveform: np.ndarray | None
    codes: np.ndarray | None
    about: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    part: int | None = None


@dataclass
class Recorded:
    """A sample whose segments are {"text"} or {"pieces"}, in order."""

    sample: dict[str, Any]
    conversation: Conversation
    turns: list[dict[str, Any]]

    @property
    def pieces(self) -> list[Piece]:
        segments = [segment for turn in self.turns for segment in turn["segments"]]
        return [piece for segment in segments for piece in segment.get("pieces", [])]


class Studio:
    """Kinds, engines by the name in front of a voice, and augmentation of a recipe. `window`: the
    most seconds of a piece."""

    def __init__(
        self,
        kinds: dict[str, Entry],
        engines: dict[str, Engine],
        steps: list[dict[str, Any]],
        seed: int,
        window: float,
        token_rate: float,
    ) -> None:
        self.kinds, self.engines, self.steps = kinds, engines, steps
        self.seed, self.window, self.token_rate = seed, window, token_rate
        self._free = {n: BoundedSemaphore(engine.parallel) for n, engine in engines.items()}

    def record(self, sample: dict[str, Any], conversation: Conversation) -> Recorded | Reject:
        """Speak a sample; safe in several threads. Unavailable when an engine cannot go on."""
        turns = self.kinds[sample["kind"]].turns(conversation, f"{self.seed}/{sample['id']}") or []
        planned = iter(sample["speech"])
        made = []
        try:
            for turn in turns:
                segments = [
                    segment
                    if "text" in segment
                    else {"pieces": self._make(segment, **next(planned))}
                    for segment in turn["segments"]
                ]
                made.append({"role": turn["role"], "segments": segments})
        except Unavailable:
            raise
        except ValueError as error:
            return Reject(sample["id"], str(error))
        return Recorded(sample, conversation, made)

    def _make(self, segment: dict[str, Any], voice: str | None, seed: int) -> list[Piece]:
        if voice is None:
            return [self._sound(segment, seed)]
        name, _, speaker = voice.partition("/")
        pieces = self._say(self.engines[name], segment["say"], name, speaker, seed)
        for number, piece in enumerate(pieces):
            piece.part = number if len(pieces) > 1 else None
            if segment.get("shuffle"):
                piece.said, piece.about = None, {**piece.about, "shuffled": piece.said}
        return pieces

    def _say(self, engine: Engine, text: str, name: str, speaker: str, seed: int) -> list[Piece]:
        limit = engine.max_characters
        while True:
            pieces = []
            for number, part in enumerate(sentences(text, limit)):
                with self._free[name]:
                    spoken = engine.speak(part, speaker, seed + number)
                pieces.append(self._heard(spoken, seed + number))
                pieces[-1].said, pieces[-1].voice = part, f"{name}/{speaker}"
                pieces[-1].language = engine.language
            longest = max(pieces, key=lambda piece: piece.seconds)
            if longest.seconds <= self.window:
                return pieces
            # again in shorter pieces; `sentences` refuses what one sentence makes too long
            size = len((longest.said or "").encode())
            limit = min(size - 1, int(0.9 * size * self.window / longest.seconds))

    def _sound(self, segment: dict[str, Any], seed: int) -> Piece:
        count = int(min(segment["seconds"], self.window) * audio.SAMPLE_RATE)
        spec = {"_component_": segment["sound"]}
        sound = config.instantiate(spec, samples=count, rng=np.random.default_rng(seed))
        waveform = sound * 10 ** ((segment["level"] or 0) / 20)
        about = {key: segment[key] for key in ("sound", "level")}
        return self._heard(Spoken(waveform.astype(np.float32), about=about), seed)

    def _heard(self, spoken: Spoken, seed: int) -> Piece:
        """What reaches the microphone."""
        waveform, about = spoken.waveform, dict(spoken.about)
        if waveform is not None:
            waveform, done = augmentation.apply(waveform, self.steps, seed)
            about |= {"augmentation": done} if done else {}
        codes = spoken.codes
        seconds = (
            len(waveform) / audio.SAMPLE_RATE
            if waveform is not None
            else len(codes if codes is not None else ()) / self.token_rate
        )
        if seconds < 1 / self.token_rate:
            raise ValueError(f"too short: {seconds:.4f} s is less than one token")
        return Piece(None, None, None, seed, waveform, codes, about, seconds)


def synthesize(
    planned: Iterable[tuple[dict[str, Any], Conversation]],
    studio: Studio,
    quantizer: Quantizer,
    batch_size: int,
    round_trip: RoundTrip | None,
    depth: int,
) -> tokenizing.Shard:
    """Rows, rejects and counts of one shard's samples."""
    shard = tokenizing.Shard([], [], Counter())
    counts: Counter[str] = Counter()
    recorded: list[Recorded] = []
    faults: dict[int, str] = {}  # by place in `recorded`
    pending: list[tuple[int, Piece]] = []

    def finish() -> None:
        waves = [p.waveform for _, p in pending if p.waveform is not None]
        codes = iter(quantizer.encode(waves, batch_size))
        for _, piece in pending:
            piece.codes = next(codes) if piece.waveform is not None else piece.codes
        if round_trip:
            for place, reason in _judge([x for x in pending if x[1].said], round_trip, counts):
                faults.setdefault(place, reason)
        for _, piece in pending:
            piece.waveform = None
        pending.clear()

    threads = sum(engine.parallel for engine in studio.engines.values()) or 1
    for item in tokenizing.ahead(lambda pair: studio.record(*pair), planned, threads, depth):
        if isinstance(item, Reject):
            shard.rejects.append({"id": item.id, "reason": item.reason})
            continue
        for piece in item.pieces:
            pending.append((len(recorded), piece))
            if len(pending) == batch_size:
                finish()
        recorded.append(item)
    finish()
    for place, item in enumerate(recorded):
        if place in faults:
            shard.rejects.append({"id": item.sample["id"], "reason": faults[place]})
        else:
            shard.rows.append(_row(item))
            counts["split"] += sum(piece.part == 0 for piece in item.pieces)
            counts["pieces"] += sum(piece.part is not None for piece in item.pieces)
    return shard._replace(counts=counts)


def _judge(
    pending: list[tuple[int, Piece]], round_trip: RoundTrip, counts: Counter[str]
) -> Iterable[tuple[int, str]]:
    """(place, reason) of what is not understood; counts by voice what was heard."""
    made = [Made(p.said or "", np.asarray(p.codes), p.waveform) for _, p in pending]
    for (place, piece), verdict in zip(pending, round_trip.judge(made), strict=True):
        piece.about |= {"heard": verdict.heard, "wer": verdict.wer}
        counts[f"heard/{piece.voice}"] += 1
        counts[f"words/{piece.voice}"] += verdict.words
        counts[f"wrong/{piece.voice}"] += round(verdict.wer * verdict.words)
        if verdict.reason:
            counts[f"refused/{piece.voice}"] += 1
            yield place, verdict.reason


def _row(item: Recorded) -> dict[str, Any]:
    sample, conversation = item.sample, item.conversation
    turns, number = [], 0
    for turn in item.turns:
        segments = []
        for segment in turn["segments"]:
            if "text" in segment:
                segments.append(segment)
                continue
            id = f"{sample['id']}/{number}"
            offset = 0.0
            for piece in segment["pieces"]:
                segments.append({"speech": _speech(piece, id, offset)})
                offset += piece.seconds
            number += 1
        turns.append({"role": turn["role"], "segments": segments})
    extra = {
        **conversation.extra,
        "source": conversation.source,
        "text": conversation.id,
        "kind": sample["kind"],
    }
    return {"id": sample["id"], "turns": turns, "extra": json.dumps(extra, sort_keys=True)}


def _speech(piece: Piece, id: str, offset: float) -> dict[str, Any]:
    codes, whole = np.asarray(piece.codes), piece.part is None
    if "shuffled" in piece.about:
        codes = np.random.default_rng(piece.seed).permutation(codes)
    return {
        "id": id if whole else f"{id}#{piece.part}",
        "codes": codes.astype(np.uint16),
        "seconds": piece.seconds,
        "text": piece.said,
        "speaker": piece.voice,
        "language": piece.language,
        "source": {
            "uri": f"synthetic:{piece.voice or piece.about['sound']}", "offset": offset,
            "seconds": piece.seconds, "sha256": None,
        },
        "parent": None if whole else id,
        "part": piece.part,
        "extra": json.dumps({"seed": piece.seed, **piece.about}, sort_keys=True),
    }  # fmt: skip
