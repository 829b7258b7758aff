"""Augmentation: noise, rooms, lines and codecs between a speaker and a microphone.

In: a mono float32 waveform at 16 kHz, specs of steps and a seed. Out: the waveform, and the steps
that were applied, as JSON. A step is named by dotted path and applied with `probability` (default
1):

    augmentation:
      - {_component_: speechfuse.audio.Reverberation, decay: [0.2, 0.6], probability: 0.3}
      - {_component_: speechfuse.audio.Noise, snr: [5, 30], probability: 0.5}
      - {_component_: speechfuse.audio.Lossy, probability: 0.2}

Every value is drawn from its range; the same seed gives the same samples.
"""

import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.components import Decibels, Positive, PositiveRange, SecondsRange, ShareRange

Augmented = tuple[np.ndarray, dict[str, Any]]  # the waveform, {"name", drawn values}


def apply(
    waveform: np.ndarray, specs: list[dict[str, Any]], seed: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Apply the steps in order, then lower the whole waveform where its peak is over full scale.

    Returns float32 samples and {"name", drawn values} of each step that was applied. Each step has
    a random stream of its own: one more at the end changes none before it.
    """
    records = []
    for i, spec in enumerate(specs):
        rng = np.random.default_rng([seed, i])
        if rng.random() < spec.get("probability", 1.0):
            waveform, record = _step(json.dumps(spec))(waveform, rng)
            records.append(record)
    peak = float(np.abs(waveform).max(initial=0))
    return (waveform / max(1.0, peak)).astype(np.float32), records


def check(specs: list[dict[str, Any]]) -> str | None:
    """A hash of the names and sizes of all files in the folders that the steps read, for the job's
    fingerprint; None without folders. Raises ValueError for a step that cannot work (unknown key,
    range, folder without audio, format that libsndfile cannot write)."""
    digest = hashlib.sha256()
    folders = []
    for spec in specs:
        probability = spec.get("probability", 1.0)
        if not isinstance(probability, int | float) or not 0 <= probability <= 1:
            raise ValueError(f"{spec.get('_component_')}: probability={probability!r}: give 0 to 1")
        step, rng = _step(json.dumps(spec)), np.random.default_rng(0)
        result, _ = step(0.1 * white(decoding.SAMPLE_RATE // 2, rng).astype(np.float32), rng)
        if not np.isfinite(result).all():
            raise ValueError(f"{spec['_component_']}: {vars(step)} makes NaN or infinity")
        if folder := getattr(step, "folder", None):
            folders.append(folder)
            for path in _files(folder):
                name = path.relative_to(folder).as_posix()
                digest.update(f"{name} {path.stat().st_size}\n".encode())
    return digest.hexdigest() if folders else None


@cache
def _step(spec: str) -> Callable[[np.ndarray, np.random.Generator], Augmented]:
    arguments = json.loads(spec)
    arguments.pop("probability", None)
    return config.instantiate(arguments)


def _draw(rng: np.random.Generator, bounds: Decibels) -> float:
    # rounded before it is used: what is recorded is what was done
    return round(float(rng.uniform(*bounds)), 3)


@cache
def _files(folder: str) -> list[Path]:
    """Audio files below `folder`, in order. Raises ValueError when there is none."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in decoding.SUFFIXES]
    if not files:
        raise ValueError(f"folder={folder}: there is no audio in it")
    return files


def _recording(folder: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    files = _files(folder)
    path = files[rng.integers(len(files))]
    return decoding.load(path), path.relative_to(folder).as_posix()


def white(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of equal power at every frequency; mean square 1."""
    return rng.standard_normal(samples)


def pink(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise that falls by 3 dB an octave from 20 Hz on, as wind, traffic and rooms do; mean square
    1."""
    spectrum = np.fft.rfft(white(samples, rng))
    frequencies = np.fft.rfftfreq(samples, 1 / decoding.SAMPLE_RATE)
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequencies, 20)), samples)
    return noise / max(1e-12, float(np.sqrt(np.mean(noise**2))))


