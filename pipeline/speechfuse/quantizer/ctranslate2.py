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
    for name, values in _stored(_Reader(content)):
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
    found, due = ({n: list(t.shape) for n, t in ts.items()} for ts in (made, expected))
    for name in sorted(found.keys() | due.keys()):
        if found.get(name) != due.get(name):
            raise ValueError(
                f"it is another model: {name} has the shape {found.get(name)}, not {due.get(name)}"
            )
    return made


class _Reader:
    """Takes bytes from the front. Raises ValueError where a count asks for more than there are."""

    def __init__(self, content: bytes) -> None:
        self.left = memoryview(content)

    def take(self, count: int) -> memoryview:
        if count > len(self.left):
            raise ValueError(f"it is cut short: {count:,} bytes are due, {len(self.left):,} left")
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return bytes(self.take(self.number(2))).rstrip(b"\0").decode()


def _stored(file: _Reader) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of every fp16 tensor; what is of another type are settings."""
    if (head := (file.number(4), file.text())) != (6, "WhisperSpec"):
        raise ValueError(f"it is no Whisper in CTranslate2's format 6: it begins with {head}")
    file.number(4)  # revision of WhisperSpec
    for _ in range(file.number(4)):
        name = file.text()
        shape = [file.number(4) for _ in range(file.number(1))]
        kind, content = file.number(1), file.take(file.number(4))
        if kind == FLOAT16:
            if len(content) != 2 * math.prod(shape):
                raise ValueError(f"{name} of the shape {shape} has {len(content):,} bytes")
            yield name, np.frombuffer(content, "<f2").reshape(shape)
