"""Kinds of sample: what a model is taught with a piece of instruction text: an instruction, a
transcription, a refusal of noise or silence, several turns ...

In: a conversation of plain text and the sample's own random numbers. Out: turns in the schema of
shards.CONVERSATIONS, or None for a conversation that the kind cannot use, whatever the random
numbers. In these turns a segment to be spoken is {"say": text}, with "shuffle": true where its
codes are to be put out of order, and a segment of sound is {"sound": component, "seconds": s,
"level": dB}. A recipe names kinds by dotted path:

    kinds:
      instruction: {_component_: speechfuse.synthesis.Instruction, share: 0.7}
      transcription: {_component_: speechfuse.synthesis.Transcription, share: 0.3, requests: [...]}
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechfuse import config
from speechfuse.texts.conversations import Conversation
from speechfuse.tokens.prompts import spoken_answer

Turns = list[dict[str, Any]]
Kind = Callable[[Conversation, random.Random], Turns | None]

_WORD = re.compile(r"\S*\w\S*")  # with a letter or digit: a mark alone is not spoken
SPEECH = "{speech}"  # where the speech goes in a wording; without it the speech comes last
UNINTELLIGIBLE = ["noise", "silence", "shuffled"]
NOISES = ["speechfuse.audio.white", "speechfuse.audio.pink"]
CHARACTERS_PER_SECOND = 15.0  # of speech, by which a sound lasts as long as its question would


def _turn(role: str, *segments: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "segments": list(segments)}


def _exchanges(conversation: Conversation) -> list[tuple[str, str]]:
    """Return [(question, answer), ...] of a conversation in which user and assistant take turns; []
    for any other conversation."""
    roles = [turn.role for turn in conversation.turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return []
    texts = [turn.text for turn in conversation.turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _around(before: str, spoken: str, after: str) -> list[dict[str, Any]]:
    segments = [{"text": before}, {"say": spoken}, {"text": after}]
    return [segment for segment in segments if segment != {"text": ""}]


def _worded(wording: str, text: str) -> list[dict[str, Any]]:
    before, _, after = (wording if SPEECH in wording else wording + SPEECH).partition(SPEECH)
    return _around(before, text, after)


def _check_wordings(key: str, wordings: list[str]) -> None:
    if not wordings or not all(isinstance(w, str) and w for w in wordings):
        raise ValueError(f"{key}={wordings!r}: give at least one wording, e.g. 'repeat:{SPEECH}'")
    for wording in wordings:
        if wording.count(SPEECH) > 1:
            raise ValueError(f"{key}: {wording!r} has {SPEECH} twice; the speech is one piece")


def _reply(question: str, answer: str, repeat_first: bool) -> dict[str, Any]:
    text = spoken_answer(question, answer) if repeat_first else answer
    return _turn("assistant", {"text": text})


@dataclass(frozen=True)
class Transcription:
    """The first turn, spoken, with a request to transcribe it: one of `requests`, in which {speech}
    is where the speech goes (without it the speech comes last). No answer is needed."""

    requests: list[str]

    def __post_init__(self) -> None:
        _check_wordings("requests", self.requests)

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        if not conversation.prompts:
            return None
        text = conversation.prompts[0]
        user = _turn("user", *_worded(rng.choice(self.requests), text))
        return [user, _turn("assistant", {"text": text})]


@dataclass(frozen=True)
class TextAround:
    """A spoken question inside text: one of `wordings`, as "Answer in a word: {speech}".
    `repeat_first`: the target is the question, then the answer."""

    wordings: list[str]
    repeat_first: bool = False

    def __post_init__(self) -> None:
        _check_wordings("wordings", self.wordings)

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        if len(exchanges := _exchanges(conversation)) != 1:
            return None
        ((question, answer),) = exchanges
        user = _turn("user", *_worded(rng.choice(self.wordings), question))
        return [user, _reply(question, answer, self.repeat_first)]


class Instruction(TextAround):
    """One spoken question and its answer. `repeat_first`: as TextAround."""

    def __init__(self, repeat_first: bool = False) -> None:
        super().__init__([SPEECH], repeat_first)


class PartlySpoken:
    """A question of which some consecutive words are spoken; the words before and after them are
    text."""

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        exchanges = _exchanges(conversation)
        if len(exchanges) != 1 or len(words := list(_WORD.finditer(exchanges[0][0]))) < 2:
            return None
        ((prompt, answer),) = exchanges
        first, last = 0, len(words) - 1
        while last - first + 1 == len(words):
            first, last = sorted(rng.choices(range(len(words)), k=2))
        start, end = words[first].start(), words[last].end()
        # a space stays with the word that follows it, as in tokenizers
        segments = _around(prompt[:start].rstrip(), prompt[start:end], prompt[end:])
        return [_turn("user", *segments), _turn("assistant", {"text": answer})]


@dataclass(frozen=True)
class MultiTurn:
    """A conversation of two questions or more, each of them spoken with the probability `spoken`,
    but at least one. `repeat_first` is that of Instruction, for the questions that are spoken."""

    spoken: float = 0.5
    repeat_first: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.spoken <= 1:
            raise ValueError(f"spoken={self.spoken} is not a chance: 0 to 1")

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        exchanges = _exchanges(conversation)
        if len(exchanges) < 2:
            return None
        always = rng.randrange(len(exchanges))
        turns = []
        for number, (prompt, answer) in enumerate(exchanges):
            spoken = rng.random() < self.spoken or number == always
            turns.append(_turn("user", {"say" if spoken else "text": prompt}))
            turns.append(_reply(prompt, answer, spoken and self.repeat_first))
        return turns


@dataclass(frozen=True)
class Refusal:
    """Sound that nobody can understand, about as long as a spoken question, and one of `replies`.

    Each sample has one of `sounds`: noise (made by one of `noises`, functions like those of
    audio.augmentation), silence, or shuffled (the codes of the spoken question, out of order). The
    sound stands in place of one of the conversation's questions; the questions before it are
    spoken, and what follows its reply is cut. `level` is the range of the noise's level in dB of
    full scale; `most` is the most seconds that noise or silence lasts.
    """

    replies: list[str]
    sounds: list[str] = field(default_factory=UNINTELLIGIBLE.copy)
    noises: list[str] = field(default_factory=NOISES.copy)
    level: tuple[float, float] = (-50.0, -10.0)
    most: float = 10.0

    def __post_init__(self) -> None:
        _check_wordings("replies", self.replies)
        if unknown := [sound for sound in self.sounds if sound not in UNINTELLIGIBLE]:
            raise ValueError(f"sounds: {unknown[0]!r}; choose from {', '.join(UNINTELLIGIBLE)}")
        if not self.sounds or not self.noises or self.most <= 0:
            raise ValueError("a refusal needs at least one of sounds, one of noises, and most > 0")
        if not self.level[0] <= self.level[1] <= 0:
            raise ValueError(f"level={self.level}: give [least, most] in dB of full scale, up to 0")
        for noise in self.noises:
            config.instantiate({"_component_": noise}, samples=1, rng=np.random.default_rng(0))

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        if not (exchanges := _exchanges(conversation)):
            return None
        at = rng.randrange(len(exchanges))
        turns = []
        for prompt, answer in exchanges[:at]:
            turns += [_turn("user", {"say": prompt}), _turn("assistant", {"text": answer})]
        segment = self._sound(exchanges[at][0], rng)
        reply = _turn("assistant", {"text": rng.choice(self.replies)})
        return [*turns, _turn("user", segment), reply]

    def _sound(self, prompt: str, rng: random.Random) -> dict[str, Any]:
        sound = rng.choice(self.sounds)
        if sound == "shuffled":
            return {"say": prompt, "shuffle": True}
        seconds = min(max(0.5, len(prompt) / CHARACTERS_PER_SECOND), self.most)
        component = rng.choice(self.noises) if sound == "noise" else "speechfuse.synthesis.silence"
        level = round(rng.uniform(*self.level), 1) if sound == "noise" else None
        return {"sound": component, "seconds": round(seconds, 2), "level": level}


def silence(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the noise of a microphone without speech, float64 (samples,): white noise, at a level
    drawn from -90 to -55 dB of full scale."""
    return rng.standard_normal(samples) * 10 ** (rng.uniform(-90, -55) / 20)


class Text:
    """Text replay: the conversation as it is, nothing of it spoken."""

    def __call__(self, conversation: Conversation, rng: random.Random) -> Turns | None:
        if not _exchanges(conversation):
            return None
        return [_turn(turn.role, {"text": turn.text}) for turn in conversation.turns]
