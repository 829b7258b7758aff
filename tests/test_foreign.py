"""Encoders from elsewhere: NeMo's FastConformer (golden/make_fastconformer_golden.py made the
values), WavLM, HuBERT, several at once, and files that are none."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

from speechfuse import config
from speechfuse.artifact import write_json
from speechfuse.fusion.adapters import count
from speechfuse.fusion.door import adapter_of
from speechfuse.hub import push
from speechfuse.quantizer import foreign
from speechfuse.train.preflight import rehearsal

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
LENGTHS = [8_000, 15_999, 16_000, 16_001, 17_280, 32_000, 160_000]
FRAMES = [7, 13, 13, 13, 14, 25, 125]  # as NeMo counts them
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def waveform(samples: int) -> np.ndarray:
    """As golden/make_fastconformer_golden.py has it."""
    noise = np.random.default_rng(samples).normal(0, 0.1, samples)
    return (noise * (1 + np.sin(np.arange(samples) / 3000))).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders of small random models, by kind; both norms of the convolutions."""
    made = {}
    for kind, model, settings, norm in (
        ("wavlm", WavLMModel, WavLMConfig, "layer"),
        ("hubert", HubertModel, HubertConfig, "group"),
    ):
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        shape = settings(**SMALL, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
        model(shape).save_pretrained(made[kind])
        write_json(made[kind] / "preprocessor_config.json", {"do_normalize": norm == "layer"})
    return made


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_a_fastconformer_is_nemos(name):
    golden = load_file(GOLDEN / "fastconformer.safetensors")
    encoder = foreign.of_fastconformer(str(GOLDEN / f"fastconformer_{name}.nemo"))
    assert (encoder.token_rate, encoder.width, encoder.window) == (12.5, 16, 40.0)
    found, lengths = encoder.encode_batch([waveform(samples) for samples in LENGTHS], 16)
    assert lengths == FRAMES == [count(samples, encoder.steps) for samples in LENGTHS]
    for clip, samples, length in zip(found, LENGTHS, lengths, strict=True):
        torch.testing.assert_close(clip[:length], golden[f"{name}.{samples}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "scaled", "wavlm", "hubert", "both"])
def test_a_clip_has_the_same_frames_alone_and_in_any_batch(kind, folders):
    encoder = made(kind, folders)
    clips = [waveform(samples) for samples in LENGTHS[:-1]]
    together, lengths = encoder.encode_batch(clips, 16)
    for clip, found, length in zip(clips, together, lengths, strict=True):
        (alone,), (own,) = encoder.embed_batch([clip], 1)  # as ask does
        assert own == length == count(len(clip), encoder.steps)
        torch.testing.assert_close(found[:length], alone, rtol=0, atol=1e-6)
        assert not found[length:].any()
    # what lies behind a clip, if it is no silence, is not heard; and a clip of length 0 is one
    samples = torch.tensor([8_000, 0])
    for behind in (0.0, 1.0):
        waveforms = torch.full((2, 16_000), behind)
        waveforms[0, :8_000] = torch.from_numpy(clips[0])
        heard, (first, none) = encoder.train()(waveforms, samples)
        assert none == 0 and not heard[1].any() and heard.isfinite().all()
        torch.testing.assert_close(heard[0, :first], together[0, :first], rtol=0, atol=1e-6)


def made(kind: str, folders: dict[str, Path]) -> Any:
    if kind in folders:
        return foreign.of_wavlm(str(folders[kind]))
    of = "speechfuse.quantizer.of_"
    nemo = {"_component_": f"{of}fastconformer"}
    nemo["checkpoint"] = str(GOLDEN / f"fastconformer_{kind.replace('both', 'plain')}.nemo")
    if kind != "both":
        return config.instantiate(nemo)
    wavlm = {"_component_": f"{of}wavlm", "checkpoint": str(folders["wavlm"]), "window": 20.0}
    both = {"_component_": "speechfuse.quantizer.concatenated", "encoders": [nemo, wavlm]}
    return config.instantiate(both)


@pytest.mark.parametrize("kind", ["wavlm", "hubert"])
def test_wavlm_and_hubert_are_transformers(kind, folders):
    model = {"wavlm": WavLMModel, "hubert": HubertModel}[kind].from_pretrained(folders[kind])
    clip = torch.from_numpy(waveform(16_000))[None]
    if kind == "wavlm":  # whose preprocessor normalizes
        clip = (clip - clip.mean()) / (clip.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        theirs = model.eval()(clip).last_hidden_state[0]
    ((ours,), (length,)) = made(kind, folders).encode_batch([waveform(16_000)], 1)
    assert length == 49
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_encoders_side_by_side_keep_time(folders):
    both, first, second = (made(kind, folders) for kind in ("both", "plain", "wavlm"))
    assert (both.width, both.token_rate, both.window) == (32, 12.5, 20.0)
    clip = [waveform(17_280)]
    joined, a, b = (each.encode_batch(clip, 1)[0][0] for each in (both, first, second))
    assert torch.equal(joined[:, :16], a) and torch.equal(joined[:, 16:], b[::4][:14])
    assert both.identity not in (first.identity, made("hubert", folders).identity)


@pytest.mark.parametrize("kind", ["plain", "wavlm", "hubert", "both"])
def test_the_memory_of_a_window_is_planned_without_any(kind, folders):
    encoder = made(kind, folders)
    foreign.filters.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        frames = encoder.silence(3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a second plan, and then a real batch
        encoder.silence(1)
    assert encoder.encode_batch([waveform(8_000)], 1)[0].isfinite().all()
    assert (frames.shape[0], frames.shape[2]) == (3, encoder.width)
    assert frames.shape[1] >= count(round(encoder.window * 16_000), encoder.steps)


@pytest.mark.parametrize("kind", ["scaled", "wavlm", "both"])
def test_a_saved_encoder_is_read_again(kind, folders, tmp_path):
    """As a training writes it; in it weights that are no encoder's are left alone."""
    encoder = made(kind, folders)
    encoder.save(tmp_path)
    again = foreign.trained(tmp_path)
    assert again.identity == encoder.identity and len(encoder.identity) == 64
    clip = [waveform(16_001)]
    assert torch.equal(again.encode_batch(clip, 1)[0], encoder.encode_batch(clip, 1)[0])
    assert not made(kind, folders).to("meta").state_dict().keys() - encoder.state_dict().keys()


def test_preflight_asks_wavlm_for_the_windows_that_fill_a_batch(folders, monkeypatch):
    encoder, asked = foreign.of_wavlm(str(folders["wavlm"]), window=1.0), []
    silence = encoder.silence
    monkeypatch.setattr(encoder, "silence", lambda clips: (asked.append(clips), silence(clips))[1])
    stack = {"_component_": "speechfuse.fusion.Stack", "width": 16, "stack": 3, "hidden": 8}
    door = SimpleNamespace(adapter=adapter_of(stack, 8), encoder=encoder, weight=torch.zeros(1, 8))
    monkeypatch.setattr(rehearsal.backbone, "embedding_of", lambda _: door)
    planned = SimpleNamespace(model=None, dtype=torch.float32)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    assert rehearsal.Rehearsal._heard(planned, tokens).shape == (2, 64, 8)
    assert asked == [8] and 7 * 49 < 2 * 64 * 3 <= 8 * 49  # 49 frames a second


def test_encoders_side_by_side_are_pushed_whole(folders, tmp_path):
    encoder, epoch, there = made("both", folders), tmp_path / "epoch_0", tmp_path / "there"
    (epoch / "encoder").mkdir(parents=True)
    encoder.save(epoch / "encoder")
    write_json(epoch / "speech.json", {"base": "models/base"})
    for name in ("config.json", "manifest.json"):
        write_json(epoch / name, {})
    for name in ("speech.safetensors", "model.safetensors"):
        save_file({"a": torch.zeros(1)}, epoch / name)
    for name, path in push.files_of(epoch).items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there / name)
    assert foreign.trained(there / "encoder").identity == encoder.identity
    others = {path.name for path in there.iterdir()} - {"encoder"}
    assert others == {"speech.json", "speech.safetensors", "manifest.json"}


def test_the_encoder_of_a_recognizer_in_a_hugging_face_folder(tmp_path):
    encoder = foreign.of_fastconformer(str(GOLDEN / "fastconformer_plain.nemo"))
    encoder.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"model.encoder.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed | {"proj_out.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    shape = foreign.read_config(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "canary", "encoder_config": shape})
    again = foreign.of_fastconformer(str(tmp_path))
    clip = [waveform(16_001)]
    assert torch.equal(again.encode_batch(clip, 1)[0], encoder.encode_batch(clip, 1)[0])
    del renamed["model.encoder.layers.1.conv.norm.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the encoder that its configuration"):
        foreign.of_fastconformer(str(tmp_path))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], **files: bytes) -> str:
    """A .nemo file whose YAML is changed."""
    with tarfile.open(GOLDEN / "fastconformer_plain.nemo") as tar:
        contents = {m.name.removeprefix("./"): tar.extractfile(m) for m in tar if m.isfile()}
        read = {name: file.read() for name, file in contents.items() if file}
    stated = yaml.safe_load(read["model_config.yaml"])
    change(stated)
    read["model_config.yaml"] = yaml.safe_dump(stated).encode()
    path = folder / "changed.nemo"
    with tarfile.open(path, "w") as tar:
        for name, content in (read | files).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "encoder",
            {"_target_": "nemo.collections.asr.modules.ConvASREncoder"},
            r"of another architecture: its encoder._target_ is 'nemo.*ConvASREncoder'",
        ),
        ("encoder", {"subsampling": "striding"}, r"another architecture: its encoder.subsampling"),
        ("encoder", {"att_context_size": [70, 13]}, r"att_context_size is \[70, 13\]"),
        ("preprocessor", {"normalize": "NA"}, r"another architecture: its preprocessor.normalize"),
        ("encoder", {"n_layers": 3}, "does not hold the encoder that its configuration describes"),
        ("encoder", {"d_model": "wide"}, "a size in its configuration is wrong"),
        ("encoder", {"n_layers": 10**9}, "that its configuration describes: it has .* tensors"),
        ("encoder", {"subsampling_factor": 0}, "that its configuration describes"),
        ("encoder", {"n_heads": 0}, "that its configuration describes"),
        ("encoder", {"n_heads": 3}, "that its configuration describes"),
        ("preprocessor", {"window_size": "long"}, "a size in its configuration is wrong"),
        ("preprocessor", {"features": 64}, "that its configuration describes"),
    ],
)
def test_a_nemo_file_of_another_architecture_is_refused(part, values, message, tmp_path):
    path = rewritten(tmp_path, lambda stated: stated[part].update(values))
    with pytest.raises(ValueError, match=message) as caught:
        foreign.of_fastconformer(path)
    assert "changed.nemo" in str(caught.value)


