"""Speech by any server with OpenAI's `POST /audio/speech`: kokoro, piper, vLLM, OpenAI itself.

In: text. Out: a waveform, from any format that the server sends. The protocol has no seed, so a
server may speak the same text in another way the next time: set `cache` to keep its answers.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechfuse.audio import decoding
from speechfuse.components import Batch, Count, PositiveRange
from speechfuse.openai_server import Server
from speechfuse.synthesis.engines import Engine, Spoken


@dataclass(kw_only=True, eq=False)
class Endpoint(Server, Engine):
    """`names` are the server's voices. `format` of the audio; `speed`: a range to draw from, sent
    where it is given; `send_seed`: for servers that take one; `parallel` requests."""

    names: list[str]
    format: str = "wav"
    speed: PositiveRange | None = None
    send_seed: bool = False
    max_characters: Count | None = 4096
    parallel: Batch = 8

    def voices(self) -> list[str]:
        return self.names

    def check(self) -> None:
        """Ask for one word in every voice. Raises ValueError without key, server, model or voice,
        and for an answer that is no audio."""
        self.key()
        for voice in self.names:
            try:
                self.speak("Yes.", voice, 0)
            except ValueError as error:
                raise ValueError(
                    f"voice {voice!r}, model {self.model!r} of {self.url}: {error}"
                ) from None

    def identity(self) -> dict[str, Any]:
        """Where the server is and the model's name; its weights cannot be asked for."""
        return {"engine": "endpoint", "url": self.url, "model": self.model}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        about: dict[str, Any] = {}
        if self.speed:
            about["speed"] = round(random.Random(seed).uniform(*self.speed), 2)
        if self.send_seed:
            about["seed"] = seed
        fields: dict[str, Any] = {"model": self.model, "input": text, "voice": voice}
        more = {"response_format": self.format, **(self.body or {}), **about}
        key = [seed, {**fields, **more}]
        return Spoken(self.post("/audio/speech", fields, more, key, _waveform), about=about)


def _waveform(content: bytes) -> np.ndarray:
    waveform = decoding.decode(content).waveform
    if not waveform.any():
        raise ValueError("no sound: the server sent silence")
    return waveform
