"""Clips of a corpus, as a job reads them, and what is decoded of one."""

import json
from typing import Any

import numpy as np

from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject


def everything(corpus: Any, shard_size: int = 100) -> list[Clip | Reject]:
    """All clips, through a plan that has been JSON; each shard gives what the plan counted."""
    items = []
    for shard in json.loads(json.dumps(corpus.plan(shard_size))):
        assert 0 < shard["count"] <= shard_size
        part = list(corpus.clips(shard))
        assert len(part) == shard["count"]
        items += part
    return items


def same(clip: Clip, samples: np.ndarray) -> bool:
    """Whether exactly these 16-bit samples are decoded of a clip."""
    assert not isinstance(clip.audio, np.ndarray)
    waveform = decoding.decode(clip.audio, clip.offset, clip.seconds).waveform
    return np.array_equal(waveform * 32768, samples.astype(np.float32))
