"""The one reader of the weights of a Hugging Face folder.

In: a folder. Out: its weights, or their shapes and dtypes alone, which needs no torch. Read is what
transformers reads: model.safetensors or, without it, the files that model.safetensors.index.json
names. Any other file there (Meta's consolidated.safetensors, an old copy) is left alone. What does
not fit together is refused, because half a model trains and answers without a word.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from speechfuse.tokens.vocabulary import read_config, read_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = "rotary_emb.inv_freq"  # of old checkpoints; whoever needs them computes them
PICKLES = ("pytorch_model*.bin", "consolidated*.pth")


@dataclass(frozen=True)
class Header:
    """What is known of a weight before it is read. `file`: by its path in the folder; `dtype`: by
    the name that torch has for it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def headers(folder: Path) -> dict[str, Header]:
    """Return the header of each weight of the model, by name.

    Raises FileNotFoundError without config.json. Raises ValueError for weights that are missing,
    cut short, there twice or elsewhere than the index says, for quantized ones, and, of a Llama,
    for other names or shapes than config.json asks for.
    """
    config = read_config(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json): transformers would read the model "
            "that it names; merge it into the weights, or move its files away"
        )
    placed = _placed(folder)
    found: dict[str, Header] = {}
    for file in sorted({*placed.values()}) or [SINGLE]:
        for name, header in _headers_of(folder, file).items():
            if name in found:
                raise ValueError(f"{folder}: {name} is in {found[name].file} and again in {file}")
            found[name] = header
    for name in sorted({*placed, *found} if placed else ()):
        there, said = found[name].file if name in found else None, placed.get(name)
        if there != said:
            raise ValueError(
                f"{folder}: {INDEX} says that {name} is in {said or 'no file'}, but it is in "
                f"{there or 'none'}: copy the index and its files from one place"
            )
    return _fitting(folder, config, found) if config.get("model_type") == "llama" else found


def read(folder: Path) -> "dict[str, Tensor]":
    """Return the weights of the model by name; a head that is the embedding is not among them.
    Raises as `headers`."""
    found = headers(folder)
    if read_config(folder).get("tie_word_embeddings"):
        found.pop(HEAD, None)
    return _tensors(folder, found)


def _placed(folder: Path) -> dict[str, str]:
    """Return the file of each weight as the index says; {} where all are in one file."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return {}
    if not index.is_file():
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        raise ValueError(
            f"{folder} has no weights: {SINGLE} is not there, nor is {INDEX}"
            + (
                f", only {pickles[0]}, and pickled files are not read: write them anew, "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')"
                ".save_pretrained(...) with transformers"
                if pickles
                else ", or it leads nowhere; copy it again, or leave the checkpoint out"
            )
        )
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
    found = {}
    try:
        with safe_open(folder / file, "np") as content:
            for name in content.keys():
                part = content.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if name.endswith(TABLES):
                    continue
                if dtype not in DTYPES:
                    raise ValueError(
                        f"{folder / file}: {name} is {dtype}: quantized weights cannot be used; "
                        f"they must be one of {', '.join(DTYPES.values())}"
                    )
                found[name] = Header(file, shape, DTYPES[dtype])
    except SafetensorError as error:
        raise ValueError(
            f"{folder / file} is no whole file of safetensors ({error}): is it cut short, or a "
            "pointer of Git LFS? Copy it again"
        ) from error
    return found


def _fitting(folder: Path, config: dict[str, Any], found: dict[str, Header]) -> dict[str, Header]:
    """Return the headers of a Llama's weights. Raises ValueError unless they are those that
    config.json asks for, and a head beside a tied embedding equals it."""
    asked, tied = _llama(folder, config), bool(config.get("tie_word_embeddings"))
    if missing := sorted(asked.keys() - found.keys() - ({HEAD} if tied else set())):
        raise ValueError(
            f"{folder} lacks {few(missing)} of the weights of its config.json"
            + (" (set tie_word_embeddings=true if it is the embedding)" * (missing == [HEAD]))
        )
    if more := sorted(found.keys() - asked.keys()):
        raise ValueError(f"{folder} has weights that a Llama of its config.json lacks: {few(more)}")
    for name, header in found.items():
        if header.shape != asked[name]:
            raise ValueError(
                f"{folder}: {name} is {_by(header.shape)}, but config.json says {_by(asked[name])}"
            )
    if tied and HEAD in found:
        import torch

        if not torch.equal(*_tensors(folder, {n: found[n] for n in (EMBEDDING, HEAD)}).values()):
            raise ValueError(
                f"{folder}: config.json has tie_word_embeddings=true, but {HEAD} is not "
                f"{EMBEDDING}: set it to false, or take {HEAD} out"
            )
    return found


def _llama(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a transformers LlamaForCausalLM, head included."""
    try:
        width, inner, rows, heads, layers = (
            int(config[key])
            for key in "hidden_size intermediate_size vocab_size num_attention_heads "
            "num_hidden_layers".split()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json states no usable {error}") from error
    each = config.get("head_dim") or width // heads
    queries, keys = heads * each, (config.get("num_key_value_heads") or heads) * each
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {
        EMBEDDING: (rows, width),
        "model.norm.weight": (width,),
        HEAD: (rows, width),
        **{f"model.layers.{i}.{n}.weight": s for i in range(layers) for n, s in layer.items()},
    }


def _tensors(folder: Path, found: dict[str, Header]) -> "dict[str, Tensor]":
    """Read the weights that `found` names."""
    tensors = {}
    for file in sorted({header.file for header in found.values()}):
        with safe_open(folder / file, "pt") as content:
            for name, header in found.items():
                if header.file == file:
                    tensors[name] = content.get_tensor(name)
    return tensors


def few(names: list[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
