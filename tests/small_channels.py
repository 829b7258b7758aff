"""A model of two channels small enough for tests: sessions of random frames, and its recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse.rows import shards
from tests.small_sessions import CODEC
from tests.small_training import FROZEN, LORA, WORDS, dataset, fused, make_parts, recipe

WIDTH, STACK, WINDOW = 6, 2, 20
FRAMES = {"encoder": "e" * 64, "frame_rate": 25.0, "width": WIDTH}
ADAPTER = {
    "_component_": "speechfuse.fusion.Channels",
    "width": WIDTH,
    "stack": STACK,
    "hidden": 16,
    "codebooks": 2,
    "codebook_size": 256,
    "window": WINDOW,
    "padding_weight": 0.5,
}


def session_row(number: int, kind: str = "answer") -> dict[str, Any]:
    rng = np.random.default_rng(number)
    word, start = WORDS[number % 8], 0.4 + 0.08 * int(rng.integers(8))
    codes = rng.integers(0, 256, (10, 2))
    turns = [
        {"role": "user", "text": word, "start": 0.1, "end": 0.3},
        {"role": "assistant", "text": word, "start": start, "end": start + 0.8},
    ]
    turns[1]["codes"] = codes.flatten().tolist()
    frames = rng.standard_normal((60 + number % 3, WIDTH)).astype(np.float16)
    extra = {"turns": turns, "kind": kind, "seconds": 2.4}
    row = {"id": f"{kind}{number}", "seconds": 2.4, "text": "", "extra": json.dumps(extra)}
    return row | {"frames": frames.tobytes()}


def parts_of(folder: Path) -> Path:
    """The parts of small_training, and sessions/."""
    rows = [session_row(i) for i in range(24)] + [session_row(i, "reading") for i in range(24, 32)]
    dataset(make_parts(folder) / "sessions", shards.FRAMES, rows, FRAMES)
    return folder


def duplex(parts: Path, out: Path, **changes: Any) -> Path:
    """A recipe of a training on the sessions and texts."""
    entries = [
        fused("duplex", parts / "sessions", 0.7, codec=CODEC, stack=STACK),
        fused("conversations", parts / "texts", 0.3),
    ]
    keys = {"checkpoint": str(parts / "init"), "model": LORA, "datasets": entries}
    keys |= {"adapter": ADAPTER, "freeze": FROZEN, "step": "speechfuse.train.next_frame"}
    return recipe(parts, out, **keys | changes)
