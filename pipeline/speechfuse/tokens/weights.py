"""The one reader of the weights of a Hugging Face folder.

In: a folder. Out: its weights, or their files, shapes and dtypes alone. Read is what transformers
reads: model.safetensors or, without it, the files that model.safetensors.index.json names. Any
other file there (Meta's consolidated.safetensors, an old copy) is left alone. What does not fit
together is refused, because half a model trains and answers without a word.
"""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from speechfuse.tokens.vocabulary import read_config, read_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = "rotary_emb.inv_freq"  # of old checkpoints; whoever needs them computes them


class Header(NamedTuple):
    """What is known of a weight before it is read. `file`: by its path in the folder; `dtype`: by
    the name that torch has for it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def files(folder: Path) -> list[str]:
    """Return the files that hold the weights, by their path in the folder. Raises ValueError for
    one that is not there, or that the index has elsewhere."""
    return sorted({*_placed(folder).values()}) or [SINGLE]


def speech_part(folder: Path) -> list[str]:
    """Return the files that make a language model hear, beside its own in a folder of
    speechfuse.fusion, by their path in it; none in any other."""
    if not (folder / "speech.json").is_file():
        return []
    paths = [*folder.glob("speech.*"), *folder.glob("lora/*"), *folder.glob("encoder/**/*")]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


def headers(folder: Path) -> dict[str, Header]:
    """Return the header of each weight of the model, by name.

    Raises FileNotFoundError without config.json. Raises ValueError for weights that are missing,
    cut short, quantized, there twice or elsewhere than the index says, for other names or shapes
    than the model of config.json has, and for a head that is to be the embedding and is not.
    """
    config, placed = read_config(folder), _placed(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json): transformers would read the model "
            "that it names; merge it into the weights, or move its files away"
        )
    parts = [part for file in files(folder) for part in _headers_of(folder, file).items()]
    places, found = {(name, header.file) for name, header in parts}, dict(parts)
    if placed and (differ := sorted({name for name, _ in places ^ placed.items()})):
        raise ValueError(
            f"{folder}: {INDEX} and its files do not agree where {few(differ)} is, or it is there "
            "twice: copy the index and all its files from one place"
        )
    asked, tied = asked_of(folder), bool(config.get("tie_word_embeddings"))
    if missing := sorted(asked.keys() - found.keys() - ({HEAD} if tied else set())):
        hint = " (set tie_word_embeddings=true if it is the embedding)"
        raise ValueError(
            f"{folder} lacks {few(missing)} of the weights of its config.json"
            + hint * (missing == [HEAD])
        )
    if more := sorted(found.keys() - asked.keys()):
        raise ValueError(f"{folder} has weights that a model of its config.json lacks: {few(more)}")
    for name, header in found.items():
        if header.shape != asked[name]:
            have, want = (" x ".join(map(str, shape)) for shape in (header.shape, asked[name]))
            raise ValueError(f"{folder}: {name} is {have}, but config.json says {want}")
    if tied and {EMBEDDING, HEAD} <= found.keys():
        import torch

        if not torch.equal(*_tensors(folder, {n: found[n] for n in (EMBEDDING, HEAD)}).values()):
            raise ValueError(
                f"{folder}: config.json has tie_word_embeddings=true, but {HEAD} is not "
                f"{EMBEDDING}: set it to false, or take {HEAD} out"
            )
    return found


def read(folder: Path) -> "dict[str, Tensor]":
    """Return the weights of the model by name; a head that is the embedding is not among them.
    Raises as `headers`."""
    found = headers(folder)
    if read_config(folder).get("tie_word_embeddings"):
        found.pop(HEAD, None)
    return _tensors(folder, found)


def every(folder: Path) -> "dict[str, Tensor]":
    """Return all tensors in the files of the weights by name, whatever model they are of. Raises
    ValueError for a damaged file."""
    from safetensors.torch import load_file

    try:
        parts = [load_file(folder / name) for name in files(folder)]
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged ({error}): copy them again") from None
    return {name: tensor for part in parts for name, tensor in part.items()}


def few(names: list[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _placed(folder: Path) -> dict[str, str]:
    """Return the file of each weight as the index says; {} where all are in one file."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {}
    if not index.is_file():
        cure = "or it leads nowhere; copy it again, or leave the checkpoint out"
        if pickles := [path.name for path in folder.glob("pytorch_model*.bin")]:
            cure = f"only {min(pickles)}, and pickles are not read: save it with transformers anew"
        raise ValueError(f"{folder} has no weights: {SINGLE} is not there, nor {INDEX}, {cure}")
    placed = read_json(index).get("weight_map")
    if not placed or not isinstance(placed, dict):
        raise ValueError(f"{index} names no weights (weight_map): copy it again")
    for file in sorted({*map(str, placed.values())}):
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{index} names {file}, which leads out of the folder")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no weights: {file} of {INDEX} is not there; copy it")
    return placed


def _headers_of(folder: Path, file: str) -> dict[str, Header]:
    """Return the headers of one file, without tables that are no weights."""
    try:
        with safe_open(folder / file, "np") as content:
            parts = {name: content.get_slice(name) for name in content.keys()}
            found = {n: (tuple(part.get_shape()), part.get_dtype()) for n, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{folder / file} is no whole file of safetensors ({error}): is it cut short, or a "
            "pointer of Git LFS? Copy it again"
        ) from error
    if other := [f"{name} is {dtype}" for name, (_, dtype) in found.items() if dtype not in DTYPES]:
        raise ValueError(
            f"{folder / file}: {few(other)}: quantized weights cannot be used; they must be one of "
            f"{', '.join(DTYPES.values())}"
        )
    return {
        name: Header(file, shape, DTYPES[dtype])
        for name, (shape, dtype) in found.items()
        if not name.endswith(TABLES)
    }


def asked_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of the model that config.json describes, its head included,
    also where that is the embedding."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from speechfuse.rwkv import hugging_face

    hugging_face.register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # of many classes
        raise ValueError(f"{folder}/config.json describes no model: {error!r}") from error
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _tensors(folder: Path, found: dict[str, Header]) -> "dict[str, Tensor]":
    """Read the weights that `found` names."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({header.file for header in found.values()}):
        with safe_open(folder / file, "pt") as content:
            names = [name for name, header in found.items() if header.file == file]
            tensors |= {name: content.get_tensor(name) for name in names}
    return tensors
