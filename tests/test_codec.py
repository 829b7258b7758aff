"""Codes back to words: equality with whisperspeech's decoding, both file formats, refusals.

The golden files and how they were made: golden/make_whisperspeech_golden.py.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from speechfuse.quantizer.decoder import CodeTranscriber, save_published
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.spec import QuantizerSpec

GOLDEN = Path(__file__).parent / "golden"
WHISPER = GOLDEN / "whisper-decoding.pt"
RECORDED = json.loads((GOLDEN / "whisperspeech_decoding.json").read_text())
NEWEST, OLDEST = GOLDEN / "whispervq-decoding.model", GOLDEN / "whispervq-oldest.model"
MODELS = {"decoding": NEWEST, "oldest": OLDEST}


def codes_of(name: str) -> list[np.ndarray]:
    return [np.array(clip["codes"], np.uint16) for clip in RECORDED[name]]


def check_features(name: str, features: torch.Tensor) -> None:
    for clip, made in zip(RECORDED[name], features, strict=True):
        for place, expected in clip["features"].items():
            assert torch.allclose(made[int(place)], torch.tensor(expected), atol=1e-4), place


def test_golden_decoding_can_fail_a_wrong_decoder() -> None:
    for name, clips in RECORDED.items():
        assert [len(clip["codes"]) for clip in clips] == [0, 1, 40, 377, 750]
        texts = [clip["text"] for clip in clips]
        assert len(set(texts)) > 1 and all(texts), f"{name}: the text does not follow the codes"
        first = [clip["features"]["0"] for clip in clips]
        assert all(np.abs(np.subtract(a, b)).max() > 0.05 for a, b in pairwise(first))
    assert RECORDED["decoding"][0]["features"]["0"] != RECORDED["oldest"][0]["features"]["0"]


@pytest.mark.parametrize("name", MODELS)
def test_features_and_text_are_those_of_whisperspeech(name: str) -> None:
    decoder = CodeTranscriber.load(MODELS[name], WHISPER)
    codes = codes_of(name)
    check_features(name, decoder.features(codes))
    check_features(name, torch.cat([decoder.features([each]) for each in codes]))
    assert decoder.transcribe(codes, batch_size=3) == [clip["text"] for clip in RECORDED[name]]


def test_both_halves_survive_our_format_and_the_published_one(tmp_path: Path) -> None:
    quantizer, decoder = Quantizer.load(NEWEST, WHISPER), CodeTranscriber.load(NEWEST, WHISPER)
    ours, published = tmp_path / "ours", tmp_path / "tiny.en.model"
    quantizer.save(ours)
    decoder.decoder.save(ours)
    save_published(published, quantizer, decoder.decoder, "tiny.en")
    for path, whisper in ((ours, None), (published, WHISPER)):
        assert Quantizer.load(path, whisper).identity == quantizer.identity
        again = CodeTranscriber.load(path, WHISPER)
        assert again.decoder.shape == decoder.decoder.shape
        assert torch.equal(
            again.features(codes_of("decoding")), decoder.features(codes_of("decoding"))
        )


def test_a_shorter_window_is_that_of_a_whisper_that_was_cut(tmp_path: Path) -> None:
    content = torch.load(WHISPER, weights_only=True)
    content["dims"]["n_audio_ctx"] = 100
    positions = content["model_state_dict"]["encoder.positional_embedding"]
    content["model_state_dict"]["encoder.positional_embedding"] = positions[:100].clone()
    torch.save(content, tmp_path / "cut.pt")
    quantizer = Quantizer.load(NEWEST, WHISPER, window=2)
    assert quantizer.window == 2 and quantizer.frames == 200
    assert quantizer.identity == Quantizer.load(NEWEST, tmp_path / "cut.pt").identity
    assert quantizer.identity != Quantizer.load(NEWEST, WHISPER).identity
    spec = QuantizerSpec(str(NEWEST), str(WHISPER), window=2.0)
    assert spec.load("cpu").identity == quantizer.identity
    codes = codes_of("decoding")[:3]
    cut = CodeTranscriber.load(NEWEST, WHISPER, window=2)
    assert cut.features(codes).shape == (3, 100, 32)
    expected = CodeTranscriber.load(NEWEST, tmp_path / "cut.pt")
    assert torch.equal(cut.features(codes), expected.features(codes))
    assert cut.transcribe(codes) == expected.transcribe(codes)
    quantizer.save(tmp_path / "ours")
    cut.decoder.save(tmp_path / "ours")
    ours = CodeTranscriber.load(tmp_path / "ours", WHISPER)  # its Whisper is cut as it is
    assert ours.transcribe(codes) == cut.transcribe(codes)
    with pytest.raises(ValueError, match=r"multiple of 0\.04 s, at most the 30 s"):
        CodeTranscriber.load(NEWEST, WHISPER, window=2.02)
    with pytest.raises(ValueError, match=r"window=3: .*ours was trained with a window of 2 s"):
        Quantizer.load(tmp_path / "ours", window=3)


def test_a_saved_half_always_has_the_same_bytes(tmp_path: Path) -> None:
    half = CodeTranscriber.load(NEWEST, WHISPER).decoder
    made = set()
    for _ in range(8):
        half.save(tmp_path)
        made.add((tmp_path / "decoder.safetensors").read_bytes())
    assert len(made) == 1


def test_written_file_has_the_tensors_of_a_genuine_one(tmp_path: Path) -> None:
    """whisperspeech reads strictly: one name more or less, or another shape, is an error."""
    written, genuine = tmp_path / "written.model", torch.load(NEWEST, weights_only=True)
    quantizer, decoder = Quantizer.load(NEWEST, WHISPER), CodeTranscriber.load(NEWEST, WHISPER)
    save_published(written, quantizer, decoder.decoder, "tiny.en")
    content = torch.load(written, weights_only=True)
    assert content["config"] == genuine["config"]
    assert content["tunables"].items() >= genuine["tunables"].items()
    assert {k: t.shape for k, t in content["state_dict"].items()} == {
        k: t.shape for k, t in genuine["state_dict"].items()
    }
    for key, tensor in genuine["state_dict"].items():
        if not key.endswith(("embed_avg", "cluster_size", "initted")):  # of its own training
            assert torch.equal(content["state_dict"][key], tensor), key


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    decoder = CodeTranscriber.load(NEWEST, WHISPER)
    with pytest.raises(ValueError, match="751 codes up to 3: this quantizer makes 750 at most"):
        decoder.transcribe([np.full(751, 3, np.uint16)])
    with pytest.raises(ValueError, match=r"up to 33: .* of 0 to 32"):
        decoder.transcribe([np.array([33], np.uint16)])
    with pytest.raises(ValueError, match="set whisper to the openai-whisper"):
        CodeTranscriber.load(NEWEST, None)
    with pytest.raises(ValueError, match="vocabulary of 64"):
        CodeTranscriber.load(GOLDEN / "whispervq.model", GOLDEN / "whisper.pt")
    with pytest.raises(ValueError, match=r"has no decoder\.safetensors"):
        Quantizer.load(NEWEST, WHISPER).save(tmp_path)
        CodeTranscriber.load(tmp_path, WHISPER)
    other = torch.load(WHISPER, weights_only=True)
    other["model_state_dict"]["encoder.conv1.weight"][0] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another encoder"):
        CodeTranscriber.load(tmp_path, tmp_path / "other.pt")
    content = torch.load(NEWEST, weights_only=True)
    for key in [key for key in content["state_dict"] if "project_out" in key]:
        del content["state_dict"][key]
    torch.save(content, tmp_path / "half.model")
    with pytest.raises(ValueError, match="no decoding half"):
        CodeTranscriber.load(tmp_path / "half.model", WHISPER)