def babble(samples: int, rng: np.random.Generator, talkers: int = 6) -> np.ndarray:
    """Talkers without words: for each a gliding voice pitch with its harmonics under a vowel's
    spectrum, in syllables of 2 to 6 a second; mean square 1."""
    time = np.arange(samples) / decoding.SAMPLE_RATE
    total = np.zeros(samples)
    for _ in range(talkers):
        knots = np.arange(0, samples / decoding.SAMPLE_RATE + 2, 1 / rng.uniform(2, 6))
        pitch = rng.uniform(85, 255) * rng.uniform(0.85, 1.2, len(knots))
        loud = rng.uniform(0, 1, len(knots)) ** 2
        formant = rng.uniform(300, 2500, len(knots))
        turn = np.exp(2j * np.pi * np.cumsum(np.interp(time, knots, pitch)) / decoding.SAMPLE_RATE)
        wave = np.ones(samples, complex)
        for k in range(1, 13):
            wave *= turn
            near = np.exp(-(((k * pitch - formant) / 500) ** 2)) + 0.3 / k
            total += np.interp(time, knots, loud * near) * wave.imag
    return total / max(1e-12, float(np.sqrt(np.mean(total**2)))) if samples else total


def disturb(waveform: np.ndarray, snr: float, gain: float, rng: random.Random) -> np.ndarray:
    """White noise at `snr` dB below the speech, then a gain of `gain` dB, with peaks kept below 1:
    what corpora.Synthetic does to each line."""
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(waveform))
    power = float(np.mean(np.square(waveform))) + 1e-12
    noisy = waveform + noise * np.sqrt(power / 10 ** (snr / 10))
    noisy *= 10 ** (gain / 20)
    return (noisy / max(1.0, float(np.abs(noisy).max()))).astype(np.float32)


NOISES = {"white": white, "pink": pink, "babble": babble}


@dataclass
class Noise:
    """Noise `snr` dB below the speech, powers taken over the whole clip: one of `sources` (white,
    pink, babble), or a stretch of a recording in `folder`, repeated where it is too short."""

    snr: Decibels
    sources: list[str] = field(default_factory=lambda: list(NOISES))
    folder: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sources if name not in NOISES]:
            raise ValueError(f"noise {unknown[0]!r}: choose from {', '.join(NOISES)}")

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        snr = _draw(rng, self.snr)
        if self.folder:
            recording, source = _recording(self.folder, rng)
            start = int(rng.integers(len(recording)))
            noise = np.resize(np.roll(recording, -start), len(waveform)).astype(np.float64)
        else:
            source = self.sources[rng.integers(len(self.sources))]
            noise = NOISES[source](len(waveform), rng)
        power = np.mean(np.square(waveform, dtype=np.float64)) / 10 ** (snr / 10)
        noise *= np.sqrt(power / max(1e-12, float(np.mean(noise**2))))
        return waveform + noise, {"name": "noise", "source": source, "snr": snr}


@dataclass
class Reverberation:
    """A room: an impulse response that falls by 60 dB in `decay` seconds, `wet` dB relative to the
    direct sound; or the one of a recording in `folder`. Length and loudness stay."""

    decay: SecondsRange = (0.2, 0.8)
    wet: Decibels = (-12.0, 0.0)
    folder: str | None = None

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        record: dict[str, Any] = {"name": "reverberation"}
        if self.folder:
            room, record["source"] = _recording(self.folder, rng)
            room = room[int(np.abs(room).argmax()) :].astype(np.float64)  # no delay
        else:
            decay, wet = _draw(rng, self.decay), _draw(rng, self.wet)
            time = np.arange(max(2, int(decay * decoding.SAMPLE_RATE))) / decoding.SAMPLE_RATE
            tail = white(len(time), rng) * 10 ** (-3 * time / decay)
            tail[0] = 0
            tail *= 10 ** (wet / 20) / np.sqrt(np.sum(tail**2))
            room = tail + (time == 0)
            record |= {"decay": decay, "wet": wet}
        size = 1 << max(1, len(waveform) + len(room) - 2).bit_length()
        result = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(room, size), size)
        result = result[: len(waveform)]
        level = np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))
        result *= level / max(1e-12, float(np.sqrt(np.mean(result**2))))
        return result, record


