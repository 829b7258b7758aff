"""Training a quantizer: both methods through the job, resuming to the same bits, refusals.

The teacher here has random weights and transcribes nothing; that a codec learns to transcribe is
shown by `just prove quantizer`.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.distributed import checkpoint as dcp
from whisper.model import AudioEncoder, ModelDimensions, Whisper

from speechfuse import config, workers
from speechfuse.audio import espeak_ng
from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.encoder import Encoder, padded
from speechfuse.quantizer.frames import of_whisper
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.training import batches, distillation, mels, phonemes
from speechfuse.quantizer.training.alignment import aligned
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


WIDE = PHONEMES["model"] | {"n_audio_state": 32}
LOOKING_BACK = {"look_back": 20, "pad_to": 1.0}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are made in this process: a worker would spend seconds on its imports."""

    def run(function: Any, tasks: list[tuple], *_: Any) -> Iterator[Any]:
        for task in tasks:
            with torch.random.fork_rng():  # a worker's random state is its own
                result = function(*task)
            yield result

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


def arguments(teacher: Path, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in whisper_method(teacher, **changes).items() if k != "_component_"}


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


@pytest.mark.parametrize(
    ("method", "compute_dtype"),
    [
        (PHONEMES, "fp32"),
        (PHONEMES | {"model": PHONEMES["model"] | LOOKING_BACK, "delay": 0.1}, "bf16"),
    ],
)
@pytest.mark.usefixtures("inline")
def test_phonemes_resume_from_before_and_after_the_codebook_starts(
    corpus: dict, tmp_path: Path, method: dict, compute_dtype: str
) -> None:
    whole = job(tmp_path / "whole", corpus, method, compute_dtype=compute_dtype)
    train_quantizer.main(whole)
    assert totals(tmp_path / "whole")["codes_used"] > 1 and totals(tmp_path / "whole")["pnmi"] > 0
    for step in (3, 7):  # the codebook starts at step 6
        what = job(tmp_path / f"{step}", corpus, method, compute_dtype=compute_dtype)
        run_until(step, what, phonemes.Phonemes)
        torch.rand(3)
        train_quantizer.main(what)
        assert made(tmp_path / f"{step}") == made(tmp_path / "whole")


def on_whisper(teacher: Path) -> dict[str, Any]:
    bottleneck = {name: PHONEMES["model"][name] for name in ("codes", "codebook_dim")}
    bottleneck |= {"downsample": 2, "downsample_mean": True}
    return PHONEMES | {"whisper": str(teacher), "window": 1.6, "model": bottleneck}


