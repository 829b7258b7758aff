"""Frames spliced into a language model: the door, its training, its folder and its replies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speechfuse import artifact
from speechfuse.evals import generation, speech
from speechfuse.evals.harness_model import harness_model
from speechfuse.fusion import adapters, door, folder, views
from speechfuse.hub import cards, push
from speechfuse.rows import shards
from speechfuse.samples import datasets
from speechfuse.tokens.vocabulary import Vocabulary
from speechfuse.train import checkpoint, loop, optimizers, plan, trainer
from speechfuse.train import model as models
from speechfuse.train.preflight import memory
from tests.small_training import (
    FROZEN,
    LORA,
    ROOT,
    WORDS,
    begin_and_kill,
    dataset,
    fused,
    job,
    losses,
    make_parts,
    recipe,
    sha256s,
    train_on_two_ranks,
)

ENCODER, WIDTH, STACK = "e" * 64, 12, 3
FRAMES = {"encoder": ENCODER, "frame_rate": 25.0, "width": WIDTH}
ADAPTER = {"_component_": "speechfuse.fusion.Stack", "width": WIDTH, "stack": STACK, "hidden": 24}


def frames_row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    word = number % 8
    frames = rng.standard_normal((int(rng.integers(5, 20)), WIDTH)) * 0.1
    frames[:, word] += 1  # so that there is something to learn
    return {
        "id": f"f{number}",
        "seconds": len(frames) / 25,
        "text": WORDS[word],
        "extra": json.dumps({"answer": WORDS[word]}),
        "frames": frames.astype(np.float16).tobytes(),
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    parts = make_parts(tmp_path_factory.mktemp("splice"))
    rng = np.random.default_rng(0)
    dataset(parts / "frames", shards.FRAMES, [frames_row(i, rng) for i in range(120)], FRAMES)
    return parts


def splice(parts: Path, out: Path, **changes: Any) -> Path:
    turns = {"_component_": "speechfuse.samples.answer", "prompt": "say:"}
    entries = [
        fused("speech", parts / "frames", 0.8, stack=STACK, turns=turns),
        fused("conversations", parts / "texts", 0.2),
    ]
    keys = {"checkpoint": str(parts / "init"), "model": LORA, "datasets": entries}
    return recipe(parts, out, **keys | {"adapter": ADAPTER, "freeze": FROZEN} | changes)


@pytest.fixture(scope="module")
def trained(parts) -> Path:
    out = parts / "trained"
    loop.run(job(splice(parts, out, epochs=2)))
    return out


def step(parts: Path, tmp_path: Path, rows: list[list[int]], micro: int, **changes: Any) -> Any:
    """Losses and gradients of one step of these samples of the frames, in these rows."""
    settings = job(splice(parts, tmp_path / "step", **changes))
    entry = {key: value for key, value in settings.datasets[0].items() if key != "share"}
    index = datasets.index.build(entry, parts / "init", parts / "cache")
    vocabulary = Vocabulary.load(parts / "init")
    made = trainer.Trainer(settings, models.decoder_of(settings))
    samples = [[index[number] for number in row] for row in rows]
    chunks = [samples[start : start + micro] for start in range(0, len(samples), micro)]
    batches = [
        views.collate(chunk, datasets.longest(chunk), vocabulary.end, None) for chunk in chunks
    ]
    result, _ = made.backward(batches)
    grads = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    return result["text"], grads, made.model, [s for row in samples for s in row]


def test_a_prompt_may_be_learned(parts, tmp_path):
    """Vectors before the speech in place of words: they learn beside a frozen model, have a rate of
    their own, are in the epoch, and the model of it gives the trainer's logits; text has none."""
    turns_of = {"_component_": "speechfuse.samples.answer"}
    frames = fused("speech", parts / "frames", 0.8, stack=STACK, turns=turns_of, prompt=3)
    texts = fused("conversations", parts / "texts", 0.2)
    keys: dict[str, Any] = {"datasets": [frames, texts], "adapter": ADAPTER | {"prompt": 3}}
    keys |= {"model": {"_component_": "torchtune.models.llama3_1.llama3_1"}}
    keys |= {"rates": {"adapter[.]prompt$": 10}}
    settings = job(splice(parts, tmp_path / "run", **keys))
    loop.run(settings)
    epoch = tmp_path / "run/epoch_0"
    learned = load_file(epoch / folder.SPEECH)["prompt"]
    first = door.initial_values(settings.adapter, learned.shape[1], settings.seed)["prompt"]
    assert learned.shape == (3, 32) and (learned != first).all(1).all()
    made = models.decoder_of(replace(settings, checkpoint=str(epoch)))
    made_trainer = trainer.Trainer(replace(settings, checkpoint=str(epoch)), made)
    assert sorted({g["lr"] for g in made_trainer.optimizer.param_groups}) == [3e-3, 3e-2]
    generator = generation.generator(epoch, ENCODER, "the frames", "cpu")
    row = next(shards.read_rows(parts / "frames"))
    ids = generator.prompt([{"role": "user", "segments": [{"speech": row}]}])
    (clip,) = ids.clips
    assert ids.count(door.FRAME) == 3 + -(-len(clip) // STACK)
    sample = datasets.index.build(
        {k: v for k, v in frames.items() if k != "share"}, parts / "init", parts / "cache"
    )[0]
    assert sample.tokens.tolist()[: len(ids)] == ids
    heard, tokens = views.padded(ids.clips), torch.tensor(ids)[None]
    with made.model.tok_embeddings.hearing(*heard):
        ours = made.model(tokens)
    with generator.door.hearing(*heard):
        theirs = generator.model(inputs_embeds=generator.door(tokens)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    alone = {"checkpoint": str(epoch), "freeze": [*FROZEN, "[.]adapter[.](?!prompt)"]}
    loop.run(job(splice(parts, tmp_path / "other", **keys | alone)))
    own, other = (load_file(f / folder.SPEECH) for f in (epoch, tmp_path / "other/epoch_0"))
    assert [name for name in own if not torch.equal(own[name], other[name])] == ["prompt"]
    for prompt, message in (
        (0, "adapter.prompt=0, and the dataset has prompt=3"),
        (-1, "0 to 1024"),
    ):
        keys["adapter"] = ADAPTER | {"prompt": prompt}
        with pytest.raises(ValueError, match=message):
            loop.run(job(splice(parts, tmp_path / "bad", **keys)))


def test_losses_are_those_of_inputs_embeds(parts, tmp_path):
    numbers = list(range(8))
    (loss, targets), _, model, samples = step(
        parts, tmp_path, [[n] for n in numbers], 8, model=LORA
    )
    theirs = AutoModelForCausalLM.from_pretrained(parts / "init").float()
    total = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.tokens).long()
        vectors = theirs.model.embed_tokens(ids.clamp(min=0))
        (clip,) = sample.audio
        heard = model.tok_embeddings.adapter(
            torch.tensor(clip[None]).float(), torch.tensor([len(clip)])
        )
        assert (ids == door.FRAME).sum() == heard.shape[1] == -(-len(clip) // STACK)
        vectors[ids == door.FRAME] = heard[0].detach()
        logits = theirs(inputs_embeds=vectors[None]).logits[0]
        learned = torch.from_numpy(sample.targets[1:])
        total += F.cross_entropy(logits[:-1][learned], ids[1:][learned], reduction="sum").item()
    assert loss == pytest.approx(total, rel=1e-6) and targets > 8


@pytest.mark.parametrize("adapter", ["Stack", "Linear", "Conformer"])
def test_packed_and_accumulated_are_as_one_sample_a_row(parts, tmp_path, adapter):
    more = {"Stack": {"hidden": 24}, "Linear": {}, "Conformer": {"hidden": 16, "heads": 2}}
    spec = {"_component_": f"speechfuse.fusion.{adapter}", "width": WIDTH, "stack": STACK}
    spec |= more[adapter]
    if adapter == "Conformer":
        spec |= {"dropout": 0.0, "layers": 1}
    numbers = list(range(8))
    alone = step(parts, tmp_path, [[n] for n in numbers], 8, adapter=spec)
    packed = step(parts, tmp_path, [numbers[:5], numbers[5:]], 2, adapter=spec)
    assert packed[0][0] == pytest.approx(alone[0][0], rel=1e-6)
    threes = step(parts, tmp_path, [[n] for n in numbers], 3, adapter=spec)
    for result in (packed, threes):
        assert result[0][1] == alone[0][1] and result[1].keys() == alone[1].keys()
        for name, gradient in alone[1].items():
            torch.testing.assert_close(result[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_conformer_hears_a_clip_alone_as_beside_longer_ones():
    torch.manual_seed(0)
    made = adapters.Conformer(WIDTH, 32, STACK, hidden=16, heads=2, layers=2, dropout=0.0)
    lengths = torch.tensor([18, 9, 5, 0])
    frames = torch.randn(4, 18, WIDTH) * (torch.arange(18) < lengths[:, None])[..., None]
    together = made(frames, lengths)
    assert torch.isfinite(together).all()  # of no clip too, which stands in where a batch has none
    for clip, found, length in zip(frames[:3], together, lengths, strict=False):
        (alone,) = made(clip[None, :length], length[None])
        torch.testing.assert_close(found[: len(alone)], alone, rtol=1e-5, atol=1e-6)
    for parameter in made.parameters():  # FSDP2 casts parameters and leaves buffers
        parameter.data = parameter.data.bfloat16()
    assert made(frames.bfloat16(), lengths).dtype == torch.bfloat16


def test_a_training_leaves_the_language_model_as_it_was(parts, trained):
    assert losses(trained)[-1] < losses(trained)[0] - 0.2, "it must learn"
    epoch, base = trained / "epoch_1", sha256s(parts / "init")
    files = sha256s(epoch)
    assert len(base.keys() - folder.OWN) > 3
    assert all(files[name] == base[name] for name in base.keys() - folder.OWN)
    speech = json.loads((epoch / "speech.json").read_text())
    assert speech["encoder"] == ENCODER and speech["adapter"] == ADAPTER
    assert json.loads((epoch / "lora/adapter_config.json").read_text())["r"] == 4
    # stock transformers loads the model of text
    text = AutoModelForCausalLM.from_pretrained(epoch)
    assert not isinstance(text.get_input_embeddings(), door.Door)


@pytest.mark.parametrize("name", ["Stack", "Conformer"])
def test_an_adapter_trains_alone(parts, tmp_path, name):
    """No other weight asks for gradients; the memory that a step takes is planned all the same."""
    more = {"Stack": {"hidden": 24}, "Conformer": {"hidden": 32, "layers": 1, "heads": 2}}[name]
    spec = {"_component_": f"speechfuse.fusion.{name}", "width": WIDTH, "stack": STACK, **more}
    model = {"_component_": "torchtune.models.llama3_1.llama3_1"}
    small, large = (
        job(splice(parts, tmp_path / "run", model=model, adapter=each, steps=3))
        for each in (spec, spec | {"hidden": 256})
    )
    shape = {"rows": 4, "length": 64, "passes": 1, "ranks": 1, "gpu": False}
    full = [replace(each, model=models.decoder_of(each).spec) for each in (small, large)]
    activations = [memory.of(each, **shape).step["activations"] for each in full]
    assert activations[1] > activations[0] > 0
    loop.run(small)
    epoch = tmp_path / "run/epoch_0"
    assert (epoch / folder.SPEECH).exists() and not (epoch / "lora").exists()


def turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "segments": [{"text": "say:"}, {"speech": row}]}]


def test_replies_of_a_batch_are_those_of_each_alone(parts, trained):
    rows = [r for r, _ in zip(shards.read_rows(parts / "frames"), range(8), strict=False)]
    epoch = trained / "epoch_1"
    generator = generation.generator(epoch, ENCODER, "the frames", "cpu")
    together = generator.reply([turns(row) for row in rows], 4, batch_size=8)
    alone = [generator.reply([turns(row)], 4)[0] for row in rows]
    assert together == alone
    # without the speech part the base answers, as it always did
    off = generation.Generator(epoch, None, "", "cpu")
    ask = [{"role": "user", "segments": [{"text": "say one"}]}]
    assert off.reply([ask], 4) == generation.Generator(parts / "init", None, "", "cpu").reply(
        [ask], 4
    )


def test_text_is_asked_with_the_speech_part_on_or_off(parts, trained):
    epoch, name = trained / "epoch_1", "model.layers.0.self_attn.q_proj.weight"
    base = generation.load(parts / "init", "cpu").get_parameter(name).clone()
    for lora in (False, True):
        model = harness_model(epoch, 2, lora).model
        assert torch.equal(model.get_parameter(name), base) != lora
    replies = {}
    for on in (False, True):
        texts = speech.Speech(str(parts / "texts"), "acc", reference="answer", speech_on=on)
        texts.check(epoch)
        for folder_, base_ in ((epoch, False), (parts / "init", True)):
            batches = texts.predict(folder_, texts.ids()[:8])
            replies[on, base_] = [entry["reply"] for batch in batches for entry in batch]
    assert replies[False, False] == replies[False, True] == replies[True, True]
    assert replies[True, False] != replies[False, False], "LoRA was on"
    heard = speech.Speech(str(parts / "frames"), "acc", reference="answer", speech_on=False)
    with pytest.raises(ValueError, match="holds speech, and speech_on=false asks in text alone"):
        heard.check(epoch)


def test_a_training_goes_on_from_an_epoch(parts, trained, tmp_path):
    """Adapter and LoRA are those that the epoch has; written again, they are its bytes."""
    epoch = trained / "epoch_1"
    made = models.decoder_of(settings := job(splice(parts, tmp_path / "on", checkpoint=str(epoch))))
    trainer.Trainer(settings, made)
    speech_json = json.loads((epoch / "speech.json").read_text())
    checkpoint.export(made, 0, tmp_path / "again", {}, speech_json)
    for name in (folder.SPEECH, folder.LORA, "speech.json", "lora/adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (epoch / name).read_bytes(), name
    with pytest.raises(ValueError, match=r"adapter=None, and .* has {'_component_"):
        keys = {"checkpoint": str(epoch), "model": LORA, "freeze": FROZEN[:3]}
        settings = job(recipe(parts, tmp_path / "text", **keys))
        trainer.Trainer(settings, models.decoder_of(settings))
    few = LORA | {"lora_attn_modules": ["q_proj"]}
    for other, match in ((LORA | {"lora_alpha": 9}, "lora_rank are 8 and 4"), (few, "its modules")):
        settings = job(splice(parts, tmp_path / "on", checkpoint=str(epoch), model=other))
        with pytest.raises(ValueError, match=match):
            trainer.Trainer(settings, models.decoder_of(settings))


@pytest.mark.parametrize("freeze", [FROZEN, []])
def test_the_written_folder_gives_the_trainers_logits(parts, tmp_path, freeze):
    """With all that trains as far from its first values as a long training brings it; LoRA lies
    beside a language model that is frozen, and is merged into one that trains whole."""
    _, _, model, samples = step(parts, tmp_path, [[0], [1]], 2, freeze=freeze)
    settings = job(splice(parts, tmp_path / "step", freeze=freeze))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    decoder = models.decoder_of(settings)
    decoder = replace(decoder, model=model)
    speech = {"generator": "speechfuse.evals.SpliceGenerator", "adapter": ADAPTER}
    checkpoint.export(decoder, 0, tmp_path / "epoch", {}, speech | {"encoder": ENCODER})
    assert (tmp_path / "epoch/lora").exists() == bool(freeze)
    theirs = generation.generator(tmp_path / "epoch", ENCODER, "x", "cpu").model
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long()[None]
        frames, lengths = views.padded(list(sample.audio))
        with torch.no_grad():
            with model.tok_embeddings.hearing(frames, lengths):
                ours = model(tokens)
            with theirs.get_input_embeddings().hearing(frames, lengths):
                other = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens)).logits
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)


