"""Rows whose frames are made while a training runs: each finds its waveform again.

In: rows of speech with `source`, as stages.encode_speech and stages.tokenize_speech write them, and
the folder of the recordings that they were made of. Out: samples with as many places as the
recipe's encoder makes vectors, a pure function of the row; their waveforms are read, and augmented,
when a step needs them. Audio files alone are read again: no members of tars, rows of tables,
recordings on the Hub or speech that a corpus synthesizes.
"""

import hashlib
from dataclasses import replace
from functools import lru_cache, partial
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import soundfile

from speechfuse import artifact
from speechfuse.audio import augmentation as augmenting
from speechfuse.audio import decoding
from speechfuse.fusion import views
from speechfuse.fusion.adapters import count, positions
from speechfuse.fusion.door import FRAME
from speechfuse.samples.view import Sample, View
from speechfuse.tokens.vocabulary import Vocabulary

SLACK = decoding.SAMPLE_RATE // 1000  # samples by which a resampled part may differ in length


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, size: int, changed: int) -> str:
    return artifact.sha256_of(path)


@lru_cache(maxsize=1 << 16)
def _end(path: Path, size: int, changed: int) -> float:
    """Return the length in seconds that the header of a WAV or FLAC file states; of others inf."""
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError:
        return inf
    return info.duration if info.format in ("WAV", "FLAC") and info.frames else inf


def file_of(row: dict[str, Any], root: Path | None) -> Path:
    """Return the file below `root` that holds the recording of a speech row. Raises
    FileNotFoundError, which no index keeps as a fault of the row, where it is not there, and where
    it is another file than that of which the row was made."""
    source = row.get("source") or {}
    name = PurePosixPath(source.get("uri") or "..")
    if root is None or name.is_absolute() or ".." in name.parts or not (root / name).is_file():
        raise FileNotFoundError(
            f"row {row['id']}: its recording {name} is no file below {root}: set runtime.roots to "
            "{DATASET: folder of its corpus}; what was in a tar, a table or on the Hub, or "
            "synthesized, is not read again"
        )
    path, sha256 = root / name, source.get("sha256")
    stat = path.stat()
    version = path, stat.st_size, stat.st_mtime_ns
    end = source["offset"] + source["seconds"]
    if not sha256 and end > _end(*version) + decoding.SLACK:  # as of a part of it
        raise FileNotFoundError(
            f"row {row['id']}: {path} ends at {_end(*version):.2f} s, and the row was made of one "
            f"that has {end:.2f} s: put that back, or make the dataset again"
        )
    if sha256 and _digest(*version) != sha256:
        raise FileNotFoundError(
            f"row {row['id']}: {path} is not the recording that the row was made of (its sha256 is "
            "another): put that back, or make the dataset again"
        )
    return path


def waveform_of(row: dict[str, Any], root: Path | None) -> np.ndarray:
    """Return the waveform of a speech row, float32 at 16 kHz, as it was encoded; parts of a
    recording that was resampled are equal but for their edges. Raises as `file_of`, and ValueError
    for a recording that is no audio or of another length."""
    path, source, samples = file_of(row, root), row["source"], samples_of(row)
    whole = source["sha256"] and row["part"] is None
    try:
        part = () if whole else (source["offset"], source["seconds"])
        waveform = decoding.decode(path, *part).waveform
    except ValueError as error:
        raise ValueError(f"row {row['id']}: {path}: {error}") from None
    if abs(len(waveform) - samples) > SLACK:
        raise ValueError(
            f"row {row['id']}: {path} gives {len(waveform):,} samples, and the row has places for "
            f"{samples:,}: make the dataset again"
        )
    return np.pad(waveform[:samples], (0, max(0, samples - len(waveform))))


def samples_of(row: dict[str, Any]) -> int:
    """Return the number of samples of a speech row's waveform at 16 kHz."""
    return round(row["source"]["seconds"] * decoding.SAMPLE_RATE)


def recordings(
    vocabulary: Vocabulary,
    path: str,
    turns: dict[str, Any],
    stack: int,
    augmentation: list[dict[str, Any]] | None = None,
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
    encoder: dict[str, Any] | None = None,
    root: str | None = None,
    prompt: int = 0,
) -> View:
    """Rows of speech made into conversations by `turns`, as fusion.speech, whose frames the
    recipe's encoder makes. `augmentation`: steps of speechfuse.audio, drawn anew for each step of
    the training by row; none may change the length. The training itself gives `encoder` (its
    stream, window and steps) and `root` (of runtime.roots; by default the corpus that the manifest
    names). Raises as `file_of` for a row whose recording is not there or another."""
    if encoder is None:
        raise ValueError(f"{path}: the recipe has no encoder, which is to make its frames: set it")
    corpus = artifact.manifest_of(Path(path)).get("config", {}).get("corpus", {})
    named = root or corpus.get("audio_dir") or corpus.get("path")
    folder = Path(named) if isinstance(named, str) else None
    steps = augmentation or []
    augmenting.check(steps)
    _check_length(steps)
    stream = {name: encoder[name] for name in ("encoder", "frame_rate", "width")}
    return views.conversations_of(
        vocabulary,
        Path(path),
        turns,
        select,
        train_on,
        partial(_places, encoder=encoder, stack=stack, root=folder),
        (stream, stack, prompt),
        partial(_at_step, root=folder, steps=steps),
    )


def _check_length(steps: list[dict[str, Any]]) -> None:
    probe = np.linspace(-0.1, 0.1, decoding.SAMPLE_RATE, dtype=np.float32)
    for step in steps:
        if len(augmenting.apply(probe, [step | {"probability": 1.0}], 0)[0]) != len(probe):
            raise ValueError(
                f"augmentation: {step['_component_']} changes the length of a waveform, and so the "
                "number of its frames, which the plan of a training needs beforehand: leave it out"
            )


def _places(
    speech: dict[str, Any],
    clips: list[dict[str, Any]],
    encoder: dict[str, Any],
    stack: int,
    root: Path | None,
) -> list[int]:
    """Return the ids that stand for a speech segment, FRAME for each vector; its row is added to
    `clips`."""
    file_of(speech, root)
    if speech["source"]["seconds"] > encoder["window"]:
        raise ValueError(
            f"row {speech['id']} has {speech['source']['seconds']:.2f} s, and the encoder takes "
            f"{encoder['window']:g} s at most: make the dataset with that encoder"
        )
    frames = count(samples_of(speech), encoder["steps"])
    cached = len(speech.get("frames") or b"") / 2 / encoder["width"]  # float16
    if cached and cached != frames:
        raise ValueError(
            f"row {speech['id']} has {cached:g} frames, and its {samples_of(speech):,} samples are "
            f"{frames}: it was encoded by another encoder, or its source is not its own"
        )
    clips.append({name: speech[name] for name in ("id", "part", "source")})
    return [FRAME] * positions(frames, stack)


def _at_step(
    sample: Sample, step: int, root: Path | None, steps: list[dict[str, Any]]
) -> views.SplicedSample:
    """Return the sample with waveforms as they are heard in `step`: by row and step alone, so that
    ranks, workers and stops change nothing."""
    assert isinstance(sample, views.SplicedSample)
    waveforms = []
    for row in sample.audio:
        waveform = waveform_of(row, root)
        if steps:
            digest = hashlib.sha256(f"{step}/{row['id']}".encode()).digest()
            waveform, _ = augmenting.apply(waveform, steps, int.from_bytes(digest[:8]))
        waveforms.append(waveform)
    return replace(sample, audio=tuple(waveforms))
