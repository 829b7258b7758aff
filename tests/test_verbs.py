"""What just sweep, stage2 and synthesize start, with which arguments. Jobs are not run here."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERBS = ROOT / "recipes/verbs.py"


class Started:
    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.codes: dict[str, int] = {}

    def __call__(self, command: list[str]) -> "Started":
        assert command[0] == sys.executable
        path = command[1:] if command[1] != "-m" else command[2:]
        self.jobs.append([Path(path[0]).stem if "/" in path[0] else path[0][7:], *path[1:]])
        self.returncode = self.codes.get(self.jobs[-1][0], 0)
        return self


@pytest.fixture
def started(monkeypatch, tmp_path) -> Started:
    """In an empty folder, so that no stage 2 is complete."""
    made = Started()
    monkeypatch.setattr("subprocess.run", made)
    monkeypatch.chdir(tmp_path)
    return made


def verb(name: str, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verbs.py", name, str(ROOT / "recipes/demo"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(VERBS), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        ([], []),
        (["out=out/demo/evals"], ["evals=out/demo/evals", "out=out/demo"]),
        (["out=out/laundry/evals"], ["evals=out/laundry/evals", "out=out/laundry"]),
        (["out=out/mine"], ["evals=out/mine", "out=out/mine_report"]),
        (["limit=20", "limit=null"], []),
        (["only=[base, stage1]", "limit=20"], ["partial=limit=20 only=[base, stage1]"]),
    ],
)
def test_the_report_is_of_what_was_swept(started, monkeypatch, arguments, report):
    assert verb("sweep", monkeypatch, *arguments) == 0
    [(first, _, *given), (second, path, *more)] = started.jobs
    assert (first, given, second, more) == ("evaluate", arguments, "report", report)
    assert path.endswith("recipes/demo/report.yaml")


@pytest.mark.parametrize("argument", ["--dry-run", "runtime.dry_run=true", "runtime.dry_run=True"])
def test_a_dry_run_reports_and_judges_nothing(started, monkeypatch, capsys, argument):
    assert verb("sweep", monkeypatch, argument) == 0 and len(started.jobs) == 1
    assert verb("gate", monkeypatch, argument) == 0 and len(started.jobs) == 1
    assert capsys.readouterr().out == "gate: not asked in a dry run\n"


@pytest.mark.parametrize(("evaluated", "jobs"), [(1, 2), (2, 1), (130, 1), (-15, 1)])
def test_failed_cells_are_reported_and_what_did_not_run_is_not(
    started, monkeypatch, evaluated, jobs
):
    started.codes["evaluate"] = evaluated
    assert verb("sweep", monkeypatch) == evaluated and len(started.jobs) == jobs


def test_the_gate_judges_what_is_trained_on_or_says_that_it_does_not(started, monkeypatch, capsys):
    assert verb("gate", monkeypatch, "seed=1", "runtime.threads=1") == 0
    (first, _, *only), (second, path) = started.jobs
    assert (first, second) == ("evaluate", "gate")
    assert only == ["only=[base,stage1]", "runtime.threads=1"]
    assert path.endswith("gate.yaml") and capsys.readouterr().out == ""
    assert verb("gate", monkeypatch, "checkpoint=out/x/epoch_0") == 0 and len(started.jobs) == 2
    said = capsys.readouterr().out
    assert "judges out/demo/stage1/epoch_0 and this run begins with out/x/epoch_0" in said
    assert verb("gate", monkeypatch, "gate=false") == 0 and len(started.jobs) == 2
    started.codes["gate"] = 1
    assert verb("gate", monkeypatch) == 1
    done = Path("out/demo/stage2")
    done.mkdir(parents=True)
    (done / "manifest.json").touch()
    assert verb("gate", monkeypatch) == 0 and len(started.jobs) == 4


def test_texts_are_chosen_and_then_spoken(started, monkeypatch, capsys):
    assert verb("synthesize", monkeypatch, "samples=9") == 0
    names = [name for name, *_ in started.jobs]
    assert names == ["world", "dialogues", "curate_texts", "synthesize_instructions"]
    assert started.jobs[2][2:] == [] and started.jobs[3][2:] == ["samples=9"]
    assert verb("synthesize", monkeypatch, "--dry-run") == 0
    assert [name for name, *_ in started.jobs[4:]] == names[:3], "there are no texts yet"
    assert started.jobs[6][2:] == ["--dry-run"]
    assert "is planned when the texts are chosen" in capsys.readouterr().out
    done = Path("out/data/texts")
    done.mkdir(parents=True)
    (done / "manifest.json").touch()
    assert verb("synthesize", monkeypatch, "--dry-run") == 0
    assert started.jobs[-2][2:] == [] and started.jobs[-1][2:] == ["--dry-run"]
    assert verb("synthesize", monkeypatch, "fresh=true") == 0
    assert started.jobs[-2][2:] == started.jobs[-1][2:] == ["fresh=true"]
    started.codes["curate_texts"] = 2
    assert verb("synthesize", monkeypatch) == 2 and started.jobs[-1][0] == "curate_texts"


def test_help_is_of_both_jobs_and_runs_neither(started, monkeypatch):
    assert verb("sweep", monkeypatch, "limit=20", "--help") == 0
    assert started.jobs == [["evaluate", "--help"], ["report", "--help"]]
    assert verb("synthesize", monkeypatch, "--help") == 0
    assert started.jobs[2:] == [["curate_texts", "--help"], ["synthesize_instructions", "--help"]]
    assert verb("gate", monkeypatch, "-h") == 0 and len(started.jobs) == 4


def test_just_passes_arguments_on_unread(tmp_path):
    """Values with spaces, braces and semicolons reach the job as they were typed."""
    just = shutil.which("just")
    assert just, "the verbs need just"
    lines = '#!/bin/sh\nfor each; do echo "<$each>"; done\n'
    (tmp_path / "python").write_text(lines)
    (tmp_path / "python").chmod(0o755)
    values = ["corpus.path=a b", "select={speaker: [x, y]}", "note=x;echo INJECTED $HOME `ls`"]
    for given, expected in (
        (["tokenize", "my recipe.yaml"], ["-m", "stages.tokenize_speech", "my recipe.yaml"]),
        (
            ["say", "one; two 'three'"],
            ["recipes/demo/say.py", "recipes/demo/say.yaml", "one; two 'three'"],
        ),
        (["stage1"], ["-m", "stages.train", "recipes/demo/stage1.yaml"]),
    ):
        command = [just, "--no-deps", f"python={tmp_path}/python", *given, *values]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [f"<{each}>" for each in [*expected, *values]]


def test_just_calls_them():
    text = (ROOT / "justfile").read_text()
    assert 'recipes/verbs.py synthesize {{r}} "$@"' in text
    assert 'recipes/verbs.py sweep {{r}} "$@"' in text
    assert 'recipes/verbs.py gate {{r}} gate={{gate}} "$@"' in text