def test_two_ranks_and_a_resume_train_the_same(parts, trained, tmp_path):
    train_on_two_ranks(splice(parts, tmp_path / "two", epochs=2))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(trained), rtol=1e-4)
    killed = splice(parts, tmp_path / "killed", epochs=2)
    begin_and_kill(killed)
    loop.run(job(killed))
    assert losses(tmp_path / "killed") == losses(trained)
    for name in (folder.SPEECH, folder.LORA):
        ours, theirs = (load_file(run / "epoch_1" / name) for run in (tmp_path / "killed", trained))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_does_not_belong_together_is_one_sentence(parts, trained, tmp_path):
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            loop.run(job(splice(parts, tmp_path / "bad", **changes)))

    entries = job(splice(parts, tmp_path / "bad")).datasets
    refused("adapter.width=13, and the dataset has width=12", adapter=ADAPTER | {"width": 13})
    refused("adapter.stack=2, and the dataset has stack=3", adapter=ADAPTER | {"stack": 2})
    refused("they belong together, give both", adapter=None, freeze=FROZEN[:3])
    with pytest.raises(ValueError, match="holds no frames"):
        views.speech(Vocabulary.load(parts / "init"), str(parts / "speech"), {}, STACK)
    rng = np.random.default_rng(1)
    rows = [frames_row(i, rng) for i in range(9)]
    other = dataset(tmp_path / "other", shards.FRAMES, rows, FRAMES | {"encoder": "f" * 64})
    refused("frames of several encoders", datasets=[*entries, entries[0] | {"path": str(other)}])
    refused("others of the language model train", freeze=FROZEN[:1])
    with pytest.raises(ValueError, match="the language model takes 32"):
        adapters.Identity(width=12, out=32)
    with pytest.raises(ValueError, match="expanded for eeee"):
        generation.generator(trained / "epoch_1", "f" * 64, "x")


