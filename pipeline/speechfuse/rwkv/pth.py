"""BlinkDL's `.pth` files, which the official runtime and RWKV's trainers read and write.

In: a file. Out: its sizes and its tensors, under the names and in the shapes that it has them. A
learned initial state is in it as `blocks.N.att.time_state` (heads, value, key).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechfuse import failures
from speechfuse.rwkv.model import Rwkv, Shape

MODEL_TYPE = "speechfuse_rwkv"  # in config.json of a folder
STATE = "time_state"  # how its names end
RANKS = {  # the tensors, of `att` of the last layer, whose second size is that rank
    6: {"mix": "time_maa_w1", "decay": "time_decay_w1"},
    7: {"decay": "w1", "rate": "a1", "value": "v1", "gate": "g1"},
}
UNUSED = re.compile(r"blocks[.]0[.]att[.]v[012]")  # in some files; the first layer does not mix


def is_state(name: str) -> bool:
    """Return whether a parameter of this name is a learned initial state."""
    return name.endswith(f".{STATE}")


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises ValueError for one that is none."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {n: t for n, t in tensors.items() if not UNUSED.fullmatch(n)}
    except Exception as error:  # of many classes
        raise ValueError(f"{path} is no file of tensors ({error}); copy it again") from error


def read(path: Path) -> tuple[Shape, dict[str, Tensor]]:
    """Return the sizes and the tensors of a file. Raises ValueError for one that is no RWKV-6 or
    RWKV-7, or not whole."""
    tensors = load(path)
    shape = _shape_of(tensors, path)
    with torch.device("meta"):
        model = Rwkv(shape, learned_state=any(map(is_state, tensors)))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        odd = " ".join(str(error).partition(":")[2].split())[:300]
        raise ValueError(f"{path} is no whole RWKV-{shape.version}: {odd}") from None
    return shape, tensors


def set_state(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Give an Rwkv the learned `state`, zeros where that is empty. Raises ValueError for that of
    another model."""
    blocks: Any = model.blocks if isinstance(model, Rwkv) else ()
    names = [f"blocks.{layer}.att.{STATE}" for layer in range(len(blocks))]
    shapes = {name: block.att.memory for name, block in zip(names, blocks, strict=True)}
    if state and {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
        raise ValueError(
            f"{what} is the learned state of another model: its layers or sizes differ"
        )
    for name, block in zip(names, blocks, strict=True):
        value = state[name].to(block.ln1.weight.device) if state else None
        block.att.time_state = None if value is None else nn.Parameter(value)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors`, those of a model and its learned state."""
    with failures.writing(path):
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _shape_of(tensors: dict[str, Tensor], path: Path) -> Shape:
    places = [re.match(r"blocks[.](\d+)[.]att[.](time_faaaa|r_k)$", name) for name in tensors]
    found = {int(place[1]): place[0] for place in places if place}
    if not found:
        raise ValueError(f"{path} is no RWKV-6 or RWKV-7: it has neither time_faaaa nor r_k")
    name = found[max(found)]
    att, _, own = name.rpartition(".")
    version = 7 if own == "r_k" else 6
    try:
        ranks = {n: tensors[f"{att}.{t}"].shape[1] for n, t in RANKS[version].items()}
        if version == 6:
            ranks["mix"] //= 5
        (vocabulary, width), ffn = tensors["emb.weight"].shape, tensors["blocks.0.ffn.key.weight"]
        layers, heads = 1 + max(found), len(tensors[name])
        return Shape(version, vocabulary, width, layers, heads, len(ffn), ranks)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]} of RWKV-{version}") from None
