"""What tests/prove_sweep.py and tests/bench_sweep.py sweep: a run of tiny epochs, speech, MMLU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from tests.mmlu_folder import write_mmlu
from tests.small_training import ROOT, make_parts

SPEECH = "speechfuse.evals.Speech"


def copy(source: Path, out: Path, turn: int) -> Path:
    """A checkpoint whose head's rows are moved on by `turn`: other content, other replies."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name[0] != ".":
            (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(out / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(turn, 0) * 30
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def make(folder: Path, epochs: int, questions: int = 4) -> dict[str, Any]:
    """The configuration of a sweep over `epochs` epochs of a run: speech by WER, and MMLU."""
    make_parts(folder)
    for epoch in range(epochs):
        copy(folder / "expanded", folder / "run" / f"epoch_{epoch}", 7 * epoch + 1)
    (folder / "run" / "manifest.json").write_text("{}")
    mmlu = write_mmlu(folder / "mmlu", test=questions)
    return {
        "out": str(folder / "evals"),
        "checkpoints": [{"name": "run", "path": str(folder / "run"), "tasks": ["asr", "mmlu"]}],
        "tasks": {
            "asr": {
                "_component_": SPEECH,
                "data": str(folder / "speech"),
                "metric": "wer",
                "max_new_tokens": 40,
                "batch_size": 4,
            },
            "mmlu": {
                "_component_": "speechfuse.evals.Harness",
                "task": "mmlu",
                "data": str(mmlu),
                "num_fewshot": 0,
            },
        },
        "runtime": {"device": "cpu"},
    }


def start(config: dict[str, Any], *overrides: str) -> subprocess.Popen:
    """stages.evaluate in a process group of its own."""
    path = Path(config["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "stages.evaluate", str(path), *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def results(out: Path) -> dict[str, Any]:
    """Scores and items of every result file, by its path."""
    paths = [path for path in sorted(out.rglob("*.json")) if "cells" not in path.parts]
    found = {path.relative_to(out).as_posix(): json.loads(path.read_text()) for path in paths}
    return {
        name: (cell["scores"], cell["items"]) if "scores" in cell else cell["error"]
        for name, cell in found.items()
    }
