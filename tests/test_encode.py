"""Recordings to frames: the job, both kinds of encoder, and what the job refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from speechfuse import artifact, config
from speechfuse.evals import items
from speechfuse.quantizer import frames
from speechfuse.quantizer.encoder import log_mel, padded
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import shards, verification
from speechfuse.texts.curation.normalization import spoken_words
from stages import encode_speech, recognize_speech, tokenize_speech

QUANTIZER = "recipes/demo/models/quantizer"
DIMS = ModelDimensions(80, 50, 32, 2, 1, 51_864, 16, 32, 2, 1)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    texts = ("one plus two", "what is the capital of spain", "red")
    rows = ({"id": f"l{i}", "text": text, "voices": "v"} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keys(lines: Path, out: Path, **more: Any) -> list[str]:
    corpus = {"_component_": "speechfuse.corpora.synthetic", "lines": str(lines)}
    corpus["voices"] = {"v": {"variants": ["en-us+Annie"]}}
    values = {"out": str(out), "corpus": corpus, "runtime.workers": 1, "shard_size": 2} | more
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def encoded(lines: Path, out: Path, encoder: dict[str, str], **more: Any) -> list[dict[str, Any]]:
    settings = keys(lines, out, encoder=encoder, **more)
    encode_speech.main(config.load(encode_speech.EncodeSpeech, None, settings))
    return list(shards.read_rows(out))


def test_a_recognizer_writes_what_whisper_hears_in_its_whole_window(lines, tmp_path, capsys):
    torch.manual_seed(0)
    model = Whisper(DIMS).eval()
    path, out = tmp_path / "tiny.pt", tmp_path / "heard"
    torch.save({"dims": vars(DIMS), "model_state_dict": model.state_dict()}, path)
    component = {"_component_": "speechfuse.quantizer.recognizer", "checkpoint": str(path)}
    voices = {"v": {"variants": ["en-us+Annie"], "rate": [450, 450]}}  # within a second
    settings = [*keys(lines, out, recognizer=component), f"corpus.voices={json.dumps(voices)}"]
    recognize_speech.main(config.load(recognize_speech.RecognizeSpeech, None, settings))
    said = capsys.readouterr().out
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    corpus = config.instantiate(
        config.load(recognize_speech.RecognizeSpeech, None, settings).corpus
    )
    clips = [clip for shard in corpus.plan(9) for clip in corpus.clips(shard)]
    genuine = {}
    for clip in clips:
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(clip.audio, 16_000))
        genuine[clip.id] = spoken_words(whisper.decode(model, mel, options).text)
    texts = {row["id"]: row["text"] for row in shards.read_rows(out)}
    assert texts == genuine and "3 transcripts" in said
    assert items.transcripts_of({id: {} for id in texts}, "", str(out)) == texts
    assert all(not faults for _, _, faults in verification.checks(out))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("What\u2019s 3 + 4?", "what is three plus four"),
        (" How much is 12 - 5.", "how much is twelve minus five"),
        ("Name the capital of Spain!", "name the capital of spain"),
        ("Twenty-one.", "twenty one"),
        ("[BLANK_AUDIO]", "blank audio"),
        ("0" * 20, "zero zero zero"),
        ("", ""),
    ],
)
def test_a_transcript_is_written_as_it_is_said(text, said):
    assert spoken_words(text) == said


def test_frames_are_what_the_codes_are_made_of(lines, tmp_path, capsys):
    settings = keys(lines, tmp_path / "codes", quantizer={"checkpoint": QUANTIZER})
    tokenize_speech.main(config.load(tokenize_speech.TokenizeSpeech, None, settings))
    component = {"_component_": "speechfuse.quantizer.of_quantizer", "checkpoint": QUANTIZER}
    rows = encoded(lines, tmp_path / "frames", component)
    quantizer = Quantizer.load(Path(QUANTIZER))
    stream = shards.read_stream(tmp_path / "frames")
    assert stream == {"encoder": quantizer.identity, "frame_rate": 25.0, "width": 384}
    assert "3 rows of 25 frames a second" in capsys.readouterr().out
    for row, other in zip(rows, shards.read_rows(tmp_path / "codes"), strict=True):
        vectors = np.frombuffer(row["frames"], np.float16).reshape(-1, 384)
        codes = quantizer.quantize(torch.tensor(vectors.astype(np.float32)))
        assert row["codes"] is None and codes.tolist() == other["codes"].tolist()
        same = ("id", "text", "seconds", "speaker", "source")
        assert [row[name] for name in same] == [other[name] for name in same]
    inputs = artifact.manifest_of(tmp_path / "frames")["inputs"]
    assert inputs["encoder"] == quantizer.identity


def test_any_whisper_is_an_encoder(lines, tmp_path):
    torch.manual_seed(0)
    theirs = Whisper(DIMS).eval()
    content = {"dims": vars(DIMS), "model_state_dict": theirs.state_dict()}
    torch.save(content, tmp_path / "tiny.pt")
    component = {"_component_": "speechfuse.quantizer.of_whisper"}
    component["checkpoint"] = str(tmp_path / "tiny.pt")
    rows = encoded(lines, tmp_path / "frames", component)
    assert len(rows) > 3, "clips longer than its window of 1 s are split"
    ours = config.instantiate(component)
    assert (ours.token_rate, ours.window, ours.width) == (50.0, 1.0, 32)
    waveform = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)
    mel = log_mel(waveform, 80)
    with torch.no_grad():
        whole = theirs.encoder(padded([mel], 1, ours.frames))[0]
    vectors, (length,) = ours.embed_batch([waveform], 1)
    assert length == mel.shape[1] // 2
    torch.testing.assert_close(vectors[0, :length], whole[:length])


def test_a_whisper_is_cut_to_a_window_and_is_then_another_encoder(lines, tmp_path):
    torch.manual_seed(0)
    whole = Whisper(DIMS).eval()
    whole.encoder.positional_embedding.normal_()
    content = {"dims": vars(DIMS), "model_state_dict": whole.state_dict()}
    torch.save(content, tmp_path / "tiny.pt")
    component = {"_component_": "speechfuse.quantizer.of_whisper"}
    component |= {"checkpoint": str(tmp_path / "tiny.pt"), "window": 0.5}
    cut = config.instantiate(component)
    assert (
        cut.window == 0.5
        and len({cut.identity, frames.of_whisper(str(tmp_path / "tiny.pt")).identity}) == 2
    )
    whole.encoder.positional_embedding = whole.encoder.positional_embedding[:25]
    mel = log_mel(np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32), 80)
    with torch.no_grad():
        torch.testing.assert_close(cut.embed(mel[None]), whole.encoder(mel[None]))
    seconds = [row["seconds"] for row in encoded(lines, tmp_path / "frames", component)]
    assert len(seconds) > 6 and max(seconds) <= 0.5
    cut.save(tmp_path / "ours")
    assert frames.of_whisper(str(tmp_path / "ours"), 0.5).identity == cut.identity
    with pytest.raises(ValueError, match=r"window=1: .*ours was trained with a window of 0\.5 s"):
        frames.of_whisper(str(tmp_path / "ours"), 1)
    for window in (0.51, 1.02, 0, -0.5):
        with pytest.raises(ValueError, match=r"multiple of 0\.02 s, at most the 1 s of .*tiny\.pt"):
            config.instantiate(component | {"window": window})


def test_another_file_is_no_encoder(lines, tmp_path):
    torch.save({"config": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a Whisper checkpoint: it must hold"):
        frames.of_whisper(str(tmp_path / "other.pt"))
    torch.save({"dims": {}, "model_state_dict": {}}, tmp_path / "no-dims.pt")
    with pytest.raises(ValueError, match="is not a Whisper checkpoint: its dims lack"):
        frames.of_whisper(str(tmp_path / "no-dims.pt"))
    content = {"dims": vars(DIMS), "model_state_dict": {}}
    torch.save(content, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="does not hold the encoder of its dims"):
        frames.of_whisper(str(tmp_path / "empty.pt"))
    component = {"_component_": "speechfuse.quantizer.of_whisper", "checkpoint": "no/such.pt"}
    with pytest.raises(FileNotFoundError, match=r"no/such\.pt"):
        encoded(lines, tmp_path / "out", component)


def test_a_job_of_which_nothing_is_left_is_refused(lines, tmp_path):
    component = {"_component_": "speechfuse.quantizer.of_quantizer", "checkpoint": QUANTIZER}
    none = {"_component_": "speechfuse.audio.duration", "min_seconds": 60.0}
    with pytest.raises(ValueError, match="of 3 clips none is left"):
        encoded(lines, tmp_path / "out", component, filters=[none])
    assert not (tmp_path / "out/manifest.json").exists()
    rejects = (tmp_path / "out").glob("shard-*.rejects.jsonl")
    assert sum(len(path.read_text().splitlines()) for path in rejects) == 3
