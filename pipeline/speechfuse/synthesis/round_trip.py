"""ASR round trip: transcribe synthesized speech, and reject clips whose word error rate is high.

In: a clip's codes, its waveform where there is one, and its text. Out: the transcript, its word
error rate, and the reason of a reject. Transcribers, by dotted path:

    round_trip:
      max_wer: 0.3
      listener: {_component_: speechfuse.synthesis.QuantizerDecoder, quantizer: ..., whisper: ...}
      listener: {_component_: speechfuse.synthesis.Whisper, whisper: models/tiny.en.pt}
      listener: {_component_: speechfuse.synthesis.TranscriptionEndpoint, url: ..., model: ...}

QuantizerDecoder reads the codes, as the model will; its rate has the codec's own errors in it. The
others hear the waveform.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from speechfuse import artifact, config, workers
from speechfuse.audio import decoding
from speechfuse.components import Batch
from speechfuse.openai_server import Server, Unavailable
from speechfuse.quantizer.decoder import CodeTranscriber, load_whisper, transcribe_audio
from speechfuse.rows.rejects import FILTERED
from speechfuse.scores.word_errors import errors, normalised, whisper_english


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

    transcript: str
    wer: float
    words: int
    reason: str | None


class Transcriber(Protocol):
    """`transcribe` returns each clip's transcript, or the error that rejects this clip alone."""

    not_identity: ClassVar[tuple[str, ...]] = ()  # arguments that change nothing of the transcripts

    def check(self, codec: str) -> None: ...
    def identity(self) -> dict[str, Any]: ...
    def transcribe(self, clips: list[SynthesizedClip]) -> Sequence[str | ValueError]: ...


class QuantizerDecoder(Transcriber):
    """The quantizer's own decoder: `quantizer` with its decoding half, and the `whisper` (.pt) that
    it was trained on, cut to `window` seconds as that of the quantizer."""

    def __init__(
        self,
        quantizer: str,
        whisper: str,
        language: str = "en",
        batch_size: Batch = 16,
        window: float | None = None,
    ) -> None:
        self.path, self.batch_size = quantizer, batch_size
        decoder = CodeTranscriber.load(quantizer, whisper, language, window)
        self.decoder = decoder.to(workers.device())

    def check(self, codec: str) -> None:
        """Raises ValueError unless it decodes the codes of `codec`, a quantizer's identity."""
        if (own := self.decoder.quantizer.identity) != codec:
            raise ValueError(
                f"round_trip: {self.path} is another codec ({own[:12]}) than the one that "
                f"makes the codes ({codec[:12]}): give the decoder of the same quantizer"
            )

    def identity(self) -> dict[str, Any]:
        return {"listener": "codec decoder", "language": self.decoder.language}

    def transcribe(self, clips: list[SynthesizedClip]) -> list[str]:
        return self.decoder.transcribe([clip.codes for clip in clips], self.batch_size)


class Whisper(Transcriber):
    """An openai-whisper checkpoint, the `.pt` of just fetch-whisper, which hears the waveforms."""

    def __init__(self, whisper: str, language: str = "en") -> None:
        self.model = load_whisper(Path(whisper)).to(workers.device())
        self.language, self.sha256 = language, artifact.sha256_of(Path(whisper))

    def check(self, codec: str) -> None:
        """It hears waveforms, of any codec."""

    def identity(self) -> dict[str, Any]:
        return {"listener": "whisper", "sha256": self.sha256, "language": self.language}

    def transcribe(self, clips: list[SynthesizedClip]) -> list[str]:
        """Raises Unavailable for codes without a waveform."""
        return [transcribe_audio(self.model, _audio(clip), self.language) for clip in clips]


class TranscriptionEndpoint(Server, Transcriber):
    """Any server with OpenAI's `POST /audio/transcriptions`."""

    @property
    def form(self) -> dict[str, str]:
        """The fields of every request."""
        fields = {"model": self.model, "language": self.language, "response_format": "json"}
        return fields | (self.body or {})

    def check(self, codec: str) -> None:
        """Transcribe half a second of silence. Raises ValueError without key, server or model."""
        self.key()
        self._transcribe(np.zeros(8000, np.float32))

    def identity(self) -> dict[str, Any]:
        return {"listener": "endpoint", "url": self.url, **self.form}

    def transcribe(self, clips: list[SynthesizedClip]) -> list[str | ValueError]:
        """Raises Unavailable for codes without a waveform, and without a server."""
        results: list[str | ValueError] = []
        for clip in clips:
            try:
                results.append(self._transcribe(_audio(clip)))
            except Unavailable:
                raise
            except ValueError as error:
                results.append(error)
        return results

    def _transcribe(self, waveform: np.ndarray) -> str:
        wav = decoding.encode(waveform, "WAV")
        fields = {"file": ("speech.wav", wav, "audio/wav"), "model": self.model}
        key = [self.form, wav.hex()]
        return self.post("/audio/transcriptions", fields, self.form, key, _transcription_text)


def _audio(clip: SynthesizedClip) -> np.ndarray:
    if clip.waveform is None:
        raise Unavailable(
            "round_trip: an engine that makes codes leaves no audio for a transcriber to hear: use "
            "speechfuse.synthesis.QuantizerDecoder"
        )
    return clip.waveform


def _transcription_text(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        if isinstance(text := json.loads(content)["text"], str):
            return text
    raise ValueError(f"not a transcript: {content[:100]!r}")


class RoundTrip:
    """Rejects clips over `max_wer`. `characters`: count characters instead of words, for languages
    without spaces."""

    def __init__(
        self, listener: dict[str, Any], max_wer: float = 0.3, characters: bool = False
    ) -> None:
        if max_wer < 0:
            raise ValueError(f"round_trip: max_wer={max_wer}: give 0 or more, 0.3 is three in ten")
        self.transcriber: Transcriber = config.instantiate(listener)
        self.max_wer, self.characters = max_wer, characters

    def judge(self, clips: list[SynthesizedClip]) -> list[Verdict]:
        """A verdict on each clip, in order."""
        transcripts = self.transcriber.transcribe(clips)
        return [self._verdict(c.text, t) for c, t in zip(clips, transcripts, strict=True)]

    def _verdict(self, text: str, transcript: str | ValueError) -> Verdict:
        if isinstance(transcript, ValueError):
            return Verdict("", 0.0, 0, f"not heard: {transcript}")
        wer, words = rate(text, transcript, self.characters)
        transcript = transcript.strip()
        reason = (
            f"{FILTERED}round trip: {wer:.2f} of the words are wrong, more than "
            f"{self.max_wer:g}; heard: {transcript[:100]}"
        )
        return Verdict(transcript, round(wer, 4), words, reason if wer > self.max_wer else None)


def rate(text: str, transcript: str, characters: bool = False) -> tuple[float, int]:
    """(word error rate, words of the text), or of characters, as scores.word_errors normalises
    them. A text of which it leaves nothing ("um") has rate 0: there is nothing to miss."""
    # words in brackets are spoken too, and the normaliser would delete them
    both = [[re.sub(r"[()\[\]<>]", " ", words)] for words in (text, transcript)]
    if characters:
        both = [[" ".join("".join(words.split()))] for (words,) in both]
    references, hypotheses, _ = normalised(both[0], both[1], whisper_english())
    (wrong,) = errors(references, hypotheses)
    return (wrong.total / wrong.words, wrong.words) if wrong.words else (0.0, 0)
