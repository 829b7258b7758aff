"""Quality filters for tokenizing: which clips a dataset is made of, by length, level, clipping,
speech and speaking rate.

In: a clip's waveform (mono float32 at 16 kHz, before it is split) and its text, if it has one. Out:
None to keep it, else "name: why not". Named in a job's YAML, in order:

    filters:
      - {_component_: speechfuse.audio.level, min_dbfs: -50}
      - {_component_: speechfuse.audio.speech_share, min_share: 0.5}
"""

from collections.abc import Callable
from functools import cache
from math import inf, log10
from typing import Any

import numpy as np

from speechfuse.audio.decoding import SAMPLE_RATE

Filter = Callable[[np.ndarray, str | None], str | None]

FULL_SCALE = 0.99  # decoders and resampling leave clipped samples a little below 1


def duration(min_seconds: float = -inf, max_seconds: float = inf) -> Filter:
    """Keep what lasts `min_seconds` to `max_seconds`."""
    fault = _bounds("duration", "seconds", min_seconds, max_seconds, " s")
    return lambda waveform, _: fault(len(waveform) / SAMPLE_RATE)


def level(min_dbfs: float = -inf, max_dbfs: float = inf) -> Filter:
    """Keep what is `min_dbfs` to `max_dbfs` loud: the mean power of the clip, pauses included, in
    dB of a full-scale square wave (a full-scale sine has -3.0)."""
    fault = _bounds("level", "dbfs", min_dbfs, max_dbfs, " dBFS")

    def check(waveform: np.ndarray, _: str | None) -> str | None:
        power = float(np.mean(np.square(waveform), dtype=np.float64)) if len(waveform) else 0.0
        return fault(10 * log10(power) if power else -inf)

    return check


def clipping(max_share: float) -> Filter:
    """Keep what has at most `max_share` (0 to 1) of its samples at full scale. What was clipped and
    then made quieter is not seen."""
    fault = _bounds("clipping", "share", -inf, _share("max_share", max_share))
    return lambda waveform, _: fault(_mean(np.abs(waveform) >= FULL_SCALE))


def characters_per_second(min: float = -inf, max: float = inf) -> Filter:
    """Keep what has `min` to `max` characters of text a second, each space between words one of
    them: others have another text than what is said. A clip without a text is kept."""
    fault = _bounds("characters per second", "", min, max)

    def check(waveform: np.ndarray, text: str | None) -> str | None:
        if text is None:
            return None
        characters = len(" ".join(text.split()))
        return fault(characters * SAMPLE_RATE / len(waveform) if len(waveform) else inf)

    return check


def speech_share(min_share: float, threshold: float = 0.5) -> Filter:
    """Keep what is speech for at least `min_share` (0 to 1) of its time: frames of 32 ms to which
    Silero VAD gives a probability of at least `threshold`. Needs the extra `vad`. Words that stand
    alone and are shorter than half a second may have none."""
    fault = _bounds("speech share", "share", _share("min_share", min_share), inf)
    threshold, model = _share("threshold", threshold), _silero()
    return lambda waveform, _: fault(_mean(model.audio_forward(waveform) >= threshold))


@cache
def _silero() -> Any:
    """Silero VAD in its sequence form, which keeps nothing between calls: threads may share it."""
    import torch

    threads = torch.get_num_threads()
    try:
        import onnxruntime  # noqa: F401
        import silero_vad
    except ImportError:
        raise ValueError(
            "filters.speech_share needs the packages of an extra: pip install 'speechfuse[vad]'"
        ) from None
    finally:
        torch.set_num_threads(threads)  # importing silero_vad sets it to 1
    return silero_vad.load_silero_vad(sequence=True)


def _bounds(
    name: str, key: str, low: float, high: float, unit: str = ""
) -> Callable[[float], str | None]:
    """What is wrong with a value outside of `low` to `high`: "name: value is under low"."""
    keys = [f"{side}_{key}".strip("_") for side in ("min", "max")]
    if not low <= high:
        raise ValueError(f"{keys[0]}={low} is more than {keys[1]}={high}: nothing would be kept")
    if low == -inf and high == inf:
        raise ValueError(f"filter {name}: give {keys[0]} or {keys[1]}; now it keeps everything")

    def fault(value: float) -> str | None:
        if low <= value <= high:
            return None
        side = f"under {low:g}" if value < low else f"over {high:g}"
        return f"{name}: {value:.4g}{unit} is {side}"

    return fault


def _share(key: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value} is not a share: 0 to 1")
    return value


def _mean(marks: np.ndarray) -> float:
    return float(np.mean(marks)) if len(marks) else 0.0
