"""What every corpus gives: clips that are not decoded yet, and rejects.

A corpus is any class with

    fingerprint   what makes it this corpus: a declared revision, or sorted relative paths and sizes
    source_name   for the data card
    licence       for the data card; None where it is not stated
    plan(shard_size)  -> one dict a shard: {"count": clips, ...what `clips` needs}; frozen in the
                  artifact's plan.json
    clips(shard)  -> Clip or Reject for each, in order

`clips` is a pure function of the configuration and the shard, so that a shard made again is the
same shard; it opens and slices but does not decode, so it is cheap and holds one clip at a time.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Clip:
    """One recording. `audio`: an audio file, the bytes of one, or mono float32 samples at 16 kHz.

    `offset` and `seconds` say which part of it is the clip (None: to its end). `uri` is relative to
    the corpus, or a Hub path. `phonemes`: (start second, name), synthetic speech only.
    """

    id: str
    audio: Path | bytes | np.ndarray
    uri: str
    offset: float = 0.0
    seconds: float | None = None
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    phonemes: list[tuple[float, str]] = field(default_factory=list)
