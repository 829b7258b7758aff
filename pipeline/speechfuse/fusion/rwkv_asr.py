"""The files that RWKV-ASR publishes, rwkv-adapter-N.pth: an adapter on an encoder's frames, and the
initial state of an RWKV-6.

In: such a file, the sizes of its language model, the width of a frame. Out: both as a folder of
ours has them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechfuse.fusion.door import adapter_of
from speechfuse.rwkv import pth
from speechfuse.rwkv.model import Rwkv, Shape

MODEL = "language_model."  # before the names of the state
LAYERS = {"speech_encoder.adapter.0": "inner", "speech_encoder.adapter.2": "outer"}
NAMES = {
    f"{theirs}.{k}": f"{ours}.{k}" for theirs, ours in LAYERS.items() for k in ("weight", "bias")
}


def read(
    path: Path, shape: Shape, width: int
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter as a recipe states it, its tensors, and the state. Raises ValueError for a
    file that lacks a tensor, has one more, or is of another model or encoder."""
    tensors = pth.load(path)
    state = {n.removeprefix(MODEL): t for n, t in tensors.items() if pth.is_state(n)}
    spec: dict[str, Any] = {"_component_": "speechfuse.fusion.Stack", "width": width}
    try:
        adapter = {NAMES[name]: t for name, t in tensors.items() if not pth.is_state(name)}
        hidden, inputs = adapter["inner.weight"].shape
        spec |= {"stack": inputs // width, "hidden": hidden, "plain": True}
        # there a number of all stacked frames comes before the next number, here frame after frame
        adapter["inner.weight"] = adapter["inner.weight"].unflatten(1, (width, -1)).mT.flatten(1)
        adapter_of(spec, shape.hidden_size).load_state_dict(adapter)
    except (KeyError, RuntimeError) as error:
        odd = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is no adapter of RWKV-ASR from frames of {width} numbers to a language model "
            f"of {shape.hidden_size}: {odd}"
        ) from None
    if not state:
        raise ValueError(f"{path} has no initial state of a language model")
    with torch.device("meta"):
        pth.set_state(Rwkv(shape, learned_state=True), state, str(path))
    return spec, adapter, state
