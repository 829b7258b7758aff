"""Training a quantizer: both methods through the job, resuming to the same bits, refusals.

The teacher here has random weights and transcribes nothing; that a codec learns to transcribe is
shown by `just prove quantizer`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from whisper.model import ModelDimensions, Whisper

from speechfuse import config, workers
from speechfuse.audio import espeak_ng
from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.training import distillation, mels, phonemes
from speechfuse.scores.word_errors import word_error_rate
from stages import train_quantizer

TEXTS = ("red cat", "green dog", "blue bird", "yellow fish", "black horse", "white cow")
SMALL = {"steps": 8, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2}
PHONEMES = {
    "_component_": "speechfuse.quantizer.phonemes",
    "quantize_from": 0.7,
    "model": {
        "codes": 64,
        "codebook_dim": 4,
        "downsample": 2,
        "downsample_mean": True,
        "n_mels": 80,
        "n_audio_ctx": 100,
        "n_audio_state": 16,
        "n_audio_head": 2,
        "n_audio_layer": 1,
    },
}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are made in this process: a worker would spend seconds on its imports."""

    def run(function: Any, tasks: list[tuple], *_: Any) -> Iterator[Any]:
        yield from (function(*task) for task in tasks)

    monkeypatch.setattr(workers, "processes", run)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with a window of 2 s whose random weights are so large that its text follows what
    it hears."""
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(80, 100, 16, 2, 1, 51_864, 12, 16, 2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.25 / parameter[0].numel() ** 0.5)
        model.decoder.blocks[0].cross_attn.out.weight.mul_(4)
    path = tmp_path_factory.mktemp("teacher") / "tiny.pt"
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        {"id": f"{i}", "text": text, "split": split, "voices": "all"}
        for i, (text, split) in enumerate((t, s) for s in ("train", "test") for t in TEXTS)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "_component_": "speechfuse.corpora.synthetic",
        "lines": str(folder / "lines.jsonl"),
        "voices": {"all": {"variants": ["Annie", "Mike"], "accents": ["en-us"]}},
    }


def whisper_method(teacher: Path, **changes: Any) -> dict[str, Any]:
    method = {
        "_component_": "speechfuse.quantizer.whisper",
        "whisper": str(teacher),
        "codes": 32,
        "codebook_dim": 4,
        "max_teacher_wer": 99.0,
    }
    return method | changes


def job(out: Path, corpus: dict, method: dict, **changes: Any) -> train_quantizer.TrainQuantizer:
    runtime = train_quantizer.Runtime(workers=1, device="cpu", state_every=2, max_reject_rate=0.5)
    values = {
        "corpus": {**corpus, "splits": ["train"]} if "lines" in corpus else corpus,
        "validation": {**corpus, "splits": ["test"]} if "lines" in corpus else corpus,
    }
    return train_quantizer.TrainQuantizer(
        out=str(out), method=method, runtime=runtime, **{**values, **SMALL, **changes}
    )


def made(out: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.iterdir())
        if p.suffix in (".safetensors", ".jsonl")
    }


def totals(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())["totals"]


@pytest.fixture(scope="module")
def distilled(teacher: Path, corpus: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made whole, by real worker processes."""
    out = tmp_path_factory.mktemp("distilled") / "quantizer"
    train_quantizer.main(job(out, corpus, whisper_method(teacher)))
    return out


def test_distilled_files_are_one_codec(distilled: Path, teacher: Path) -> None:
    found = totals(distilled)
    ours, published = Quantizer.load(distilled), distilled / "whisper-vq.model"
    assert ours.identity == Quantizer.load(published, teacher).identity == found["identity"]
    with espeak_ng.EspeakLibrary() as engine:
        said = engine.speak("red cat", espeak_ng.EspeakVoice("en-us+Annie")).waveform
    codes = ours.encode([said])
    assert codes[0].max() < 32, "the mask code is not for speech"
    one, two = CodeTranscriber.load(distilled, teacher), CodeTranscriber.load(published, teacher)
    assert torch.equal(one.features(codes), two.features(codes))
    assert one.transcribe(codes) == two.transcribe(codes)


def test_manifest_says_what_teacher_and_codec_heard(distilled: Path) -> None:
    found = totals(distilled)
    heard = [json.loads(line) for line in (distilled / "heard.jsonl").read_text().splitlines()]
    assert [row["text"] for row in heard] == list(TEXTS)
    for who in ("teacher", "codec"):
        wer = word_error_rate(list(TEXTS), [row[who] for row in heard])
        assert found[f"{who}_wer"] == [round(value, 4) for value in wer]
    assert found["validation_clips"] == 6 and 1 < found["codes_used"] <= 32
    assert 0 < found["entropy_bits"] <= 5 and 1 < found["perplexity"] <= found["codes_used"]
    assert found["speech"]["corpus"]["clips"] == 6 and found["speech"]["corpus"]["rejected"] == {}
    assert not (distilled / "mels").exists()


def run_until(step: int, what: train_quantizer.TrainQuantizer, method: type) -> None:
    """Run a job that is stopped before `step`."""
    losses = method.losses

    def stopped(self: Any, at: int, *rest: int) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return losses(self, at, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "losses", stopped)
        train_quantizer.main(what)


@pytest.mark.usefixtures("inline")
def test_a_stopped_distillation_ends_with_the_same_bits(
    distilled: Path, teacher: Path, corpus: dict, tmp_path: Path
) -> None:
    what = job(tmp_path / "quantizer", corpus, whisper_method(teacher))
    run_until(5, what, distillation.Whisper)
    torch.rand(3)  # as another process would, it starts with another random state
    train_quantizer.main(what)
    assert len(made(distilled)) == 3
    assert made(tmp_path / "quantizer") == made(distilled)


