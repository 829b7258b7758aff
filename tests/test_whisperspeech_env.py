"""WhisperSpeech on its genuine classes, in its own environment: both routes, end to end.

    just test-whisperspeech      (makes the environment where there is none)

Skipped without .venv-whisperspeech; SPEECHFUSE_WHISPERSPEECH names another interpreter. The models
are small, with random weights (make_whisperspeech.py).
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.functional import normalize

from speechfuse.openai_server import Unavailable
from speechfuse.quantizer import decoder
from speechfuse.quantizer.checkpoints import ENCODER_DIMS
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.synthesis.engines import sentences, whisperspeech
from speechfuse.synthesis.engines.espeak import Espeak
from speechfuse.synthesis.engines.whisperspeech import PYTHON, TextToCodes, TextToWaveform

ROOT = Path(__file__).parent.parent
INTERPRETER = os.environ.get("SPEECHFUSE_WHISPERSPEECH", str(ROOT / PYTHON))
CODES, WIDTH = 32, 8
TEXTS = ["What is three plus four?", "Name the capital of France.", "Why do birds sing?"]

skip_without_it = pytest.mark.skipif(
    not Path(INTERPRETER).exists(), reason="no WhisperSpeech here: just test-whisperspeech"
)


def needs_environment(test: Any) -> Any:
    return pytest.mark.whisperspeech(skip_without_it(test))


def quantizer(folder: Path, seed: int) -> Quantizer:
    """Each sound's row begins with 0.25, the mask's with -20, so that make_whisperspeech.py makes a
    model that says sounds."""
    torch.manual_seed(seed)
    made = Quantizer(QuantizerConfig(CODES, WIDTH, 2, True, 80, 300, 16, 2, 1))
    rows = normalize(torch.randn(CODES, WIDTH - 1), dim=-1) * (1 - 0.25**2) ** 0.5
    made.codebook[:-1] = torch.cat((torch.full((CODES, 1), 0.25), rows), dim=1)
    made.codebook[-1] = torch.tensor([-20.0] + [0.0] * (WIDTH - 1))
    made.save(folder)
    return made.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whisperspeech")
    own = quantizer(folder / "quantizer", 0)
    quantizer(folder / "another", 1)
    (folder / "codebook.json").write_text(json.dumps(own.codebook.tolist()))
    speakers = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "speakers.json").write_text(
        json.dumps(dict(zip(("ann", "bob"), speakers, strict=True)))
    )
    if Path(INTERPRETER).exists():
        script = str(ROOT / "tests/make_whisperspeech.py")
        subprocess.run([INTERPRETER, "-P", script, str(folder)], check=True, capture_output=True)
    else:  # what needs no environment reads its shape and its codebook only
        write_shape(folder / "t2s.model", own.codebook)
    return folder


def write_shape(path: Path, codebook: torch.Tensor) -> None:
    config = {"ttoks_len": 80, "stoks_len": 150, "stoks_codes": len(codebook)}
    state = {"embeddings.embedding.main.weight": codebook}
    torch.save({"config": config, "tunables": {}, "state_dict": state}, path)


def to_codes(models: Path, name: str = "quantizer", **changes) -> TextToCodes:
    return TextToCodes(
        **{
            "t2s": str(models / "t2s.model"),
            "quantizer": str(models / name),
            "python": INTERPRETER,
            **changes,
        }
    )


def to_waveform(models: Path, **changes) -> TextToWaveform:
    return TextToWaveform(
        **{
            "t2s": str(models / "t2s.model"),
            "s2a": str(models / "s2a.model"),
            "vocoder": str(models / "vocos"),
            "speakers": str(models / "speakers.json"),
            "python": INTERPRETER,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def codes(models) -> Iterator[TextToCodes]:
    with to_codes(models) as engine:
        process = engine._process
        yield engine
    assert process is not None and process.poll() == 0


@pytest.fixture(scope="module")
def waveform(models) -> Iterator[TextToWaveform]:
    with to_waveform(models) as engine:
        yield engine


@needs_environment
def test_text_becomes_codes_of_the_quantizer(codes, models):
    codes.check()
    assert codes.codec == Quantizer.load(models / "quantizer").identity
    said = [codes.speak(text, "whisperspeech", seed) for text in TEXTS for seed in range(4, 8)]
    for spoken in said:
        assert spoken.waveform is None and spoken.codes.dtype == np.uint16
        assert 1 <= len(spoken.codes) < 149 and spoken.codes.max() < CODES
        assert 13 <= spoken.about["cps"] <= 17
    assert len({tuple(spoken.codes) for spoken in said}) > 4 + 2, "the text is not heard"


@needs_environment
def test_what_is_said_depends_on_text_voice_and_seed_alone(codes, waveform):
    for engine, field, voice in ((codes, "codes", "whisperspeech"), (waveform, "waveform", "bob")):
        first = engine.speak(TEXTS[0], voice, 1)
        engine.speak(TEXTS[1], engine.voices()[0], 2)
        again, other = (engine.speak(TEXTS[0], voice, seed) for seed in (1, 3))
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
        assert first.about == again.about != other.about
        assert len(getattr(other, field)) != len(getattr(first, field))


@needs_environment
def test_text_becomes_a_waveform_that_the_quantizer_encodes(codes, waveform, models):
    waveform.check()
    assert waveform.codec is None and waveform.voices() == ["ann", "bob"]
    ann, bob = (waveform.speak(TEXTS[0], voice, 1).waveform for voice in waveform.voices())
    semantic = codes.speak(TEXTS[0], "whisperspeech", 1).codes
    assert ann.dtype == np.float32 and np.isfinite(ann).all() and np.std(ann) > 1e-4
    # the same text-to-codes model with the same seed: 25 codes a second become 75 acoustic ones,
    # of which the last 4 are not made
    assert len(ann) / 16_000 == pytest.approx(len(semantic) / 25 - 4 / 75, abs=0.03)
    assert len(ann) == len(bob) and np.abs(ann - bob).max() > 1e-3, "the speaker is not heard"
    (found,) = Quantizer.load(models / "quantizer").encode([ann])
    assert len(found) == int(25 * len(ann) / 16_000)


@needs_environment
def test_recordings_become_speakers(models, tmp_path):
    espeak, out = Espeak(["Annie", "m3"], ["en-us"]), tmp_path / "speakers.json"
    for voice in espeak.voices():
        said = espeak.speak(TEXTS[1], voice, 0).waveform
        soundfile.write(tmp_path / f"{voice[6:]}.wav", said, 16_000)
    script = str(ROOT / "pipeline/speechfuse/synthesis/engines/whisperspeech_speakers.py")
    command = [INTERPRETER, "-P", script, str(models / "ecapa.ckpt"), str(tmp_path), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert to_waveform(models, speakers=str(out)).voices() == ["Annie", "m3"]
    first, second = json.loads(out.read_text()).values()
    assert np.abs(np.subtract(first, second)).max() > 0.01


@needs_environment
def test_text_over_the_window_is_refused_by_the_process_and_split_before_it(codes):
    """The genuine model would crop it without a word."""
    assert codes.max_characters == min(79, int(0.9 * 150 / 25 * 13))
    long = "What is three plus four, and how much is that when it is doubled and doubled again?"
    with pytest.raises(ValueError, match=r"^too long: 84 bytes of text, at most 79$") as caught:
        codes.speak(long + "x", "whisperspeech", 0)
    assert not isinstance(caught.value, Unavailable)
    with pytest.raises(ValueError, match="too long"):
        codes.speak("é" * 40, "whisperspeech", 0)  # 80 bytes
    with pytest.raises(ValueError, match="too long"):
        sentences(long, codes.max_characters)
    text = " ".join(TEXTS)
    assert sentences(text, codes.max_characters) == [" ".join(TEXTS[:2]), TEXTS[2]]


@needs_environment
def test_speech_that_does_not_end_is_a_reject(models, tmp_path):
    spec = torch.load(models / "t2s.model", weights_only=True)
    bias = spec["state_dict"]["embeddings.embedding.hidden_to_emb.bias"]
    bias[0] = 200.0
    torch.save(spec, tmp_path / "endless.model")
    with to_codes(models, t2s=str(tmp_path / "endless.model")) as engine:
        with pytest.raises(ValueError, match=r"^unfinished: no end within 149 codes$") as caught:
            engine.speak(TEXTS[0], "whisperspeech", 0)
    assert not isinstance(caught.value, Unavailable)


@needs_environment
def test_a_process_that_fails_ends_the_job(models, tmp_path):
    (tmp_path / "t2s.model").write_bytes(b"no model")
    with pytest.raises(Unavailable, match="WhisperSpeech failed: "):
        to_codes(models, t2s=str(tmp_path / "t2s.model")).__enter__()
    engine = to_codes(models)
    with engine:
        process = engine._process
        assert process is not None
        process.kill()
        process.wait()
        with pytest.raises(Unavailable, match="process has ended"):
            engine.speak(TEXTS[0], "whisperspeech", 0)


@pytest.mark.parametrize("answers", [0, 1])
def test_a_process_that_hangs_is_ended_and_the_job_with_it(models, tmp_path, monkeypatch, answers):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + "echo {}\n" * answers + "exec sleep 60\n")  # deaf, too
    python.chmod(0o755)
    monkeypatch.setattr(whisperspeech, "SILENCE", 0.5)
    monkeypatch.setattr(whisperspeech, "PER_CHARACTER", 0.01)
    monkeypatch.setattr(whisperspeech, "ENDS", 0.1)
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"said nothing for 0\.\d+ s and was ended"):
        with to_codes(models, python=str(python)) as engine:
            engine.speak("ten " * 10, "whisperspeech", 0)
    assert time.monotonic() - start < 5


def test_a_process_that_does_not_end_is_killed(models, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho {}\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(whisperspeech, "ENDS", 0.1)
    with to_codes(models, python=str(python)) as engine:
        process = engine._process
    assert process is not None and process.poll() == -9


def test_a_text_to_codes_model_of_another_codec_is_refused(models, tmp_path):
    python = {"python": __file__}  # a file that is there
    to_codes(models, **python).check()
    with pytest.raises(ValueError, match=r"speaks the codes of another codec than .*another"):
        to_codes(models, "another", **python).check()
    own = Quantizer.load(models / "quantizer").codebook
    for other in (own[:17], own[:, :4]):
        write_shape(tmp_path / "t2s.model", other.contiguous())
        with pytest.raises(ValueError, match=f"its codebook .{len(other) - 1} codes of"):
            to_codes(models, t2s=str(tmp_path / "t2s.model"), **python).check()


def test_what_is_missing_is_said_before_work(models, tmp_path):
    python = {"python": __file__}
    with pytest.raises(ValueError, match="run `just setup-whisperspeech`"):
        to_codes(models, python=str(tmp_path / "bin/python")).check()
    with pytest.raises(ValueError, match=r"s2a=.*absent is not there: get it from WhisperSpeech"):
        to_waveform(models, s2a=str(tmp_path / "absent"), **python).check()
    (tmp_path / "speakers.json").write_text('{"ann": [1, 2]}')
    with pytest.raises(ValueError, match="give a JSON file"):
        to_waveform(models, speakers=str(tmp_path / "speakers.json"), **python).voices()
    (tmp_path / "t2s.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not a t2s model"):
        to_codes(models, t2s=str(tmp_path / "t2s.model"), **python).check()


def test_other_model_files_are_another_identity(models, tmp_path):
    first = to_codes(models).identity()
    (tmp_path / "t2s.model").write_bytes((models / "t2s.model").read_bytes() + b"x")
    assert to_codes(models).identity() == first
    assert to_codes(models, t2s=str(tmp_path / "t2s.model")).identity() != first


DECODE = """
import json, sys, torch, whisper
from whisperspeech.vq_stoks import RQBottleneckTransformer
torch.set_float32_matmul_precision("highest")  # the package lowers it
path, teacher, codes = sys.argv[1:]
model = RQBottleneckTransformer.load_model(path)
model.whmodel = [whisper.load_model(teacher, device="cpu")]
codes = torch.tensor(json.loads(codes))
options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
with torch.inference_mode():
    features, heard = model.dequantize(codes), model.decode_text(codes, options)
