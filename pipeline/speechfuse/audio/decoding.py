"""Audio constants, decoding, mono, resampling and splitting.

In: an audio file, its bytes or an array. Out: mono float32 waveforms at 16 kHz. Full scale is 1;
decoders of lossy formats overshoot it, and the overshoot is kept.
libsndfile reads most formats. What it does not read and ffmpeg does (m4a, webm, wma ...) is used
where an `ffmpeg` is on the path.
"""

import errno
import io
import stat
import tempfile
from collections import deque
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import soxr

from speechfuse.audio import containers

SAMPLE_RATE = 16_000  # Hz; Whisper's
TOKEN_RATE = 25.0  # codes a second of every WhisperVQ
SEARCH_SECONDS = 1.0  # how far before the limit a quiet place is looked for
QUIET_SECONDS = 0.1  # length of the stretch whose energy is compared
SUFFIXES = tuple(
    ".wav .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64 .sph .mp2 "
    ".m4a .m4b .mp4 .aac .webm .mka .wma .amr .3gp".split()  # these by ffmpeg
)
RATES = (4_000, 768_000)  # Hz; plausible sample rates
LOUDEST = 8.0  # samples beyond are on another scale, as float samples from -32768 to 32767
SLACK = 0.1  # seconds that may be missing at the end: durations in manifests are rounded
ENOUGH = 11_025  # frames of a second in which channels are compared
STRETCH = 0.25  # seconds in which channels are compared with their mix
CANCELLED = 0.1  # share of the power that channels without relation would leave in their mix
PAUSE = 1e-3  # share of the loudest stretch's power under which nobody speaks
# speech under a steady noise is looked for in bands of 225 Hz, 1.5 seconds at a time
BANDS = np.linspace(200, 3800, 17)  # Hz; the edges
FRAME = 0.064  # seconds
FRAMES = 24
RISE = 4.0  # times the power of a band's quiet fifth; a steady sound stays below
AUDIBLE = 1e-4  # share of the loudest band's power; below is a codec's own noise
CANCELLED_BAND = 0.4  # as CANCELLED, in one band of one frame

# no file's fault: the last ones are of the disk that a copy is written to
_OF_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 waveform at `rate` Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return waveform.astype(np.float32, copy=False)
    return soxr.resample(waveform.astype(np.float32, copy=False), rate, SAMPLE_RATE)


