"""The training loop: ranks, micro-batches, resuming, exported logits, guards, refusals. Real
torchtune, FSDP2, gloo, torchrun."""

import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speechfuse.rows import shards
from speechfuse.train import loop
from speechfuse.train.config import Finetune
from speechfuse.train.new_rows import NewRows
from speechfuse.train.preflight import assumed
from speechfuse.train.state import complete_steps
from tests.small_training import (
    ROOT,
    STREAM,
    built,
    command,
    dataset,
    job,
    kill,
    losses,
    make_parts,
    recipe,
    train,
    weights,
)


class Died(Exception):
    """Instead of a kill."""


def run_until_it_dies(settings: Finetune, monkeypatch) -> None:
    """Steps 1 to 6 of a run that saves every fifth; then it is gone."""

    def measure(rows: NewRows, step: int) -> dict[str, float]:
        if step == 7:
            raise Died
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(NewRows, "measure", measure)
        with pytest.raises(Died):
            loop.run(settings)
    while complete_steps(Path(settings.out) / "state") != [5]:  # written in the background
        time.sleep(0.01)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    loop.run(job(recipe(parts, out)))
    return out


@pytest.fixture(scope="module")
def on_two_ranks(parts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two"
    done = train(recipe(parts, out), ranks=2)
    assert done.returncode == 0, done.stderr
    return out


def test_two_ranks_and_one_rank_train_the_same_model(undisturbed, on_two_ranks):
    one, two = losses(undisturbed), losses(on_two_ranks)
    assert len(one) >= 20
    assert one[-1] < 0.7 * one[0], "the run must learn, or equality says little"
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(on_two_ranks)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_torchtunes_command_line_trains_the_same(parts, undisturbed, on_two_ranks, tmp_path, ranks):
    """Bit for bit; and the recipe names the builder alone, which config.json gives its sizes."""
    builder = {"_component_": "torchtune.models.llama3_1.llama3_1"}
    config = recipe(parts, tmp_path / "tuned", model=builder)
    several = [] if ranks == 1 else ["--nproc_per_node", str(ranks)]
    tune = Path(sys.executable).with_name("tune")
    done = subprocess.run(
        [tune, "run", *several, "stages/train.py", "--config", config, "runtime.state_every=10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reference = weights(undisturbed if ranks == 1 else on_two_ranks)
    tuned = weights(tmp_path / "tuned")
    assert tuned.keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in tuned.items())


def test_micro_batches_weigh_every_target_alike(parts, undisturbed, tmp_path):
    out = tmp_path / "micro"
    loop.run(job(recipe(parts, out, micro_batch_size=1)))
    np.testing.assert_allclose(losses(out), losses(undisturbed), rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_started_again_ends_as_if_undisturbed(
    parts, undisturbed, on_two_ranks, tmp_path, monkeypatch, capsys, ranks
):
    config = recipe(parts, tmp_path / "killed")
    reference = undisturbed if ranks == 1 else on_two_ranks
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(config, ranks), cwd=ROOT, **quiet)
    out = tmp_path / "killed"
    while not list(out.glob("state/step_*/.metadata")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    kill(process)
    assert not (out / "manifest.json").exists()
    # after the first the plan is known to be good, and torchrun is started by the recipe itself
    done = train(config, 1, f"runtime.ranks={ranks}")
    assert done.returncode == 0, done.stderr
    assert f"{out}: goes on at step " in done.stdout and done.stdout.count("\nparameters") == 1
    assert losses(out) == losses(reference)
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(out)[name], tensor), name
    again = [str(config), "runtime.dry_run=true", f"runtime.ranks={ranks}"]
    assert launched(again, monkeypatch, capsys)[1] == f"{out}: complete, nothing to do\n"


def test_exported_model_gives_the_trainers_logits_in_transformers(parts, undisturbed):
    config = yaml.safe_load((undisturbed.with_suffix(".yaml")).read_text())
    folder = undisturbed / "epoch_0"
    ours = built(folder, config["model"])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, config["model"]["vocab_size"], (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(
        load_file(parts / "expanded/model.safetensors")["lm_head.weight"],
        weights(undisturbed)["lm_head.weight"],
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size=3 does not divide"),
        ({"seq_len": 8}, "at most seq_len=8 tokens"),
        ({"compute_dtype": "fp8"}, "compute_dtype='fp8'"),
        ({"checkpoint": "missing/folder"}, "missing/folder"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(parts, tmp_path, change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        loop.run(job(recipe(parts, tmp_path / "bad", **change)))
    assert not (tmp_path / "bad").exists()


def test_a_refusal_is_a_line_and_an_exit_code(parts, tmp_path):
    done = train(recipe(parts, tmp_path / "bad", batch_sise=4))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "did you mean 'batch_size'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("checkpoint=out/models/expanded_8b/x", "`just recipe=early_fusion_8b expand` makes it"),
        ("seq_length=4", "did you mean 'seq_len'"),
        ("attention=sdpa", "attention='sdpa': choose one of auto, dense, varlen, flex"),
        ("activation_checkpointing=half", "choose one of none, selective, full"),
        ("batch_size=5", "batch_size=5 is not a multiple of the 2 ranks"),
        ("datasets.0.path=none", "none is not there; no recipe here makes it"),
        ("shard_group=3", "shard_group=3 does not divide the 2 ranks"),
        ("attention=flex", "attention=flex is compiled for CUDA"),
        ("warmup_steps=1000", "warmup_steps=1000 and the run has 31 steps"),
        ("optimizer={_component_: torch.optim.LBFGS}", "missing 1 required positional argument"),
        ("optimizer.betas=3", "optimizer: torch.optim.AdamW: "),
        ("optimizer._component_=torch.optim.Adafactor", "cannot update weights that are sharded"),
    ],
)
def test_what_is_refused_is_refused_before_torchrun(
    parts, tmp_path, monkeypatch, capsys, override, said
):
    arguments = [str(recipe(parts, tmp_path / "bad")), "runtime.ranks=2", override]
    code, _, stderr = launched(arguments, monkeypatch, capsys)
    assert code == 2 and stderr.splitlines()[-1].startswith("error: ") and said in stderr


def test_a_dry_run_plans_for_its_ranks_in_one_process(parts, tmp_path, monkeypatch, capsys):
    arguments = [str(recipe(parts, tmp_path / "dry")), "runtime.ranks=4", "--dry-run"]
    code, stdout, _ = launched(arguments, monkeypatch, capsys)
    assert code is None and "on the CPU, 4 ranks" in stdout and not (tmp_path / "dry").exists()
    code, stdout, _ = launched([*arguments[:1], "runtime.ranks=2"], monkeypatch, capsys)
    assert code == "torchrun" and stdout == ""


def test_a_dry_run_needs_neither_checkpoint_nor_data(parts, tmp_path, monkeypatch, capsys):
    arguments = [str(recipe(parts, tmp_path / "run")), "--dry-run", "runtime.gpu=4090"]
    arguments += ["steps=7", "runtime.dollars_per_gpu_hour=2"]
    _, whole, _ = launched(arguments, monkeypatch, capsys)
    more = ["checkpoint=out/models/expanded_8b/x", "datasets.1.path=out/data/none"]
    code, said, _ = launched([*arguments, *more], monkeypatch, capsys)
    lines = said.splitlines()
    assert code is None and not (tmp_path / "run").exists()
    assert lines[0].endswith("x is not there; `just recipe=early_fusion_8b expand` makes it")
    assert lines[1].startswith("out/data/none is not there; no recipe here makes it")
    rows = dict(line.split(maxsplit=1) for line in lines[2:])
    assert rows["data"] == "unknown, and so are time and price"
    assert rows["steps"] == "7 of 4 rows, epochs: 1"
    assert rows["speed"] == "not known: nothing was measured, and an assumption needs the data"
    assert not rows.keys() & {"time", "price"} and "\ntime" in whole and "\nprice" in whole
    assert "7 of 4 rows, epochs: 1; steps=7 ends the last early" in whole
    for name in ("parameters", "memory", "  weights", "  activations", "disk", "formula"):
        mine, full = ([s for s in t.splitlines() if s.startswith(name)] for t in (said, whole))
        assert len(mine) == 1 and (mine == full or name == "disk"), "the model's shapes suffice"
    tied = {"_component_": "torchtune.models.llama3_2.llama3_2", "num_heads": 2, "embed_dim": 8}
    assert assumed.shape(tied, [])["tie_word_embeddings"] is True
    with pytest.raises(ValueError, match=r"it is gone .*no num_heads and embed_dim to plan with"):
        assumed.shape({"_component_": "torchtune.models.llama3_1.llama3_1_8b"}, ["it is gone"])


def launched(arguments: list[str], monkeypatch, capsys) -> tuple[object, str, str]:
    """(exit status, or "torchrun" where it would start that; stdout; stderr) of finetune.py."""

    def torchrun(path: str, command: list[str]) -> None:
        assert "speechfuse.train.torchrun" in command and "--nproc-per-node=2" in command
        sys.exit("torchrun")

    code = None
    monkeypatch.setattr("os.execv", torchrun)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # and not left behind
    monkeypatch.setattr(sys, "argv", ["stages/train.py", *arguments])
    try:
        runpy.run_module("stages.train", run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_a_vocabulary_that_does_not_fit_is_refused(parts, tmp_path):
    config = recipe(parts, tmp_path / "vocab")
    content = yaml.safe_load(config.read_text())
    content["model"]["vocab_size"] += 1
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        loop.run(job(config))


def test_codes_of_another_quantizer_are_refused(parts, tmp_path):
    other = dataset(
        tmp_path / "other",
        shards.SPEECH,
        [{"id": "a", "codes": [1, 2], "text": "one", "extra": '{"answer": "one"}'}],
        {**STREAM, "quantizer": "f" * 64},
    )
    config = recipe(
        parts,
        tmp_path / "mixed",
        datasets=[{"_component_": "speechfuse.samples.sound", "path": str(other), "share": 1.0}],
    )
    with pytest.raises(ValueError, match="was made with quantizer ffffffffffff"):
        loop.run(job(config))


@pytest.mark.parametrize("what", ["new rows alone", "dropout of adapters"])
def test_what_a_run_that_died_must_find_again(parts, tmp_path, monkeypatch, capsys, what):
    """While new rows train alone, most weights have no moments yet, and must have none after;
    dropout goes on where its chance stood; frozen weights are in no state."""
    changes: dict[str, Any] = {"new_rows_first": 8}
    if what != "new rows alone":
        shape = yaml.safe_load(recipe(parts, tmp_path / "any").read_text())["model"]
        changes = {
            "model": shape
            | {
                "_component_": "torchtune.models.llama3_1.lora_llama3_1",
                "lora_dropout": 0.3,
                "lora_attn_modules": ["q_proj", "v_proj"],
                "lora_rank": 4,
                "lora_alpha": 8,
            },
            "freeze": ["^layers[.](?!.*lora_)", "^norm[.]"],
        }
    reference, out = tmp_path / "whole", tmp_path / "died"
    loop.run(job(recipe(parts, reference, **changes)))
    settings = job(recipe(parts, out, **changes))
    run_until_it_dies(settings, monkeypatch)
    half = out / "state/step_6"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"what a kill left")
    capsys.readouterr()
    loop.run(settings)
    said = capsys.readouterr().out
    assert not half.exists() and f"{half} is dropped: a stop came before" in said
    assert re.search(rf"{out}: goes on at step 6 of \d+\n", said)
    assert losses(out) == losses(reference)
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(out)[name], tensor), name


def test_a_run_goes_on_with_other_memory_settings(parts, tmp_path, monkeypatch, capsys):
    reference, out = tmp_path / "whole", tmp_path / "died"
    loop.run(job(recipe(parts, reference)))
    settings = job(recipe(parts, out))
    run_until_it_dies(settings, monkeypatch)
    loop.run(replace(settings, micro_batch_size=1, activation_checkpointing="full"))
    said = capsys.readouterr().out
    assert "begun with micro_batch_size=0, goes on with 1" in said
    assert "begun with activation_checkpointing=none, goes on with full" in said
    np.testing.assert_allclose(losses(out), losses(reference), rtol=1e-4)
    capsys.readouterr()
    with pytest.raises(ValueError, match="made from something else; what differs: seq_len"):
        loop.run(replace(settings, seq_len=65))
    assert capsys.readouterr().out == ""  # no plan of what is not done
    loop.run(replace(settings, micro_batch_size=2))
    first, last = capsys.readouterr().out.splitlines()
    assert "begun with micro_batch_size=0, and not 2" in first and "nothing to do" in last
