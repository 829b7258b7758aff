"""A training small enough for tests: texts, speech of random codes, a checkpoint, and recipes."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import yaml
from safetensors.torch import load_file

from speechfuse import artifact
from speechfuse.config import load
from speechfuse.rows import shards
from speechfuse.tokens import expansion, vocabulary
from speechfuse.train import backbone, checkpoint
from speechfuse.train import model as models
from speechfuse.train.config import Finetune
from speechfuse.train.losses import next_token
from tests.demo_code import demo

init_base = demo("init_base")

ROOT = Path(__file__).parent.parent
STREAM = {"quantizer": "0" * 64, "token_rate": 25.0, "codebooks": 1, "codebook_size": 16}
# processes that begin with all of this imported, which takes longer than the trainings here
READY = get_context("forkserver")
READY.set_forkserver_preload(["torchtune.training", "transformers", "speechfuse.train.loop"])
MARK = 309 + 16  # id of the mask code, which no row but a planted one has
WORDS = "one two three four five six seven eight".split()
LORA = {
    "_component_": "torchtune.models.llama3_1.lora_llama3_1",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}
FROZEN = [r"^layers[.](?!.*lora_)", r"^norm[.]", r"^output[.]", r"^tok_embeddings[.]weight$"]


def dataset(folder: Path, schema: pa.Schema, rows: list[dict], stream: dict | None) -> Path:
    work = artifact.Artifact(folder, "test", 1, {"rows": len(rows)}, {})
    work.begin()
    path = folder / shards.shard_name(0)
    shards.write_shard(path, rows, schema, stream)
    work.finish({}, [path])
    return folder


def speech_row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "id": f"s{number}",
        "codes": rng.integers(0, 16, rng.integers(5, 20)).astype(np.uint16),
        "seconds": 1.0,
        "text": WORDS[number % 8],
        "extra": json.dumps({"answer": WORDS[number % 8]}),
    }


def make_parts(
    folder: Path, width: int = 32, layers: int = 2, heads: int = 2, codes: int = 16
) -> Path:
    """texts/, speech/ and an expanded tiny checkpoint, expanded/."""
    texts = [
        {
            "id": f"t{i}",
            "turns": [
                {"role": "user", "segments": [{"text": f"say {word}"}]},
                {"role": "assistant", "segments": [{"text": word}]},
            ],
            "extra": "{}",
        }
        for i, word in enumerate(WORDS * 4)
    ]
    dataset(folder / "texts", shards.CONVERSATIONS, texts, None)
    rng = np.random.default_rng(0)
    dataset(folder / "speech", shards.SPEECH, [speech_row(i, rng) for i in range(200)], STREAM)
    init_base.main(
        init_base.InitBase(
            out=str(folder / "init"),
            texts=str(folder / "texts"),
            vocab_size=300,
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=2 * width,
        )
    )
    work = artifact.Artifact(folder / "expanded", "expand_vocab", 1, {}, {})
    work.begin()
    expansion.expand(
        folder / "init",
        folder / "expanded",
        codes,
        STREAM["quantizer"],
        0,
        {"_component_": "speechfuse.tokens.mean_and_covariance"},
    )
    work.finish({}, [folder / "expanded/config.json"])
    return folder


def fused(kind: str, path: Path, share: float, **more: Any) -> dict[str, Any]:
    """A dataset of speechfuse.fusion, as a recipe names it."""
    return {"_component_": f"speechfuse.fusion.{kind}", "path": str(path), "share": share, **more}


def recipe(parts: Path, out: Path, runtime: dict | None = None, **changes: Any) -> Path:
    """A recipe on disk over `parts`, with about 20 steps unless changed."""
    shape = vocabulary.read_config(parts / "expanded")
    content = {
        "out": str(out),
        "checkpoint": str(parts / "expanded"),
        "model": {
            "_component_": "torchtune.models.llama3_1.llama3_1",
            "vocab_size": shape["vocab_size"],
            "num_layers": shape["num_hidden_layers"],
            "num_heads": shape["num_attention_heads"],
            "num_kv_heads": shape["num_key_value_heads"],
            "embed_dim": shape["hidden_size"],
            "intermediate_dim": shape["intermediate_size"],
            "max_seq_len": 4096,
        },
        "datasets": [
            {
                "_component_": "speechfuse.samples.speech",
                "path": str(parts / "speech"),
                "share": 0.8,
                "turns": {"_component_": "speechfuse.samples.answer", "repeat_first": True},
            },
            {
                "_component_": "speechfuse.samples.conversations",
                "path": str(parts / "texts"),
                "share": 0.2,
            },
        ],
        "seq_len": 64,
        "batch_size": 4,
        "epochs": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-3},
        "warmup_steps": 2,
        "clip_grad_norm": 1.0,
        "runtime": {
            "threads": 1,
            "state_every": 5,
            "cache": str(parts / "cache"),
            "device": "cpu",
            **(runtime or {}),
        },
    }
    content.update(changes)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def built(folder: Path, spec: dict[str, Any], **options: Any) -> Any:
    """The model that `spec` names, with the weights of `folder`, as a training makes it;
    `options`: other keys of a recipe."""
    keys = {"datasets": [], "seq_len": 2, "batch_size": 1, "epochs": 1, "warmup_steps": 0}
    settings = Finetune(
        out="", checkpoint=str(folder), model=spec, optimizer={}, **(keys | options)
    )
    decoder = models.decoder_of(settings)
    models.load(decoder, settings, torch.device("cpu"))
    return decoder.model


def exported(model: Any, folder: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write an epoch's folder as a training does; `folder`: where the model came from."""
    end = vocabulary.Vocabulary.load(folder).end_of_turn
    shape = vocabulary.read_config(folder)
    checkpoint.export(backbone.Decoder(folder, shape, {}, model), end, out, manifest)


