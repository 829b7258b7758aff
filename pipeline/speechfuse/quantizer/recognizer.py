"""A recognizer: speech to words by any openai-whisper checkpoint, for a cascade to read.

In: mono float32 waveforms at 16 kHz, each no longer than Whisper's window. Out: for each the words,
written as they are said: lower case, no punctuation, numbers and signs in words. Each clip gets the
whole window of 30 s: in a shorter one, with so little silence, Whisper's decoder repeats itself.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from speechfuse.artifact import sha256_of
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.quantizer.decoder import load_whisper, transcribe
from speechfuse.quantizer.encoder import log_mel
from speechfuse.quantizer.model import Encoded
from speechfuse.texts.curation.normalization import spoken_words


class Recognizer:
    """Stands where a quantizer stands; a row gets `text` in place of codes. Raises ValueError for a
    `checkpoint` that is no Whisper."""

    token_rate = 50.0
    shortest = 1 / token_rate  # seconds
    stream: ClassVar[dict[str, object]] = {}  # there are no codes

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint, self.whisper = Path(checkpoint), load_whisper(Path(checkpoint))
        self.window = self.whisper.dims.n_audio_ctx / self.token_rate

    def to(self, device: str) -> "Recognizer":
        self.whisper = self.whisper.to(device)
        return self

    @cached_property
    def identity(self) -> str:
        """sha256 of the checkpoint's file."""
        return sha256_of(self.checkpoint)

    def padded_frames(self, frames: int) -> int:
        """Mel frames that a clip of so many is padded to: the whole window."""
        return 2 * self.whisper.dims.n_audio_ctx

    @torch.inference_mode()
    def encode_batch(self, waveforms: list[np.ndarray], batch_size: int) -> Encoded:
        """Return the words of each waveform as UTF-8, spaces behind, and how many bytes count."""
        samples, bands = round(self.window * SAMPLE_RATE), self.whisper.dims.n_mels
        whole = [np.pad(waveform, (0, samples - len(waveform))) for waveform in waveforms]
        mels = torch.stack([log_mel(each, bands, self.whisper.device) for each in whole])
        words = [spoken_words(text).encode() for text in transcribe(self.whisper, mels, "en")]
        longest = max(map(len, words))
        window = np.array([[*each.ljust(longest)] for each in words], np.uint8)
        return torch.from_numpy(window), [*map(len, words)]

    def columns(self, letters: np.ndarray) -> dict[str, Any]:
        """Return the columns of a row of speech with these words."""
        return {"text": letters.tobytes().decode()}
