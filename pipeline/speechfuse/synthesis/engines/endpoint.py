"""Speech by any server with OpenAI's `POST /audio/speech`: kokoro, piper, vLLM, OpenAI itself.

In: text. Out: a waveform, whatever format the server sends. The protocol has no seed, so a server
may say the same text in another way the next time: set `cache`, and what was received stays.
"""

import random
from typing import Any, Self

import numpy as np

from speechfuse.audio import decoding
from speechfuse.openai_server import Server
from speechfuse.synthesis.engines import Spoken


class Endpoint:
    """`names` are the server's voices. `speed`: a range to draw from, sent where it is given.
    `body`: further fields of every request. `send_seed`: for servers that take one."""

    not_identity = ("key_variable", "parallel", "timeout", "tries", "cache")
    codec = None

    def __init__(
        self,
        url: str,
        model: str,
        names: list[str],
        key_variable: str | None = "OPENAI_API_KEY",
        format: str = "wav",
        speed: tuple[float, float] | None = None,
        body: dict[str, Any] | None = None,
        send_seed: bool = False,
        language: str = "en",
        max_characters: int | None = 4096,
        parallel: int = 8,
        timeout: float = 120.0,
        tries: int = 6,
        cache: str | None = None,
    ) -> None:
        self.server = Server(url, key_variable, timeout, tries, cache)
        self.model, self.names, self.format = model, names, format
        self.speed, self.body, self.send_seed = speed, body or {}, send_seed
        self.language, self.max_characters, self.parallel = language, max_characters, parallel

    def voices(self) -> list[str]:
        return self.names

    def check(self) -> None:
        """Ask for one word in every voice. ValueError: no key, no server, no such model or voice,
        or an answer that is no audio."""
        self.server.key()
        for voice in self.names:
            try:
                self.speak("Yes.", voice, 0)
            except ValueError as error:
                raise ValueError(
                    f"voice {voice!r}, model {self.model!r} of {self.server.url}: {error}"
                ) from None

    def identity(self) -> dict[str, Any]:
        """What the server is said to be; which weights it runs cannot be asked."""
        return {"engine": "endpoint", "url": self.server.url, "model": self.model}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        about: dict[str, Any] = {}
        if self.speed:
            about["speed"] = round(random.Random(seed).uniform(*self.speed), 2)
        if self.send_seed:
            about["seed"] = seed
        fields: dict[str, Any] = {"model": self.model, "input": text, "voice": voice}
        more = {"response_format": self.format, **self.body, **about}
        waveform = self.server.post(
            "/audio/speech",
            lambda client: (
                client.audio.speech.with_raw_response.create(**fields, extra_body=more).content
            ),
            [seed, {**fields, **more}],
            _waveform,
        )
        return Spoken(waveform, about=about)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _waveform(content: bytes) -> np.ndarray:
    waveform = decoding.decode(content).waveform
    if not waveform.any():
        raise ValueError("no sound: the server sent silence")
    return waveform
