"""The training loop: ranks, micro-batches, resuming, exported logits, refusals. Real torchtune,
FSDP2, gloo, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speechfuse import artifact, datasets, shards, vocab
from speechfuse.train import model as models
from stages import init_base

ROOT = Path(__file__).parent.parent
STREAM = {"quantizer": "0" * 64, "token_rate": 25.0, "codebooks": 1, "codebook_size": 16}


def dataset(folder: Path, schema, rows: list[dict], stream: dict | None) -> Path:
    work = artifact.Artifact(folder, "test", 1, {"rows": len(rows)}, {})
    work.begin()
    path = folder / shards.shard_name(0)
    shards.write_shard(path, rows, schema, stream)
    work.finish({}, [path])
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with texts, speech of random codes, and an expanded tiny checkpoint."""
    folder = tmp_path_factory.mktemp("parts")
    words = "one two three four five six seven eight".split()
    texts = [
        {
            "id": f"t{i}",
            "turns": [
                {"role": "user", "segments": [{"text": f"say {word}"}]},
                {"role": "assistant", "segments": [{"text": word}]},
            ],
            "extra": "{}",
        }
        for i, word in enumerate(words * 4)
    ]
    dataset(folder / "texts", shards.CONVERSATIONS, texts, None)
    rng = np.random.default_rng(0)
    speech = [
        {
            "id": f"s{i}",
            "codes": rng.integers(0, 16, rng.integers(5, 20)).astype(np.uint16),
            "seconds": 1.0,
            "text": words[i % 8],
            "extra": json.dumps({"answer": words[i % 8]}),
        }
        for i in range(200)
    ]
    dataset(folder / "speech", shards.SPEECH, speech, STREAM)
    init_base.main(
        init_base.InitBase(
            out=str(folder / "init"), texts=str(folder / "texts"), vocab_size=300, hidden_size=32,
            num_layers=2, num_heads=2, intermediate_size=64,
        )
    )  # fmt: skip
    work = artifact.Artifact(folder / "expanded", "expand_vocab", 1, {}, {})
    work.begin()
    vocab.expand(folder / "init", folder / "expanded", 16, STREAM["quantizer"], seed=0)
    work.finish({}, [folder / "expanded/config.json"])
    return folder


def recipe(parts: Path, out: Path, **changes) -> Path:
    """A recipe on disk over `parts`, with 20 steps unless changed."""
    shape = vocab.read_config(parts / "expanded")
    content = {
        "out": str(out), "checkpoint": str(parts / "expanded"),
        "model": {
            "_component_": "torchtune.models.llama3_1.llama3_1", "vocab_size": shape["vocab_size"],
            "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32,
            "intermediate_dim": 64, "max_seq_len": 128,
        },
        "datasets": [
            {
                "_component_": "speechfuse.datasets.speech",
                "path": str(parts / "speech"),
                "share": 0.8,
                "turns": {"_component_": "speechfuse.instructions.answer", "repeat_first": True},
            },
            {
                "_component_": "speechfuse.datasets.conversations",
                "path": str(parts / "texts"),
                "share": 0.2,
            },
        ],
        "seq_len": 64, "batch_size": 4, "epochs": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-3}, "warmup_steps": 2,
        "clip_grad_norm": 1.0, "runtime": {"threads": 1, "state_every": 5},
    }  # fmt: skip
    content.update(changes)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def command(config: Path, ranks: int = 1) -> list[str]:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launch, "recipes/finetune.py", str(config)]


def train(config: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(command(config, ranks), cwd=ROOT, capture_output=True, text=True)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, epoch: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"epoch_{epoch}" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = train(recipe(parts, out))
    assert done.returncode == 0, done.stderr
    return out


def test_two_ranks_and_one_rank_train_the_same_model(parts, undisturbed, tmp_path):
    out = tmp_path / "two"
    done = train(recipe(parts, out), ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = losses(undisturbed), losses(out)
    assert len(one) >= 20
    assert one[-1] < 0.7 * one[0], "the run must learn, or equality says little"
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=1e-3, atol=1e-5)


def test_micro_batches_weigh_every_target_alike(parts, undisturbed, tmp_path):
    out = tmp_path / "micro"
    assert train(recipe(parts, out, micro_batch_size=1)).returncode == 0
    np.testing.assert_allclose(losses(out), losses(undisturbed), rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_started_again_ends_as_if_undisturbed(parts, undisturbed, tmp_path, ranks):
    config = recipe(parts, tmp_path / "killed")
    reference = undisturbed
    if ranks == 2:
        reference = tmp_path / "whole"
        assert train(recipe(parts, reference), ranks).returncode == 0
    process = subprocess.Popen(
        command(config, ranks), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    out = tmp_path / "killed"
    while not list(out.glob("state/step_*/.metadata")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    done = train(config, ranks)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(reference)
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(out)[name], tensor), name
    again = train(config, ranks)
    assert "complete, nothing to do" in again.stdout


def test_exported_model_gives_the_trainers_logits_in_transformers(parts, undisturbed):
    config = yaml.safe_load((undisturbed.with_suffix(".yaml")).read_text())
    folder = undisturbed / "epoch_0"
    ours = models.build(config["model"], folder, torch.device("cpu"), "fp32", "fp32", False)
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
        ({"batch_sise": 4}, "did you mean 'batch_size'"),
        ({"batch_size": 4, "micro_batch_size": 3}, "micro_batch_size=3 does not divide"),
        ({"seq_len": 8}, "at most seq_len=8 tokens"),
        ({"compute_dtype": "fp8"}, "compute_dtype='fp8'"),
        ({"checkpoint": "missing/folder"}, "missing/folder"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(parts, tmp_path, change, said):
    done = train(recipe(parts, tmp_path / "bad", **change))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vocabulary_that_does_not_fit_is_refused(parts, tmp_path):
    config = recipe(parts, tmp_path / "vocab")
    content = yaml.safe_load(config.read_text())
    content["model"]["vocab_size"] += 1
    config.write_text(yaml.safe_dump(content))
    done = train(config)
    assert done.returncode == 2 and "model.vocab_size" in done.stderr


def test_codes_of_another_quantizer_are_refused(parts, tmp_path):
    other = dataset(
        tmp_path / "other", shards.SPEECH,
        [{"id": "a", "codes": [1, 2], "text": "one", "extra": '{"answer": "one"}'}],
        {**STREAM, "quantizer": "f" * 64},
    )  # fmt: skip
    config = recipe(
        parts, tmp_path / "mixed",
        datasets=[{"_component_": "speechfuse.datasets.sound", "path": str(other), "share": 1.0}],
    )  # fmt: skip
    done = train(config)
    assert done.returncode == 2 and "was made with quantizer ffffffffffff" in done.stderr


def test_batches_depend_on_the_seed_alone(parts):
    specs = yaml.safe_load(recipe(parts, parts / "unused").read_text())["datasets"]
    _, mixture = datasets.load(specs, parts / "expanded", 64, 4, 0)
    names = [[s.name for s in pack] for batch in mixture.batches(0) for pack in batch]
    _, again = datasets.load(specs, parts / "expanded", 64, 4, 0)
    assert names == [[s.name for s in pack] for batch in again.batches(0) for pack in batch]
