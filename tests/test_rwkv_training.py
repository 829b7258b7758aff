"""RWKV in the loop: adapter and learned state beside a frozen model, packing, ranks, resuming, the
plan of memory; its folder, its replies, lm-eval."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from speechfuse.evals import generation, states
from speechfuse.evals import speech as speech_task
from speechfuse.evals.harness_model import harness_model
from speechfuse.fusion import folder, views
from speechfuse.rows import shards
from speechfuse.rwkv import pth
from speechfuse.rwkv.model import Rwkv
from speechfuse.samples import datasets
from speechfuse.tokens.expansion import has_sound_tokens
from speechfuse.tokens.vocabulary import Vocabulary, tokenizer_of
from speechfuse.train import loop, metrics, trainer
from speechfuse.train import model as models
from speechfuse.train.preflight import assumed, memory
from stages.convert_rwkv import ConvertRwkv
from stages.convert_rwkv import main as convert
from tests.small_training import (
    ROOT,
    begin_and_kill,
    dataset,
    init_base,
    job,
    losses,
    make_parts,
    recipe,
    train_on_two_ranks,
    weights,
)
from tests.test_splice import ADAPTER, ENCODER, FRAMES, STACK, frames_row, turns

RANKS = {6: {"mix": 4, "decay": 6}, 7: {"decay": 4, "rate": 5, "value": 6, "gate": 7}}
VERSIONS = pytest.mark.parametrize("version", [6, 7])
MODEL = {"_component_": "speechfuse.train.rwkv"}
FROZEN = [r"^emb[.]weight$", r"^(?!.*time_state)blocks[.]", "^ln_out[.]", "^head[.]"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Texts, frames, and an untrained model of each version, rwkv6/ and rwkv7/."""
    parts = make_parts(tmp_path_factory.mktemp("rwkv"))
    rng = np.random.default_rng(0)
    dataset(parts / "frames", shards.FRAMES, [frames_row(i, rng) for i in range(120)], FRAMES)
    for version, ranks in RANKS.items():
        init_base.main(
            init_base.InitBase(
                out=str(parts / f"rwkv{version}"),
                texts=str(parts / "texts"),
                vocab_size=300,
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                intermediate_size=48,
                rwkv={"version": version, "ranks": ranks},
            )
        )
        path = parts / f"rwkv{version}/model.safetensors"
        torch.manual_seed(version)  # untrained, most products give zeros
        tensors = {n: t + 0.1 * torch.randn(t.shape) for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return parts


def speech(parts: Path, out: Path, version: int, **changes: Any) -> Path:
    """The recipe of an adapter and a learned state."""
    entries = [
        {
            "_component_": "speechfuse.fusion.speech",
            "path": str(parts / "frames"),
            "stack": STACK,
            "share": 0.8,
            "turns": {"_component_": "speechfuse.samples.answer"},
        },
        {
            "_component_": "speechfuse.fusion.conversations",
            "path": str(parts / "texts"),
            "share": 0.2,
        },
    ]
    keys: dict[str, Any] = {"checkpoint": str(parts / f"rwkv{version}"), "datasets": entries}
    keys |= {"model": MODEL | {"learned_state": True}, "adapter": ADAPTER, "freeze": FROZEN}
    return recipe(parts, out, **keys | {"rates": {"time_state": 10}, "epochs": 2} | changes)


@pytest.fixture(scope="module")
def trained(parts) -> dict[int, Path]:
    runs = {version: parts / f"trained{version}" for version in RANKS}
    for version, out in runs.items():
        loop.run(job(speech(parts, out, version)))
    return runs


def step(parts: Path, tmp_path: Path, version: int, rows: list[list[int]]) -> Any:
    """The loss and the gradients of one step of these samples, in these rows."""
    settings = job(speech(parts, tmp_path / "step", version))
    entry = {key: value for key, value in settings.datasets[0].items() if key != "share"}
    checkpoint = Path(settings.checkpoint)
    index = datasets.index.build(entry, checkpoint, parts / "cache")
    made = trainer.Trainer(settings, models.decoder_of(settings))
    samples = [[index[number] for number in row] for row in rows]
    end = Vocabulary.load(checkpoint).end
    result, _ = made.backward([views.collate(samples, datasets.longest(samples), end, None)])
    named = made.model.named_parameters()
    return result["text"], {n: p.grad for n, p in named if p.grad is not None}


@VERSIONS
def test_packed_rows_are_as_one_sample_a_row(parts, tmp_path, version):
    numbers = list(range(8))
    (loss, targets), alone = step(parts, tmp_path, version, [[n] for n in numbers])
    (packed, count), grads = step(parts, tmp_path, version, [numbers[:5], numbers[5:]])
    assert targets == count and packed == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == alone.keys() and sum("time_state" in name for name in grads) == 2
    for name, gradient in alone.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@VERSIONS
def test_the_frozen_model_stays_and_the_state_learns(parts, trained, version):
    out, base = trained[version], parts / f"rwkv{version}"
    assert losses(out)[-1] < losses(out)[0] - 0.2, "it must learn"
    epoch = out / "epoch_1"
    digests = [hashlib.sha256((f / "model.safetensors").read_bytes()) for f in (epoch, base)]
    assert digests[0].hexdigest() == digests[1].hexdigest()
    state = folder.state_of(epoch)
    assert [*state] == [f"blocks.{n}.att.time_state" for n in range(2)]
    assert all(tensor.shape == (2, 16, 16) and tensor.abs().max() > 0 for tensor in state.values())
    groups = trainer.Trainer(
        settings := job(speech(parts, out, version)), models.decoder_of(settings)
    ).optimizer.param_groups
    assert sorted(group["lr"] for group in groups) == pytest.approx([3e-3, 3e-2])


@VERSIONS
def test_two_ranks_and_a_resume_train_the_same(parts, trained, tmp_path, version):
    train_on_two_ranks(speech(parts, tmp_path / "two", version))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(trained[version]), rtol=1e-4)
    killed = speech(parts, tmp_path / "killed", version)
    begin_and_kill(killed)
    loop.run(job(killed))
    assert losses(tmp_path / "killed") == losses(trained[version])
    for name in (folder.SPEECH, folder.STATE):
        runs = (tmp_path / "killed", trained[version])
        ours, theirs = (load_file(run / "epoch_1" / name) for run in runs)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@VERSIONS
