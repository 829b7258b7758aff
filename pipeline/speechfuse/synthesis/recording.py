"""The studio: planned samples are spoken here, each by itself.

In: a recipe's kinds, voices and augmentation, and samples of synthesis.plan with their texts.
Out: turns whose segments are text or pieces of speech. What is heard of a sample depends on the
sample and the recipe alone, never on what was made before, so any can be made again: by a resumed
job, and by `just listen`.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import BoundedSemaphore
from typing import Any, Self

import numpy as np

from speechfuse import config
from speechfuse.audio import augmentation, decoding
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows.rejects import Reject
from speechfuse.synthesis.engines import Engine, Spoken, sentences
from speechfuse.synthesis.plan import Entry
from speechfuse.texts.conversations import Conversation


def engines_of(voices: dict[str, dict[str, Any]]) -> dict[str, Engine]:
    """The engines of a recipe, {name: {_component_, share, ...}}; ValueError for a name that no
    voice could be found by."""
    if bad := [name for name in voices if "/" in name]:
        raise ValueError(f"voices.{bad[0]}: a name without a slash is needed")
    rest = {n: {k: v for k, v in s.items() if k != "share"} for n, s in voices.items()}
    return {name: config.instantiate(spec) for name, spec in rest.items()}


def speakers_of(voices: dict[str, dict[str, Any]], engines: dict[str, Engine]) -> dict[str, float]:
    """engine/voice: its share of all samples that speak. An engine's share is divided evenly among
    its voices; ValueError unless the shares sum to 1."""
    shares = {name: spec.get("share", 1 / len(voices)) for name, spec in voices.items()}
    numbers = all(isinstance(share, int | float) and share > 0 for share in shares.values())
    if not numbers or (shares and abs(sum(shares.values()) - 1) > 1e-6):
        raise ValueError(f"voices: the shares are {shares}: give each one above 0, together 1")
    found = {name: engine.voices() for name, engine in engines.items()}
    if silent := [name for name, names in found.items() if not names]:
        raise ValueError(f"voices.{silent[0]} has no voice: name at least one")
    return {
        f"{name}/{voice}": shares[name] / len(names)
        for name, names in found.items()
        for voice in names
    }


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


@dataclass(frozen=True)
class SpokenSample:
    """A sample whose segments are {"text"} or {"pieces"}, in order."""

    sample: dict[str, Any]
    conversation: Conversation
    turns: list[dict[str, Any]]

    @property
    def pieces(self) -> list[Piece]:
        segments = [segment for turn in self.turns for segment in turn["segments"]]
        return [piece for segment in segments for piece in segment.get("pieces", [])]


class Studio:
    """Kinds, engines by the name in front of a voice, and augmentation of a recipe, to be used in a
    `with` block. `quantizer`: its window is the most that a piece may last."""

    def __init__(
        self,
        kinds: dict[str, Entry],
        engines: dict[str, Engine],
        steps: list[dict[str, Any]],
        seed: int,
        quantizer: Quantizer,
    ) -> None:
        self.kinds, self.engines, self.steps, self.seed = kinds, engines, steps, seed
        self.window, self.token_rate = quantizer.window, quantizer.token_rate
        self._free = {n: BoundedSemaphore(engine.parallel) for n, engine in engines.items()}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.close()

    def record(self, sample: dict[str, Any], conversation: Conversation) -> SpokenSample | Reject:
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
        return SpokenSample(sample, conversation, made)

    def again(self, speech: dict[str, Any]) -> Piece:
        """A row's piece of speech, spoken once more from what the row says of it. Of shuffled codes
        this is the speech before. ValueError for a voice of another recipe."""
        about = json.loads(speech["extra"])
        if "sound" in about:
            return self._sound(about, about["seed"])
        name, _, speaker = speech["speaker"].partition("/")
        if name not in self.engines:
            raise ValueError(f"there is no engine {name!r} to speak as {speech['speaker']!r}")
        text = about.get("shuffled") or speech["text"]
        with self._free[name]:
            spoken = self.engines[name].speak(text, speaker, about["seed"])
        return self._heard(spoken, about["seed"])

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
            for part in sentences(text, limit):
                with self._free[name]:
                    spoken = engine.speak(part, speaker, seed)  # one person in one room says all
                pieces.append(self._heard(spoken, seed))
                pieces[-1].said, pieces[-1].voice = part, f"{name}/{speaker}"
                pieces[-1].language = engine.language
            longest = max(pieces, key=lambda piece: piece.seconds)
            if longest.seconds <= self.window:
                return pieces
            # again in shorter pieces; `sentences` refuses what one sentence makes too long
            size = len((longest.said or "").encode())
            limit = min(size - 1, int(0.9 * size * self.window / longest.seconds))

    def _sound(self, segment: dict[str, Any], seed: int) -> Piece:
        count = round(min(segment["seconds"], self.window) * decoding.SAMPLE_RATE)
        spec = {"_component_": segment["sound"]}
        sound = config.instantiate(spec, samples=count, rng=np.random.default_rng(seed))
        waveform = sound * 10 ** ((segment["level"] or 0) / 20)
        about = {key: segment[key] for key in ("sound", "level", "seconds")}
        return self._heard(Spoken(waveform.astype(np.float32), about=about), seed)

    def _heard(self, spoken: Spoken, seed: int) -> Piece:
        """What reaches the microphone."""
        waveform, about = spoken.waveform, dict(spoken.about)
        if waveform is not None:
            waveform, done = augmentation.apply(waveform, self.steps, seed)
            about |= {"augmentation": done} if done else {}
        codes = spoken.codes
        seconds = (
            len(waveform) / decoding.SAMPLE_RATE
            if waveform is not None
            else len(codes if codes is not None else ()) / self.token_rate
        )
        if seconds < 1 / self.token_rate:
            raise ValueError(f"too short: {seconds:.4f} s is less than one token")
        return Piece(None, None, None, seed, waveform, codes, about, seconds)
