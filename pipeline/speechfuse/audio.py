"""Audio constants, decoding, mono, resampling and splitting.

In: an audio file, its bytes or an array. Out: mono float32 waveforms at 16 kHz, in [-1, 1].
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz; Whisper's
TOKEN_RATE = 25.0  # codes a second of every WhisperVQ
SEARCH_SECONDS = 1.0  # how far before the limit a quiet place is looked for
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
QUIET_SECONDS = 0.1  # length of the stretch whose energy is compared


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 waveform at `rate` Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return waveform.astype(np.float32, copy=False)
    return soxr.resample(waveform.astype(np.float32, copy=False), rate, SAMPLE_RATE)


@dataclass(frozen=True)
class Decoded:
    """`waveform`: float32 mono at 16 kHz. `rate` (Hz) and `channels` are the source's."""

    waveform: np.ndarray
    rate: int
    channels: int


def decode(source: Path | bytes, offset: float = 0.0, seconds: float | None = None) -> Decoded:
    """Decode a file, or the bytes of one, that libsndfile reads; channels are averaged.

    Only `seconds` from `offset` on are decoded. ValueError("kind: detail"), without the path, when
    it is absent, no audio, or holds nothing usable (the kinds of speechfuse.corpora.clip.Reject).
    """
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"not found: {'not a file' if source.exists() else 'no such file'}")
    try:
        with soundfile.SoundFile(source if isinstance(source, Path) else BytesIO(source)) as file:
            rate, channels = file.samplerate, file.channels
            file.seek(round(offset * rate))
            frames = -1 if seconds is None else round(seconds * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not audio: {error.error_string}") from None
    if len(samples) == 0:
        raise ValueError("empty: it holds 0 seconds of audio")
    if not np.isfinite(samples).all():
        raise ValueError("not finite: it holds samples that are no numbers (NaN or infinite)")
    return Decoded(resample(samples.mean(axis=1), rate), rate, channels)


def load(path: Path) -> np.ndarray:
    """The waveform of one file, float32 mono at 16 kHz; FileNotFoundError, or ValueError naming
    it."""
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    try:
        return decode(path).waveform
    except ValueError as error:
        raise ValueError(f"{path} is not usable audio: {error}") from None


def split(waveform: np.ndarray, limit: float) -> list[np.ndarray]:
    """Cut into pieces of at most `limit` seconds, each cut at the quietest 0.1 s of the last second
    before the limit. Nothing is dropped: the pieces joined are the waveform."""
    most, quiet = int(limit * SAMPLE_RATE), int(QUIET_SECONDS * SAMPLE_RATE)
    search = min(int(SEARCH_SECONDS * SAMPLE_RATE), most // 2)
    pieces = []
    while len(waveform) > most:
        energy = np.cumsum(np.square(waveform[most - search : most], dtype=np.float64))
        start = int(np.argmin(energy[quiet:] - energy[:-quiet]))
        cut = most - search + start + quiet // 2
        pieces.append(waveform[:cut])
        waveform = waveform[cut:]
    return [*pieces, waveform]
