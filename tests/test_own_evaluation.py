"""Spoken questions, a stage 2, an evaluation and a report of one's own, from the README's examples,
at the first try."""

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speechfuse import config
from speechfuse.rows import shards
from stages import expand_vocab
from tests.eval_results import score, write
from tests.small_training import ROOT, WORDS, dataset, make_parts

README = (ROOT / "recipes/demo/README.md").read_text("utf-8")
EXAMPLE = dict(re.findall(r"`recipes/mine/(\w+)\.yaml`:\n\n```yaml\n(.*?)```", README, re.DOTALL))
LOSSES = [{"step": i, "epoch": 0, "loss": 5 / i, "tokens": 9, "seconds": 1.0} for i in range(1, 9)]


@pytest.fixture
def mine(tmp_path, monkeypatch, parts) -> Path:
    """A folder with a run of two epochs, recordings with transcripts, and the README's files."""
    run, recipe = tmp_path / "out/mine/stage2", tmp_path / "recipes/mine"
    for epoch in range(2):
        shutil.copytree(parts / "expanded", run / f"epoch_{epoch}")
    (run / "manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LOSSES))
    shutil.copytree(parts / "speech", tmp_path / "out/data/mine_test")
    recipe.mkdir(parents=True)
    for name, text in EXAMPLE.items():
        (recipe / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("own"))


SCHEMAS = {"curate_texts": "CurateTexts", "synthesize_instructions": "SynthesizeInstructions"}


def test_questions_of_ones_own_are_spoken_trained_on_and_asked(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "recipes/mine"
    mine.mkdir(parents=True)
    (tmp_path / "recipes/demo").symlink_to(ROOT / "recipes/demo")
    for name, text in EXAMPLE.items():
        (mine / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert 12 <= len(EXAMPLE["synthesize"].splitlines()) <= 15
    stage1 = ["out=out/demo/stage1/epoch_0"]
    expand = Path("recipes/demo/expand_vocab.yaml")
    expand_vocab.main(config.load(expand_vocab.ExpandVocab, expand, stage1))
    asked = [{"question": f"what is {word} plus one", "answer": word} for word in WORDS]
    Path("data/mine").mkdir(parents=True)
    lines = "".join(f"{json.dumps(line)}\n" for line in asked)
    Path("data/mine/questions.jsonl").write_text(lines)
    rows = [
        {"id": word, "turns": conversation(word), "extra": '{"kind": "answer"}'} for word in WORDS
    ]
    dataset(Path("out/data/world"), shards.CONVERSATIONS, rows, None)
    mine = Path("recipes/mine")
    assert verb("synthesize", mine, monkeypatch, "samples=10", "runtime.workers=1") == 0
    assert "10 of 10 samples" in capsys.readouterr().out
    train = [
        sys.executable,
        "-m",
        "stages.train",
        str(mine / "stage2.yaml"),
        "epochs=1",
        "batch_size=4",
    ]
    train += ["warmup_steps=1"]
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'pipeline'}"}
    subprocess.run([*train, "runtime.threads=1"], check=True, env=path)
    wav = next(Path("out/mine/instructions").rglob("*.flac"))
    epoch = "checkpoint=out/mine/stage2/epoch_0"
    assert verb("ask", mine, monkeypatch, f"file={wav}", epoch) == 0
    assert "answer:" in capsys.readouterr().out  # of so few steps it need not repeat first


def conversation(word: str) -> list[dict]:
    turns = ("user", f"say {word}"), ("assistant", word)
    return [{"role": role, "segments": [{"text": text}]} for role, text in turns]


def sweep(recipe: Path, monkeypatch, *arguments: str) -> int:
    return verb("sweep", recipe, monkeypatch, *arguments)


def verb(name: str, recipe: Path, monkeypatch, *arguments: str) -> int:
    """`just recipe=mine NAME`, with its jobs in this process, where torch is imported already."""

    def run(job: tuple[str, ...]) -> int:
        if job[0] == "say":
            return 0
        module = importlib.import_module(f"stages.{job[0]}")
        schema = SCHEMAS.get(job[0], job[0].capitalize())
        monkeypatch.setattr(sys, "argv", [*job])
        try:
            keys = getattr(getattr(module, "sweep", module), schema)  # evaluate's are its room's
            config.main(module.main, keys, module.__doc__, ("file",))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    verbs = runpy.run_path(str(ROOT / "recipes/verbs.py"))
    verbs["main"].__globals__["run"] = run
    if name in verbs["VERBS"]:
        return verbs["main"](name, recipe, list(arguments))
    return run((name, f"{recipe}/{name}.yaml", *arguments))


def test_the_readmes_example_works_at_the_first_try(mine, monkeypatch, capsys):
    assert sum(len(EXAMPLE[name].splitlines()) for name in ("evaluate", "report")) == 12
    assert sweep(Path("recipes/mine"), monkeypatch, "limit=4", "runtime.device=cpu") == 0
    said = capsys.readouterr()
    assert "error" not in said.err and said.out.endswith("chosen stage2/epoch_0\n")
    text = Path("out/mine/report.md").read_text()
    assert "lowest wer on transcription, split all" in text and "## Training" in text
    assert "## Text knowledge" not in text and "accuracy" not in text and "## Results" not in text
    rows = json.loads(Path("out/mine/report.json").read_text())
    assert {(row["checkpoint"], row["metric"]) for row in rows} == {
        (f"stage2/epoch_{epoch}", metric) for epoch in range(2) for metric in ("wer", "wer_capped")
    }


def test_a_single_checkpoint_needs_no_run(mine, monkeypatch, capsys):
    (mine / "evaluate.yaml").write_text(EXAMPLE["evaluate"].replace("/stage2,", "/stage2/epoch_1,"))
    lines = [line for line in EXAMPLE["report"].splitlines() if not line.startswith("runs")]
    (mine / "report.yaml").write_text("\n".join(lines))
    assert sweep(Path("recipes/mine"), monkeypatch, "limit=4", "runtime.device=cpu") == 0
    assert "chosen stage2" in capsys.readouterr().out
    assert "## Training" not in Path("out/mine/report.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "task: transcription",
            "task: transcript",
            "rule: recipes/mine/evaluate.yaml scores no 'tr",
        ),
        ("split: all", "split: test", "no 'transcription test wer' of stage2; it scores transcrip"),
        ("metric: wer", "metric: acc", "no 'transcription all acc' of stage2; it scores transcrip"),
        ("choose_from: stage2", "choose_from: mine", "has no checkpoint mine; it has stage2"),
        ("name: stage2", "name: stage1", "runs: recipes/mine/evaluate.yaml has no checkpoint stag"),
        ("evals: out/mine/evals", "evals: out/evals", "writes to out=out/mine/evals: make them eq"),
        (
            "out: out/mine",
            "text: transcription\nout: out/mine",
            "text, an accuracy: recipes/mine/e",
        ),
        (
            "out: out/mine",
            "base: llama\nout: out/mine",
            "base: recipes/mine/evaluate.yaml has no c",
        ),
        ("out: out/mine", "samples: test\nout: out/mine", "samples: recipes/mine/evaluate.yaml sc"),
        (
            "out: out/mine",
            "table: [{task: a, split: b, metric: wer, degradation: true}]\nout: out/mine",
            "base is not set, but a b wer is compared with it",
        ),
    ],
)
def test_what_the_report_lacks_is_said_before_anything_is_evaluated(
    mine, monkeypatch, capsys, old, new, says
):
    (mine / "report.yaml").write_text(EXAMPLE["report"].replace(old, new, 1))
    for arguments in ([], ["--dry-run"]):
        assert sweep(Path("recipes/mine"), monkeypatch, *arguments) == 2
        assert says in capsys.readouterr().err and not Path("out/mine/evals").exists()


