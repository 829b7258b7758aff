"""Whisper models in CTranslate2's format (model.bin, as faster-whisper has them).

In: the bytes of a model.bin, and the dimensions it should have. Out: its tensors under the names of
openai-whisper. The format holds names, shapes and numbers; no code in it is run.
"""

import math
import re
from collections.abc import Iterator

import numpy as np
from whisper.model import ModelDimensions, Whisper

TINY_EN = ModelDimensions(80, 1500, 384, 6, 4, 51_864, 448, 384, 6, 4)
FLOAT16 = 4  # CTranslate2's number for it
PLACES = {  # in CTranslate2's names: in openai-whisper's, several where matrices are stacked
    "self_attention/layer_norm": ["attn_ln"],
    "self_attention/linear_0": ["attn.query", "attn.key", "attn.value"],
    "self_attention/linear_1": ["attn.out"],
    "attention/layer_norm": ["cross_attn_ln"],
    "attention/linear_0": ["cross_attn.query"],
    "attention/linear_1": ["cross_attn.key", "cross_attn.value"],
    "attention/linear_2": ["cross_attn.out"],
    "ffn/layer_norm": ["mlp_ln"],
    "ffn/linear_0": ["mlp.0"],
    "ffn/linear_1": ["mlp.2"],
    "embeddings": ["token_embedding"],
    "position_encodings": ["positional_embedding"],
    "encoder/layer_norm": ["ln_post"],
    "decoder/layer_norm": ["ln"],
}
PARTS = {"gamma": ".weight", "beta": ".bias", "encodings": ""}
_NAME = re.compile(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)")


def read_whisper(content: bytes, dims: ModelDimensions) -> dict[str, np.ndarray]:
    """Return the tensors of a model.bin, fp16, under openai-whisper's names; they are views of
    `content`. Raises ValueError unless it is a Whisper of `dims`."""
    made = {}
    for name, values in _stored(content):
        if not (match := _NAME.fullmatch(name)):
            raise ValueError(f"it is another model: it has a tensor {name!r}")
        side, layer, place, part = match.groups()
        places = PLACES.get(place) or PLACES.get(f"{side}/{place}", [place])
        prefix = f"{side}.blocks.{layer}." if layer else f"{side}."
        for each, share in zip(places, np.array_split(values, len(places)), strict=True):
            made[f"{prefix}{each}{PARTS.get(part, f'.{part}')}"] = share
    for name in [n for n, values in made.items() if n.endswith("key.bias") and not values.any()]:
        del made[name]  # Whisper's keys have no bias
    expected = Whisper(dims).state_dict()
    for name in sorted(made.keys() | expected.keys()):
        found, due = (list(of[name].shape) if name in of else None for of in (made, expected))
        if found != due:
            raise ValueError(f"it is another model: {name} has the shape {found}, not {due}")
    return made


def _stored(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of every fp16 tensor; what is of another type are settings. Raises
    ValueError where a count asks for more bytes than there are."""
    left = memoryview(content)

    def take(count: int) -> memoryview:
        nonlocal left
        if count > len(left):
            raise ValueError(f"it is cut short: {count:,} bytes are due, {len(left):,} left")
        taken, left = left[:count], left[count:]
        return taken

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def text() -> str:
        return bytes(take(number(2))).rstrip(b"\0").decode()

    if (head := (number(4), text())) != (6, "WhisperSpec"):
        raise ValueError(f"it is no Whisper in CTranslate2's format 6: it begins with {head}")
    number(4)  # revision of WhisperSpec
    for _ in range(number(4)):
        name, shape = text(), [number(4) for _ in range(number(1))]
        kind, values = number(1), take(number(4))
        if kind == FLOAT16:
            if len(values) != 2 * math.prod(shape):
                raise ValueError(f"{name} of the shape {shape} has {len(values):,} bytes")
            yield name, np.frombuffer(values, "<f2").reshape(shape)