@pytest.mark.usefixtures("inline")
def test_phonemes_resume_from_before_and_after_the_codebook_starts(
    corpus: dict, tmp_path: Path
) -> None:
    whole = job(tmp_path / "whole", corpus, PHONEMES)
    train_quantizer.main(whole)
    assert totals(tmp_path / "whole")["codes_used"] > 1 and totals(tmp_path / "whole")["pnmi"] > 0
    for step in (3, 7):  # the codebook starts at step 6
        what = job(tmp_path / f"{step}", corpus, PHONEMES)
        run_until(step, what, phonemes.Phonemes)
        torch.rand(3)
        train_quantizer.main(what)
        assert made(tmp_path / f"{step}") == made(tmp_path / "whole")


@pytest.mark.usefixtures("inline")
def test_the_loss_falls_and_the_teacher_stays_as_it_is(
    teacher: Path, corpus: dict, tmp_path: Path
) -> None:
    method = config.instantiate(whisper_method(teacher))
    what = job(tmp_path, corpus, {}, steps=40)
    what.runtime.state_every = 100
    before = {k: v.clone() for k, v in method.teacher.state_dict().items() if not v.is_sparse}
    plan = config.instantiate(what.corpus).plan(250)
    mels.make({"mels": what.corpus}, {"mels": plan}, tmp_path, method.window, 1)
    found, _ = mels.load(tmp_path / "mels", method.window, 0.0)
    torch.manual_seed(0)
    trainee = method.begin(found, found, "cpu")
    first = {name: loss.item() for name, loss in method.losses(0, 40, 6, 0).items()}
    last = train_quantizer.train(what, method, trainee)
    assert last["kl"] < 0.2 * first["kl"] and last["ce"] < first["ce"]
    after = method.teacher.state_dict()
    assert len(before) > 30 and all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(name.startswith("teacher") or "encoder" in name for name in trainee.state_dict())
    reduced = config.instantiate(whisper_method(teacher, dtype="bfloat16"))
    torch.manual_seed(0)
    reduced.begin(found, found, "cpu")
    for name, loss in reduced.losses(0, 40, 6, 0).items():
        assert loss.item() != first[name]
        assert loss.item() == pytest.approx(first[name], rel=0.1, abs=0.01)


@pytest.mark.usefixtures("inline")
def test_a_teacher_that_does_not_transcribe_is_refused(
    teacher: Path, corpus: dict, tmp_path: Path
) -> None:
    method = whisper_method(teacher)
    del method["max_teacher_wer"]
    with pytest.raises(ValueError, match=r"tiny\.pt does not transcribe: WER [\d.]+ on 6 valid"):
        train_quantizer.main(job(tmp_path / "refused", corpus, method))
    assert not (tmp_path / "refused/state").exists()


@pytest.mark.usefixtures("inline")
def test_what_cannot_be_trained_on_is_counted(teacher: Path, tmp_path: Path) -> None:
    """A folder with two clips to train on, one over the window, one without text, one no audio, and
    one whose text is more than the decoder can read."""
    folder = tmp_path / "speech"
    folder.mkdir()
    with espeak_ng.EspeakLibrary() as engine:
        said = engine.speak("red cat", espeak_ng.EspeakVoice("en-us+Annie")).waveform
    rng = np.random.default_rng(0)
    for name, samples, text in (
        ("a", said, "red cat"),
        ("b", said[::-1], "<|endoftext|> dog"),
        ("mute", said, "  "),
        ("c", said[:3000], "a b c " * 9),
        ("long", rng.standard_normal(40_000) * 0.1, "words"),
    ):
        soundfile.write(folder / f"{name}.wav", samples, 16_000)
        (folder / f"{name}.txt").write_text(text)
    (folder / "text.wav").write_text("no audio")
    (folder / "text.txt").write_text("but a transcript")
    spec = {"_component_": "speechfuse.corpora.folder", "path": str(folder)}
    train_quantizer.main(job(tmp_path / "out", spec, whisper_method(teacher), steps=3))
    found = totals(tmp_path / "out")
    assert found["speech"]["corpus"]["rejected"] == {"no text": 1, "not audio": 1, "too long": 1}
    assert found["text_too_long"] == 1
    strict = job(tmp_path / "strict", spec, whisper_method(teacher))
    strict.runtime.max_reject_rate = 0.1
    with pytest.raises(ValueError, match=r"3 of 6 clips cannot .*long: too long: 2\.50"):
        train_quantizer.main(strict)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_it_and_the_state_before_goes_on(tmp_path, capsys, bad):
    trainee, steps = torch.nn.Linear(2, 1), []

    class Method:
        worst = bad

        def losses(self, step: int, *_: int) -> dict[str, torch.Tensor]:
            steps.append(step)
            loss = trainee(torch.ones(2)).sum() ** 2
            return {"right": loss, "other": loss * (self.worst if step == 3 else 1.0)}

    job = train_quantizer.TrainQuantizer(
        out=str(tmp_path),
        corpus={},
        validation={},
        method={},
        steps=5,
        batch_size=1,
        warmup_steps=0,
    )
    job.runtime.state_every = 2
    with pytest.raises(ValueError, match=rf"the loss of step 4 is {bad}: lower lr"):
        train_quantizer.train(job, Method(), trainee)
    assert all(weights.isfinite().all() for weights in trainee.parameters())
    Method.worst = 1.0
    assert all(np.isfinite([*train_quantizer.train(job, Method(), trainee).values()]))
    assert steps == [0, 1, 2, 3, 2, 3, 4] and "goes on at step 3 of 5" in capsys.readouterr().out