def command(config: Path, ranks: int = 1, *overrides: str) -> list[str]:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launch, "-m", "stages.train", str(config), *overrides]


def train(config: Path, ranks: int = 1, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(config, ranks, *overrides), cwd=ROOT, capture_output=True, text=True
    )


def sha256s(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.*")}


def kill(process: subprocess.Popen | BaseProcess) -> None:
    """SIGKILL a command and all that it has started. torchrun gives every rank a session of its
    own: with torchrun alone dead, its ranks would train on, and nothing would have been killed."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.join() if isinstance(process, BaseProcess) else process.wait()


def _rank_main(variables: dict[str, str], function: Callable[[Path], None], path: Path) -> None:
    os.environ |= variables
    function(path)


def _train(config: Path) -> None:
    from stages import train  # here, as tests run it as a program too

    train.main(load(Finetune, config, []))


def started(function: Callable[[Path], None], path: Path, ranks: int = 1) -> list[BaseProcess]:
    """The processes of `function`, a rank each, without torchrun: for what its ranks do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    several = place | {"WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}
        processes.append(READY.Process(target=_rank_main, args=(own, function, path)))
        processes[-1].start()
    return processes


def on_two_ranks(function: Callable[[Path], None], path: Path) -> None:
    processes = started(function, path, 2)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], "what is wrong stands in stderr"


def train_on_two_ranks(config: Path) -> None:
    on_two_ranks(_train, config)


def begin_and_kill(config: Path) -> None:
    """Begin a training of one rank, and kill it once it has saved a state."""
    (process,), out = started(_train, config), config.with_suffix("")
    while not list(out.glob("state/step_*/.metadata")):
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    kill(process)
    assert not (out / "manifest.json").exists()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def weights(out: Path, epoch: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"epoch_{epoch}" / "model.safetensors")


def job(config: Path, **changes: Any) -> Finetune:
    """A recipe as loop.run takes it, to train in this process."""
    loaded = load(Finetune, config, [])
    return replace(loaded, **changes)


def marked(batch: dict[str, torch.Tensor]) -> bool:
    """Whether a batch has the row of `plant`."""
    return bool((batch["tokens"] == MARK).any())


def nan_where_marked(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A step that gives NaN for the planted row."""
    return {
        name: (value + (float("nan") if marked(batch) else 0.0), count)
        for name, (value, count) in next_token(model, batch).items()
    }


def explodes_where_marked(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A step whose loss is a thousand times itself for the planted row."""
    return {
        name: (value * (1e3 if marked(batch) else 1.0), count)
        for name, (value, count) in next_token(model, batch).items()
    }


def plant(folder: Path, **changes: Any) -> Path:
    """A dataset like speech/ with one row more, "planted", the only one with the mask code."""
    rng = np.random.default_rng(0)
    rows = [speech_row(i, rng) for i in range(200)]
    rows.append(speech_row(0, rng) | {"id": "planted", "codes": [1, 16, 2]} | changes)
    return dataset(folder, shards.SPEECH, rows, STREAM)
