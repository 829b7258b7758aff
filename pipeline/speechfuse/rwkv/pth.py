"""BlinkDL's `.pth` files, which the official runtime and RWKV's trainers read and write.

In: a file. Out: its sizes and its tensors, under the names and in the shapes that it has them. A
learned initial state is in it as `blocks.N.att.time_state` (heads, value, key).
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from speechfuse import failures
from speechfuse.rwkv.model import Rwkv, Shape

STATE = "time_state"  # how its names end
RANKS = {  # the tensors, of `att` of the last layer, whose second size is that rank
    6: {"mix": "time_maa_w1", "decay": "time_decay_w1"},
    7: {"decay": "w1", "rate": "a1", "value": "v1", "gate": "g1"},
}
UNUSED = re.compile(r"blocks[.]0[.]att[.]v[012]")  # in some files; the first layer does not mix


def is_state(name: str) -> bool:
    """Return whether a parameter of this name is a learned initial state."""
    return name.endswith(f".{STATE}")


def read(path: Path) -> tuple[Shape, dict[str, Tensor]]:
    """Return the sizes and the tensors of a file. Raises ValueError for one that is no RWKV-6 or
    RWKV-7, or not whole."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {n: t for n, t in tensors.items() if not UNUSED.fullmatch(n)}
    except Exception as error:  # of many classes
        raise ValueError(f"{path} is no file of tensors ({error}); copy it again") from error
    shape = _shape_of(tensors, path)
    check(tensors, shape, str(path))
    return shape, tensors


def check(tensors: dict[str, Tensor], shape: Shape, what: str) -> None:
    """Raise ValueError unless `tensors` are those of a model of this `shape`, with a learned state
    or without."""
    with torch.device("meta"):
        asked = Rwkv(shape, learned_state=any(map(is_state, tensors))).state_dict()
    for word, odd in (("lacks", asked.keys() - tensors), ("also has", tensors.keys() - asked)):
        if odd:
            few = ", ".join(sorted(odd)[:3])
            raise ValueError(f"{what} {word} {few}: {len(odd)} tensors of RWKV-{shape.version}")
    for name, tensor in tensors.items():
        if tensor.shape != asked[name].shape:
            have, want = tuple(tensor.shape), tuple(asked[name].shape)
            raise ValueError(f"{what}: {name} is {have}, and a model of its sizes has {want}")


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors`, those of a model and its learned state."""
    with failures.writing(path):
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _shape_of(tensors: dict[str, Tensor], path: Path) -> Shape:
    layers = 1 + max(
        (int(found[1]) for name in tensors if (found := re.match(r"blocks[.](\d+)[.]", name))),
        default=-1,
    )
    att = f"blocks.{layers - 1}.att."
    heads = {v: tensors.get(f"{att}{n}") for v, n in ((6, "time_faaaa"), (7, "r_k"))}
    version = next((number for number, found in heads.items() if found is not None), None)
    if version is None:
        raise ValueError(
            f"{path} is no RWKV-6 or RWKV-7: it has neither {att}time_faaaa nor {att}r_k"
        )
    try:
        vocabulary, width = tensors["emb.weight"].shape
        return Shape(
            version=version,
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=len(tensors[f"{att}{'time_faaaa' if version == 6 else 'r_k'}"]),
            intermediate_size=len(tensors["blocks.0.ffn.key.weight"]),
            ranks={n: tensors[att + t].shape[1] for n, t in RANKS[version].items()}
            | ({"mix": tensors[f"{att}time_maa_w1"].shape[1] // 5} if version == 6 else {}),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]} of RWKV-{version}") from None
