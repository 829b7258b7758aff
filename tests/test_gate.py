"""The gate: stage 2 starts only over thresholds, and the table that says so is shown."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechfuse import config
from speechfuse.evals import cells
from stages import gate, report
from tests.eval_results import score, write, write_failure

ROOT = Path(__file__).parent.parent
TEXT = {"task": "text_mmlu", "split": "replayed", "metric": "acc"}


@pytest.fixture
def evals(tmp_path: Path) -> Path:
    write(tmp_path, "base", "text_mmlu", [score("text_mmlu", "replayed", 0.8)])
    write(tmp_path, "stage1/epoch_0", "text_mmlu", [score("text_mmlu", "replayed", 0.6)])
    return tmp_path


def settings(folder: Path, *floors: dict, **more) -> gate.Gate:
    spec = {
        "evals": str(folder),
        "checkpoint": "stage1/epoch_0",
        "base": "base",
        "floors": [{**TEXT, **floor} for floor in floors],
        **more,
    }
    (folder / "gate.yaml").write_text(yaml.safe_dump(spec))
    return config.load(gate.Gate, folder / "gate.yaml", [])


@pytest.mark.parametrize(
    ("kept", "missed"),
    [
        ({"at_least": 0.6}, {"at_least": 0.61}),
        ({"of_base_at_least": 0.74}, {"of_base_at_least": 0.76}),
        ({"at_most": 0.6}, {"at_most": 0.59}),
    ],
)
def test_a_missed_threshold_shows_its_table_and_exits_with_1(evals, capsys, kept, missed):
    gate.main(settings(evals, kept))
    assert "keeps all 1 thresholds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        gate.main(settings(evals, kept, missed))
    said = capsys.readouterr()
    head, first, second = said.out.splitlines()
    assert stopped.value.code == 1 and head.split()[:4] == ["score", "n", "stage1/epoch_0", "base"]
    assert first.split()[-1] == "ok" and second.split()[-1] == "MISSED"
    assert "0.600 \u00b1 0.050" in second and "0.800 \u00b1 0.050" in second and "0.750" in second
    assert said.err.count("\n") == 1 and "misses 1 of 2 thresholds" in said.err
    assert "gate=false" in said.err


def test_as_a_command(evals):
    settings(evals, {"at_least": 0.7})
    command = [sys.executable, "-m", "stages.gate", str(evals / "gate.yaml")]
    env = {"PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "MISSED" in done.stdout and "Traceback" not in done.stderr


def test_what_is_not_evaluated_is_to_be_swept_first(evals):
    sweep = r"run the sweep of it first: just sweep only=\[stage1,base\]"
    with pytest.raises(ValueError, match=f"no text_mmlu unseen acc of stage1/epoch_0.*{sweep}"):
        gate.main(settings(evals, {"split": "unseen", "at_least": 0.5}))
    write_failure(evals, "stage1/epoch_0", "text_mmlu", "out of memory")
    with pytest.raises(ValueError, match=rf"\(failed: text_mmlu: out of memory\); {sweep}"):
        gate.main(settings(evals, {"at_least": 0.5}))
    with pytest.raises(ValueError, match=f"holds no <checkpoint>.*{sweep}"):
        gate.main(settings(evals, {"at_least": 0.5}, evals=str(evals / "none")))
    with pytest.raises(ValueError, match="floors is empty"):
        gate.main(settings(evals))


def test_results_of_other_weights_are_no_results(evals, capsys):
    """A stage trained again under the same name must be evaluated again."""
    folder = evals.parent / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    prints = {"checkpoint": cells.fingerprint(folder, evals), "predictions": "", "data": ""}
    scores = [score("text_mmlu", "replayed", 0.6)]
    write(evals, "stage1/epoch_0", "text_mmlu", scores, fingerprints=prints)
    job = settings(evals, {"at_least": 0.5}, path=str(folder))
    gate.main(job)
    (folder / "model.safetensors").write_bytes(b"22")
    with pytest.raises(
        ValueError, match=r"of other weights than .*weights holds now; run the sweep"
    ):
        gate.main(job)


def test_partial_results_are_marked(evals, capsys):
    scores = [score("text_mmlu", "replayed", 0.6)]
    write(evals, "stage1/epoch_0", "text_mmlu", scores, details={"partial": True})
    gate.main(settings(evals, {"at_least": 0.5}))
    assert capsys.readouterr().out.splitlines()[1].endswith("  ok  partial")


def test_the_demo_asks_for_scores_that_it_evaluates():
    job = config.load(gate.Gate, ROOT / "recipes" / "demo" / "gate.yaml", [])
    evaluated = yaml.safe_load((ROOT / "recipes" / "demo" / "evaluate.yaml").read_text())
    run = job.checkpoint.partition("/")[0]
    tasks = {entry["name"]: entry["tasks"] for entry in evaluated["checkpoints"]}
    assert job.evals == evaluated["out"]
    for floor in job.floors:
        assert floor.task in tasks[run] and floor.task in tasks[job.base]
        assert floor.split in ("replayed", "not_replayed")
    stage2 = yaml.safe_load((ROOT / "recipes" / "demo" / "stage2.yaml").read_text())
    assert job.path == stage2["checkpoint"]


def test_the_large_recipe_reads_what_it_evaluates():
    folder = ROOT / "recipes" / "early_fusion_8b"
    judged = config.load(gate.Gate, folder / "gate.yaml", [])
    job = config.load(report.Report, folder / "report.yaml", [])
    assert judged.path == yaml.safe_load((folder / "stage2.yaml").read_text())["checkpoint"]
    if not (folder / "evaluate.yaml").exists():
        pytest.skip("recipes/early_fusion_8b has no evaluate.yaml")
    evaluated = yaml.safe_load((folder / "evaluate.yaml").read_text())
    tasks = {entry["name"]: entry["tasks"] for entry in evaluated["checkpoints"]}
    assert {floor.task for floor in judged.floors} <= {*tasks["stage1"]} & {*tasks["base"]}
    read = (job.rule, *job.rule.then, *job.rule.under, *job.table)
    assert {entry.task for entry in read} <= {*tasks["stage2"]}
    assert {job.evals, judged.evals} == {evaluated["out"]}