def test_a_model_of_text_trains_whole(parts, tmp_path, version):
    texts = {"_component_": "speechfuse.samples.conversations", "path": str(parts / "texts")}
    keys = {"model": MODEL, "datasets": [texts | {"share": 1.0}], "epochs": 4, "warmup_steps": 1}
    config = recipe(parts, tmp_path / "run", checkpoint=str(parts / f"rwkv{version}"), **keys)
    settings = job(config)
    full = replace(settings, model=models.decoder_of(settings).spec)
    sizes = [memory.of(full, 4, length, 1, 1, False).step["activations"] for length in (32, 256)]
    assert sizes[1] > 4 * sizes[0] > 0
    decoder = models.decoder_of(settings)
    flops = metrics.Flops.of(decoder.model, decoder.shape)
    assert flops.attention == 0 and flops.products > 6 * 2 * 5 * 32 * 32
    loop.run(settings)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 1
    changed, before = (
        weights(tmp_path / "run", 3),
        load_file(parts / f"rwkv{version}/model.safetensors"),
    )
    assert changed.keys() == before.keys()
    same = {name for name, tensor in before.items() if torch.equal(changed[name], tensor)}
    assert not same, same
    generator = generation.Generator(tmp_path / "run/epoch_3", None, "", "cpu")
    asked = [[{"role": "user", "segments": [{"text": f"say {w}"}]}] for w in ("one", "seven")]
    assert generator.reply(asked, 4) == [generator.reply([each], 4)[0] for each in asked]


