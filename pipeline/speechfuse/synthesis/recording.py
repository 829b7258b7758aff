"""Planned samples to speech: engines speak them, augmentation changes the waveforms.

In: a recipe's kinds, voices and augmentation, and samples of synthesis.plan with their texts. Out:
turns whose segments are text or pieces of speech. A sample depends on its plan and the recipe
alone, never on what was recorded before, so that a resumed job makes the same.
"""

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
from speechfuse.synthesis.plan import Entry, check_shares
from speechfuse.texts.conversations import Conversation


def engines_of(voices: dict[str, dict[str, Any]]) -> dict[str, Engine]:
    """The engines of a recipe, {name: {_component_, share, ...}}. Raises ValueError for a name with
    a slash, which separates engine and voice in a row's speaker."""
    if bad := [name for name in voices if "/" in name]:
        raise ValueError(f"voices.{bad[0]}: a name without a slash is needed")
    specs = {n: {k: v for k, v in s.items() if k != "share"} for n, s in voices.items()}
    return {name: config.instantiate(spec) for name, spec in specs.items()}


def speakers_of(voices: dict[str, dict[str, Any]], engines: dict[str, Engine]) -> dict[str, float]:
    """{engine/voice: its share of all samples with speech}. An engine's share is divided evenly
    among its voices. Raises ValueError unless the shares sum to 1."""
    shares = {name: spec.get("share", 1 / len(voices)) for name, spec in voices.items()}
    if shares:
        check_shares("voices", shares)
    voices_of = {name: engine.voices() for name, engine in engines.items()}
    if mute := [name for name, names in voices_of.items() if not names]:
        raise ValueError(f"voices.{mute[0]} has no voice: name at least one")
    pairs = [(name, voice) for name, names in voices_of.items() for voice in names]
    return {f"{name}/{voice}": shares[name] / len(voices_of[name]) for name, voice in pairs}


@dataclass
class Piece:
    """A piece of speech, or a sound, while its row is made: a waveform (float32, 16 kHz, mono) or
    codes, and its duration. `text` is what it says, None for a sound without words; `about` goes
    into the segment's extra; `part` is its number where a text is spoken in several pieces."""

    seed: int
    waveform: np.ndarray | None
    codes: np.ndarray | None
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    voice: str | None = None
    language: str | None = None
    part: int | None = None


@dataclass
class SpokenSample:
    """A sample whose segments are {"text"} or {"pieces"}, in order. `fault`: why it is rejected."""

    sample: dict[str, Any]
    conversation: Conversation
    turns: list[dict[str, Any]]
    fault: str | None = None

    @property
    def pieces(self) -> list[Piece]:
        segments = [segment for turn in self.turns for segment in turn["segments"]]
        return [piece for segment in segments for piece in segment.get("pieces", [])]


@dataclass
class Recorder:
    """Kinds, engines by the name in front of a voice, and the augmentation `steps` of a recipe, to
    be used in a `with` block. `quantizer`: its window is the most that a piece may last."""

    kinds: dict[str, Entry]
    engines: dict[str, Engine]
    steps: list[dict[str, Any]]
    seed: int
    quantizer: Quantizer

    def __post_init__(self) -> None:
        self._turn = {n: BoundedSemaphore(engine.parallel) for n, engine in self.engines.items()}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def record(self, sample: dict[str, Any], conversation: Conversation) -> SpokenSample | Reject:
        """Speak a sample; safe in several threads. Raises Unavailable when an engine cannot go
        on."""
        turns = self.kinds[sample["kind"]].turns(conversation, f"{self.seed}/{sample['id']}") or []
        planned = iter(sample["speech"])
        try:
            for turn in turns:
                turn["segments"] = [
                    s if "text" in s else {"pieces": self._pieces(s, next(planned))}
                    for s in turn["segments"]
                ]
        except Unavailable:
            raise
        except ValueError as error:
            return Reject(sample["id"], str(error))
        return SpokenSample(sample, conversation, turns)

    def _pieces(self, segment: dict[str, Any], planned: dict[str, Any]) -> list[Piece]:
        """A segment's speech, or its sound, in the voice and by the seed that are planned."""
        if planned["voice"] is None:
            return [self._sound(segment, planned["seed"])]
        pieces = self._speech(segment["say"], **planned)
        for number, piece in enumerate(pieces):
            piece.part = number if len(pieces) > 1 else None
            if segment.get("shuffle"):
                piece.about["shuffled"], piece.text = piece.text, None
        return pieces

    def _speech(self, text: str, voice: str, seed: int) -> list[Piece]:
        name, _, speaker = voice.partition("/")
        engine = self.engines[name]
        limit = engine.max_characters
        while True:
            pieces = []
            for part in sentences(text, limit):
                with self._turn[name]:
                    spoken = engine.speak(part, speaker, seed)  # pace and room stay: one seed
                piece = self._augment(spoken, seed)
                piece.text, piece.voice, piece.language = part, voice, engine.language
                pieces.append(piece)
            longest = max(pieces, key=lambda piece: piece.seconds)
            if longest.seconds <= self.quantizer.window:
                return pieces
            # again in shorter pieces; `sentences` refuses what one sentence makes too long
            size = len((longest.text or "").encode())
            limit = min(size - 1, int(0.9 * size * self.quantizer.window / longest.seconds))

    def _sound(self, segment: dict[str, Any], seed: int) -> Piece:
        count = round(min(segment["seconds"], self.quantizer.window) * decoding.SAMPLE_RATE)
        spec = {"_component_": segment["sound"]}
        sound = config.instantiate(spec, samples=count, rng=np.random.default_rng(seed))
        waveform = sound * 10 ** ((segment["level"] or 0) / 20)
        about = {key: segment[key] for key in ("sound", "level", "seconds")}
        return self._augment(Spoken(waveform.astype(np.float32), about=about), seed)

    def _augment(self, spoken: Spoken, seed: int) -> Piece:
        """Apply the augmentation to a waveform; codes stay. Returns the piece with its duration.
        Raises ValueError for less than one token of sound."""
        waveform, codes, about = spoken.waveform, spoken.codes, dict(spoken.about)
        if waveform is not None:
            waveform, records = augmentation.apply(waveform, self.steps, seed)
            about |= {"augmentation": records} if records else {}
            seconds = len(waveform) / decoding.SAMPLE_RATE
        else:
            seconds = (0 if codes is None else len(codes)) / self.quantizer.token_rate
        if seconds < 1 / self.quantizer.token_rate:
            raise ValueError(f"too short: {seconds:.4f} s is less than one token")
        return Piece(seed, waveform, codes, seconds, about)
