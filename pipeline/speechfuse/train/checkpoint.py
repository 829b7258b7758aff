"""Hugging Face folders in and out of a decoder that trains.

In: a folder (config.json, safetensors, tokenizer) and a model. Out: its weights under the model's
names; and after every epoch the same folder layout again, adapters merged into the weights.
"""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchtune.modules.peft import DoRALinear, LoRALinear, get_merged_lora_ckpt

from speechfuse import artifact, failures
from speechfuse.fusion import folder as folders
from speechfuse.fusion.door import initial_values
from speechfuse.rwkv.pth import is_state
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import read_speech
from speechfuse.train import backbone, state
from speechfuse.train.backbone import Decoder

# files of a checkpoint that training does not change
CARRIED = (
    "config.json tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja"
).split()
# keys of generation_config.json that ask for sampling
SAMPLING = "do_sample temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff".split()


def read(decoder: Decoder) -> dict[str, Tensor]:
    """Return the weights of the checkpoint by the names of the model. Raises as weights.headers."""
    return backbone.of(decoder.model).read_hf(weights.read(decoder.folder), decoder.shape)


def _prefix(model: nn.Module) -> str:
    """Return how the names of the adapter's tensors begin."""
    return f"{backbone.of(model).embedding}.adapter."


def read_adapter(decoder: Decoder, seed: int) -> dict[str, Tensor]:
    """Return the tensors of the adapter by the names of the model: those of the checkpoint where it
    has a speech part, else as drawn by `seed`. Raises ValueError for those of another adapter."""
    model, speech = decoder.model, read_speech(decoder.folder)
    if speech.get("adapter", decoder.adapter) != decoder.adapter:
        raise ValueError(
            f"adapter={decoder.adapter}, and {decoder.folder} has {speech['adapter']}: set it so, "
            "or start from the language model alone"
        )
    if "adapter" in speech:
        values = load_file(decoder.folder / folders.SPEECH)
    else:
        width = backbone.embedding_of(model).embedding_dim
        values = initial_values(decoder.adapter or {}, width, seed)
    return {_prefix(model) + name: tensor for name, tensor in values.items()}


def read_lora(decoder: Decoder) -> dict[str, Tensor]:
    """Return the LoRA beside the language model of the checkpoint by the names of the model; none
    where there is none. Raises ValueError for another LoRA than the model's."""
    settings, path = decoder.folder / "lora/adapter_config.json", decoder.folder / folders.LORA
    if not path.is_file():
        return {}
    shapes = {n: p.shape for n, p in decoder.model.named_parameters() if is_lora(n)}
    try:
        stated, spec = json.loads(settings.read_text("utf-8")), decoder.spec
        own = stated["lora_alpha"], stated["r"]
        if own != (spec.get("lora_alpha"), spec.get("lora_rank")):
            raise ValueError(f"its lora_alpha and lora_rank are {own[0]} and {own[1]}")
        return backbone.of(decoder.model).read_lora(load_file(path), shapes, decoder)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{decoder.folder} has a LoRA that is not the model's ({error}): give model the same, "
            "or start from the language model that it was trained on"
        ) from None


def read_state(decoder: Decoder) -> dict[str, Tensor]:
    """Return the learned state of the model, by name: that of the checkpoint, else zeros; none
    where the model has none. Raises ValueError for that of another model."""
    named = decoder.model.named_parameters()
    values = {n: torch.zeros(p.shape) for n, p in named if is_state(n)}
    found = folders.state_of(decoder.folder)
    if found and {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in values.items()}:
        raise ValueError(
            f"{decoder.folder} has a learned state of {len(found)} layers, and the model has "
            f"{len(values)}, or other sizes: set model.learned_state as it was trained"
        )
    return values | found


def is_lora(name: str) -> bool:
    """Return whether a parameter of this name is LoRA's."""
    return name.endswith(("lora_a.weight", "lora_b.weight"))


def beside(name: str) -> bool:
    """Return whether a parameter of this name lies beside the language model in an epoch."""
    return is_lora(name) or is_state(name)


def trains_whole(model: nn.Module) -> bool:
    """Return whether all of the language model beside an adapter trains. Raises ValueError where a
    part of it does: an epoch has that of the checkpoint, untouched, or one of its own."""
    speech = _prefix(model), backbone.encoder_prefix(model)
    own = {
        name: parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith(speech) and not beside(name)
    }
    if (training := [name for name in own if own[name]]) and len(training) < len(own):
        raise ValueError(
            f"{training[0]} and {len(training) - 1} others of the language model train beside the "
            f"adapter, and {len(own) - len(training)} do not: name all in freeze, as "
            "recipes/demo/splice_lora.yaml does, or none"
        )
    return bool(training)


