"""Round trip: does the speech that was made say its text?

In: what was made (codes, and the waveform where there is one) and its text. Out: what a listener
heard, its word error rate, and why a row is left out, if it is. Listeners, by dotted path:

    round_trip:
      max_wer: 0.3
      listener: {_component_: speechfuse.synthesis.QuantizerDecoder, quantizer: ..., whisper: ...}
      listener: {_component_: speechfuse.synthesis.TranscriptionEndpoint, url: ..., model: ...}

CodecDecoder hears the codes, as the model will; its rate has the codec's own errors in it.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from speechfuse import config, workers
from speechfuse.audio import decoding
from speechfuse.openai_server import Server, Unavailable
from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows.rejects import FILTERED
from speechfuse.scores.word_errors import errors, whisper_english


@dataclass(frozen=True)
class SynthesizedClip:
    """One piece of speech: `text` that it should say, `codes`, and `waveform` (float32, 16 kHz) or
    None where an engine made codes."""

    text: str
    codes: np.ndarray
    waveform: np.ndarray | None


@dataclass(frozen=True)
class Verdict:
    """`wer` is a fraction of `words`, those of the text; `reason` is that of a reject, or None."""

    heard: str
    wer: float
    words: int
    reason: str | None


class Transcriber(Protocol):
    """`hear` gives what was heard of each, or the error that is the reject of this one alone."""

    not_identity: tuple[str, ...]  # arguments that change nothing of what it hears

    def check(self, codec: str) -> None: ...
    def identity(self) -> dict[str, Any]: ...
    def hear(self, made: list[SynthesizedClip]) -> Sequence[str | ValueError]: ...


class QuantizerDecoder:
    """The quantizer's own decoder: `quantizer` with its decoding half, and the `whisper` (.pt) that
    it was trained on."""

    not_identity = ()

    def __init__(
        self, quantizer: str, whisper: str, language: str = "en", batch_size: int = 16
    ) -> None:
        self.paths = Path(quantizer), Path(whisper)
        self.decoder = CodeTranscriber.load(*self.paths, language).to(workers.device())
        self.batch_size = batch_size

    def check(self, codec: str) -> None:
        """ValueError unless it decodes the codes of this `codec`, a quantizer's identity."""
        own = Quantizer.load(*self.paths).identity
        if own != codec:
            raise ValueError(
                f"round_trip: {self.paths[0]} is another codec ({own[:12]}) than the one that "
                f"makes the codes ({codec[:12]}): give the decoder of the same quantizer"
            )

    def identity(self) -> dict[str, Any]:
        return {"listener": "codec decoder", "language": self.decoder.language}

    def hear(self, made: list[SynthesizedClip]) -> list[str]:
        return self.decoder.transcribe([each.codes for each in made], self.batch_size)


class TranscriptionEndpoint:
    """Any server with OpenAI's `POST /audio/transcriptions`. `body`: further fields of the form."""

    not_identity = ("key_variable", "timeout", "tries", "cache")

    def __init__(
        self,
        url: str,
        model: str,
        language: str = "en",
        key_variable: str | None = "OPENAI_API_KEY",
        body: dict[str, Any] | None = None,
        timeout: float = 120.0,
        tries: int = 6,
        cache: str | None = None,
    ) -> None:
        self.server = Server(url, key_variable, timeout, tries, cache)
        self.form = {"model": model, "language": language, "response_format": "json"}
        self.form |= body or {}

    def check(self, codec: str) -> None:
        """Have it hear half a second of nothing: ValueError without key, server or model."""
        self.server.check()
        self._hear(SynthesizedClip("", np.zeros(0, np.uint16), np.zeros(8000, np.float32)))

    def identity(self) -> dict[str, Any]:
        return {"listener": "endpoint", "url": self.server.url, **self.form}

    def hear(self, made: list[SynthesizedClip]) -> list[str | ValueError]:
        """Unavailable for codes without a waveform, and without a server."""
        found: list[str | ValueError] = []
        for each in made:
            try:
                found.append(self._hear(each))
            except Unavailable:
                raise
            except ValueError as error:
                found.append(error)
        return found

    def _hear(self, made: SynthesizedClip) -> str:
        if made.waveform is None:
            raise Unavailable(
                "round_trip: an engine that makes codes leaves no audio for a transcriber to hear: "
                "use speechfuse.synthesis.QuantizerDecoder"
            )
        file = io.BytesIO()
        soundfile.write(file, made.waveform, decoding.SAMPLE_RATE, format="WAV", subtype="PCM_16")
        wav = file.getvalue()
        key = [self.form, wav.hex()]
        files = {"file": ("speech.wav", wav, "audio/wav")}
        return self.server.post(
            "/audio/transcriptions", _transcription_text, key, data=self.form, files=files
        )


def _transcription_text(content: bytes) -> str:
    try:
        text = json.loads(content)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"not a transcript: {content[:100]!r}")
    return text


class RoundTrip:
    """Rows over `max_wer` are left out. `characters`: count characters instead of words, for
    languages that write no spaces."""

    def __init__(
        self, listener: dict[str, Any], max_wer: float = 0.3, characters: bool = False
    ) -> None:
        if max_wer < 0:
            raise ValueError(f"round_trip: max_wer={max_wer}: give 0 or more, 0.3 is three in ten")
        self.listener: Transcriber = config.instantiate(listener)
        self.max_wer, self.characters = max_wer, characters

    def judge(self, made: list[SynthesizedClip]) -> list[Verdict]:
        """What was heard of each, and whether it will do."""
        found = []
        for each, heard in zip(made, self.listener.hear(made), strict=True):
            if isinstance(heard, ValueError):
                found.append(Verdict("", 0.0, 0, f"not heard: {heard}"))
                continue
            wer, words = rate(each.text, heard, self.characters)
            reason = (
                f"{FILTERED}round trip: {wer:.2f} of the words are wrong, more than "
                f"{self.max_wer:g}; heard: {heard.strip()[:100]}"
                if wer > self.max_wer
                else None
            )
            found.append(Verdict(heard.strip(), round(wer, 4), words, reason))
        return found


def rate(text: str, heard: str, characters: bool = False) -> tuple[float, int]:
    """(word error rate, words of the text), or of characters, as Whisper's English normaliser
    leaves them. A text of which it leaves nothing ("um") is right: there is nothing to miss."""
    # what stands in brackets is said too, and the normaliser would delete it
    both = [re.sub(r"[()\[\]<>]", " ", each) for each in (text, heard)]
    if characters:
        both = [" ".join("".join(each.split())) for each in both]
    wanted, found = map(whisper_english(), both)
    (wrong,) = errors([wanted], [found])
    return (wrong.total / wrong.words, wrong.words) if wrong.words else (0.0, 0)
