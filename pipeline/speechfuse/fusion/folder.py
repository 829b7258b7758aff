"""A Hugging Face folder whose model hears: a language model as it was, and a speech part beside.

In: a folder of a language model, an adapter's tensors, and LoRA's in peft's layout. Out: the files
of the language model, untouched unless it trained whole (base is null then), so that any library
loads it as a model of text, and

    speech.safetensors                  the adapter
    speech.json                         {generator, adapter, encoder, base, sha256 of weights}
    lora/adapter_model.safetensors      LoRA, where it was trained, as peft reads it
    lora/adapter_config.json
    speech.state.safetensors            RWKV's learned initial state, by BlinkDL's names
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechfuse import artifact
from speechfuse.fusion.door import Door, adapter_of
from speechfuse.rwkv import pth
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import read_speech

SPEECH, LORA = "speech.safetensors", "lora/adapter_model.safetensors"
STATE = "speech.state.safetensors"
OWN = {SPEECH, STATE, "speech.json", "manifest.json", "plan.json"}  # not the language model's


def write(
    folder: Path,
    base: Path | None,
    speech: dict[str, Any],
    adapter: dict[str, Tensor],
    lora: tuple[dict[str, Tensor], dict[str, Any]] | None,
    state: dict[str, Tensor],
) -> None:
    """Fill the empty `folder` with the files of `base` and the speech part. A file on the same disk
    is linked, not copied. Without `base` the folder has a language model of its own already.
    `lora`: (weights, config) in peft's layout."""
    files = base.iterdir() if base else ()
    for path in sorted(p for p in files if p.is_file() and p.name not in OWN):
        (folder / path.name).unlink(missing_ok=True)  # of a job that was interrupted
        try:
            os.link(path.resolve(), folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / SPEECH)
    if state:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE)
    if lora:
        (folder / "lora").mkdir()
        save_file({name: t.contiguous() for name, t in lora[0].items()}, folder / LORA)
        artifact.write_json(folder / "lora/adapter_config.json", lora[1])
    names = [*weights.files(folder), SPEECH, *[LORA] * bool(lora), *[STATE] * bool(state)]
    hashes = {name: artifact.sha256_of(folder / name) for name in names}
    artifact.write_json(folder / "speech.json", speech | {"sha256": hashes})


def _check(folder: Path, names: set[str]) -> None:
    """Raise ValueError unless `names` are the files that speech.json was written with, where it
    says so: a base or LoRA of the same shape would load, and answer nonsense."""
    hashes = read_speech(folder).get("sha256") or {}
    for name in sorted(names) if hashes else ():
        if artifact.sha256_of(folder / name) != hashes.get(name):
            raise ValueError(
                f"{folder / name} is not the file that speech.json beside it was written with (it "
                "may be of another base or training): copy the folder again, whole"
            )


def add_speech(model: nn.Module, folder: Path) -> Door:
    """Give a transformers model the door of `folder`, and return it. Raises ValueError unless every
    tensor of its adapter is there, and no other."""
    speech, words = read_speech(folder) or {}, model.get_input_embeddings()  # type: ignore[operator]
    adapter = adapter_of(speech["adapter"], words.embedding_dim)
    tensors, names = load_file(folder / SPEECH), set(adapter.state_dict())
    for what, odd in (("lacks", names - tensors.keys()), ("also has", tensors.keys() - names)):
        if odd:
            raise ValueError(
                f"{folder / SPEECH} {what} {', '.join(sorted(odd))}: it is not of the adapter that "
                "speech.json names; copy the folder again"
            )
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / SPEECH} does not fit speech.json: {error}") from None
    with_lora = (folder / LORA).is_file()  # then the base was compared when that was added
    _check(folder, {SPEECH} if with_lora else {SPEECH, *weights.files(folder)})
    door = Door(words, adapter.to(words.weight))  # its device and dtype
    model.set_input_embeddings(door)  # type: ignore[operator]
    return door.eval()


def state_of(folder: Path) -> dict[str, Tensor]:
    """Return the learned state of a folder; {} where there is none."""
    return load_file(folder / STATE) if (folder / STATE).is_file() else {}


def set_state(model: nn.Module, folder: Path) -> None:
    """Give an RWKV the learned state of `folder`, or zeros where that has none. Raises ValueError
    for that of another model."""
    if state := state_of(folder):
        _check(folder, {STATE})
    pth.set_state(model, state, str(folder / STATE))


def add_lora(model: nn.Module, folder: Path) -> None:
    """Add the LoRA of `folder`/lora to the weights of a transformers model. Raises ValueError where
    it does not fit the model."""
    tensors = load_file(folder / LORA)
    settings = json.loads((folder / "lora/adapter_config.json").read_text("utf-8"))
    scale, parameters = settings["lora_alpha"] / settings["r"], dict(model.named_parameters())
    used = set()
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        inner, outer = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
        target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        weight = parameters.get(target)
        shape = None if outer is None else (outer.shape[0], inner.shape[1])
        if weight is None or shape != tuple(weight.shape):
            raise ValueError(
                f"{folder}/lora does not fit its base: {target} is "
                f"{'not there' if weight is None else tuple(weight.shape)} and LoRA's is {shape}"
            )
        update = scale * (outer.float() @ inner.float())  # type: ignore[union-attr]
        weight.data += update.to(weight.device, weight.dtype)
        used |= {name, name.replace("lora_A", "lora_B")}
    if odd := tensors.keys() - used:
        raise ValueError(f"{folder}/lora has {', '.join(sorted(odd))}, which is no LoRA weight")
    _check(folder, {LORA, *weights.files(folder)})