def _write_speech(
    decoder: Decoder,
    values: dict[str, Tensor],
    end_of_turn: int,
    speech: dict[str, Any],
    hidden: Path,
) -> None:
    """Write the language model of the checkpoint, untouched, with adapter and LoRA beside it, or
    one that trains whole, LoRA merged into it; and encoder/, as `just encode` reads it, where the
    encoder trains."""
    prefix, model = _prefix(decoder.model), decoder.model
    if whole := trains_whole(model):
        others = prefix, backbone.encoder_prefix(model)
        own = {n: v for n, v in values.items() if not n.startswith(others) and not is_state(n)}
        _write_weights(decoder, own, end_of_turn, hidden)
        speech = speech | {"base": None}
    names = [name for name in values if name.startswith(prefix)]
    adapter = {name.removeprefix(prefix): values[name] for name in names}
    low = {name: tensor for name, tensor in values.items() if is_lora(name) and not whole}
    learned = {name: tensor for name, tensor in values.items() if is_state(name)}
    lora = backbone.of(model).write_lora(low, decoder) if low else None
    prefix = backbone.encoder_prefix(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefix)}
    if decoder.encoder and trained:
        encoder = deepcopy(backbone.encoder_of(decoder.encoder))
        names = [name for name in values if name.startswith(prefix)]
        encoder.load_state_dict({name.removeprefix(prefix): values[name] for name in names})
        (hidden / "encoder").mkdir()
        encoder.save(hidden / "encoder")
        speech = speech | {"encoder": encoder.identity}
    folders.write(hidden, None if whole else decoder.folder, speech, adapter, lora, learned)


def _write_weights(
    decoder: Decoder, values: dict[str, Tensor], end_of_turn: int, hidden: Path
) -> None:
    """Write the weights, adapters merged into them, with the checkpoint's other files."""
    folder = decoder.folder
    _merge_adapters(decoder.model, values)
    values = backbone.of(decoder.model).write_hf(values, decoder.shape)
    for name, tensor in values.items():
        # rows gathered from ranks with unequal shares lie in a larger block of memory
        whole_block = tensor.untyped_storage().nbytes() == tensor.nbytes
        values[name] = tensor.contiguous() if whole_block else tensor.clone()
    save_torch_state_dict(values, hidden)
    for name in CARRIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, hidden / name)
    generation = _generation_config(folder, decoder.shape, end_of_turn)
    artifact.write_json(hidden / "generation_config.json", generation)


def export(
    decoder: Decoder,
    end_of_turn: int,
    out: Path,
    manifest: dict[str, Any],
    speech: dict[str, Any] | None = None,
) -> None:
    """Write the weights to `out`, a Hugging Face folder with config.json and tokenizer of the
    checkpoint, complete or absent. The model itself stays as it is. With `speech` (see
    fusion.folder) the language model is that of the checkpoint, unless it trains whole.

    Call it on every rank; rank 0 writes, into a hidden folder that is renamed at the end.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    values: dict[str, Any] = get_model_state_dict(decoder.model, options=options)
    if state.rank() != 0:
        return
    hidden = out.with_name(f".{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        with failures.writing(out):
            hidden.mkdir(parents=True)
            if speech:
                _write_speech(decoder, values, end_of_turn, speech, hidden)
            else:
                _write_weights(decoder, values, end_of_turn, hidden)
            artifact.write_json(hidden / "manifest.json", manifest)
            for path in filter(Path.is_file, hidden.rglob("*")):
                artifact.flush(path)
            os.replace(hidden, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # a full disk needs the room


def _merge_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put adapters into the weights beside them, in fp32, one layer after the other."""
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear | DoRALinear):
            continue
        scale = module.scaling if isinstance(module, DoRALinear) else module.alpha / module.rank
        dtype = weights[f"{name}.weight"].dtype
        own = [key for key in weights if key.startswith(f"{name}.")]
        # copies, because these tensors may be the model's own
        parts = {key: weights.pop(key).to(torch.float32, copy=True) for key in own}
        (merged,) = get_merged_lora_ckpt(parts, rank=1, alpha=scale).values()
        weights[f"{name}.weight"] = merged.to(dtype)


def _generation_config(folder: Path, shape: dict[str, Any], end_of_turn: int) -> dict[str, Any]:
    """Return the settings of `folder` without sampling (generation is greedy unless asked
    otherwise), and with an answer that ends where its turn ends."""
    path = folder / "generation_config.json"
    ids = {key: shape.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content = ids | (json.loads(path.read_text()) if path.is_file() else {})
    ends = content["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    content["eos_token_id"] = sorted({*ends, end_of_turn})
    return {key: value for key, value in content.items() if key not in SAMPLING}
