"""Make a folder that hears of a SALM of NVIDIA NeMo, as Canary-Qwen is published.

    python -m stages.convert_salm models/canary-qwen-2.5b out/models/canary base=models/Qwen3-1.7B

In: a folder with config.json and the weights of NeMo's SALM whose encoder is followed by one
matrix, and the folder of its language model, of which config.json and the tokenizer are read. Out:
a folder as a training leaves it (speechfuse.fusion.folder): the language model of that SALM, its
matrix as an adapter, its LoRA, and its encoder. Each tensor is used; one that is missing, unknown
or of another shape is refused by its name.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechfuse import artifact, config, failures
from speechfuse.config import key

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
ENCODER = "perception.encoder."
LORA = {"task_type", "r", "lora_alpha", "lora_dropout", "target_modules"}  # keys that can be read
CHATS = {  # by prompt_format, where the base's own chat template is another than NeMo's
    "qwen": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
}
CARRIED = {
    ".jinja",
    ".json",
    ".model",
    ".txt",
}  # files of the base, but for weights and what is ours


@dataclass
class ConvertSalm:
    path: str = key("folder of NeMo's SALM")
    out: str = key("the folder to make")
    base: str = key("Hugging Face folder of its language model: config.json and tokenizer")
    fresh: bool = key("move an artifact that differs aside", False)


def wanted(
    asked: dict[str, Shape], lora: dict[str, Any], mel: dict[str, Any], width: int
) -> dict[str, tuple[str, str, Shape]]:
    """Return by NeMo's name the part that each tensor but the encoder's belongs to, its name there
    and its shape. `asked`: shapes of the language model's weights; `width`: of a frame."""
    start, targets = "llm.base_model.model." if lora else "llm.", lora.get("target_modules", ())
    names: dict[str, tuple[str, str, Shape]] = {}
    for name, shape in asked.items():
        module, _, leaf = name.rpartition(".")
        if name.endswith("embed_tokens.weight"):  # NeMo has it outside of the language model
            names["embed_tokens.weight"] = "llm", name, shape
            names["perception.proj.weight"] = "adapter", "linear.weight", (shape[1], width)
            names["perception.proj.bias"] = "adapter", "linear.bias", shape[1:]
        elif not module.endswith(tuple(f".{target}" for target in targets)):
            names[f"{start}{name}"] = "llm", name, shape
        else:
            names[f"{start}{module}.base_layer.{leaf}"] = "llm", name, shape
            ranks = {"A": (lora["r"], shape[-1]), "B": (shape[0], lora["r"])}
            for side, size in ranks.items() if leaf == "weight" else ():
                own = f"base_model.model.{module}.lora_{side}.weight"
                names[f"{start}{module}.lora_{side}.default.weight"] = "lora", own, size
    filters = 1, mel["feature_size"], mel["n_fft"] // 2 + 1
    names["perception.preprocessor.featurizer.fb"] = "mel", "filters", filters
    names["perception.preprocessor.featurizer.window"] = "mel", "window", (mel["win_length"],)
    return names


def parts_of(
    path: Path, tensors: "dict[str, Tensor]", names: dict[str, tuple[str, str, Shape]]
) -> "dict[str, dict[str, Tensor]]":
    """Return the tensors of each part, `llm`, `adapter`, `lora` and `mel`. Raises ValueError for
    one that is missing, unknown or of another shape."""
    from speechfuse.tokens.weights import few

    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}
    shapes = {name: tuple(own[name].shape) for name in own.keys() & names.keys()}
    faults = {
        "lacks": names.keys() - own.keys(),
        "also has": own.keys() - names.keys(),
        "has in other shapes than its config.json and the base's": {
            name for name, shape in shapes.items() if shape != names[name][2]
        },
    }
    for what, odd in faults.items():
        if odd:
            raise ValueError(
                f"{path} {what} {few(sorted(odd))}: a SALM has its base's weights, the LoRA of its "
                "config.json and one matrix behind its encoder; copy it, or its base, again"
            )
    parts: dict[str, dict[str, Tensor]] = {"lora": {}}
    for name, (part, place, _) in names.items():
        parts.setdefault(part, {})[place] = own[name]
    return parts


def main(job: ConvertSalm) -> None:
    import torch
    from safetensors.torch import save_file

    from speechfuse.fusion import folder
    from speechfuse.quantizer import foreign
    from speechfuse.tokens import weights
    from speechfuse.tokens.vocabulary import read_config

    path, base, out = Path(job.path), Path(job.base), Path(job.out)
    stated, shape = read_config(path), read_config(base)
    lora, format = stated.get("lora") or {}, stated.get("prompt_format")
    if "perception" not in stated or (lora and not lora.keys() >= LORA - {"lora_dropout"}):
        raise ValueError(f"{path} holds no SALM: its config.json lacks perception or parts of lora")
    if odd := lora.keys() - LORA:
        raise ValueError(f"{path}: lora.{min(odd)} of its config.json cannot be read here")
    encoder = foreign.of_fastconformer(str(path))
    mel, tensors, asked = encoder.config.sizes["mel"], weights.every(path), weights.asked_of(base)
    if shape.get("tie_word_embeddings") and not any(n.endswith(weights.HEAD) for n in tensors):
        del asked[weights.HEAD]
    parts = parts_of(path, tensors, wanted(asked, lora, mel, encoder.width))
    filters = torch.from_numpy(foreign.filters(mel["feature_size"], mel["n_fft"]))
    ours = {"filters": filters[None], "window": torch.hann_window(mel["win_length"], False)}
    for name, tensor in ours.items():
        if not torch.allclose(
            parts["mel"][name].float(), tensor, rtol=2**-7, atol=1e-6
        ):  # bfloat16
            raise ValueError(f"{path} has another log-mel than that of its config.json: its {name}")
    files = [path / name for name in ("config.json", *weights.files(path))]
    inputs = {each.name: artifact.sha256_of(each) for each in files}
    inputs["base"] = artifact.json_digest(shape)
    work = artifact.Artifact(out, "convert_salm", 1, asdict(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    with failures.writing(out):
        for name in ("lora", "encoder"):  # of a conversion that was stopped
            shutil.rmtree(out / name, ignore_errors=True)
        for file in base.iterdir():
            if file.suffix in CARRIED and file.name not in folder.OWN | {weights.INDEX}:
                shutil.copyfile(file, out / file.name)
        if format in CHATS:
            (out / "chat_template.jinja").write_text(CHATS[format], "utf-8")
        llm = {name: tensor.contiguous() for name, tensor in parts["llm"].items()}
        save_file(llm, out / weights.SINGLE, {"format": "pt"})
        (out / "encoder").mkdir()
        encoder.save(out / "encoder")
        adapter = {"_component_": "speechfuse.fusion.Linear", "width": encoder.width}
        speech: dict[str, Any] = {"adapter": adapter, "base": None, "encoder": encoder.identity}
        speech["generator"] = "speechfuse.evals.SpliceGenerator"
        of_lora = (parts["lora"], lora | {"peft_type": "LORA"}) if lora else None
        folder.write(out, None, speech, parts["adapter"], of_lora, {})
    written = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name[0] != "."]
    count = sum(tensor.numel() for tensor in tensors.values())
    work.finish({"parameters": count}, [p for p in written if p != out / "plan.json"])
    print(f"{out}: {shape['model_type']}, LoRA of rank {lora.get('r', 0)}, {count:,} parameters")


if __name__ == "__main__":
    config.main(main, ConvertSalm, __doc__, ("path", "out"))
