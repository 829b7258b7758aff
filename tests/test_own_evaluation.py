"""An evaluation and report of one's own, from the README's example, at the first try."""

import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from speechfuse import config
from tests.eval_results import score, write
from tests.small_training import ROOT, make_parts

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


def sweep(recipe: Path, monkeypatch, *arguments: str) -> int:
    """`just recipe=mine sweep`, with its jobs in this process, where torch is imported already."""

    def run(job: tuple[str, ...]) -> int:
        module = importlib.import_module(f"stages.{job[0]}")
        schema = {"evaluate": "Evaluate", "report": "Report"}[job[0]]
        monkeypatch.setattr(sys, "argv", [*job])
        try:
            config.main(module.main, getattr(module, schema), module.__doc__)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    verbs = runpy.run_path(str(ROOT / "recipes/verbs.py"))
    verbs["main"].__globals__["run"] = run
    return verbs["main"]("sweep", recipe, list(arguments))


def test_the_readmes_example_works_at_the_first_try(mine, monkeypatch, capsys):
    assert EXAMPLE.keys() == {"evaluate", "report"}
    assert sum(len(text.splitlines()) for text in EXAMPLE.values()) == 12
    assert sweep(Path("recipes/mine"), monkeypatch, "limit=4", "runtime.device=cpu") == 0
    said = capsys.readouterr()
    assert "error" not in said.err and "chosen stage2/epoch_0" in said.out
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
