"""Audio constants, decoding, mono, resampling and splitting.

In: an audio file or array. Out: mono float32 waveforms at 16 kHz, in [-1, 1], no longer than a
window.
"""

from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz; Whisper's
TOKEN_RATE = 25.0  # codes a second of every WhisperVQ
SEARCH_SECONDS = 1.0  # how far before the limit a quiet place is looked for
QUIET_SECONDS = 0.1  # length of the stretch whose energy is compared


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 waveform at `rate` Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return waveform.astype(np.float32, copy=False)
    return soxr.resample(waveform.astype(np.float32, copy=False), rate, SAMPLE_RATE)


def load(path: Path) -> np.ndarray:
    """Decode any file libsndfile reads; channels are averaged. Returns float32 at 16 kHz.

    FileNotFoundError when absent; ValueError when it is not audio or holds no sample.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    try:
        waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable audio file: {error.error_string}") from None
    if len(waveform) == 0:
        raise ValueError(f"{path} holds 0 seconds of audio")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{path} holds samples that are no numbers (NaN or infinite)")
    return resample(waveform.mean(axis=1), rate)


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