def test_a_file_that_is_no_nemo_file_is_refused(tmp_path, folders):
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR."
    path = rewritten(tmp_path, lambda stated: None, **{"model_weights.ckpt": code})
    with pytest.raises(ValueError, match=r"changed.nemo is no .nemo file with an encoder"):
        foreign.of_fastconformer(path)
    assert not (tmp_path / "run").exists()
    for content in ([torch.zeros(1)], {"encoder.pre_encode.out.weight": 1}):
        torch.save(content, file := io.BytesIO())
        files = {"model_weights.ckpt": file.getvalue()}
        with pytest.raises(ValueError, match=r"changed\.nemo is no .nemo file with an encoder"):
            foreign.of_fastconformer(rewritten(tmp_path, lambda stated: None, **files))
    path = rewritten(tmp_path, lambda stated: stated.pop("encoder"))
    with pytest.raises(ValueError, match=r"has no encoder and log-mel \('encoder'\)"):
        foreign.of_fastconformer(path)
    (tmp_path / "text.nemo").write_text("no tar")
    with pytest.raises(ValueError, match="it must be a plain tar"):
        foreign.of_fastconformer(str(tmp_path / "text.nemo"))
    with pytest.raises(ValueError, match=r"its config.json is of a wavlm"):
        foreign.of_fastconformer(str(folders["wavlm"]))
    shutil.copytree(folders["hubert"], tmp_path / "other")
    write_json(tmp_path / "other/config.json", {"model_type": "bert"})
    with pytest.raises(ValueError, match="of no hubert or wavlm"):
        foreign.of_wavlm(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"waveform 0 has 41.00 s; .* takes 0.08 to 40 s"):
        made("plain", folders).encode_batch([np.zeros(41 * 16_000, np.float32)], 1)


def test_parameters_of_the_modular_speechllm_at_its_size():
    """Of the encoder, and of two conformer blocks with their projection to Llama-2's width."""
    recipe = yaml.safe_load((ROOT / "recipes/modular_7b/stage1.yaml").read_text())
    encoder = config.instantiate(recipe["encoder"])
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert round(parameters(encoder) / 1e6, 2) == 108.76
    with torch.device("meta"):
        adapter = adapter_of(recipe["adapter"], recipe["model"]["embed_dim"])
    assert round(parameters(adapter.blocks, adapter.outer) / 1e6, 2) == 14.73
    assert encoder.steps[1:] == [[3, 2, 1]] * 3 and encoder.token_rate == 12.5


def parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_stated_sizes_are_compared_with_the_file():
    path = str(GOLDEN / "fastconformer_plain.nemo")
    assert foreign.of_fastconformer(path, sizes={"hidden_size": 16}).width == 16
    with pytest.raises(ValueError, match="has other sizes than the recipe states: num_hidden_lay"):
        foreign.of_fastconformer(path, sizes={"hidden_size": 16, "num_hidden_layers": 17})
    with pytest.raises(FileNotFoundError):
        foreign.of_fastconformer("no/such.nemo")
