"""Frames that a training makes itself: waveforms found again, augmented, and an encoder inside."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file

from speechfuse.audio import decoding
from speechfuse.corpora.nemo import Nemo
from speechfuse.evals import generation
from speechfuse.fusion import folder, recordings, views
from speechfuse.quantizer import foreign, frames, tokenize
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.rows import shards
from speechfuse.train import loop, plan, trainer
from speechfuse.train import model as models
from speechfuse.train.preflight import memory
from stages import ask, encode_speech
from tests.corpus_clips import everything
from tests.small_training import (
    FROZEN,
    LORA,
    ROOT,
    STREAM,
    WORDS,
    begin_and_kill,
    dataset,
    job,
    losses,
    make_parts,
    recipe,
    sha256s,
    train_on_two_ranks,
)
from tests.test_layouts import TEMPLATES

STACK, RATE = 3, 16_000
ASKED = "what word is it? "
ADAPTER = {"_component_": "speechfuse.fusion.Stack", "width": 16, "stack": STACK, "hidden": 24}
CONFORMER = {"_component_": "speechfuse.fusion.Conformer", "width": 16, "stack": STACK}
CONFORMER |= {"hidden": 16, "heads": 2, "layers": 1, "dropout": 0.0}
NOISY = [
    {"_component_": "speechfuse.audio.Noise", "snr": [5.0, 20.0], "probability": 0.7},
    {"_component_": "speechfuse.audio.Gain", "db": [-6.0, 3.0]},
]
KEEP = [r"^tok_embeddings[.]encoder[.]encoder[.]"]


def make_corpus(folder: Path, clips: int = 48) -> None:
    """A chord for each word; every third file at another rate, one long enough to be split."""
    rng = np.random.default_rng(0)
    for i in range(clips):
        seconds = 4.5 if i == 5 else rng.uniform(0.3, 1.5)
        time = np.arange(int(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * (300 + 150 * (i % 8)) * time)
        rate = 22_050 if i % 3 == 1 else RATE
        samples = soxr.resample(tone + 0.01 * rng.standard_normal(len(time)), RATE, rate)
        path = folder / f"{i % 2}" / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate)
        path.with_suffix(".txt").write_text(WORDS[i % 8])


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    parts = make_parts(tmp_path_factory.mktemp("fly"))
    torch.manual_seed(0)
    Quantizer(QuantizerConfig(16, 4, 2, True, 80, 100, 16, 2, 1)).save(parts / "quantizer")
    make_corpus(parts / "corpus")
    corpus = {"_component_": "speechfuse.corpora.folder", "path": str(parts / "corpus")}
    out = str(parts / "frames")
    encode_speech.main(
        encode_speech.EncodeSpeech(out=out, corpus=corpus, encoder=encoder(parts), shard_size=30)
    )
    return parts


def encoder(parts: Path) -> dict[str, Any]:
    checkpoint = str(parts / "quantizer")
    return {"_component_": "speechfuse.quantizer.of_quantizer", "checkpoint": checkpoint}


def fly(parts: Path, out: Path, runtime: dict | None = None, **changes: Any) -> Path:
    """A recipe whose frames are made as it trains; `cached`: from the dataset; `steps` of
    augmentation and `path` of the recordings."""
    own = {key: changes.pop(key, None) for key in ("cached", "augmentation", "path")}
    path = str(own["path"] or parts / "frames")
    speech: dict[str, Any] = {
        "_component_": f"speechfuse.fusion.{'speech' if own['cached'] else 'recordings'}",
        "path": path,
        "stack": STACK,
        "share": 0.8,
        "turns": {"_component_": "speechfuse.samples.transcribe", "requests": ["say:"]},
    }
    if own["augmentation"]:
        speech["augmentation"] = own["augmentation"]
    texts = {"_component_": "speechfuse.fusion.conversations", "path": str(parts / "texts")}
    keys: dict[str, Any] = {"checkpoint": str(parts / "init"), "model": LORA, "freeze": FROZEN}
    keys |= {"adapter": ADAPTER, "datasets": [speech, texts | {"share": 0.2}], "epochs": 3}
    if not own["cached"]:
        keys["encoder"] = encoder(parts)
        runtime = {"roots": {path: str(parts / "corpus")}, **(runtime or {})}
    return recipe(parts, out, runtime, **keys | changes)


def load(config: Path) -> Any:
    settings = job(config)
    return plan.load_data(settings, plan.pins_of(settings))


def test_frames_made_in_a_training_are_those_of_the_cache(parts, tmp_path):
    fresh, cached = (load(fly(parts, tmp_path / "a", cached=c)) for c in (False, True))
    made = frames.of_quantizer(str(parts / "quantizer"))
    assert len(fresh.indexes[0]) == len(cached.indexes[0]) > 40  # pieces have no transcript
    samples = [fresh.sample(0, 0, i) for i in range(len(fresh.indexes[0]))]
    waveforms, lengths = views.padded([clip for sample in samples for clip in sample.audio])
    with torch.no_grad():
        found, counts = made(waveforms, lengths)
    for i, sample in enumerate(samples):
        theirs = cached.sample(0, 0, i)
        assert sample.name == theirs.name and (sample.tokens == theirs.tokens).all()
        (clip,) = theirs.audio
        assert counts[i] == len(clip) and not found[i, len(clip) :].any()
        np.testing.assert_allclose(found[i, : len(clip)].numpy(), clip, rtol=1e-3, atol=1e-4)


def test_a_training_on_waveforms_is_that_on_the_cache(parts, tmp_path):
    for name in ("fresh", "cached"):
        loop.run(job(fly(parts, tmp_path / name, cached=name == "cached", epochs=1)))
    np.testing.assert_allclose(losses(tmp_path / "fresh"), losses(tmp_path / "cached"), rtol=1e-3)
    a, b = (sha256s(tmp_path / name / "epoch_0") for name in ("fresh", "cached"))
    assert a.keys() == b.keys() and not (tmp_path / "fresh/epoch_0/encoder").exists()
    speeches = [
        json.loads((tmp_path / n / "epoch_0/speech.json").read_text()) for n in ("fresh", "cached")
    ]
    for speech in speeches:
        del speech["sha256"]  # of weights, which differ by the rounding of the cache
    assert speeches[0] == speeches[1]


def codes(parts: Path) -> Path:
    """The rows of `frames` with codes instead, which no encoder of frames made."""
    if not (parts / "codes").exists():
        rows = [dict(row) for row in shards.read_rows(parts / "frames")]
        for row in rows:
            del row["frames"]
            row["codes"] = [1, 2]
        dataset(parts / "codes", shards.SPEECH, rows, STREAM)
    return parts / "codes"


@pytest.mark.parametrize("trains", [False, True])
def test_an_encoder_of_nemo_is_asked_for_or_trains(trains, parts, tmp_path):
    """Frozen, it is in no epoch, which names it; if it trains, it lies beside the adapter."""
    nemo = {"_component_": "speechfuse.quantizer.of_fastconformer"}
    nemo["checkpoint"] = str(ROOT / "tests/golden/fastconformer_plain.nemo")
    made = foreign.of_fastconformer(nemo["checkpoint"])
    keep = [r"^tok_embeddings[.]encoder[.].*self_attn"] if trains else []
    path = fly(parts, tmp_path / "run", encoder=nemo, keep=keep, epochs=1, path=codes(parts))
    made_job = job(path)
    planned = replace(made_job, model=models.decoder_of(made_job).spec)
    assert memory.of(planned, 4, 64, 1, 1, False).step["activations"] > 0
    loop.run(made_job)
    epoch = tmp_path / "run/epoch_0"
    own, said = epoch / "encoder", json.loads((epoch / "speech.json").read_text())["encoder"]
    if not trains:
        assert said == made.identity and not own.exists()
        return
    tuned = foreign.trained(own)
    assert said == tuned.identity != made.identity
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, made.state_dict()[n])}
    assert changed and all("self_attn" in name for name in changed)


def test_rows_of_codes_are_heard_too(parts, tmp_path):
    """A model of text knows no quantizer, and takes only the recordings of a tokenized dataset."""
    mixture, cached = (load(fly(parts, tmp_path / "a", path=path)) for path in (codes(parts), None))
    assert np.array_equal(mixture.indexes[0].lengths, cached.indexes[0].lengths)


def test_a_manifest_of_nemo_trains_a_model_of_another_family(parts, tmp_path):
    """Frames of a FastConformer, questions of a file, Llama-2's tokenizer and a zephyr template."""
    lines = [
        {"audio_filepath": f"{i % 2}/{i:02d}.wav", "answer": WORDS[i % 8]}
        for i in range(40)
        if i != 5
    ]
    (tmp_path / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "asked.txt").write_text("which?\nwhat word is it? <audio>\n")
    corpus = {"_component_": "speechfuse.corpora.nemo", "manifest": str(tmp_path / "data.json")}
    nemo = {"_component_": "speechfuse.quantizer.of_fastconformer"}
    nemo["checkpoint"] = str(ROOT / "tests/golden/fastconformer_plain.nemo")
    out = str(tmp_path / "frames")
    corpus["audio_dir"] = str(parts / "corpus")
    encode_speech.main(encode_speech.EncodeSpeech(out=out, corpus=corpus, encoder=nemo))
    base = shutil.copytree(parts / "init", tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests/golden/chat/llama2" / file, base / file)
    (base / "chat_template.jinja").write_text(TEMPLATES["zephyr"])
    turns = {"_component_": "speechfuse.samples.context", "questions": str(tmp_path / "asked.txt")}
    data = {"_component_": "speechfuse.fusion.speech", "path": out, "stack": STACK, "turns": turns}
    keys: dict[str, Any] = {"checkpoint": str(base), "model": LORA, "freeze": FROZEN, "epochs": 6}
    keys |= {"adapter": ADAPTER, "datasets": [data | {"share": 1.0}]}
    path = recipe(parts, tmp_path / "run", **keys)
    mixture = load(path)
    assert len(mixture.indexes[0]) == 39 and not mixture.indexes[0].rejected
    said = {
        mixture.vocabulary.tokenizer.decode([i for i in each.tokens if i >= 0])
        for step in range(mixture.plan.counts.steps)
        for row in mixture.samples(step)
        for each in row
        if each.name == "0/00"
    }
    either = [f"<|user|>\n{asked}</s>\n<|assistant|>\none</s>\n" for asked in ("which?", ASKED)]
    assert said == set(either)
    loop.run(job(path))
    found = losses(tmp_path / "run")
    assert len(found) > 10 and found[-1] < found[0]
    asked = generation.Generator(tmp_path / "run/epoch_5", None, "")
    assert asked.vocabulary.end_of_turn == asked.vocabulary.end == 301


def test_parts_of_a_recording_are_found_too(parts):
    rows = [row for row in shards.read_rows(parts / "frames") if row["part"] is not None]
    assert len(rows) > 1
    joined = [recordings.waveform_of(row, parts / "corpus") for row in rows]
    whole, _ = soundfile.read(parts / "corpus" / rows[0]["source"]["uri"], dtype="float32")
    assert np.array_equal(np.concatenate(joined), whole)


def test_what_a_manifest_cuts_out_of_a_file_is_found(parts, tmp_path):
    """Such rows have no sha256: a file that has become shorter is refused before it is read."""
    lines = [
        {"audio_filepath": name, "offset": 0.1 * i, "duration": 0.2 + 0.01 * i, "text": "one"}
        for i, name in enumerate(["0/00.wav", "1/01.wav", "0/02.wav", "1/05.wav"])
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    clips = everything(Nemo(str(manifest), str(parts / "corpus")))
    made = frames.of_quantizer(str(parts / "quantizer"))
    rows = tokenize.tokenize(clips, made, 4, [], 1, 1).rows
    assert len(rows) == 4 and not any(row["source"]["sha256"] for row in rows)
    for row, clip in zip(rows, clips, strict=True):
        theirs = decoding.decode(clip.audio, clip.offset, clip.seconds).waveform
        assert np.array_equal(recordings.waveform_of(row, parts / "corpus"), theirs)
    (tmp_path / "1").mkdir()
    samples, rate = soundfile.read(parts / "corpus/1/05.wav")
    soundfile.write(tmp_path / "1/05.wav", samples[: rate // 4], rate)
    with pytest.raises(FileNotFoundError, match=r"1/05.wav ends at 0.25 s, and .* has 0.53 s"):
        recordings.file_of(rows[3], tmp_path)


def test_a_moved_corpus_is_found_and_another_is_refused(parts, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(parts / "corpus", moved)
    roots = {"roots": {str(parts / "frames"): str(moved)}}
    assert len(load(fly(parts, tmp_path / "moved_run", roots)).indexes[0].rejected) == 0
    changed = moved / "0/04.wav"
    samples, rate = soundfile.read(changed)
    soundfile.write(changed, samples * 0.9, rate)

    def refused(match: str, runtime: dict) -> None:
        with pytest.raises(FileNotFoundError, match=match):
            loop.run(job(fly(parts, tmp_path / "bad", runtime)))
        assert not (tmp_path / "bad").exists()

    shutil.copytree(moved, tmp_path / "again")
    again = {"roots": {str(parts / "frames"): str(tmp_path / "again")}}
    refused(rf"row 0/04: {tmp_path}/again/0/04.wav is not the recording", again)
    (tmp_path / "again/0/04.wav").unlink()
    refused("row 0/04: its recording 0/04.wav is no file below", again)
    shutil.copyfile(parts / "corpus/0/04.wav", tmp_path / "again/0/04.wav")
    assert load(fly(parts, tmp_path / "bad", again)).indexes[0].rejected == []
    refused("its recording 0/00.wav is no file below .../corpus: set runtime.roots", {"roots": {}})
    with pytest.raises(ValueError, match="roots: elsewhere is no path of datasets"):
        load(fly(parts, tmp_path / "bad", {"roots": {"elsewhere": "x"}}))
    # a file that changes after the index was made is found when its turn comes
    mixture = load(fly(parts, tmp_path / "late", {"roots": {str(parts / "frames"): str(moved)}}))
    with pytest.raises(
        FileNotFoundError, match=r"row 0/04: .*/moved/0/04.wav is not the recording"
    ):
        [mixture.sample(0, 0, i) for i in range(len(mixture.indexes[0]))]


def test_a_fault_that_a_loaders_process_finds_is_one_sentence(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "SLACK", -1)
    with pytest.raises(ValueError, match=r"^row .* gives [\d,]+ samples.* make the dataset again$"):
        loop.run(job(fly(parts, tmp_path / "late", {"loader_workers": 1})))


def test_what_cannot_be_made_on_the_fly_is_one_sentence(parts, tmp_path):
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            loop.run(job(fly(parts, tmp_path / "bad", **changes)))

    refused("the recipe has no encoder", encoder=None)
    refused("its frames are cached, and encoder=", cached=True, encoder=encoder(parts))
    refused("adapter.width=12, and the dataset has width=16", adapter=ADAPTER | {"width": 12})
    refused("Speed changes the length", augmentation=[{"_component_": "speechfuse.audio.Speed"}])
    refused("keep: 'ears' fits no parameter", keep=["ears"])
    refused("others of the language model train", keep=["^layers[.]0"])
    shutil.copytree(parts / "init", tmp_path / "epoch")
    (tmp_path / "epoch/speech.json").write_text(json.dumps({"encoder": "f" * 64}))
    for cached in (True, False):
        refused(r"epoch was expanded for ffff", checkpoint=str(tmp_path / "epoch"), cached=cached)
    first, *rest = shards.read_rows(parts / "frames")
    source = first["source"]
    for match, change in (
        ("no file below", {"uri": "synthetic:en"}),
        ("no file below", {"uri": "../corpus/0/00.wav"}),
        ("frames, and its 8,000 samples are 12", {"seconds": 0.5}),
        ("and the encoder takes 2 s", {"seconds": 2.5}),
    ):
        rows = [first | {"source": source | change}, *rest]
        stream = shards.read_stream(parts / "frames")
        odd = tmp_path / hashlib.sha256(str(change).encode()).hexdigest()[:8]
        dataset(odd, shards.FRAMES, rows, stream)
        refused(f"row {first['id']}.* {match}", path=odd)


def test_augmentation_is_drawn_by_row_and_step_alone(parts, tmp_path):
    mixture = load(fly(parts, tmp_path / "a", augmentation=NOISY))
    clean = load(fly(parts, tmp_path / "a"))

    def audio(of: Any, step: int) -> list[np.ndarray]:
        return [of.sample(step, 0, i).audio[0] for i in range(12)]

    first, again, later, plain = (
        audio(mixture, 0),
        audio(mixture, 0),
        audio(mixture, 9),
        audio(clean, 0),
    )
    for a, b, c, d in zip(first, again, later, plain, strict=True):
        assert np.array_equal(a, b) and len(a) == len(c) == len(d)
        assert not np.array_equal(a, c) and not np.array_equal(a, d)
    assert len({a.tobytes() for a in first}) == 12


def tensors(epoch: Path) -> dict[str, torch.Tensor]:
    files = sorted(path for path in epoch.rglob("*.safetensors") if not path.is_symlink())
    return {f"{p.relative_to(epoch)}/{n}": t for p in files for n, t in load_file(p).items()}


@pytest.mark.parametrize("cached", [True, False])
def test_a_kill_and_a_resume_change_no_bit(parts, tmp_path, cached):
    """With LoRA's dropout, on cached frames and on augmented waveforms with an encoder that trains
    at a rate of its own."""
    changes: dict[str, Any] = {"model": LORA | {"lora_dropout": 0.1}, "cached": cached}
    if not cached:
        changes |= {"augmentation": NOISY, "keep": KEEP, "rates": {"[.]encoder[.]": 0.1}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    loop.run(job(fly(parts, whole, {"loader_workers": 2}, **changes)))
    begin_and_kill(config := fly(parts, killed, **changes))
    loop.run(job(config))
    assert losses(killed) == losses(whole)
    ours, theirs = (tensors(run / "epoch_2") for run in (killed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any("lora" in name for name in ours)


@pytest.mark.parametrize(("keep", "adapter"), [([], CONFORMER), (KEEP, ADAPTER)])
def test_two_ranks_train_as_one(parts, tmp_path, keep, adapter):
    changes = {"augmentation": NOISY, "keep": keep, "adapter": adapter}
    loop.run(job(fly(parts, tmp_path / "one", **changes)))
    train_on_two_ranks(fly(parts, tmp_path / "two", **changes))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_an_encoder_that_trains_is_in_its_epoch(parts, tmp_path, capsys):
    out = tmp_path / "run"
    loop.run(job(fly(parts, out, keep=KEEP)))
    epoch, base = out / "epoch_2", sha256s(parts / "init")
    files = sha256s(epoch)
    assert all(files[name] == base[name] for name in base.keys() - folder.OWN)
    before, after = (
        load_file(p / "model.safetensors") for p in (parts / "quantizer", epoch / "encoder")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {n for n in before if n.startswith("encoder.") and "positional" not in n}
    assert moved == trained
    made = frames.of_quantizer(str(epoch / "encoder"))
    assert json.loads((epoch / "speech.json").read_text())["encoder"] == made.identity
    generator = generation.generator(epoch, made.identity, "x", "cpu")
    (speech,) = generator.speech(
        made, [recordings.waveform_of(next(shards.read_rows(parts / "frames")), parts / "corpus")]
    )
    assert (
        len(generator.reply([[{"role": "user", "segments": [{"text": "say:"}, speech]}]], 3)) == 1
    )
    file = str(parts / "corpus/0/00.wav")
    ask.main(ask.Ask(file, "no report", str(parts / "quantizer"), checkpoint=str(epoch)))
    assert "answer:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expanded for"):
        generation.generator(epoch, frames.of_quantizer(str(parts / "quantizer")).identity, "x")


def test_the_encoder_has_a_gradient_where_it_is_kept_alone(parts, tmp_path):
    settings = job(fly(parts, tmp_path / "run", keep=KEEP))
    made = trainer.Trainer(settings, models.decoder_of(settings))
    text = load(fly(parts, tmp_path / "run", keep=KEEP))
    batch = text.collate([[text.sample(0, 1, 0)]], 32, text.vocabulary.end, None)
    made.backward([batch])  # no clip at all: a rank runs its encoder nevertheless
    prefix = "tok_embeddings.encoder."
    inside = {n: p.grad for n, p in made.model.named_parameters() if n.startswith(prefix)}
    kept = {n for n in inside if n.startswith(f"{prefix}encoder.")}
    assert all((grad is not None) == (n in kept) for n, grad in inside.items())
    assert not any(inside[n].any() for n in kept)


def test_the_memory_of_an_encoder_is_planned(parts, tmp_path):
    """Its weights, and what its backward pass keeps where it trains."""
    kinds: list[dict[str, Any]] = [{"cached": True}, {}, {"keep": KEEP}]
    jobs = [job(fly(parts, tmp_path / "run", dtype="bf16", **kind)) for kind in kinds]
    jobs = [replace(each, model=models.decoder_of(each).spec) for each in jobs]
    cached, frozen, trained = (memory.of(each, 4, 64, 1, 1, False) for each in jobs)
    weights = frames.of_quantizer(str(parts / "quantizer")).state_dict().values()
    assert frozen.weights - cached.weights == sum(t.nbytes for t in weights)  # float32
    assert trained.step["activations"] > 2 * frozen.step["activations"]
    assert trained.gradients > frozen.gradients == cached.gradients


def test_a_whispers_encoder_is_written_and_read(tmp_path):
    torch.manual_seed(0)
    dims = {"n_mels": 80, "n_audio_ctx": 100, "n_audio_state": 16, "n_audio_head": 2}
    dims |= {"n_audio_layer": 1}
    made = frames._Whisper(QuantizerConfig(0, 0, 1, False, **dims)).eval()
    content = {"dims": dims, "model_state_dict": made.state_dict()}
    torch.save(content, tmp_path / "tiny.pt")
    (tmp_path / "encoder").mkdir()
    made.save(tmp_path / "encoder")
    read = [frames.of_whisper(str(tmp_path / name)) for name in ("tiny.pt", "encoder")]
    assert read[0].identity == read[1].identity == made.identity
    assert read[1].stream["frame_rate"] == 50.0