@pytest.mark.parametrize("fault", ["few", "many", "shape", "lora"])
def test_a_damaged_speech_part_is_refused(parts, trained, tmp_path, fault):
    epoch = trained / "epoch_1"
    copy = tmp_path / "copy"
    (copy / "lora").mkdir(parents=True)
    for path in (p for p in epoch.rglob("*") if p.is_file()):
        (copy / path.relative_to(epoch)).write_bytes(path.read_bytes())
    tensors = load_file(copy / folder.SPEECH)
    if fault == "few":
        del tensors["inner.bias"]
    if fault == "many":
        tensors["extra"] = torch.zeros(1)
    if fault == "shape":
        tensors["inner.bias"] = torch.zeros(5)
    save_file(tensors, copy / folder.SPEECH)
    if fault == "lora":
        low = load_file(copy / folder.LORA)
        first = next(name for name in low if name.endswith("lora_A.weight"))
        save_file(low | {first: torch.zeros(4, 5)}, copy / folder.LORA)
    match = {
        "few": "lacks inner.bias",
        "many": "also has extra",
        "shape": "does not fit speech.json",
        "lora": "does not fit its base",
    }[fault]
    with pytest.raises(ValueError, match=match):
        generation.generator(copy, ENCODER, "x", "cpu")


def test_a_question_from_a_file_is_heard_as_a_row_is(parts, trained):
    """What stages.ask does with the waveform: the encoder's frames, as a row of the data has."""

    class Encoder:
        def embed_batch(self, waveforms: list[np.ndarray], size: int) -> Any:
            return torch.from_numpy(waveforms[0].reshape(1, -1, WIDTH)), [4]

    generator = generation.generator(trained / "epoch_1", ENCODER, "x", "cpu")
    waveform = np.arange(6 * WIDTH, dtype=np.float32)
    (segment,) = generator.speech(Encoder(), [waveform])
    heard = views.frames_of(segment["speech"], WIDTH)
    assert np.array_equal(heard, waveform.reshape(-1, WIDTH)[:4].astype(np.float16))