@VERSIONS
@torch.no_grad()
def test_the_written_folder_gives_the_trainers_logits(parts, trained, version):
    """Left-padded in a batch too; without the speech part it is the base that answers."""
    epoch = trained[version] / "epoch_1"
    settings = job(speech(parts, parts / "again", version, checkpoint=str(epoch)))
    made = models.decoder_of(settings)
    trainer.Trainer(settings, made)
    rows = [r for r, _ in zip(shards.read_rows(parts / "frames"), range(6), strict=False)]
    generator = generation.generator(epoch, ENCODER, "the frames", "cpu")
    asked = [turns(row) for row in rows]
    ids = generator.prompt(asked[0])
    frames, lengths = views.padded(ids.clips)
    tokens = torch.tensor(ids)[None]
    with made.model.emb.hearing(frames, lengths):
        ours = made.model(tokens)
    with generator.door.hearing(frames, lengths):
        theirs = generator.model(inputs_embeds=generator.door(tokens)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    together = generator.reply(asked, 4, batch_size=6)
    assert together == [generator.reply([each], 4)[0] for each in asked]
    text = [[{"role": "user", "segments": [{"text": f"say {w}"}]}] for w in ("one", "two")]
    off = generation.Generator(epoch, None, "", "cpu").reply(text, 4)
    assert off == generation.Generator(parts / f"rwkv{version}", None, "", "cpu").reply(text, 4)


@VERSIONS
def test_lm_eval_reads_the_registered_class(parts, trained, version):
    """As its own HFLM does, to which it is a model like any other; with the state on it is
    another."""
    epoch = trained[version] / "epoch_1"
    ours = harness_model(epoch, 4)
    asked = [("", list(range(5, 5 + n)), list(range(20, 20 + n % 3 + 1))) for n in range(1, 9)]
    found = ours._loglikelihood_tokens(asked)
    stock = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=4)
    for (one, greedy), (other, best) in zip(found, stock._loglikelihood_tokens(asked), strict=True):
        assert one == pytest.approx(other, abs=1e-4) and greedy == best
    heard = harness_model(epoch, 4, lora=True)
    assert found != heard._loglikelihood_tokens(asked)


@torch.no_grad()
def test_two_turns_with_the_state_kept_are_both_turns_in_one_prompt(parts):
    model = generation.load(parts / "rwkv7", "cpu")
    ids = torch.arange(5, 95)[None]
    whole = model(ids).logits
    first = model(ids[:, :37])
    second = model(ids[:, 37:], state=first.state)
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5
    )
    sizes = {sum(t.numel() for layer in each.state for t in layer) for each in (first, second)}
    assert len(sizes) == 1


