"""Hugging Face Llama checkpoints in and out of torchtune's decoder.

In: a folder (config.json, safetensors, tokenizer) and the recipe's builder. Out: the model with its
weights, sharded by FSDP2 when several ranks train; and the same folder layout again, for every
epoch.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtune import training
from torchtune.models import convert_weights
from torchtune.modules import TransformerSelfAttentionLayer

from speechfuse import config
from speechfuse.vocab import read_config

BUILDER_KEYS = {  # argument of torchtune's Llama builders -> key of config.json
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CARRIED = (  # files of a checkpoint that training does not change
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def check_shape(spec: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """config.json of `checkpoint`. ValueError when the recipe's `model` states another shape."""
    shape = read_config(checkpoint)
    for argument, key in BUILDER_KEYS.items():
        if spec.get(argument) != shape[key]:
            raise ValueError(
                f"model.{argument}={spec.get(argument)} in the recipe, but {checkpoint}/config.json"
                f" has {key}={shape[key]}: set model.{argument}={shape[key]} or give a checkpoint "
                "that fits"
            )
    return shape


def _shape_arguments(shape: dict[str, Any]) -> dict[str, int]:
    return {
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "dim": shape["hidden_size"],
    }


def build(
    spec: dict[str, Any],
    checkpoint: Path,
    device: torch.device,
    dtype: str,
    compute_dtype: str,
    recompute: bool,
) -> nn.Module:
    """The decoder that `spec` (a torchtune builder) names with the weights of `checkpoint`.

    Weights are kept in `dtype`, matrix products are done in `compute_dtype` (through FSDP2's mixed
    precision, so several ranks only, or a process group of one). `recompute` drops activations and
    computes them again in the backward pass. Only rank 0 reads the files.
    """
    shape = check_shape(spec, checkpoint)
    with torch.device("meta"), training.set_default_dtype(DTYPES[dtype]):
        model = config.instantiate(spec)
    if recompute:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[compute_dtype], reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()
    weights: dict[str, Any] = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        for path in sorted(checkpoint.glob("*.safetensors")):
            weights |= load_file(path)
        if not weights:
            raise ValueError(f"{checkpoint} holds no *.safetensors")
        weights = convert_weights.hf_to_tune(weights, **_shape_arguments(shape))
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    set_model_state_dict(
        model, weights,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized()),
    )  # fmt: skip
    return model


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop training every parameter whose name (torchtune's, as layers.0.mlp.w1.weight) a pattern
    is found in.

    ValueError for a pattern that fits no parameter, and when nothing is left to train.
    """
    wrapped = "_checkpoint_wrapped_module."  # recomputation puts it into the names
    names = {name.replace(wrapped, ""): p for name, p in model.named_parameters()}
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
    complete or absent.

    Call on every rank; rank 0 writes, into a hidden folder that is renamed at the end.
    """
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    shape = read_config(checkpoint)
    weights = convert_weights.tune_to_hf(weights, **_shape_arguments(shape))
    if shape.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    hidden = out.with_name(f".{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    save_torch_state_dict({k: v.contiguous() for k, v in weights.items()}, hidden)
    for name in CARRIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, hidden / name)
    (hidden / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    os.replace(hidden, out)
