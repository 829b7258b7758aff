"""The decoder that trains: weights and adapters, sharding, recomputation, compilation, freezing.

In: a recipe and its checkpoint. Out: the decoder, first without memory (what a run is planned with)
and then with its weights, sharded by FSDP2 when several ranks train.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recomputed
from torchtune.modules.peft import DoRALinear, LoRALinear

from speechfuse.tokens.vocabulary import read_config, read_speech
from speechfuse.train import backbone, checkpoint, state
from speechfuse.train.backbone import DTYPES, Decoder
from speechfuse.train.config import RECOMPUTED, Finetune
from speechfuse.train.shape import complete


def decoder_of(job: Finetune, shape: dict[str, Any] | None = None) -> Decoder:
    """Return the decoder of `job` without its weights; what `freeze` names does not train. `shape`
    stands for config.json of a checkpoint that is not there; the recipe then states the sizes."""
    folder, spec = Path(job.checkpoint), job.model
    if shape is None:
        shape = read_config(folder)
        spec = complete(spec, shape, job.checkpoint)
    model = backbone.empty(spec, job.dtype, job.loss_chunk, job.adapter, job.encoder)
    freeze(model, job.freeze, job.keep)
    if job.adapter:
        checkpoint.trains_whole(model)  # says where it does in part
    elif spec.get("learned_state"):
        raise ValueError("model.learned_state is a part of what hears: it needs an adapter")
    return Decoder(folder, shape, spec, model, job.adapter, job.encoder)


def load(decoder: Decoder, job: Finetune, device: torch.device) -> None:
    """Give the model of `decoder` its weights on `device`, sharded and recomputed as `job` says.

    Only rank 0 reads the files. Products in another dtype than that of the weights are FSDP2's
    mixed precision, which needs a process group, be it of one. Adapters are drawn from `seed`, the
    same for every number of ranks.
    """
    model = decoder.model
    place(model, job, device)
    weights: dict[str, Any] = {}
    if state.rank() == 0:
        weights = checkpoint.read(decoder)
        weights |= _adapters(model, weights, job.seed) | checkpoint.read_lora(decoder)
        weights |= checkpoint.read_state(decoder)
        if job.adapter or "adapter" in read_speech(decoder.folder):
            weights |= checkpoint.read_adapter(decoder, job.seed)
        weights = {name: tensor.to(DTYPES[job.dtype]) for name, tensor in weights.items()}
        if job.encoder:
            prefix, tensors = backbone.encoder_prefix(model), backbone.encoder_of(job.encoder)
            weights |= {prefix + name: t for name, t in tensors.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(model, weights, options=options)


def place(model: nn.Module, job: Finetune, device: torch.device) -> None:
    """Give a model of the meta device memory on `device`, sharded and recomputed as `job` says; its
    weights have no values yet."""
    _wrap_layers(model, job.activation_checkpointing, job.compile)
    if dist.is_initialized():
        _shard(model, device, DTYPES[job.compute_dtype], job.shard_group)
    model.to_empty(device=device)
    backbone.fill_positions(model, device)


def _wrap_layers(model: nn.Module, mode: str, compile: bool) -> None:
    """Replace the forward of layers, so that no weight gets another name.

    torchtune's own wrappers recompute dropout with other random numbers, and count layers over all
    models of a process.
    """
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
        copies, names = (ranks // group, group), ("copies", "shards")
        mesh = init_device_mesh(device.type, copies, mesh_dim_names=names)
    wide = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide)
    if encoder := getattr(backbone.embedding_of(model), "encoder", None):
        fully_shard(encoder, mesh=mesh)  # its weights and products stay float32
    for module in (*backbone.layers_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _adapters(model: nn.Module, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw the adapters of `model` as torchtune does: together they change nothing at first."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | DoRALinear):
            inner = torch.empty(module.lora_a.weight.shape)
            nn.init.kaiming_uniform_(inner, a=math.sqrt(5), generator=generator)
            values[f"{name}.lora_a.weight"] = inner
            values[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape)
        if isinstance(module, DoRALinear):
            values[f"{name}.magnitude"] = weights[f"{name}.weight"].float().norm(dim=1)
    return values


def freeze(model: nn.Module, patterns: list[str], keep: Sequence[str] = ()) -> None:
    """Stop training every parameter whose name (torchtune's, as layers.0.mlp.w1.weight) one of
    `patterns` is found in, and all of an encoder, but for those in which one of `keep` is. All but
    adapters, embedding and head: '^layers[.](?!.*lora_)' and '^norm[.]'.

    Raises ValueError for a pattern that fits no parameter, and when nothing is left to train.
    """
    parameters = dict(model.named_parameters())

    def named(key: str, patterns: Sequence[str]) -> set[str]:
        fitting = {p: {name for name in parameters if re.search(p, name)} for p in patterns}
        for pattern in (pattern for pattern, names in fitting.items() if not names):
            first = ", ".join(list(parameters)[:4])
            raise ValueError(f"{key}: {pattern!r} fits no parameter; there are {first} ...")
        return set().union(*fitting.values())

    encoder = {name for name in parameters if name.startswith(backbone.encoder_prefix(model))}
    for name in (encoder | named("freeze", patterns)) - named("keep", keep):
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"freeze={patterns} leaves nothing to train")
