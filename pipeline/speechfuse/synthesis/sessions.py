"""Sessions of two channels in time, drawn from conversations: who speaks when.

In: a finished artifact of text, the agent's replies in a codec's codes (stages.fit_codec), voices
of the user. Out: sessions, each the user's waveform with its real silence, and the turns of both
with their times. A session is a function of the configuration and its number alone. The kinds:

    answer       the user asks, and the agent answers after a gap
    twice        two such questions, one after the other
    barge_in     the user asks anew while the agent speaks, who stops and answers that
    backchannel  the user says a word of assent while the agent speaks, who goes on
    pause        a pause inside the user's turn, before its last words
    user_only    words that want no answer
    reading      the agent alone reads a text that is given
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse import artifact, components
from speechfuse.audio import augmentation, espeak_ng
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.codecs.codec import Codec
from speechfuse.components import Count, Decibels, PositiveRange
from speechfuse.rows import shards
from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import matches
from speechfuse.synthesis.plan import check_shares, conversations, counts
from speechfuse.texts.conversations import Conversation
from speechfuse.tokens.prompts import spoken_answer

QUIET = 0.02  # of a clip's peak; below it a voice has not begun, or has ended
STRIDE = 7919  # between the questions of one session; a prime
KINDS = "answer twice barge_in backchannel pause user_only reading".split()


@dataclass
class Session:
    """`waveform`: the user's channel, float32 at 16 kHz. `turns`: {role, text, start, end: seconds,
    speaker} of both, in the order of their starts; an assistant's has `codes`, uint16 (frames,
    codebooks), and `cut` where it was stopped."""

    id: str
    waveform: np.ndarray
    turns: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)


def said(text: str) -> str:
    """Return what a voice says of a reply: its lines as one."""
    return " ".join(text.split())


def trimmed(waveform: np.ndarray) -> np.ndarray:
    """Return a clip from its first sound to its last."""
    loud = np.flatnonzero(np.abs(waveform) > QUIET * np.abs(waveform).max(initial=1e-9))
    return waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform[:0]


def replies_of(conversation: Conversation, repeat_first: bool) -> list[tuple[str, str]]:
    """Return (what the user asks, what the agent replies) for each answered turn."""
    pairs = zip(conversation.prompts, conversation.answers, strict=False)
    return [(asked, spoken_answer(asked, a) if repeat_first else a) for asked, a in pairs]


@cache
def _replies(folder: str) -> tuple[dict[str, np.ndarray], list[str], str]:
    """Return codes by what is said, flat; what is for reading alone; identity of the codec."""
    codes, reading = {}, []
    for path in shards.shard_paths(Path(folder)):
        for row in shards.read_shard(path):
            codes[row["text"]] = row["codes"]
            reading += [row["text"]] * (row["extra"] == '{"kind": "reading"}')
    return codes, reading, shards.maker_of(Path(folder))


@dataclass
class Sessions:
    """`sessions` of them, of the conversations that `select` names; `kinds`: {kind: share}.
    `repeat_first`: the agent repeats the question first. In seconds: `gap` from a user's end to the
    agent, `pause` inside a turn and between turns, `lead` and `tail` at the ends, `stop` from a
    user's start to the cut of the agent. `snr` and `gain` as in corpora.synthetic."""

    texts: str
    replies: str
    voices: dict[str, Any]
    kinds: dict[str, float]
    sessions: Count
    select: dict[str, Any] = field(default_factory=dict)
    repeat_first: bool = True
    gap: PositiveRange = (0.4, 1.2)
    pause: PositiveRange = (0.4, 1.0)
    lead: PositiveRange = (0.2, 1.0)
    tail: PositiveRange = (0.6, 1.6)
    stop: components.Positive = 0.64
    assent: list[str] = field(default_factory="okay/yes/right/i see/uh huh".split("/").copy)
    snr: Decibels = (20.0, 40.0)
    gain: Decibels = (-10.0, 0.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(self.kinds.keys() - {*KINDS}):
            raise ValueError(f"kinds: there is no {unknown[0]!r}; there are {', '.join(KINDS)}")
        check_shares("kinds", self.kinds)
        self.group = espeak_ng.VoiceGroup(**self.voices)
        self.codes, self.reading, self.codec = _replies(self.replies)
        self.pairs = [
            (pair, each.extra)
            for _, each in conversations(Path(self.texts))
            if matches({**each.extra, "id": each.id}, self.select)
            for pair in replies_of(each, self.repeat_first)
        ]
        if not self.pairs:
            raise ValueError(f"{self.texts}: select={self.select} leaves nothing with an answer")
        if "reading" in self.kinds and not self.reading:
            raise ValueError(f"kinds.reading: {self.replies} has no text for it: leave it out")
        many, chance = counts(self.sessions, self.kinds), random.Random(f"{self.seed}/order")
        self.order = [kind for kind, n in many.items() for _ in range(n)]
        chance.shuffle(self.order)
        chance.shuffle(self.pairs)
        self.words = sorted({word for (asked, _), _ in self.pairs for word in asked.split()})
        folders = [artifact.fingerprint_of(Path(path)) for path in (self.texts, self.replies)]
        self.fingerprint = artifact.json_digest(folders)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        starts, total = range(0, self.sessions, shard_size), self.sessions
        return [{"count": min(shard_size, total - s), "first": s} for s in starts]

    def made(self, shard: Mapping[str, Any], codec: Codec) -> Iterator[Session | Reject]:
        if codec.identity != self.codec:
            raise ValueError(
                f"the replies are codes of the codec {self.codec[:12]}, and codec is "
                f"{codec.identity[:12]}: make them with it (just fit-codec codec=...)"
            )
        # espeak-ng carries state from one utterance to the next, so every shard starts a new one
        with espeak_ng.EspeakLibrary() as engine:
            for number in range(shard["first"], shard["first"] + shard["count"]):
                draft = _Draft(self, number, engine, codec)
                try:
                    getattr(draft, draft.kind)()
                    yield draft.session()
                except (espeak_ng.NoSound, KeyError) as error:
                    reason = f"no codes: of {error}" if isinstance(error, KeyError) else str(error)
                    yield Reject(draft.id, reason)


class _Draft:
    """A session in the making; `now` is the second that it has come to."""

    def __init__(self, source: Sessions, number: int, engine: Any, codec: Codec) -> None:
        self.source, self.engine, self.codec = source, engine, codec
        self.chance = random.Random(f"{source.seed}/{number}")
        self.kind, self.id = source.order[number], f"{source.order[number]}-{number:06d}"
        self.voice, self.now = source.group.draw(self.chance), self.chance.uniform(*source.lead)
        self.clips, self.turns = list[tuple[float, np.ndarray]](), list[dict[str, Any]]()
        places = (number + i * STRIDE for i in range(2))  # of two questions, one may follow
        self.pairs = [source.pairs[place % len(source.pairs)] for place in places]
        self.gaps = list[float]()

    def user(self, *parts: str) -> None:
        """Let the user say the parts, with a pause between."""
        start = self.now
        for number, part in enumerate(parts):
            self.now += self.chance.uniform(*self.source.pause) if number else 0
            clip = trimmed(espeak_ng.speak(self.engine, part, self.voice).waveform)
            self.clips.append((self.now, clip))
            self.now += len(clip) / SAMPLE_RATE
        name = f"{self.voice.name}/{self.voice.rate}/{self.voice.pitch}"
        turn = {"role": "user", "text": " ".join(parts), "speaker": name}
        self.turns.append(turn | {"start": start, "end": self.now})

    def agent(self, text: str, gap: float = 0.0) -> dict[str, Any]:
        """Let the agent say `text` so many seconds after now; return its turn. Its first frame is
        silent: there the mark of its beginning stands in the place of codes."""
        codes = self.source.codes[said(text)].reshape(-1, self.codec.codebooks)
        codes = np.concatenate([self.codec.silence()[None], codes])
        start = round((self.now + gap) * self.codec.frame_rate) / self.codec.frame_rate
        self.now = start + len(codes) / self.codec.frame_rate
        turn = {"role": "assistant", "text": text, "start": start, "end": self.now, "codes": codes}
        self.turns.append(turn)
        return turn

    def reply(self, text: str) -> dict[str, Any]:
        self.gaps.append(self.chance.uniform(*self.source.gap))
        return self.agent(text, self.gaps[-1])

    def answer(self, which: int = 0) -> dict[str, Any]:
        asked, text = self.pairs[which][0]
        self.user(asked)
        return self.reply(text)

    def twice(self) -> None:
        self.answer(0)
        self.now += self.chance.uniform(*self.source.pause)
        self.answer(1)

    def barge_in(self) -> None:
        turn, rate = self.answer(0), self.codec.frame_rate
        latest = max(0.4, turn["end"] - turn["start"] - self.source.stop - 0.2)
        self.now = turn["start"] + self.chance.uniform(0.3, latest)
        kept = ceil((self.now + self.source.stop - turn["start"]) * rate)
        turn |= {"codes": turn["codes"][:kept], "cut": len(turn["codes"]) > kept}
        turn["end"] = turn["start"] + len(turn["codes"]) / rate
        self.answer(1)

    def backchannel(self) -> None:
        turn = self.answer(0)
        self.now = self.chance.uniform(
            turn["start"] + 0.3, max(turn["start"] + 0.4, turn["end"] - 0.5)
        )
        self.user(self.chance.choice(self.source.assent))
        self.now = max(self.now, turn["end"])

    def pause(self) -> None:
        asked, text = self.pairs[0][0]
        words = asked.split()
        cut = self.chance.randint(1, max(1, len(words) - 1))
        self.user(*filter(None, (" ".join(words[:cut]), " ".join(words[cut:]))))
        self.reply(text)

    def user_only(self) -> None:
        self.user(" ".join(self.chance.choices(self.source.words, k=self.chance.randint(2, 6))))

    def reading(self) -> None:
        self.agent(self.chance.choice(self.source.reading))

    def session(self) -> Session:
        source, chance, rate = self.source, self.chance, self.codec.frame_rate
        frames = ceil((self.now + chance.uniform(*source.tail)) * rate)
        waveform = np.zeros(round(frames / rate * SAMPLE_RATE))
        for start, clip in self.clips:
            first = round(start * SAMPLE_RATE)
            waveform[first : first + len(clip)] += clip[: len(waveform) - first]
        snr, gain = chance.uniform(*source.snr), chance.uniform(*source.gain)
        if self.clips:
            heard = augmentation.disturb(waveform, snr, gain, chance)
        else:  # a room in which nobody speaks
            noise = augmentation.white(len(waveform), np.random.default_rng(chance.getrandbits(32)))
            heard = (noise * 10 ** ((gain - snr) / 20) / 10).astype(np.float32)
        extra = self.pairs[0][1] | {"kind": self.kind, "gaps": self.gaps}
        return Session(self.id, heard, sorted(self.turns, key=lambda turn: turn["start"]), extra)