def test_some_weights_have_another_rate(parts, tmp_path):
    (_, _), _, model, _ = step(parts, tmp_path, [[0]], 1)
    spec = {"_component_": "torch.optim.AdamW", "lr": 0.01}
    groups = optimizers.groups(model, spec, {"lora_b": 0.5, "adapter": 2.0, "lora": 1.0})
    assert sorted(group["lr"] for group in groups) == [0.005, 0.01, 0.02]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert optimizers.groups(model, spec, {}) == trained
    with pytest.raises(ValueError, match="'mlp' fits no parameter that trains"):
        optimizers.groups(model, spec, {"mlp": 2.0})


def test_a_run_that_began_before_there_were_adapters_goes_on(parts, tmp_path):
    settings = plan._artifact(job(recipe(parts, tmp_path / "old")), {})._config
    assert "seed" in settings and not settings.keys() & {*plan.ADDED}
    (tmp_path / "old").mkdir()  # begun by a version that stated them all
    stated = json.dumps({"config": {"adapter": None, "rates": {}}})
    (tmp_path / "old/plan.json").write_text(stated)
    settings = plan._artifact(job(recipe(parts, tmp_path / "old")), {})._config
    assert (settings["adapter"], settings["rates"]) == (None, {}) and "keep" not in settings
    assert plan._artifact(job(splice(parts, tmp_path / "new")), {})._config["adapter"] == ADAPTER


