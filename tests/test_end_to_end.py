"""The road in small, through the jobs themselves, stage 2 under torchrun with two ranks: it must
learn to hear.

Eight words in training voices go in; the model transcribes them in voices that no training has
heard. Chance is 1 in 8.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechfuse.tokens import vocabulary

ROOT = Path(__file__).parent.parent
WORDS = "seven capital monkey horse plus zero language france".split()
DEMO = ROOT / "recipes/demo"
FLOOR = 0.6  # measured 1.0; before training 0.0


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    lines = []
    for word in WORDS:
        for i in range(40):
            lines.append({"id": f"train-{word}-{i}", "split": "train", "voices": "train"})
            lines[-1] |= {"kind": "phrase", "text": word}
        for i in range(5):
            lines.append({"id": f"test-{word}-{i}", "split": "test", "voices": "unseen"})
            lines[-1] |= {"kind": "phrase", "text": word}
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    demo = yaml.safe_load((DEMO / "tokenize_test.yaml").read_text())
    for split in ("train", "test"):
        job = {
            **demo,
            "out": str(folder / split),
            "corpus": {
                "_component_": "speechfuse.corpora.synthetic",
                "lines": str(folder / "lines.jsonl"),
                "splits": [split],
                "voices": {name: demo["corpus"]["voices"][name] for name in ("train", "unseen")},
            },
        }
        run("-m", "stages.tokenize_speech", write(folder / f"{split}.yaml", job))
    expand = {"out": str(folder / "expanded"), "base": str(DEMO / "models/base")}
    expand["quantizer"] = str(DEMO / "models/quantizer")
    run("-m", "stages.expand_vocab", write(folder / "expand.yaml", expand))
    stage2 = yaml.safe_load((DEMO / "stage2.yaml").read_text())
    stage2 |= {
        "out": str(folder / "stage2"),
        "checkpoint": str(folder / "expanded"),
        "datasets": [
            {
                "_component_": "speechfuse.samples.speech",
                "path": str(folder / "train"),
                "turns": {
                    "_component_": "speechfuse.samples.transcribe",
                    "requests": ["repeat:"],
                },
                "share": 1.0,
            }
        ],
        "batch_size": 4,
        "epochs": 6,
        "warmup_steps": 10,
        "runtime": {"threads": 1},
    }
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(*launch, "-m", "stages.train", write(folder / "stage2.yaml", stage2))
    evaluate = yaml.safe_load((DEMO / "evaluate.yaml").read_text())
    task = evaluate["tasks"]["transcription"] | {"data": str(folder / "test")}
    task["splits"] = {"unseen_voices": {"voices": "unseen"}}
    evaluate |= {"out": str(folder / "evals"), "tasks": {"transcription": task}}
    evaluate["may_be_absent"] = []
    evaluate["checkpoints"] = [
        {"name": "expanded", "path": str(folder / "expanded"), "tasks": ["transcription"]},
        {"name": "stage2", "path": str(folder / "stage2/epoch_5"), "tasks": ["transcription"]},
    ]
    write(folder / "evaluate.yaml", evaluate)
    run("-m", "stages.evaluate", str(folder / "evaluate.yaml"))
    return folder


def right(road: Path, checkpoint: str) -> float:
    items = json.loads((road / "evals" / checkpoint / "transcription.json").read_text())["items"]
    assert len(items) == 5 * len(WORDS)
    return sum(item["answer"] == item["expected"] for item in items) / len(items)


def test_two_ranks_learn_to_hear_unseen_voices(road):
    assert right(road, "expanded") < 0.2, "the model must not know it before"
    assert right(road, "stage2") >= FLOOR


def test_the_loss_falls(road):
    lines = (road / "stage2/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_identity_is_carried_from_codes_to_checkpoint(road):
    identity = json.loads((road / "train/manifest.json").read_text())["totals"]["quantizer"]
    assert vocabulary.read_config(road / "stage2/epoch_5")["speechfuse"]["quantizer"] == identity


def test_a_second_run_has_nothing_to_do(road):
    said = run("-m", "stages.train", str(road / "stage2.yaml"))
    said += run("-m", "stages.tokenize_speech", str(road / "train.yaml"))
    said += run("-m", "stages.evaluate", str(road / "evaluate.yaml"))
    assert said.count("complete, nothing to do") == 2
    assert "0 results made, 2 were there" in said
