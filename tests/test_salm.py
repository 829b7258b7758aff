"""A published SALM of NVIDIA NeMo, in the layout of nvidia/canary-qwen-2.5b
(golden/make_salm_golden.py made it): it is read whole, and answers as NeMo has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speechfuse.artifact import write_json
from speechfuse.evals import generation
from speechfuse.fusion.door import FRAME
from speechfuse.hub import cards, push
from speechfuse.quantizer import foreign
from speechfuse.tokens import weights
from stages import ask, convert_salm
from tests.test_foreign import GOLDEN, ROOT, waveform

FACTS = json.loads((GOLDEN / "salm.json").read_text())
LENGTHS = [16_000, 12_000]
QWEN = {  # Qwen3-1.7B
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of its language model: configuration and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("qwen3") / "base"
    shutil.copytree(GOLDEN / "chat/qwen", folder)
    write_json(folder / "config.json", FACTS["llm"])
    return folder


@pytest.fixture(scope="module")
def made(base) -> Path:
    job = convert_salm.ConvertSalm(str(GOLDEN / "salm"), str(base.parent / "made"), str(base))
    convert_salm.main(job)
    convert_salm.main(job)  # complete
    return base.parent / "made"


def test_it_answers_as_nemo_has_it(made):
    ears = foreign.trained(made / "encoder")
    asker = generation.generator(made, ears.identity, "x", "cpu")
    golden = load_file(GOLDEN / "salm.safetensors")
    for samples, reply in zip(LENGTHS, FACTS["replies"], strict=True):
        segments = [{"text": FACTS["asked"]}, *asker.speech(ears, [waveform(samples)])]
        ids = asker.prompt([{"role": "user", "segments": segments}])
        start, frames = FACTS["ids"].index(None), ids.count(FRAME)
        assert frames == -(-samples // 1280)
        assert [*ids[:start], None, *ids[start + frames :]] == FACTS["ids"]
        inputs = asker.inputs(torch.tensor([ids]), [ids])
        how = {"max_new_tokens": 8, "do_sample": False}
        how["eos_token_id"] = asker.vocabulary.end_of_turn
        assert asker.model.generate(**inputs, **how)[0].tolist() == reply
        logits = asker.model(**inputs).logits[0, -1]
        torch.testing.assert_close(logits, golden[str(samples)], rtol=0, atol=2e-4)


def test_its_parts_are_those_of_the_file(made):
    theirs, ours = load_file(GOLDEN / "salm/model.safetensors"), load_file(made / weights.SINGLE)
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["embed_tokens.weight"])
    v_proj = "model.layers.1.self_attn.v_proj"
    name = f"llm.base_model.model.{v_proj}"
    assert torch.equal(ours[f"{v_proj}.weight"], theirs[f"{name}.base_layer.weight"])
    lora = load_file(made / "lora/adapter_model.safetensors")
    assert len(lora) == 8 and len(ours) + len(lora) + 2 + 2 == sum(
        not n.startswith(convert_salm.ENCODER) for n in theirs
    )
    low = f"base_model.model.{v_proj}.lora_B.weight"
    assert torch.equal(lora[low], theirs[f"{name}.lora_B.default.weight"])
    text = AutoModelForCausalLM.from_pretrained(made)  # for any library, without LoRA
    assert torch.equal(text.model.layers[1].self_attn.v_proj.weight, ours[f"{v_proj}.weight"])
    alone = foreign.of_fastconformer(str(GOLDEN / "salm"))  # as the encoder of a training
    assert alone.identity == foreign.trained(made / "encoder").identity
    card = cards.card(made, ROOT / "data_cards", "me/canary")
    assert f"`{alone.identity}`, which is in `encoder/`" in card and "`lora/` is in peft" in card
    sent = push.files_of(made)
    assert {"model.safetensors", "speech.safetensors", "encoder/config.json"} < sent.keys()


def test_just_ask_hears_with_its_encoder(made, tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "said.wav", waveform(16_000), 16_000)
    job: Any = ask.Ask(str(tmp_path / "said.wav"), "", "recipes/demo/models/quantizer")
    job.checkpoint, job.request, job.max_new_tokens = str(made), FACTS["asked"], 8
    ask.main(job)
    assert "answer: " in capsys.readouterr().out


def changed(folder: Path, change: Any, stated: Any = None) -> Path:
    shutil.copytree(GOLDEN / "salm", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if stated:
        content = json.loads((folder / "config.json").read_text())
        stated(content)
        write_json(folder / "config.json", content)
    return folder


def test_one_in_bfloat16_as_it_is_published(base, tmp_path):
    def half(tensors: dict[str, torch.Tensor]) -> None:
        floats = {name: t.bfloat16() for name, t in tensors.items() if t.is_floating_point()}
        tensors |= floats

    path, of_half = changed(tmp_path / "salm", half), tmp_path / "base"
    shutil.copytree(base, of_half)
    write_json(of_half / "config.json", FACTS["llm"] | {"dtype": "bfloat16"})
    out = tmp_path / "out"
    convert_salm.main(convert_salm.ConvertSalm(str(path), str(out), str(of_half)))
    ears = foreign.trained(out / "encoder")
    asker = generation.generator(out, ears.identity, "x", "cpu")
    assert asker.model.dtype == torch.bfloat16
    segments = [{"text": FACTS["asked"]}, *asker.speech(ears, [waveform(16_000)])]
    assert len(asker.reply([[{"role": "user", "segments": segments}]], 4)) == 1


LAYER = "llm.base_model.model.model.layers.1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{LAYER}.mlp.up_proj.weight", None, r"lacks llm\.base_model.*1\.mlp\.up_proj\.weight:"),
        (f"{LAYER}.self_attn.q_proj.lora_B.default.weight", None, r"lacks .*q_proj\.lora_B\."),
        (f"{LAYER}.self_attn.k_proj.lora_A.default.weight", [4, 32], r"also has .*k_proj\.lora_A"),
        (f"{LAYER}.self_attn.v_proj.lora_A.default.weight", [8, 32], r"other shapes .*lora_A"),
        ("embed_tokens.weight", None, "lacks embed_tokens.weight"),
        ("perception.proj.bias", None, r"lacks perception\.proj\.bias"),
        ("perception.proj.weight", [32, 17], r"other shapes .*perception\.proj\.weight"),
        ("perception.modality_adapter.layers.0.a", [1], r"also has perception\.modality_adapter"),
        ("perception.preprocessor.featurizer.fb", [1, 128, 257], "another log-mel.*its filters"),
        ("perception.encoder.layers.1.norm_out.bias", None, r"Missing key.*layers\.1\.norm_out"),
        ("perception.encoder.layers.2.norm_out.bias", [16], r"Unexpected key.*layers\.2\.norm_out"),
        ("audio_head.weight", [2, 2], r"also has audio_head\.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_unknown_is_named(base, tmp_path, name, value, message):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if value:
            tensors[name] = torch.ones(value)

    path = changed(tmp_path / "salm", change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_salm.main(convert_salm.ConvertSalm(str(path), str(tmp_path / "out"), str(base)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (lambda c: c.pop("perception"), "holds no SALM"),
        (lambda c: c["lora"].pop("r"), "holds no SALM"),
        (lambda c: c["lora"].update(use_dora=True), "lora.use_dora of its config.json cannot"),
        (lambda c: c["lora"].update(r=8), r"other shapes than .*lora_A"),
        (lambda c: c.pop("lora"), r"lacks llm\.model\."),
        (lambda c: c["perception"].pop("encoder"), "has no encoder and log-mel"),
        (lambda c: c["perception"]["encoder"].update(subsampling="vggnet"), "of another archit"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(base, tmp_path, stated, message):
    path = changed(tmp_path / "salm", lambda tensors: None, stated)
    with pytest.raises(ValueError, match=message):
        convert_salm.main(convert_salm.ConvertSalm(str(path), str(tmp_path / "out"), str(base)))


def test_names_and_shapes_at_the_size_of_canary_qwen(tmp_path):
    """Whose file holds bfloat16."""
    write_json(tmp_path / "config.json", {"model_type": "qwen3", **QWEN})
    asked = weights.asked_of(tmp_path)
    del asked[weights.HEAD]  # its embedding
    lora = {"r": 128, "lora_alpha": 256, "target_modules": ["q_proj", "v_proj"]}
    names = convert_salm.wanted(asked, lora, foreign.MEL | {"feature_size": 128}, 1024)
    shapes = {name: shape for name, (_, _, shape) in names.items()}
    layer = "llm.base_model.model.model.layers.27.self_attn"
    assert shapes[f"{layer}.q_proj.base_layer.weight"] == (2048, 2048)
    assert shapes[f"{layer}.v_proj.lora_B.default.weight"] == (1024, 128)
    assert shapes[f"{layer}.k_proj.weight"] == (1024, 2048)
    assert shapes["embed_tokens.weight"] == (151_936, 2048)
    assert shapes["perception.proj.weight"] == (2048, 1024)
    sizes = {"num_hidden_layers": 32, "hidden_size": 1024, "intermediate_size": 4096}
    encoder = foreign.of_fastconformer(
        "no/file", sizes=sizes | {"num_mel_bins": 128, "num_attention_heads": 8}
    )
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    total += sum(tensor.numel() for tensor in encoder.encoder.state_dict().values())
    assert round(2 * total / 2**30, 2) == 4.77  # GiB, as its file has
