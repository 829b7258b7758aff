"""Hugging Face Llama checkpoints in and out of a decoder that trains.

In: a folder (config.json, safetensors, tokenizer) and the recipe's builder: torchtune's, with
adapters (LoRA) or without, or transformers' own. Out: the model with its weights, sharded by FSDP2
when several ranks train, layers compiled and recomputed as asked for; and the same folder layout
again, for every epoch, adapters merged into the weights.
"""

import inspect
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recomputed
from torchtune.modules.peft import DoRALinear, LoRALinear, get_merged_lora_ckpt

from speechfuse import config
from speechfuse.tokens.vocabulary import Vocabulary, read_config
from speechfuse.train import backbone
from speechfuse.train.backbone import DTYPES

BUILDER_KEYS = {  # argument of torchtune's Llama builders -> key of config.json
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "rope_base": "rope_theta",
    "scale_factor": "rope factor",
}
NOT_ASKED = {"tie_word_embeddings": False, "scale_factor": 1}  # of builders without the argument
FIXED = {  # what every builder has; stands in config.json or may be absent there
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
RECOMPUTED = {"none": 0, "selective": 2, "full": 1}  # every how manyth layer
CARRIED = (  # files of a checkpoint that training does not change
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def check_shape(spec: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """config.json of `checkpoint`. ValueError when the recipe's `model`, with the defaults of its
    builder, is of another shape, or asks for what cannot be trained here."""
    shape = read_config(checkpoint)
    # transformers 5 writes rope_parameters, those before rope_scaling and rope_theta
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = shape["num_attention_heads"]
    known = {"tie_word_embeddings": False, "rope_theta": 10_000.0} | shape | rope
    known["rope factor"] = rope.get("factor", 1)
    takes = inspect.signature(config.resolve(spec["_component_"])).parameters
    for argument, key in BUILDER_KEYS.items():
        if argument in takes:
            value = spec.get(argument, takes[argument].default)
        else:
            value = NOT_ASKED.get(argument)
        if value != known[key]:
            builder = "set" if argument in takes else "choose a builder that takes it, and set"
            raise ValueError(
                f"model.{argument}={value} in the recipe, but {checkpoint}/config.json"
                f" has {key}={known[key]}: {builder} model.{argument}={known[key]}, or give a "
                "checkpoint that fits"
            )
    if kind not in ("default", "llama3"):
        raise ValueError(f"{checkpoint}/config.json has rope_type={kind}: only llama3 and default")
    for key, value in (FIXED | {"head_dim": shape["hidden_size"] // heads}).items():
        if known.get(key) not in (None, value):
            raise ValueError(
                f"{checkpoint}/config.json has {key}={known[key]}: Llama 3 has {value}, and no "
                "other can be trained here"
            )
    for argument, cure in (
        ("quantize_base", "adapters are merged into weights of full precision"),
        ("apply_lora_to_output", "the head is trained whole, as its new rows are not yet learned"),
    ):
        if spec.get(argument):
            raise ValueError(f"model.{argument}=true: {cure}; leave it out")
    return shape


def build(
    spec: dict[str, Any],
    checkpoint: Path,
    device: torch.device,
    dtype: str,
    compute_dtype: str,
    *,
    activation_checkpointing: str = "none",
    compile: bool = False,
    shard_group: int | None = None,
    loss_chunk: int = 1024,
    seed: int = 0,
) -> nn.Module:
    """The decoder that `spec` (builder and its arguments) names with the weights of `checkpoint`.

    Weights are kept in `dtype`, matrix products are done in `compute_dtype` (through FSDP2's mixed
    precision, so several ranks only, or a process group of one). Layers whose activations are
    dropped and computed again in the backward pass: full: all, selective: every second. `compile`:
    each layer by torch.compile. `shard_group`: so many neighbouring ranks share one copy of the
    model, and there are several copies (HSDP); None: one. `loss_chunk`: see head.Head. Adapters
    are drawn from `seed`, the same for every number of ranks. Only rank 0 reads the files.
    """
    shape = check_shape(spec, checkpoint)
    model = backbone.empty(spec, dtype, loss_chunk)
    _wrap_layers(model, activation_checkpointing, compile)
    if dist.is_initialized():
        _shard(model, device, DTYPES[compute_dtype], shard_group)
    model.to_empty(device=device)
    module: Any
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()
    weights: dict[str, Any] = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        weights = _read(model, checkpoint, shape)
        weights |= _adapters(model, weights, seed)
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    set_model_state_dict(
        model,
        weights,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized()),
    )
    return model


def _wrap_layers(model: nn.Module, mode: str, compile: bool) -> None:
    """Replaces the forward of layers, so that no weight gets another name.

    torchtune's own wrappers recompute dropout with other random numbers, and count layers over all
    models of a process.
    """
    if mode not in RECOMPUTED:
        raise ValueError(f"activation_checkpointing={mode!r}: choose one of {list(RECOMPUTED)}")
    every = RECOMPUTED[mode]
    for number, layer in enumerate(backbone.layers_of(model), 1):
        if compile:
            layer.forward = torch.compile(layer.forward)
        if every and number % every == 0:
            layer.forward = partial(recomputed, layer.forward, use_reentrant=False)


def _shard(
    model: nn.Module, device: torch.device, compute_dtype: torch.dtype, group: int | None
) -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))  # by itself FSDP2 takes the GPUs it finds
    if group is not None:
        if group < 1 or ranks % group:
            raise ValueError(f"shard_group={group} does not divide the {ranks} ranks")
        mesh = init_device_mesh(
            device.type, (ranks // group, group), mesh_dim_names=("copies", "shards")
        )
    wide = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide)
    for layer in backbone.layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _read(model: nn.Module, checkpoint: Path, shape: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder by `model`'s names."""
    weights: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(path)
    if not weights:
        raise ValueError(f"{checkpoint} holds no *.safetensors")
    if shape.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    return backbone.of(model).read_hf(weights, shape)


def _adapters(model: nn.Module, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """First values of `model`'s adapters, as torchtune has them: together they change nothing."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | DoRALinear):
            inner = torch.empty(module.lora_a.weight.shape)
            nn.init.kaiming_uniform_(inner, a=math.sqrt(5), generator=chance)
            found[f"{name}.lora_a.weight"] = inner
            found[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape)
        if isinstance(module, DoRALinear):
            found[f"{name}.magnitude"] = weights[f"{name}.weight"].float().norm(dim=1)
    return found


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop training every parameter whose name (torchtune's, as layers.0.mlp.w1.weight) a pattern
    is found in. All but adapters, embedding and head: '^layers[.](?!.*lora_)' and '^norm[.]'.

    ValueError for a pattern that fits no parameter, and when nothing is left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ValueError(
                f"freeze: {pattern!r} fits no parameter; there are {', '.join(list(names)[:4])} ..."
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise ValueError(f"freeze={patterns} leaves nothing to train")


def export(model: nn.Module, checkpoint: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the weights as a Hugging Face folder beside `checkpoint`'s config and tokenizer,
    complete or absent. The model itself stays as it is.

    Call on every rank; rank 0 writes, into a hidden folder that is renamed at the end.
    """
    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    _merge_adapters(model, weights)
    weights = backbone.of(model).write_hf(weights, read_config(checkpoint))
    hidden = out.with_name(f".{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    for name, tensor in weights.items():
        # rows gathered from ranks with unequal shares lie in a larger block of memory
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        weights[name] = tensor.contiguous() if alone else tensor.clone()
    save_torch_state_dict(weights, hidden)
    for name in CARRIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, hidden / name)
    for name, content in (
        ("generation_config.json", _generation_config(checkpoint)),
        ("manifest.json", manifest),
    ):
        (hidden / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(hidden, out)


def _merge_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put adapters into the weights beside them, in fp32, one layer after the other."""
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear | DoRALinear):
            continue
        scale = module.scaling if isinstance(module, DoRALinear) else module.alpha / module.rank
        dtype = weights[f"{name}.weight"].dtype
        # copies, because these tensors may be the model's own
        parts = {
            key: weights.pop(key).to(torch.float32, copy=True)
            for key in list(weights)
            if key.startswith(f"{name}.")
        }
        (merged,) = get_merged_lora_ckpt(parts, rank=1, alpha=scale).values()
        weights[f"{name}.weight"] = merged.to(dtype)


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint`'s, without sampling (so generation is greedy unless asked otherwise), and with
    an answer that ends where its turn ends."""
    path = checkpoint / "generation_config.json"
    shape = read_config(checkpoint)
    ids = {key: shape.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content = ids | (json.loads(path.read_text()) if path.is_file() else {})
    ends = content["eos_token_id"]
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    content["eos_token_id"] = sorted({*known, Vocabulary.load(checkpoint).end_of_turn})
    return {key: value for key, value in content.items() if key not in SAMPLING}