@pytest.fixture(scope="module")
def heard(teacher: Path, corpus: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phonemes on a Whisper, made whole, by real worker processes."""
    out = tmp_path_factory.mktemp("heard") / "quantizer"
    train_quantizer.main(job(out, corpus, on_whisper(teacher)))
    return out


def test_phonemes_on_a_whisper_are_its_encoder_and_a_codebook(heard: Path, teacher: Path) -> None:
    ours, genuine = Quantizer.load(heard), of_whisper(str(teacher), 1.6)
    assert ours.window == 1.6 and ours.identity == totals(heard)["identity"]
    theirs = genuine.encoder.state_dict()
    assert all(torch.equal(ours.encoder.state_dict()[name], theirs[name]) for name in theirs)
    assert ours.codebook[:64].norm(dim=-1).allclose(torch.ones(64)) and not ours.codebook[64].any()
    assert totals(heard)["codes_used"] > 1 and totals(heard)["pnmi"] > 0
    manifest = json.loads((heard / "manifest.json").read_text())
    assert manifest["inputs"]["whisper"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert "phonemes.safetensors" in manifest["outputs"]
    guess = phonemes.Guess(str(heard))
    assert len(guess.phonemes) == totals(heard)["phonemes"] and batches.SILENCE in guess.phonemes
    with espeak_ng.EspeakLibrary() as engine:
        said = engine.speak("red cat", espeak_ng.EspeakVoice("en-us+Annie")).waveform
    mel = torch.nn.functional.pad(ours.mel(said), (0, 160), value=-1.5)[None, :, :160]
    likely = guess.embed(mel).unflatten(-1, (2, -1))
    assert likely.shape == (1, 40, 2, len(guess.phonemes))
    assert likely.sum(-1).detach().allclose(torch.ones(1, 40, 2))


@pytest.fixture
def clips_heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The clips of each call of a Whisper's encoder, or of one of its class."""
    clips = list[int]()
    for kind in (Encoder, AudioEncoder):

        def counted(self: AudioEncoder, mel: torch.Tensor, forward: Any = kind.forward) -> Any:
            clips.append(len(mel))
            return forward(self, mel)

        monkeypatch.setattr(kind, "forward", counted)
    return clips


@pytest.mark.usefixtures("inline")
def test_a_whisper_hears_each_clip_once_and_a_stopped_training_ends_alike(
    heard: Path, teacher: Path, corpus: dict, tmp_path: Path, clips_heard: list[int]
) -> None:
    for step in (3, 7):  # the codebook starts at step 6
        clips_heard.clear()
        what = job(tmp_path / f"{step}", corpus, on_whisper(teacher))
        run_until(step, what, phonemes.Phonemes)
        assert sum(clips_heard) == 12
        torch.rand(3)
        train_quantizer.main(what)
        assert sum(clips_heard) == 12 + 6  # validation's once more, by the finished quantizer
        assert made(tmp_path / f"{step}") == made(heard)
        state = dcp.FileSystemReader(tmp_path / f"{step}" / "state" / "step_6").read_metadata()
        saved = [name for name in state.state_dict_metadata if name.startswith("model.")]
        assert len(saved) > 10 and not any("encoder" in name for name in saved)


@pytest.mark.usefixtures("inline")
def test_a_cached_distillation_runs_the_encoder_once_a_clip_and_resumes(
    heard: Path, teacher: Path, corpus: dict, tmp_path: Path, clips_heard: list[int]
) -> None:
    method = whisper_method(teacher, window=1.6, cache=True, codes=64, start=str(heard))
    train_quantizer.main(job(tmp_path / "whole", corpus, method))
    assert sum(clips_heard) == 12 + 6 + 6  # the last by the whole window of the teacher
    found = totals(tmp_path / "whole")
    assert CodeTranscriber.load(tmp_path / "whole", teacher).decoder.config.n_audio_ctx == 80
    assert Quantizer.load(tmp_path / "whole").identity == found["identity"]
    what = job(tmp_path / "stopped", corpus, method)
    run_until(5, what, distillation.Whisper)
    torch.rand(3)
    train_quantizer.main(what)
    assert made(tmp_path / "stopped") == made(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["inputs"]["start"] == totals(heard)["identity"]


@pytest.mark.usefixtures("inline")
def test_a_distillation_begins_with_the_codes_of_start_and_with_the_losses_of_the_encoder(
    heard: Path, teacher: Path, corpus: dict, tmp_path: Path
) -> None:
    shape = {"window": 1.6, "codes": 64, "start": str(heard)}
    losses = []
    for cache in (True, False):
        method = config.instantiate(whisper_method(teacher, cache=cache, **shape))
        plan = {"mels": config.instantiate(corpus).plan(250)}
        folder = tmp_path / str(cache)
        mels.make({"mels": corpus}, plan, folder, method.window, 1)
        clips, _ = mels.load(folder / "mels", method.window, 0.0)
        torch.manual_seed(0)
        student = method.begin(clips, clips, "cpu")
        ours = Quantizer.load(heard)
        embedded = ours.embed(padded([each.mel for each in clips], len(clips), ours.frames))
        x = torch.nn.functional.normalize(student.quantizer.project_in(embedded), dim=-1)
        assert torch.equal(student.vq(x)[1], ours.quantize(embedded))
        losses.append({name: loss.item() for name, loss in method.losses(0, 40, 6, 0).items()})
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    with torch.no_grad():  # the share of the steps that learn the encoder's features comes first
        regressing = distillation.Whisper(**arguments(teacher, regression=0.5, **shape))
        regressing.begin(clips, clips, "cpu")
        names = [{*regressing.losses(step, 40, 6, 0)} for step in (19, 20)]
    assert names == [{"squares", "commitment"}, {"ce", "kl", "commitment"}]
    for changes, message in (
        ({"codes": 32}, "is QuantizerConfig.codes=64, .*but QuantizerConfig.codes=32, .*trained"),
        ({"window": 1.0}, "n_audio_ctx=80, .*but .*n_audio_ctx=50,"),
    ):
        with pytest.raises(ValueError, match=message):
            config.instantiate(whisper_method(teacher, **shape | changes))
    content = torch.load(teacher, weights_only=True)
    content["model_state_dict"]["encoder.blocks.0.attn.query.bias"][0] += 1
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"has another encoder than .*other\.pt"):
        config.instantiate(whisper_method(tmp_path / "other.pt", **shape))


@pytest.mark.usefixtures("inline")
def test_a_cut_teacher_transcribes_with_its_whole_window_and_its_texts_end(
    teacher: Path, corpus: dict, tmp_path: Path
) -> None:
    plan = {"mels": config.instantiate(corpus).plan(250)}
    whole, cut = (distillation.Whisper(**arguments(teacher, window=w)) for w in (None, 1.6))
    mels.make({"mels": corpus}, plan, tmp_path, cut.window, 1)
    clips, _ = mels.load(tmp_path / "mels", cut.window, 0.0)
    for method in (whole, cut):
        method.begin(clips, clips, "cpu")
    assert cut.teacher_transcripts == whole.teacher_transcripts
    assert cut.teacher.dims.n_audio_ctx == 80 < whole.teacher.dims.n_audio_ctx
    cut.student.eval()  # the codebook stays
    clip, tokens = cut.training[distillation._order(0, 0, len(clips))[0]]
    features, present = cut._features([clip]), torch.zeros(1, 40, dtype=torch.bool)
    present[0, : clip.frames // 4] = True
    first = len(cut.tokenizer.sot_sequence_including_notimestamps) - 1
    teachers, students = (
        cut.teacher.decoder(torch.tensor([tokens]), heard)[0, first:].log_softmax(-1)
        for heard in (features, cut.student(features, present)[0])
    )
    words = (teachers.exp() * (teachers - students)).sum(-1)[:-1].sum()
    end = -students[-1, cut.tokenizer.eot]
    assert cut.losses(0, 40, 1, 0)["kl"].item() == pytest.approx((words + end).item(), rel=1e-4)


@pytest.mark.usefixtures("inline")
def test_several_corpora_train_one_quantizer(corpus: dict, tmp_path: Path) -> None:
    more = [{**corpus, "splits": ["train"], "seed": seed, "times": seed} for seed in (2, 3)]
    sizes, labelled = [], []
    with pytest.MonkeyPatch.context() as patch:
        begin, label = phonemes.Phonemes.begin, batches.labelled
        patch.setattr(phonemes, "labelled", lambda *of: (labelled.append(of), label(*of))[1])
        patch.setattr(
            phonemes.Phonemes,
            "begin",
            lambda s, t, v, d: (sizes.append(len(t)), begin(s, t, v, d))[1],
        )
        train_quantizer.main(job(tmp_path / "q", corpus, PHONEMES, more=more))
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert len(labelled) == 4 * 6  # each once, and those of validation
    assert sizes == [6 + 2 * 6 + 3 * 6] and {"corpus", "more.0", "more.1", "validation"} <= {
        *manifest["inputs"]
    }
    assert [manifest["totals"]["speech"][n]["clips"] for n in ("corpus", "more.1")] == [6, 6]
    more[1]["times"] = 0
    with pytest.raises(ValueError, match=r"more\.1\.times=0: give a whole number"):
        train_quantizer.main(job(tmp_path / "q", corpus, PHONEMES, more=more))


@pytest.mark.usefixtures("inline")
def test_a_small_ear_learns_from_what_a_whisper_hears_in_clips_without_text(
    heard: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "speech"
    folder.mkdir()
    with espeak_ng.EspeakLibrary() as engine:
        for text in TEXTS:
            said = engine.speak(text, espeak_ng.EspeakVoice("en-us+Annie")).waveform
            soundfile.write(folder / f"{text}.wav", said[:24_000], 16_000)
    spec = {"_component_": "speechfuse.corpora.folder", "path": str(folder)}
    method = PHONEMES | {"labels_from": {"checkpoint": str(heard)}}
    train_quantizer.main(job(tmp_path / "whole", spec, method))
    what = job(tmp_path / "stopped", spec, method)
    run_until(7, what, phonemes.Phonemes)
    torch.rand(3)
    train_quantizer.main(what)
    found = totals(tmp_path / "whole")
    assert made(tmp_path / "whole") == made(tmp_path / "stopped")
    assert found["phonemes"] == totals(heard)["phonemes"] and found["pnmi"] > 0
    assert found["speech"]["corpus"]["rejected"] == {}
    assert Quantizer.load(tmp_path / "whole").config.n_audio_state == 16
    shorter = {**PHONEMES["model"], "n_audio_ctx": 60}
    begun = config.instantiate(method | {"start": True, "model": shorter}).quantizer.encoder
    for name, tensor in Quantizer.load(heard).encoder.state_dict().items():
        assert torch.equal(begun.state_dict()[name], tensor[:60] if "position" in name else tensor)
    torch.manual_seed(0)
    kept = config.instantiate(method)
    plan = {"mels": config.instantiate(spec).plan(250)}
    mels.make({"mels": spec}, plan, tmp_path, kept.window, 1)
    clips, _ = mels.load(tmp_path / "mels", kept.window, 0.0)
    guess = phonemes.Guess(str(heard))
    windows = padded([each.mel for each in clips], len(clips), guess.quantizer.frames)
    for each, likely in zip(clips, guess.embed(windows), strict=True):
        assert each.taught.shape[0] == each.frames // 4
        assert np.allclose(each.taught, likely[: len(each.taught)].detach(), atol=1e-3)
    kept.begin(clips, clips, "cpu")
    _, targets = batches.batch(kept.training, 200, 4, 0, 0)
    known = targets.float().sum(-1)
    assert targets.shape == (4, 100, found["phonemes"]) and 0 < (known > 0).float().mean() < 1
    assert known[known > 0].numpy() == pytest.approx(1, abs=0.01)
    first = kept.losses(0, 40, 4, 0)["loss"].item()
    last = train_quantizer.train(job(tmp_path / "q", spec, {}, steps=40), kept, kept.trainee)
    assert last["loss"] < first - 0.1


@pytest.mark.usefixtures("inline")
def test_targets_are_the_phonemes_of_the_text_where_the_whisper_hears_them(
    heard: Path, corpus: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {**PHONEMES["model"], "pad_to": 1.0}
    method = PHONEMES | {"labels_from": {"checkpoint": str(heard)}, "voice": "en-us"}
    train_quantizer.main(job(tmp_path / "q", corpus, method | {"model": shape, "int8": True}))
    assert Quantizer.load(tmp_path / "q").config.pad_to == 1 and totals(tmp_path / "q")["pnmi"] > 0
    kept = config.instantiate(method | {"model": shape})
    plan = {"mels": config.instantiate(corpus).plan(250)}
    mels.make({"mels": corpus}, plan, tmp_path, kept.window, 1)
    clips, _ = mels.load(tmp_path / "mels", kept.window, 0.0)
    kept.begin(clips, [replace(clips[0], text=None)], "cpu")
    for each in kept.training:
        spoken = [batches.phoneme_name(name) for _, name in each.example.phonemes]
        found = [kept.phonemes[i] for i in each.labels]
        runs = [name for i, name in enumerate(found) if not i or name != found[i - 1]]
        wanted = [name for i, name in enumerate(spoken) if not i or name != spoken[i - 1]]
        assert [r for r in runs if r != "_"] == [w for w in wanted if w != "_"]
    heard_alone = clips[0].taught.reshape(-1, len(kept.phonemes)).argmax(-1)
    assert kept.validation[0].labels.tolist() == heard_alone.tolist()
    drawn: list[tuple[int, int]] = []
    draw = batches.batch

    def counted(clips: list, frames: int, size: int, *place: int) -> Any:
        drawn.append((frames, size))
        return draw(clips, frames, size, *place)

    monkeypatch.setattr(batches, "batch", counted)
    for step in range(12):
        kept.losses(step, 40, 4, 0)
    assert {*drawn} == {(100, 8), (200, 4)}  # every length that a clip may be padded to


def test_a_text_is_aligned_by_what_is_most_probable() -> None:
    a, b, silence = 0, 1, 2
    likely = np.full((6, 3), 0.1)
    for place, phoneme in enumerate((silence, a, a, silence, b, b)):
        likely[place, phoneme] = 0.8
    assert aligned(likely, [a, b], silence).tolist() == [2, 0, 0, 1, 1, 1]
    assert aligned(likely, [a, silence, b], silence).tolist() == [2, 0, 0, 2, 1, 1]
    assert aligned(likely[1:3], [a, silence, b], silence).tolist() == [0, 1]  # its silence left out
    assert aligned(likely, [], silence).tolist() == [2, 0, 0, 2, 1, 1]  # as it is heard
    assert aligned(likely[:1], [a, b], silence).tolist() == [2]  # no place for both
    long = aligned(np.tile(likely, (100, 1)), [a, b] * 100, silence)  # more states than int8 counts
    assert len(long) == 600 and {*long.tolist()} == {a, b, silence}


def test_a_label_may_come_after_what_it_names() -> None:
    spoken = [(0.0, "a"), (0.1, "b")]
    example = mels.Example(np.zeros(80 * 20, np.float16), 80, "a b", spoken, np.zeros((0, 1)))
    names = ["a", "b", batches.SILENCE]
    at_once, late = (batches.labelled(example, names, delay).labels for delay in (0.0, 0.06))
    assert at_once.tolist() == [0] * 5 + [1] * 5 and late.tolist() == [2] * 3 + [0] * 5 + [1] * 2


def test_speech_is_disturbed_as_rooms_and_telephones_do() -> None:
    """Here by its loud first half; the second is 36 dB below it."""
    speech = torch.zeros(80, 60)
    speech[:, 30:] = -0.9
    drawn = [batches._disturb(speech, random.Random(i)) for i in range(200)]
    again = [batches._disturb(speech, random.Random(i)) for i in range(200)]
    assert all(map(torch.equal, drawn, again)) and all(each.isfinite().all() for each in drawn)
    loud = torch.stack([each[20:50, 5:30].median() for each in drawn])
    quiet = torch.stack([each[20:50, 40:].median() for each in drawn])
    assert loud.abs().max() < 0.5  # speech stays louder than all of them
    assert 0.2 < (loud - quiet < 0.7).float().mean() < 0.6  # noise
    after, later = (torch.stack([d[20:50, at].median() for d in drawn]) for at in (31, 59))
    assert 0.15 < (after - later > 0.15).float().mean() < 0.45  # echo
    cut = torch.stack([each[:, 5:30].mean(1) for each in drawn]) < loud[:, None] - 1.0
    assert 0.25 < cut[:, 79].float().mean() < 0.45 and 0.2 < cut[:, 0].float().mean() < 0.45
    assert not cut[:, 8:57].any()  # what a telephone lets through is never cut


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1.0}, "window belongs to whisper, voice and start to labels_from"),
        ({"start": True}, "window belongs to whisper, voice and start to labels_from"),
        (
            {"labels_from": {"checkpoint": "HEARD"}, "start": True, "model": WIDE},
            "n_audio_state=32.* is no beginning of .*n_audio_state=16",
        ),
        ({"whisper": "TEACHER", "window": 1.6}, "n_audio_ctx is that of .*tiny.pt: leave it out"),
        ({"labels_from": {"checkpoint": "DISTILLED"}}, "has no phonemes.safetensors: make it by"),
        ({"labels_from": {"checkpoint": "HEARD"}, "delay": 0.1}, "delay: labels_from names each"),
        ({"labels_from": {"folder": "x"}}, "Guess: unknown argument 'folder'"),
        ({"labels_from": {"checkpoint": "HEARD"}, "voice": "en-uss"}, "no voice 'en-uss'"),
    ],
)
def test_phonemes_refuse_what_does_not_fit(teacher, distilled, heard, changes, message):
    places = {"TEACHER": str(teacher), "DISTILLED": str(distilled), "HEARD": str(heard)}
    text = json.dumps(PHONEMES | changes)
    for name, place in places.items():
        text = text.replace(name, place)
    with pytest.raises(ValueError, match=message):
        config.instantiate(json.loads(text))


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