def test_what_does_not_belong_together_is_one_sentence(parts, trained, tmp_path):
    def refused(match: str, version: int = 6, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            settings = job(speech(parts, tmp_path / "bad", version, **changes))
            trainer.Trainer(settings, models.decoder_of(settings))

    llama = {"_component_": "torchtune.models.llama3_1.llama3_1"}
    refused("for RWKV choose speechfuse.train.rwkv", model=llama)
    refused("for RWKV choose speechfuse.train.rwkv", checkpoint=str(parts / "init"))
    refused(r"model.version=7 in the recipe, but .* has version=6", model=MODEL | {"version": 7})
    refused("others of the language model train", freeze=FROZEN[:1])
    refused("it needs an adapter", adapter=None, freeze=FROZEN[:1])
    epoch = trained[6] / "epoch_1"
    refused("learned state of 2 layers, and the model has 0", checkpoint=str(epoch), model=MODEL)
    other = trained[7] / "epoch_1"
    with pytest.raises(ValueError, match="is the learned state of another model"):
        state = {name: tensor[:, :8] for name, tensor in folder.state_of(other).items()}
        pth.set_state(generation.load(other, "cpu"), state, "a file")


def test_a_state_can_be_zeroed_for_a_task_and_comes_back(parts, trained, tmp_path):
    """The next task of the same checkpoint, whose model is kept, has it again."""
    epoch, rows = trained[7] / "epoch_1", str(parts / "frames")
    own = folder.state_of(epoch)["blocks.0.att.time_state"]
    for state in (True, False, True):
        task = speech_task.Speech(rows, "acc", reference="answer", state=state, max_new_tokens=1)
        assert len(list(task.predict(epoch, ["f0", "f1"]))) == 1
        (model,) = generation._loaded.values()
        found = model.blocks[0].att.time_state
        assert torch.equal(found, own) if state else found is None
        assert task.inputs().get("state", True) == state
    for checkpoint, speech_on in ((parts / "rwkv7", True), (epoch, False)):
        task = speech_task.Speech(
            rows, "acc", reference="answer", state=False, speech_on=speech_on, input="transcript"
        )
        with pytest.raises(ValueError, match=r"^state=false: .* has no learned state to leave"):
            task.check(checkpoint)
    shutil.copytree(epoch, tmp_path / "epoch")
    save_file({"blocks.0.att.time_state": own}, tmp_path / "epoch" / folder.STATE)
    with pytest.raises(ValueError, match=r"is not the file that speech[.]json beside it was"):
        generation.generator(tmp_path / "epoch", ENCODER, "", "cpu")


@VERSIONS
@torch.no_grad()
def test_a_pth_becomes_a_folder_and_an_epoch_a_pth(parts, trained, tmp_path, version):
    """The file of an epoch has the learned state, and gives the logits of the epoch in text."""
    base, epoch = parts / f"rwkv{version}", trained[version] / "epoch_1"
    convert(ConvertRwkv(str(base), str(tmp_path / "base.pth")))
    again = ConvertRwkv(str(tmp_path / "base.pth"), str(tmp_path / "folder"), str(base))
    convert(again)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "folder", base))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ask = [[{"role": "user", "segments": [{"text": "say one"}]}]]
    one, other = (generation.Generator(f, None, "", "cpu") for f in (tmp_path / "folder", base))
    assert one.reply(ask, 4) == other.reply(ask, 4)
    convert(ConvertRwkv(str(epoch), str(tmp_path / "epoch.pth")))
    shape, tensors = pth.read(tmp_path / "epoch.pth")
    assert {n: t for n, t in tensors.items() if pth.is_state(n)}.keys() == folder.state_of(
        epoch
    ).keys()
    model = Rwkv(shape, learned_state=True)
    model.load_state_dict(tensors)
    ids = torch.arange(5, 60)[None]
    heard = generation.load(epoch, "cpu", lora=True)(ids).logits
    torch.testing.assert_close(model(ids), heard)
    with pytest.raises(ValueError, match="has a learned state"):
        convert(ConvertRwkv(str(tmp_path / "epoch.pth"), str(tmp_path / "x"), str(base)))
    demo = str(ROOT / "recipes/demo/models/base")
    with pytest.raises(ValueError, match=r"base[.]pth has \d+ tokens, and .*models/base 943"):
        convert(ConvertRwkv(str(tmp_path / "base.pth"), str(tmp_path / "x"), demo))
    before = (tmp_path / "base.pth").read_bytes()
    with pytest.raises(ValueError, match=r"base[.]pth exists: choose another name"):
        convert(ConvertRwkv(str(epoch), str(tmp_path / "base.pth")))
    assert (tmp_path / "base.pth").read_bytes() == before
    rwkv = ROOT / "recipes/demo/models/rwkv"  # with Llama 3's tokens, but no Llama
    with pytest.raises(ValueError, match="sound tokens are added beside Llama 3's control tokens"):
        has_sound_tokens(rwkv, tokenizer_of(rwkv), 8)
    with pytest.raises(ValueError, match="models/base is no RWKV"):
        convert(ConvertRwkv(demo, str(tmp_path / "x.pth")))


