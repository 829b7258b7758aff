"""What RWKV-ASR publishes, rwkv-adapter-N.pth: files of its names and shapes with random weights,
read strictly, as their code computes them, into a folder that hears."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import WavLMConfig, WavLMModel

from speechfuse.artifact import write_json
from speechfuse.evals import generation
from speechfuse.fusion import adapters, rwkv_asr
from speechfuse.quantizer import foreign
from speechfuse.rwkv import pth
from speechfuse.rwkv.model import Rwkv, Shape
from stages import ask
from stages.convert_rwkv import ConvertRwkv, main
from tests.small_training import ROOT, job
from tests.test_foreign import SMALL

QUANTIZER = ROOT / "recipes/demo/models/quantizer"
STACK, RANKS = 5, {"mix": 4, "decay": 6}


def published(path: Path, shape: Shape, width: int, hidden: int) -> dict[str, torch.Tensor]:
    """A file as its trainer writes it, in bf16."""
    heads, wide = shape.num_attention_heads, shape.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"language_model.blocks.{layer}.att.time_state": (heads, wide // heads, wide // heads)
        for layer in range(shape.num_hidden_layers)
    }
    adapter = "speech_encoder.adapter."
    shapes |= {f"{adapter}0.weight": (hidden, STACK * width), f"{adapter}0.bias": (hidden,)}
    shapes |= {f"{adapter}2.weight": (wide, hidden), f"{adapter}2.bias": (wide,)}
    tensors = {name: (torch.rand(of) - 0.5).bfloat16() for name, of in shapes.items()}
    torch.save(tensors, path)
    return tensors


def test_every_number_of_the_published_size_has_its_place(tmp_path):
    """RWKV-6 3B on WavLM-large; the adapter gives what their code computes."""
    torch.manual_seed(0)
    shape = Shape(6, 65536, 2560, 32, 40, 8960, {"mix": 32, "decay": 64})
    path = tmp_path / "rwkv-adapter-100.pth"
    tensors = published(path, shape, 1024, 2048)
    spec, adapter, state = rwkv_asr.read(path, shape, 1024)
    assert spec == job(ROOT / "recipes/rwkv_asr_3b/rwkv_asr.yaml").adapter
    counts = [sum(t.numel() for t in each.values()) for each in (adapter, state, tensors)]
    assert counts == [15_733_248, 5_242_880, 20_976_128]
    assert all(torch.equal(t, tensors[f"language_model.{name}"]) for name, t in state.items())
    ours = adapters.Stack(1024, 2560, STACK, 2048, plain=True)
    ours.load_state_dict(adapter)
    frames = torch.randn(1, 11, 1024)
    stacked = frames.unfold(1, STACK, STACK).flatten(2)  # without the last frame
    first, bias, second, last = (t.float() for name, t in tensors.items() if "adapter" in name)
    theirs = F.linear(F.relu(F.linear(stacked, first, bias)), second, last)
    found = ours(frames, torch.tensor([11]))
    torch.testing.assert_close(found[:, :2], theirs, atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """rwkv/, a language model in bf16 as BlinkDL's are; wavlm/; a recording; and what was trained
    with them, rwkv-adapter-7.pth."""
    parts, shape = tmp_path_factory.mktemp("asr"), Shape(6, 960, 32, 2, 2, 48, RANKS)
    torch.manual_seed(0)
    tensors = {n: t + 0.1 * torch.randn(t.shape) for n, t in Rwkv(shape).state_dict().items()}
    pth.write(parts / "rwkv.pth", {name: t.detach().bfloat16() for name, t in tensors.items()})
    words = str(ROOT / "recipes/demo/models/base")
    main(ConvertRwkv(str(parts / "rwkv.pth"), str(parts / "rwkv"), words))
    published(parts / "rwkv-adapter-7.pth", shape, SMALL["hidden_size"], 24)
    wavlm = WavLMConfig(**SMALL, feat_extract_norm="layer", do_stable_layer_norm=True)
    WavLMModel(wavlm).save_pretrained(parts / "wavlm")
    write_json(parts / "wavlm/preprocessor_config.json", {"do_normalize": True})
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(parts / "said.wav", noise, 16_000)
    return parts


def conversion(parts: Path, out: Path, file: str = "rwkv-adapter-7.pth") -> ConvertRwkv:
    encoder = {"_component_": "speechfuse.quantizer.of_wavlm", "checkpoint": str(parts / "wavlm")}
    return ConvertRwkv(str(parts / file), str(out), base=str(parts / "rwkv"), encoder=encoder)


def test_it_becomes_a_folder_that_is_asked(parts, tmp_path, capsys):
    """Twice makes it once; the recording is heard by the encoder that it was made for."""
    made = conversion(parts, tmp_path / "asr")
    main(made)
    main(made)
    assert "asr: complete, nothing to do" in capsys.readouterr().out
    question = ask.Ask(str(parts / "said.wav"), "", str(QUANTIZER), encoder=made.encoder)
    question.tasks, question.max_new_tokens = {"asr": str(tmp_path / "asr"), "st": "nowhere"}, 2
    question.task = "asr"
    ask.main(question)
    assert "answer:" in capsys.readouterr().out
    for task, checkpoint in (("qa", None), ("asr", str(tmp_path / "asr"))):
        with pytest.raises(
            ValueError, match=rf"^task={task}: choose one of tasks [(]asr, st[)], and"
        ):
            ask.main(replace(question, task=task, checkpoint=checkpoint))
    own, base = (load_file(f / "model.safetensors") for f in (tmp_path / "asr", parts / "rwkv"))
    assert all(torch.equal(tensor, base[name]) for name, tensor in own.items())
    identity = foreign.of_wavlm(str(parts / "wavlm")).identity
    model = generation.generator(tmp_path / "asr", identity, "a recording").model
    tensors = torch.load(parts / "rwkv-adapter-7.pth", weights_only=True)
    for layer, block in enumerate(model.blocks):
        state = tensors[f"language_model.blocks.{layer}.att.time_state"]
        assert torch.equal(block.att.time_state, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("speech_encoder.adapter.2.bias"), "Missing key"),
        (lambda t: t.update({"speech_encoder.model.x": torch.zeros(2)}), "speech_encoder.model.x"),
        (lambda t: t.pop("language_model.blocks.1.att.time_state"), "state of another model"),
        (lambda t: [t.pop(name) for name in [*t] if "time_state" in name], "has no initial state"),
        (
            lambda t: t.update({"speech_encoder.adapter.2.weight": torch.zeros(40, 24)}),
            "numbers to a language model of 32: .*size mismatch",
        ),
        (lambda t: t.update({"speech_encoder.adapter.0.weight": torch.zeros(24, 33)}), "of 16 num"),
    ],
)
def test_what_is_not_whole_is_refused(parts, tmp_path, change, message):
    tensors = torch.load(parts / "rwkv-adapter-7.pth", weights_only=True)
    change(tensors)
    torch.save(tensors, parts / "other.pth")
    with pytest.raises(ValueError, match=message):
        main(conversion(parts, tmp_path / "out", "other.pth"))
    assert not (tmp_path / "out").exists()