def test_a_speech_part_is_pushed_without_the_base_that_it_names(trained):
    outputs = artifact.manifest_of(trained)["outputs"]
    assert {f"epoch_1/{name}" for name in (folder.SPEECH, folder.LORA)} <= outputs.keys()
    epoch = trained / "epoch_1"
    own = {folder.SPEECH, folder.LORA, "speech.json", "lora/adapter_config.json", "manifest.json"}
    assert push.files_of(epoch).keys() == own
    card = cards.card(epoch, ROOT / "data_cards", "me/ears", "mit")
    base = json.loads((epoch / "speech.json").read_text())["base"]
    tensors = [*load_file(epoch / folder.SPEECH).values(), *load_file(epoch / folder.LORA).values()]
    assert f"part ({sum(t.numel() for t in tensors):,} parameters) of a language model" in card
    assert f"`{base}`, which is not in this repository" in card and "peft's format" in card
    assert "hf download me/ears --local-dir FOLDER" in card and ENCODER in card
    assert card.count("hf download") == 1, "the base is a folder, of which no repository is known"


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        ("model.safetensors", False),
        ("model.safetensors", True),
        (folder.LORA, False),
        (folder.SPEECH, False),
    ],
)
def test_a_file_of_another_training_is_refused(parts, trained, tmp_path, name, sharded):
    """The same names and shapes, so that it would load."""
    copy = shutil.copytree(trained / "epoch_1", tmp_path / "copy")
    tensors = {key: tensor + 0.01 for key, tensor in load_file(copy / name).items()}
    (copy / name).unlink()
    if sharded:
        name = "model-00001-of-00001.safetensors"
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, copy / name, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the file that speech\.json beside it was"):
        generation.generator(copy, ENCODER, "x", "cpu")