print(json.dumps([features[0, :40].tolist(), heard[0].text]))
"""


@needs_environment
@pytest.mark.parametrize("window", [30.0, 5.0])
def test_a_codec_of_ours_on_tiny_en_is_read_and_decoded_by_whisperspeech(tiny_en, window, tmp_path):
    torch.manual_seed(0)
    teacher = decoder.load_whisper(tiny_en, window)
    dims = {name: getattr(teacher.dims, name) for name in ENCODER_DIMS}
    own = Quantizer(QuantizerConfig(CODES, WIDTH, 2, True, **dims)).eval()
    own.encoder = teacher.encoder
    own.codebook.copy_(normalize(torch.randn(CODES + 1, WIDTH), dim=-1))
    half = decoder.WhisperTextDecoder(own.config, decoder.Shape(teacher.dims.n_audio_head)).eval()
    decoder.save_published(tmp_path / "whisper-vq.model", own, half, "tiny.en")
    codes = torch.randint(0, CODES, (100,)).numpy()
    arguments = [str(tmp_path / "whisper-vq.model"), str(tiny_en), json.dumps(codes.tolist())]
    command = [INTERPRETER, "-P", "-c", DECODE, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    features, heard = json.loads(done.stdout.splitlines()[-1])
    assert len(features) == 40 and heard.strip()
    if window == 30.0:  # the package knows no other, and takes the rest of it for silence
        ours = decoder.CodeTranscriber(half, own, teacher)
        torch.testing.assert_close(
            torch.tensor(features), ours.features([codes])[0, :40], atol=1e-4, rtol=1e-4
        )
        assert ours.transcribe([codes]) == [heard]
