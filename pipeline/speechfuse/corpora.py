"""Where utterances come from: a folder of audio, or text that is spoken here.

A corpus has `fingerprint`, `plan(shard_size)` -> the items of each shard (JSON, frozen in the
artifact's plan) and `utterances(items)` -> Utterance or Reject for each item, in order. It is a
pure function of its configuration and the item list, so that a shard made again is the same shard.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse import artifact, audio, tts
from speechfuse.tts import Voice

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclass(frozen=True)
class Utterance:
    """`waveform`: float32 mono 16 kHz, of any length. `phonemes`: (start second, name), synthetic
    speech only."""

    id: str
    waveform: np.ndarray
    text: str | None
    speaker: str | None
    language: str | None
    source: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    phonemes: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Reject:
    """An item that gave no utterance, and why."""

    id: str
    reason: str


def _slices(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class Folder:
    """Every audio file below `path`; a file `x.txt` beside `x.wav` is its transcript."""

    def __init__(self, path: str, language: str | None = None) -> None:
        self.path, self.language = Path(path), language
        self.fingerprint = artifact.fingerprint_of_files(self.path)

    def plan(self, shard_size: int) -> list[list[str]]:
        names = sorted(
            p.relative_to(self.path).as_posix()
            for p in self.path.rglob("*")
            if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()
        )
        return _slices(names, shard_size)

    def utterances(self, items: list[str]) -> Iterator[Utterance | Reject]:
        for name in items:
            path = self.path / name
            transcript = path.with_suffix(".txt")
            try:
                waveform = audio.load(path)
                text = transcript.read_text("utf-8").strip() if transcript.is_file() else None
            except UnicodeDecodeError:
                yield Reject(name, f"{transcript.name} is not UTF-8 text")
                continue
            except ValueError as error:
                yield Reject(name, str(error).replace(str(path), name))
                continue
            source = {
                "uri": name, "offset": 0.0, "seconds": len(waveform) / audio.SAMPLE_RATE,
                "sha256": artifact.sha256_of(path),
            }  # fmt: skip
            yield Utterance(name, waveform, text, None, self.language, source)


@dataclass(frozen=True)
class VoiceGroup:
    """Voices to draw from: espeak-ng accents x variants (or flite voices), a range of rates and of
    pitches."""

    names: list[str]
    rate: tuple[int, int] = (140, 215)
    pitch: tuple[int, int] = (25, 75)

    def draw(self, rng: random.Random) -> Voice:
        return Voice(rng.choice(self.names), rng.randint(*self.rate), rng.randint(*self.pitch))


class Synthetic:
    """Lines of text spoken by espeak-ng, with light noise and gain.

    `lines`: a JSONL file {id, text, ...}; a line's `voices` names the group of `voices` that speaks
    it, other keys are kept in `extra`. `splits`: which lines (by their `split`); null for all.
    Voice, noise and gain of a line depend only on `seed` and its id. Groups named in
    `optional_voices` need flite; without flite their lines are left out, which is said.
    """

    def __init__(
        self,
        lines: str,
        voices: dict[str, dict[str, Any]],
        splits: list[str] | None = None,
        optional_voices: list[str] | None = None,
        snr: tuple[float, float] = (20.0, 40.0),
        gain: tuple[float, float] = (-10.0, 0.0),
        seed: int = 0,
    ) -> None:
        path = Path(lines)
        if not path.is_file():
            raise FileNotFoundError(f"no lines to speak at {lines}")
        self.voices = {name: voice_group(**spec) for name, spec in voices.items()}
        self.snr, self.gain, self.seed = snr, gain, seed
        skipped = [] if tts.flite_available() else list(optional_voices or [])
        if skipped:
            print(f"flite is not installed: lines for the voices {', '.join(skipped)} are left out")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        self.rows = {
            row["id"]: row
            for row in rows
            if (splits is None or row["split"] in splits) and row["voices"] not in skipped
        }
        for row in self.rows.values():
            if row["voices"] not in self.voices:
                raise ValueError(
                    f"{lines}: line {row['id']} wants the voices {row['voices']!r}; "
                    f"configured are {sorted(self.voices)}"
                )
        key = json.dumps([artifact.sha256_of(path), skipped])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

    def plan(self, shard_size: int) -> list[list[str]]:
        return _slices(list(self.rows), shard_size)

    def utterances(self, items: list[str]) -> Iterator[Utterance | Reject]:
        # espeak-ng carries state from one utterance to the next, so every shard starts a new one
        with tts.Espeak() as engine:
            for id in items:
                row = self.rows[id]
                rng = random.Random(f"{self.seed}/{id}")
                voice = self.voices[row["voices"]].draw(rng)
                speech = tts.speak(engine, row["text"], voice)
                waveform = disturb(
                    speech.waveform, rng.uniform(*self.snr), rng.uniform(*self.gain), rng
                )
                known = ("id", "text")
                source = {
                    "uri": f"synthetic:{voice.name}",
                    "seconds": len(waveform) / audio.SAMPLE_RATE,
                }
                yield Utterance(
                    id,
                    waveform,
                    row["text"],
                    f"{voice.name}/{voice.rate}/{voice.pitch}",
                    "en",
                    source,
                    {key: value for key, value in row.items() if key not in known},
                    speech.phonemes,
                )


def voice_group(
    variants: list[str],
    accents: list[str] | None = None,
    rate: tuple[int, int] = (140, 215),
    pitch: tuple[int, int] = (25, 75),
) -> VoiceGroup:
    """From configuration: espeak-ng `accents` x `variants`, or without accents full voice names."""
    names = (
        [f"{accent}+{variant}" for accent in accents for variant in variants]
        if accents
        else variants
    )
    return VoiceGroup(list(names), (rate[0], rate[1]), (pitch[0], pitch[1]))


def disturb(waveform: np.ndarray, snr: float, gain: float, rng: random.Random) -> np.ndarray:
    """Add white noise at `snr` dB below the speech and change the level by `gain` dB; peaks are
    kept below 1."""
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(waveform))
    power = float(np.mean(np.square(waveform))) + 1e-12
    noisy = waveform + noise * np.sqrt(power / 10 ** (snr / 10))
    noisy *= 10 ** (gain / 20)
    return (noisy / max(1.0, float(np.abs(noisy).max()))).astype(np.float32)