def test_what_another_evaluation_scored_into_the_same_folder_counts(mine, monkeypatch, capsys):
    column = "table: [{task: other, split: all, metric: acc}]\n"
    (mine / "report.yaml").write_text(EXAMPLE["report"] + column)
    assert sweep(Path("recipes/mine"), monkeypatch, "--dry-run") == 2
    assert "table: recipes/mine/evaluate.yaml scores no 'other all acc'" in capsys.readouterr().err
    write(Path("out/mine/evals"), "plain/epoch_0", "other", [score("other", "all", 0.5)])
    assert sweep(Path("recipes/mine"), monkeypatch, "--dry-run") == 0


@pytest.mark.parametrize(
    ("evaluation", "report"),
    [
        ("demo/evaluate", "demo/report"),
        ("demo/evaluate_robust", "demo/report_robust"),
        ("early_fusion_8b/evaluate", "early_fusion_8b/report"),
    ],
)
def test_shipped_reports_show_what_is_evaluated(evaluation, report, monkeypatch):
    module = importlib.import_module("stages.report")
    monkeypatch.chdir(ROOT)
    plan = f"plan=recipes/{evaluation}.yaml"
    module.main(config.load(module.Report, Path(f"recipes/{report}.yaml"), [plan, "text=null"]))
    module.main(config.load(module.Report, Path(f"recipes/{report}.yaml"), [plan]))
