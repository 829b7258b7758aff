"""Voice engines: text in, a waveform or codes out.

In: a piece of text, a voice and a seed. Out: `Spoken`. A recipe names an engine by dotted path
(`_component_`); a job calls `check` once before work and uses the engine in a `with` block in each
worker process. The speech depends on text, voice and seed alone, never on earlier texts, so that a
shard made again is the same.

    {_component_: speechfuse.synthesis.Espeak, accents: [en-us], variants: [Annie, m3]}
    {_component_: speechfuse.synthesis.Endpoint, url: http://127.0.0.1:8880/v1, ...}
    {_component_: speechfuse.synthesis.TextToWaveform, t2s: models/..., ...}

Errors of `speak`: ValueError("kind: detail") is a reject of this text; Unavailable says that the
engine itself cannot go on, and ends the job.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from speechfuse.openai_server import Unavailable as Unavailable

__all__ = ["Engine", "Spoken", "Unavailable", "sentences"]

# after . ! ? or an ellipsis with its closing quotes, unless a small letter follows ("e.g. this");
# stops of Chinese and Japanese need no space after them
_CLOSING = "[\"'\u2019\u201d\u300d\u300f\uff09)\\]]*"
_ENDS = re.compile(
    rf"(?<=[.!?\u2026]){_CLOSING}\s+(?![a-z])|(?<=[\u3002\uff01\uff1f]){_CLOSING}\s*"
)
# a stop after these ends no sentence: titles and the like, initials ("U.S.A."), but for "I"
_GOES_ON = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|Rev|Gen|Sen|Gov|Capt|Lt|Col|Sgt|St|Mt|Fig|Vol|vs|cf|ca|[eE]\.g|[iI]\.e)"
    r"|\b[A-HJ-Z]|\.[A-Z])\.$"
)


@dataclass(frozen=True)
class Spoken:
    """Either `waveform` (float32, 16 kHz, mono) or `codes` (uint16, of the codec `Engine.codec`).

    `about`: JSON for the row's extra (rate, pitch, ...).
    """

    waveform: np.ndarray | None = None
    codes: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What a job asks of every engine; one that inherits from here has these defaults."""

    max_characters: int | None = None  # of one `speak`; more is split by `sentences` or rejected
    language: str = "en"  # of the rows
    parallel: int = 1  # how many threads may be in `speak` at once
    not_identity: ClassVar[tuple[str, ...]] = ()  # arguments that change nothing of the speech
    codec: str | None = None  # identity of the quantizer whose codes it makes; None for waveforms

    def voices(self) -> list[str]: ...
    def check(self) -> None: ...
    def identity(self) -> dict[str, Any]: ...
    def speak(self, text: str, voice: str, seed: int) -> Spoken: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def sentences(text: str, limit: int | None) -> list[str]:
    """Pieces of whole sentences, each of at most `limit` characters, in order: white space
    apart they are the text. `limit` counts bytes of UTF-8, which no engine counts more strictly.

    Raises ValueError("too long: ...") when one sentence is over the limit: nothing is cropped.
    """
    text = " ".join(text.split())
    if limit is None or _size(text) <= limit:
        return [text]
    pieces: list[str] = []
    for sentence in _sentences(text):
        if _size(sentence) > limit:
            raise ValueError(
                f"too long: a sentence of {_size(sentence)} characters, {limit} can be spoken"
            )
        if pieces and _size(f"{pieces[-1]} {sentence}") <= limit:
            pieces[-1] = f"{pieces[-1]} {sentence}"
        else:
            pieces.append(sentence)
    return pieces


def _sentences(text: str) -> list[str]:
    ends = [
        match.end()
        for match in _ENDS.finditer(text)
        if not _GOES_ON.search(text[max(0, match.start() - 12) : match.start()])
    ]
    cuts = [0, *ends, len(text)]
    return [part for a, b in pairwise(cuts) if (part := text[a:b].strip())]


def _size(text: str) -> int:
    return len(text.encode())