def test_another_task_is_another_state_over_the_same_adapter(parts, trained, tmp_path):
    """A task of states asks each one of its own, as if its folder were asked alone."""
    epoch = trained[6] / "epoch_1"
    alone = {"checkpoint": str(epoch), "freeze": [*FROZEN, "[.]adapter[.]"], "steps": 3}
    loop.run(job(speech(parts, tmp_path / "run", 6, **alone, rates={"time_state": 300})))
    other = tmp_path / "run/epoch_0"
    assert (other / folder.SPEECH).read_bytes() == (epoch / folder.SPEECH).read_bytes()
    ours, before = folder.state_of(other), folder.state_of(epoch)
    assert not any(torch.equal(ours[name], before[name]) for name in before)
    rows, turns_of = str(parts / "frames"), {"_component_": "speechfuse.samples.answer"}
    of = {"first": {"checkpoint": str(epoch), "turns": turns_of}}
    of["second"] = {"checkpoint": str(other), "turns": turns_of}
    task = states.States(rows, of, max_new_tokens=4, limit=8)
    task.check(epoch)
    said = {e["id"]: e["reply"] for batch in task.predict(epoch, task.ids()) for e in batch}
    for name, checkpoint in (("first", epoch), ("second", other)):
        own = speech_task.Speech(rows, "acc", reference="answer", max_new_tokens=4, limit=8)
        replies = [entry for batch in own.predict(checkpoint, own.ids()) for entry in batch]
        assert {f"{name} {e['id']}": e["reply"] for e in replies}.items() <= said.items()
    assert len({said[f"{name} f0"] for name in of}) == 2
    again = Path(task.states["second"]["checkpoint"]) / folder.STATE
    key = task.inputs()
    again.write_bytes((epoch / folder.STATE).read_bytes())
    assert task.inputs() != key
    with pytest.raises(ValueError, match=r"is not the file that speech[.]json beside it was"):
        list(task.predict(epoch, task.ids()))
    for odd, message in ((trained[7] / "epoch_1", "another language model"), (rows, "no learned")):
        of["second"]["checkpoint"] = str(odd)
        with pytest.raises(ValueError, match=rf"^states[.]second: .*{message}"):
            task.check(epoch)
    with pytest.raises(ValueError, match="name two tasks or more"):
        states.States(rows, {"first": of["first"]}).check(epoch)


def test_a_state_may_come_to_an_adapter_that_has_none(parts, tmp_path):
    """Zeros at first, as in a training that begins with the language model."""
    keys: dict[str, Any] = {"steps": 2, "warmup_steps": 0}
    loop.run(job(speech(parts, tmp_path / "alone", 6, model=MODEL, rates={}, **keys)))
    epoch = tmp_path / "alone/epoch_0"
    assert not folder.state_of(epoch)
    keys |= {"checkpoint": str(epoch), "freeze": [*FROZEN, "[.]adapter[.]"]}
    loop.run(job(speech(parts, tmp_path / "state", 6, **keys)))
    assert folder.state_of(tmp_path / "state/epoch_0")


def test_the_recipe_of_the_document_trains_21_million_weights():
    """Adapter and state as published."""
    settings = job(ROOT / "recipes/rwkv_asr_3b/rwkv_asr.yaml")
    model = models.decoder_of(settings, assumed.shape(settings.model, [])).model
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    state = sum(count for name, count in trained.items() if pth.is_state(name))
    assert state == 32 * 40 * 64 * 64
    assert sum(trained.values()) - state == 15_733_248
    frozen = sum(p.numel() for p in model.parameters()) - sum(trained.values())
    assert frozen == pytest.approx(3.1e9, rel=1e-3)


def test_the_shipped_base_is_small_and_knows_its_world():
    """In the tokens of the Llama base."""
    base = ROOT / "recipes/demo/models/rwkv"
    assert sum(path.stat().st_size for path in base.iterdir()) < 8e6
    own, other = ((f / "tokenizer.json").read_bytes() for f in (base, base.parent / "base"))
    assert own == other
    generator = generation.Generator(base, None, "", "cpu")
    asked = ("what is three plus four", "repeat: where is a bee")
    prompts = [[{"role": "user", "segments": [{"text": text}]}] for text in asked]
    assert generator.reply(prompts, 16) == ["seven", "where is a bee"]
