"""Families of decoders: what the training has to know of each.

In: `model` of a recipe (a builder and its arguments). Out: the decoder without memory, the parts of
it that the training handles by name, and its weights under the names of a Hugging Face folder. A
model whose class has no `backbone` is torchtune's.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.models import convert_weights

from speechfuse import config
from speechfuse.fusion.door import Door, adapter_of
from speechfuse.train import attention
from speechfuse.train.head import Head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Weights = dict[str, Tensor]


class Backbone:
    """torchtune's Llama, with adapters (LoRA, DoRA) or without; other families override all of it.

    `embedding`, `layers`, `head`: names of those modules. `shape`: config.json of a Hugging Face
    folder."""

    embedding, layers, head = "tok_embeddings", "layers", "output"

    def prepare(self, model: nn.Module) -> None:
        """Make the attention of a new model take every mask of attention.mask_of."""
        for layer in layers_of(model):
            inner = layer.attn  # the only door that torchtune has to its attention function
            inner._attention_call = partial(attention.by_document, inner._attention_call)

    def seen(self, shape: dict[str, Any]) -> int | None:
        """Return how many tokens each token sees, in operations; None: those of its document."""
        return None

    def read_hf(self, weights: Weights, shape: dict[str, Any]) -> Weights:
        """Return the weights of a Hugging Face folder under the names of the model."""
        return convert_weights.hf_to_tune(weights, **_sizes(shape))

    def write_hf(self, weights: Weights, shape: dict[str, Any]) -> Weights:
        """Return the weights of the model under the names of a Hugging Face folder."""
        return convert_weights.tune_to_hf(weights, **_sizes(shape))

    def write_lora(self, weights: Weights, decoder: "Decoder") -> tuple[Weights, dict[str, Any]]:
        """Return the LoRA weights of the model, and their settings, as peft's files have them."""
        sizes, spec = _sizes(decoder.shape), decoder.spec
        modules = [*spec["lora_attn_modules"]]
        modules += ["w1", "w2", "w3"] if spec.get("apply_lora_to_mlp") else []
        settings = {"r": spec["lora_rank"], "lora_alpha": spec["lora_alpha"]}
        settings |= {"target_modules": modules, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
        return (
            convert_weights.tune_to_peft_adapter_weights(weights, **sizes),
            convert_weights.tune_to_peft_adapter_config(settings),
        )

    def read_lora(
        self, tensors: Weights, shapes: dict[str, torch.Size], decoder: "Decoder"
    ) -> Weights:
        """Return the LoRA weights of the model, of these `shapes`, from the `tensors` of peft's
        file. Raises ValueError where names or shapes are others."""
        # which number goes where is what write_lora does to the numbers of places
        counts = [shape.numel() for shape in shapes.values()]
        places = torch.arange(sum(counts)).split(counts)
        parts = zip(shapes.items(), places, strict=True)
        written, _ = self.write_lora({n: part.reshape(s) for (n, s), part in parts}, decoder)
        if {n: t.shape for n, t in written.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("its modules or its rank are others than those of model")
        values = torch.empty(sum(counts))
        for name, order in written.items():
            values[order.flatten()] = tensors[name].float().flatten()
        parts = zip(shapes.items(), values.split(counts), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}


def _sizes(shape: dict[str, Any]) -> dict[str, int]:
    return {
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "dim": shape["hidden_size"],
    }


def of(model: nn.Module) -> Backbone:
    """Return the backbone that a model belongs to."""
    return getattr(model, "backbone", Backbone())


def embedding_of(model: nn.Module) -> Any:
    """Return the module that has the embedding of the tokens, `weight` (vocabulary, width)."""
    return model.get_submodule(of(model).embedding)


def layers_of(model: nn.Module) -> Any:
    """Return the layers, in the order of the forward pass."""
    return model.get_submodule(of(model).layers)


def head_of(model: nn.Module) -> Any:
    """Return the head.Head that gives logits or losses."""
    return attrgetter(of(model).head)(model)  # torchtune's own is no module where it is tied


def set_head(model: nn.Module, head: nn.Module) -> None:
    """Put another head in the place of the model's."""
    owner, _, name = of(model).head.rpartition(".")
    setattr(model.get_submodule(owner), name, head)


def fill_positions(model: nn.Module, device: torch.device) -> None:
    """Compute the tables of rotary positions on `device`; a model of the meta device has none."""
    module: Any
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()


@dataclass(frozen=True)
class Decoder:
    """`folder`: the checkpoint, whose config.json is `shape`; `spec`: `model` of the recipe with
    all arguments; `model`: what that builds, at first without memory; `adapter` and `encoder`:
    those of the recipe."""

    folder: Path
    shape: dict[str, Any]
    spec: dict[str, Any]
    model: nn.Module
    adapter: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None


def encoder_of(spec: dict[str, Any]) -> Any:
    """Return the encoder that `spec` names, with its weights, on the CPU; do not change it."""
    return _encoder(json.dumps(spec))


@cache
def _encoder(spec: str) -> nn.Module:
    return config.instantiate(json.loads(spec))


def encoder_prefix(model: nn.Module) -> str:
    """Return how the names of the encoder's tensors begin."""
    return f"{of(model).embedding}.encoder."


def empty(
    spec: dict[str, Any],
    dtype: str,
    loss_chunk: int = 1024,
    adapter: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
) -> nn.Module:
    """Return the decoder that `spec` (`_component_` and arguments) builds, with our head, on the
    meta device: shapes without memory. With `adapter` its embedding is a fusion.door.Door, with
    `encoder` inside it. An encoder's weights are float32 whatever `dtype` is."""
    inner = deepcopy(encoder_of(encoder)).to("meta") if encoder else None
    with torch.device("meta"), training.set_default_dtype(DTYPES[dtype]):
        model = config.instantiate(spec)
        set_head(model, Head(head_of(model), loss_chunk))
        if adapter:
            words = embedding_of(model)
            door = Door(words, adapter_of(adapter, words.embedding_dim), inner)
            owner, _, name = of(model).embedding.rpartition(".")
            setattr(model.get_submodule(owner), name, door)
            head_of(model).follow(words, door)
    of(model).prepare(model)
    return model
