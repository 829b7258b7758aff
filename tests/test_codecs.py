"""Codecs: a small one of our own, and those of transformers; the log-mel that looks back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers.models.dac import DacConfig, DacModel
from transformers.models.encodec import EncodecConfig, EncodecModel
from transformers.models.mimi import MimiConfig, MimiModel

from speechfuse import config
from speechfuse.audio import espeak_ng, mel
from speechfuse.codecs import patches
from speechfuse.codecs.codec import codec_of
from speechfuse.rows import shards
from stages import resynthesize

SHIPPED = Path("recipes/demo/models/codec")
OURS = {"_component_": "speechfuse.codecs.patches", "checkpoint": str(SHIPPED)}
TEXTS = ["what is two plus two four", "name the capital of peru lima", "where does a cow live"]


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    with espeak_ng.EspeakLibrary() as engine:
        return [engine.speak(text, espeak_ng.EspeakVoice("en-us")).waveform for text in TEXTS]


@pytest.fixture(scope="module")
def fitted(speech) -> patches.Patches:
    return patches.fit(torch.cat([patches.patches(clip) for clip in speech]), 16, 2, 32, 0)


def test_the_log_mel_knows_nothing_of_later_samples(speech):
    whole = torch.from_numpy(speech[0])
    other = whole.clone()
    other[8000:] = 0.5
    first, second = mel.log_mel(whole), mel.log_mel(other)
    assert torch.equal(first[:50], second[:50]) and not torch.equal(first[50], second[50])
    part = mel.log_mel(whole[:8000])
    assert torch.allclose(first[:50], part, atol=1e-5) and first.shape == (len(whole) // 160, 80)


def test_griffin_lim_is_in_time_and_says_the_same_mel(speech):
    wanted = mel.log_mel(torch.from_numpy(speech[0]))
    sound = mel.griffin_lim(wanted, 30)
    assert len(sound) == 160 * len(wanted)
    errors = {
        shift: float((mel.log_mel(torch.roll(sound, shift)) - wanted).abs().mean())
        for shift in (-160, -80, 0, 80, 160)
    }
    assert min(errors, key=errors.get) == 0 and errors[0] < 0.25, errors
    assert torch.equal(sound, mel.griffin_lim(wanted, 30))


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(8000, 7), (15999, 13), (16000, 13), (16001, 13), (17280, 14), (32000, 25), (160000, 125)],
)
def test_frames_are_as_many_as_of_an_encoder_of_80_ms(fitted, samples, frames):
    codes = fitted.encode(np.zeros(samples, np.float32))
    assert codes.shape == (frames, 2) and codes.dtype == np.uint16
    assert len(fitted.decode(codes)) == frames * 1280


def test_codes_say_more_with_each_book_and_silence_is_silent(speech, fitted):
    frames = torch.cat([patches.patches(clip) for clip in speech])
    errors = []
    for books in (0, 1, 2):
        one = patches.fit(frames, 16, max(1, books), 32, 0)
        codes = np.concatenate([one.encode(clip) for clip in speech])
        kept = sum(
            book[torch.from_numpy(codes[:, i].astype(int))]
            for i, book in enumerate(one.tensors["books"][:books])
        )
        rebuilt = kept @ one.tensors["components"].T if books else 0
        errors.append(float((rebuilt + one.tensors["mean"] - frames).square().mean()))
    assert errors[0] > 2 * errors[1] and errors[1] > 1.1 * errors[2], errors
    silence = fitted.decode(np.tile(fitted.silence(), (12, 1)))
    assert np.abs(silence).max() < 0.02 < np.abs(fitted.decode(fitted.encode(speech[0]))).max()
    assert not len(fitted.decode(np.zeros((0, 2), np.uint16)))


def test_a_codec_is_the_same_after_saving_and_not_with_another_weight(fitted, tmp_path):
    files = fitted.save(tmp_path)
    again = patches.load(str(tmp_path))
    assert again.stream == fitted.stream and all(path.is_file() for path in files)
    assert again.stream["codebooks"] == 2 and again.stream["codebook_size"] == 32
    again.tensors["mean"] += 1e-3
    assert patches.Patches(again.tensors).identity != fitted.identity


def test_what_is_no_codec_is_refused_in_a_sentence(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"too few for codebook_size=300"):
        patches.fit(torch.zeros(9, 640), 16, 2, 300, 0)
    with pytest.raises(ValueError, match="is no codec of ours"):
        patches.load(str(tmp_path))
    fitted.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"codec": "other"}))
    with pytest.raises(ValueError, match="is no codec of ours"):
        patches.load(str(tmp_path))
    with pytest.raises(ValueError, match="is no folder of a MimiModel"):
        config.instantiate(
            {"_component_": "speechfuse.codecs.mimi", "checkpoint": str(tmp_path / "x")}
        )
    with pytest.raises(ValueError, match=r"speechfuse\.audio\.Gain is no codec"):
        codec_of({"_component_": "speechfuse.audio.Gain", "db": [0, 0]})


def tiny(name: str):
    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "codebook_dim": 8}
    if name == "mimi":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        sizes |= {"hidden_size": 16, "num_filters": 2, "num_hidden_layers": 1, **heads}
        sizes |= {"intermediate_size": 16, "num_quantizers": 4, "upsample_groups": 16}
        return MimiModel(MimiConfig(vector_quantization_hidden_dimension=8, **sizes))
    if name == "encodec":
        return EncodecModel(EncodecConfig(num_filters=2, hidden_size=8, **sizes))
    own = {"encoder_hidden_size": 2, "decoder_hidden_size": 32, "n_codebooks": 3}
    return DacModel(DacConfig(**own, **sizes))


@pytest.mark.parametrize(
    ("name", "rate", "books"), [("mimi", 12.5, 4), ("encodec", 75, 80), ("dac", 31.25, 3)]
)
def test_codecs_of_transformers(name, rate, books, speech, tmp_path):
    model = tiny(name).eval()
    for buffer in (b for n, b in model.named_buffers() if n.endswith(("embed_sum", "embed"))):
        buffer.normal_()  # else all codes are one
    model.save_pretrained(tmp_path)
    spec = {"_component_": f"speechfuse.codecs.{name}", "checkpoint": str(tmp_path)}
    whole, two = codec_of(spec), codec_of(spec | {"codebooks": 2})
    assert (whole.codebooks, whole.frame_rate, whole.codebook_size) == (books, rate, 16)
    codes = whole.encode(speech[0])
    assert abs(len(codes) - len(speech[0]) / 16000 * rate) <= 2 and codes.shape[1] == books
    assert len(np.unique(codes)) > 1
    assert np.array_equal(two.encode(speech[0]), codes[:, :2]) and two.identity != whole.identity
    sound = whole.decode(codes)
    assert abs(len(sound) / whole.sample_rate - len(codes) / rate) < 0.1 and sound.ndim == 1
    assert not np.array_equal(sound, two.decode(codes[:, :2]))
    with pytest.raises(ValueError, match=f"codebooks=99: .* has {books}"):
        codec_of(spec | {"codebooks": 99})


def test_the_shipped_codec_has_its_replies_and_is_small(tmp_path, capsys):
    codec = codec_of(OURS)
    assert shards.read_stream(SHIPPED) == codec.stream
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000
    rows = [row for path in shards.shard_paths(SHIPPED) for row in shards.read_shard(path)]
    assert len({row["text"] for row in rows}) == len(rows) > 2000
    row = rows[0]
    codes = row["codes"].reshape(-1, codec.codebooks)
    assert abs(len(codes) / 12.5 - row["seconds"]) < 0.08
    wav = tmp_path / "reply.wav"
    soundfile.write(wav, codec.decode(codes), 16000)
    job = resynthesize.Resynthesize(str(wav), OURS, str(tmp_path / "again.wav"))
    resynthesize.main(job)
    assert re.search(r"frames of 2 codes, 200 bit/s", capsys.readouterr().out)
    sound, rate = soundfile.read(tmp_path / "again.wav")
    assert rate == 16000 and len(sound) == len(codes) * 1280
    with pytest.raises(FileNotFoundError, match="no audio file at"):
        resynthesize.main(resynthesize.Resynthesize(str(tmp_path / "none.wav"), OURS))