@dataclass
class Gain:
    """Louder or softer by `db` dB."""

    db: Decibels

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        db = _draw(rng, self.db)
        return waveform * 10 ** (db / 20), {"name": "gain", "db": db}


@dataclass
class Speed:
    """Faster by `factor`, and higher: as a tape does."""

    factor: PositiveRange = (0.9, 1.1)

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        factor = _draw(rng, self.factor)
        resampled = soxr.resample(waveform.astype(np.float32), factor, 1.0)
        return resampled, {"name": "speed", "factor": factor}


@dataclass
class Silence:
    """Silence before and behind, each of `seconds`."""

    seconds: SecondsRange

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        drawn = [_draw(rng, self.seconds) for _ in range(2)]
        before, behind = (round(each * decoding.SAMPLE_RATE) for each in drawn)
        return np.pad(waveform, (before, behind)), {"name": "silence", "seconds": drawn}


@dataclass
class Telephone:
    """The band of a telephone line, `low` to `high` Hz, at 8 kHz through 8 bits of mu-law."""

    low: Positive = 300.0
    high: Positive = 3400.0

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        spectrum = np.fft.rfft(waveform)
        frequencies = np.fft.rfftfreq(len(waveform), 1 / decoding.SAMPLE_RATE)
        with np.errstate(divide="ignore"):  # 4th order at either end
            spectrum /= 1 + (self.low / frequencies) ** 4 + (frequencies / self.high) ** 8
        narrow = np.fft.irfft(spectrum, len(waveform)).astype(np.float32)
        line = soxr.resample(narrow, decoding.SAMPLE_RATE, 8000)
        result = decoding.resample(_round_trip_codec(line, 8000, "WAV", "ULAW"), 8000)
        return _fit(result, len(waveform)), {"name": "telephone", "band": [self.low, self.high]}


FORMATS = {  # name: (libsndfile's format, subtype, sample rate it is written at)
    "mu-law": ("WAV", "ULAW", 16_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16_000),
    "vorbis": ("OGG", "VORBIS", 16_000),
    "opus": ("OGG", "OPUS", 16_000),
}


@dataclass
class Lossy:
    """Encoding and decoding by a lossy codec: one of `formats`, at a `compression` of 0 (best) to
    0.99 (worst) where the codec has a quality."""

    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    compression: ShareRange = (0.7, 0.99)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ValueError(f"codec {unknown[0]!r}: choose from {', '.join(FORMATS)}")
        for name in self.formats:
            if not soundfile.check_format(*FORMATS[name][:2]):
                raise ValueError(f"codec {name!r}: libsndfile here cannot write it; leave it out")

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> Augmented:
        name = self.formats[rng.integers(len(self.formats))]
        compression = _draw(rng, self.compression)
        kind, subtype, rate = FORMATS[name]
        record: dict[str, Any] = {"name": "lossy", "format": name}
        if kind != "WAV":
            record["compression"] = compression
        result = _round_trip_codec(waveform, rate, kind, subtype, record.get("compression"))
        return _fit(result, len(waveform)), record


def _round_trip_codec(
    waveform: np.ndarray, rate: int, kind: str, subtype: str, compression: float | None = None
) -> np.ndarray:
    file = io.BytesIO()
    peak = max(1.0, float(np.abs(waveform).max(initial=0)))  # codecs clip
    soundfile.write(
        file, waveform / peak, rate, format=kind, subtype=subtype, compression_level=compression
    )
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0] * peak


def _fit(waveform: np.ndarray, samples: int) -> np.ndarray:
    """Pad or cut to `samples`: codecs work in blocks."""
    return np.pad(waveform, (0, max(0, samples - len(waveform))))[:samples]