Powers = tuple[list[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Decoded:
    """`waveform`: float32 mono at 16 kHz. `rate` (Hz) and `channels` are the source's; `channel`:
    the one that was used alone, because the channels cancel each other."""

    waveform: np.ndarray
    rate: int
    channels: int
    channel: int | None = None


def decode(source: Path | bytes, offset: float = 0.0, seconds: float | None = None) -> Decoded:
    """Decode an audio file, or the bytes of one, whatever its name; channels are averaged.

    Where channels cancel each other in their average, or the speech in them does so under a noise
    that they share, the loudest that holds all of the sound is used alone. Only `seconds` from
    `offset` on are decoded, block by block, so that of a long file only the result is in memory.
    The samples are the decoder's, neither clipped nor scaled. Raises
    ValueError("kind: detail"), without the path, for a file that is absent, no audio, not what its
    header states, or of which no channel has all; kinds as in speechfuse.rows.rejects.Reject.
    """
    if not 0 <= offset < 1e9 or (seconds is not None and not 0 < seconds < 1e9):
        raise ValueError(f"bad offset: from {offset} s on, for {seconds} s")
    try:
        with _opened(source) as handle:
            decoded, powers = _decode(handle, offset, seconds, None)
            if (column := _audible(*powers)) > 0:
                decoded, _ = _decode(handle, offset, seconds, column - 1)
            return decoded
    except soundfile.LibsndfileError as error:
        if error.code == 24:
            raise ValueError("bad rate: its header has no sample rate that could be") from None
        # codes 2 and 7 (no such file) are what libsndfile says of damaged files that are here
        why = "Format not recognised." if error.code in (2, 7) else error.error_string
        raise ValueError(f"not audio: {why}") from None
    except OSError as error:
        if error.errno in _OF_MACHINE:
            raise
        raise ValueError(f"unreadable: {error.strerror}") from None


def _opened(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, Path):
        check_file(source)  # to open a named pipe would wait for ever
        return open(source, "rb", buffering=0)
    copy = tempfile.NamedTemporaryFile(buffering=0)
    Path(copy.name).write_bytes(source)
    return copy


def check_file(path: Path) -> None:
    """Raises ValueError("kind: detail") when `path` is no regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):  # ValueError: no file can have this name
        what = "a link to nothing" if path.is_symlink() else "no such file"
        raise ValueError(f"not found: {what}") from None
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ValueError(f"not a file: {what}")


def _decode(
    handle: IO[bytes], offset: float, seconds: float | None, channel: int | None
) -> tuple[Decoded, Powers]:
    """Return what is decoded, of all channels or of one, and the `_powers` and `_band_powers`."""
    end = inf if seconds is None else offset + seconds
    with containers.stream(handle.fileno(), handle.name, end) as file:
        return _read(file, handle.fileno(), offset, seconds, channel)


def _read(
    file: containers.Forward, fd: int, offset: float, seconds: float | None, channel: int | None
) -> tuple[Decoded, Powers]:
    rate, channels = file.samplerate, file.channels
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"bad rate: {rate} Hz; {RATES[0]:,} to {RATES[1]:,} Hz are used")
    if start := round(offset * rate):
        try:
            file.seek(start)
        except soundfile.LibsndfileError:  # beyond the end, or a codec or pipe that cannot
            deque(containers.blocks(file, start), maxlen=0)
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32") if rate != SAMPLE_RATE else None
    pieces, frames = [], 0
    powers: Powers = ([], [])
    for samples in containers.blocks(file, inf if seconds is None else round(seconds * rate)):
        peak = np.abs(samples).max()
        if not np.isfinite(peak):
            raise ValueError("not finite: it holds samples that are no numbers (NaN or infinite)")
        if peak > LOUDEST:
            raise ValueError(f"out of range: a sample is {peak:.6g}, full scale is 1")
        frames += len(samples)
        mono = samples.mean(axis=1)
        if channels > 1:
            powers[0].append(_powers(mono, samples, rate))
            powers[1].append(_band_powers(samples, rate))
        if channel is not None:
            mono = samples[:, channel].copy()
        pieces.append(stream.resample_chunk(mono) if stream else mono)
    end = offset + frames / rate
    if not frames and offset:
        raise ValueError(f"bad offset: it begins at {offset:.2f} s, after the end of the audio")
    if not frames:
        raise ValueError("empty: it holds 0 seconds of audio")
    if seconds is not None and not offset and end < seconds - SLACK:
        raise ValueError(f"bad duration: {seconds:.2f} s, and there are {end:.2f} s of audio")
    if seconds is not None and end < offset + seconds - SLACK:
        raise ValueError(f"bad offset: to {offset + seconds:.2f} s of {end:.2f} s of audio")
    if seconds is None and (why := containers.cut_short(file, fd, end, SLACK)):
        raise ValueError(f"truncated: {end:.2f} s decode; {why}")
    if stream:
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return Decoded(np.concatenate(pieces), rate, channels, channel), powers


def _powers(mono: np.ndarray, samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the power of the mix and of each channel (stretches, 1 + channels), without their
    constant part. `ENOUGH` frames of a second are enough for it."""
    step = max(1, rate // ENOUGH)
    rows = np.concatenate([mono[None, ::step], samples[::step].T])
    parts = np.array_split(rows, max(1, round(len(mono) / (STRETCH * rate))), axis=1)
    squares = [np.einsum("ij,ij->i", part, part) / part.shape[1] for part in parts]
    return np.array(squares) - np.square([part.mean(axis=1) for part in parts])


def _band_powers(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the power of the mix, and what channels without relation would leave in it (frames, 2,
    bands). Left-out frames fold higher bands into these, in all channels alike."""
    step = max(1, rate // ENOUGH)
    samples, rate = samples[::step], rate // step
    size = round(FRAME * rate)
    count = max(1, len(samples) // size)
    framed = np.zeros((count * size, samples.shape[1]), np.float32)
    framed[: len(samples)] = samples[: len(framed)]
    window = np.hanning(size).astype(np.float32)[:, None]
    spectra = np.fft.rfft(framed.reshape(count, size, -1) * window, axis=1)
    mix = np.square(np.abs(spectra.mean(axis=2)))
    unrelated = np.square(np.abs(spectra)).mean(axis=2) / samples.shape[1]
    sums = np.cumsum(np.stack([mix, unrelated], axis=1), axis=2, dtype=np.float64)
    edges = np.searchsorted(np.fft.rfftfreq(size, 1 / rate), BANDS)
    return np.diff(sums[..., edges - 1], axis=2)


def _audible(powers: list[np.ndarray], of_bands: list[np.ndarray]) -> int:
    """Return the column of `_powers` that is heard wherever there is sound: that of the mix, or the
    first of the channels, the loudest first. Raises ValueError when there is none."""
    if not powers:
        return 0
    stretches = np.concatenate(powers)
    loudness = stretches[:, 1:].mean(axis=1)
    stretches = stretches[loudness > PAUSE * loudness.max()]
    least = CANCELLED * stretches[:, 1:].mean(axis=1) / (stretches.shape[1] - 1)
    channels = 1 + np.argsort(-stretches[:, 1:].sum(axis=0), kind="stable")
    mix = [] if _speech_is_cancelled(np.concatenate(of_bands)) else [0]
    for column in [*mix, *channels]:
        if (stretches[:, column] >= least).all():
            return int(column)
    raise ValueError("cancelled: its channels cancel each other, and none of them has all sound")


def _speech_is_cancelled(powers: np.ndarray) -> bool:
    """Return True if in some seconds the mix lacks most of what rises above the steady sound, each
    band weighing the same: the total hides speech that is inverted between channels under a hum or
    noise that is not. A delay between channels cancels less than half of the bands."""
    heard = AUDIBLE * powers[:, 1].max()
    for part in np.array_split(powers, max(1, round(len(powers) / FRAMES))):
        mix, unrelated = part[:, 0], part[:, 1]
        rises = (unrelated > RISE * np.percentile(unrelated, 20, axis=0)) & (unrelated > heard)
        if rises.sum() < len(BANDS):
            continue  # too few to tell
        weights = rises * unrelated / np.maximum(unrelated.mean(axis=0), np.finfo(float).tiny)
        if 2 * weights[mix < CANCELLED_BAND * unrelated].sum() > weights.sum():
            return True
    return False


def load(path: Path) -> np.ndarray:
    """The waveform of one file, float32 mono at 16 kHz. Raises FileNotFoundError, and ValueError
    that names a file without readable audio."""
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    try:
        return decode(path).waveform
    except ValueError as error:
        raise ValueError(f"{path} is not a readable audio file: {error}") from None


def encode(waveform: np.ndarray, container: str) -> bytes:
    """The bytes of a file of a mono waveform at 16 kHz, in 16 bits; `container`: WAV or FLAC."""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLE_RATE, format=container, subtype="PCM_16")
    return file.getvalue()


def spoken(waveform: np.ndarray) -> np.ndarray:
    """Return a recording from its first loud moment to its last, and 0.1 s on either side. Loud is
    what is above a twentieth of the loudest 20 ms, and above three times the quietest, which is the
    noise, up to a fifth. A recording that is everywhere as loud, or silent, is returned whole."""
    step = SAMPLE_RATE // 50
    moments = waveform[: len(waveform) // step * step].reshape(-1, step)
    level = np.sqrt(np.square(moments, dtype=np.float64).mean(1))
    most, least = level.max(initial=0), level.min(initial=np.inf)
    loud = np.flatnonzero(level > max(0.05 * most, min(3 * least, 0.2 * most)))
    if not len(loud):
        return waveform
    return waveform[max(0, loud[0] - 5) * step : (loud[-1] + 6) * step]


def split(waveform: np.ndarray, limit: float) -> list[np.ndarray]:
    """Cut into pieces of at most `limit` seconds, each cut at the quietest 0.1 s of the last second
    before the limit. Nothing is dropped: the pieces joined are the waveform."""
    most = int(limit * SAMPLE_RATE)
    search = min(int(SEARCH_SECONDS * SAMPLE_RATE), most // 2)
    quiet = min(int(QUIET_SECONDS * SAMPLE_RATE), search // 2)
    pieces = []
    while len(waveform) > most:
        energy = np.cumsum(np.square(waveform[most - search : most], dtype=np.float64))
        start = int(np.argmin(energy[quiet:] - energy[:-quiet]))
        cut = most - search + start + quiet // 2
        pieces.append(waveform[:cut])
        waveform = waveform[cut:]
    return [*pieces, waveform]
