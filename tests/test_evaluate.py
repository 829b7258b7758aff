"""The sweep: cells by content, nothing computed twice, one failure alone, errors before work."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from speechfuse import config
from speechfuse.evals import cells, generation
from speechfuse.evals import sweep as sweep_module
from speechfuse.evals.cells import Predictions
from speechfuse.evals.generation import Generator
from speechfuse.evals.speech import Speech
from speechfuse.evals.sweep import Evaluate, Work, cells_of
from speechfuse.scores.metrics import METRICS
from stages import evaluate
from tests.small_training import ROOT, make_parts

SPEECH = "speechfuse.evals.Speech"


def copy(source: Path, out: Path, scale: float = 1.0) -> Path:
    """A checkpoint with its head scaled: other content, other replies."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name[0] != ".":
            (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(out / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0) * scale
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A run of two epochs, and the tiny model it began with."""
    folder = make_parts(tmp_path_factory.mktemp("sweep"))
    for epoch in range(2):
        copy(folder / "expanded", folder / "run" / f"epoch_{epoch}", 1.0 + epoch)
    (folder / "run" / "manifest.json").write_text("{}")
    return folder


class Sweep:
    """A configuration over the parts, in a folder of its own."""

    def __init__(self, parts: Path, folder: Path) -> None:
        self.parts, self.folder, self.out = parts, folder, folder / "evals"
        task = {"_component_": SPEECH, "data": str(parts / "speech"), "max_new_tokens": 3}
        self.config: dict[str, Any] = {
            "out": str(self.out),
            "checkpoints": [
                {"name": "base", "path": str(parts / "expanded"), "tasks": ["wer"]},
                {"name": "run", "path": str(parts / "run"), "tasks": ["wer", "same"]},
            ],
            "tasks": {
                "wer": {**task, "metric": "wer", "limit": 40, "batch_size": 8},
                "same": {**task, "metric": "accuracy", "reference": "answer", "limit": 20},
            },
            "runtime": {"device": "cpu"},
        }

    def path(self) -> Path:
        path = self.folder / "evaluate.yaml"
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return path

    def run(self, *overrides: str) -> None:
        evaluate.main(config.load(Evaluate, self.path(), list(overrides)))

    def results(self) -> dict[str, dict]:
        paths = [p for p in self.out.rglob("*.json") if "cells" not in p.parts]
        return {p.relative_to(self.out).as_posix(): json.loads(p.read_text()) for p in paths}


@pytest.fixture
def sweep(parts, tmp_path) -> Sweep:
    return Sweep(parts, tmp_path)


@pytest.fixture
def no_model(monkeypatch):
    """Forbid to load a model."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load", refuse)


NAMES = {
    "base/wer.json",
    "run/epoch_0/wer.json",
    "run/epoch_0/same.json",
    "run/epoch_1/wer.json",
    "run/epoch_1/same.json",
}


def test_every_cell_has_a_result_and_a_second_run_loads_nothing(sweep, capsys, monkeypatch):
    sweep.run()
    found = sweep.results()
    assert found.keys() == NAMES
    head = found["run/epoch_1/wer.json"]
    assert (head["checkpoint"], head["task"], head["metric"]) == ("run/epoch_1", "wer", "wer")
    assert head["n"] == 40 and head["interval"][0] <= head["value"] <= head["interval"][1]
    assert head["protocol"] == "clean" and head["fingerprints"].keys() >= {"checkpoint", "data"}
    assert head["scores"][0]["task"] == "wer" and len(head["items"]) == 40
    assert head["details"]["coverage"] == 1.0 and "torch" in head["details"]["versions"]
    assert "5 results made, 0 were there; 160 items computed" in capsys.readouterr().out
    monkeypatch.setattr(generation, "load", None)
    sweep.run()
    assert "0 results made, 5 were there; 0 items computed" in capsys.readouterr().out
    assert sweep.results() == found


def test_a_renamed_checkpoint_is_known_and_a_changed_one_is_not(sweep, parts, tmp_path, capsys):
    sweep.config["checkpoints"] = [
        {"name": "a", "path": str(copy(parts / "expanded", tmp_path / "a")), "tasks": ["same"]}
    ]
    sweep.run()
    before = sweep.results()["a/same.json"]
    (tmp_path / "a").rename(tmp_path / "b")
    sweep.config["checkpoints"][0] |= {"name": "b", "path": str(tmp_path / "b")}
    capsys.readouterr()
    sweep.run()
    assert "1 results made, 0 were there; 0 items computed" in capsys.readouterr().out
    assert sweep.results()["b/same.json"]["fingerprints"] == before["fingerprints"]
    weights = load_file(tmp_path / "b/model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "b/model.safetensors", {"format": "pt"})
    sweep.run()
    assert "1 results made, 0 were there; 20 items computed" in capsys.readouterr().out
    assert (sweep.out / "b" / "same.json.old-1").exists()
    after = sweep.results()["b/same.json"]["fingerprints"]
    assert after["checkpoint"] != before["fingerprints"]["checkpoint"]


def test_two_checkpoints_never_share_an_answer(sweep):
    sweep.run("only=[run]")
    found = sweep.results()
    first, second = (found[f"run/epoch_{i}/wer.json"] for i in range(2))
    assert first["fingerprints"]["predictions"] != second["fingerprints"]["predictions"]
    assert first["fingerprints"]["data"] == second["fingerprints"]["data"]


def test_a_changed_metric_scores_again_without_a_model(sweep, capsys, monkeypatch):
    sweep.run("only=[base]")
    capsys.readouterr()
    monkeypatch.setattr(generation, "load", None)
    sweep.config["tasks"]["wer"]["metric"] = "cer"
    sweep.run("only=[base]")
    assert "1 results made, 0 were there; 0 items computed" in capsys.readouterr().out
    assert sweep.results()["base/wer.json"]["metric"] == "cer"
    monkeypatch.setattr(sweep_module, "code", lambda spec: "another source")
    sweep.run("only=[base]")
    assert "1 results made, 0 were there; 0 items computed" in capsys.readouterr().out


def test_a_setting_counts_even_if_a_file_has_its_name(sweep, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("wer", "cer"):
        (tmp_path / name).touch()
    sweep.run("only=[base]")
    sweep.config["tasks"]["wer"]["metric"] = "cer"
    sweep.run("only=[base]")
    assert sweep.results()["base/wer.json"]["metric"] == "cer"


def test_code_of_the_users_own_counts_with_what_it_imports(tmp_path, monkeypatch):
    """A helper of a component is no less part of it; other people's packages count by version."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "import json\nfrom my_words import x\n\ndef read(text):\n    return x\n"
    (tmp_path / "my_reply.py").write_text(text)
    (tmp_path / "my_words.py").write_text("x = 1\n")
    spec = {"_component_": SPEECH, "reply": {"_component_": "my_reply.read"}}
    before = sweep_module.code(spec)
    assert sweep_module.code(spec) == before
    (tmp_path / "my_words.py").write_text("x = 2\n")
    assert sweep_module.code(spec) != before


def test_a_task_of_the_users_own_is_known_by_its_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "my_task.py"
    path.write_text("class Mine:\n    def inputs(self):\n        return {}\n")
    task = config.instantiate({"_component_": "my_task.Mine"})
    before = Predictions(tmp_path, "a", task).key
    path.write_text(path.read_text() + "# another way to ask\n")
    assert Predictions(tmp_path, "a", task).key != before


def test_what_a_kill_left_of_a_batch_is_dropped_and_the_rest_is_kept(sweep, capsys):
    sweep.run("only=[base]")
    whole = sweep.results()["base/wer.json"]
    (path,) = sweep.out.glob("cells/*/predictions.jsonl")
    data = path.read_bytes()
    batches = data.split(b"\n\n")
    torn = b"\n\n".join(batches[:2]) + b"\n\n" + batches[2][: len(batches[2]) // 2]
    path.write_bytes(torn)
    (sweep.out / "base/wer.json").unlink()
    capsys.readouterr()
    sweep.run("only=[base]")
    assert "1 results made, 0 were there; 24 items computed" in capsys.readouterr().out
    assert path.read_bytes() == data
    again = sweep.results()["base/wer.json"]
    assert (again["items"], again["scores"]) == (whole["items"], whole["scores"])


def test_one_broken_checkpoint_leaves_the_others_whole(sweep, parts, tmp_path, capsys):
    broken = copy(parts / "expanded", tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    entry = {"name": "broken", "path": str(broken), "tasks": ["same"]}
    sweep.config["checkpoints"].insert(0, entry)
    with pytest.raises(SystemExit) as stopped:
        sweep.run()
    assert stopped.value.code == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith("error: broken same: ")
    found = sweep.results()
    assert found.keys() == NAMES | {"broken/same.failed.json"}
    failed = found["broken/same.failed.json"]
    assert failed.keys() == {"checkpoint", "task", "error"} and failed["checkpoint"] == "broken"
    (broken / "model.safetensors").write_bytes(data)
    sweep.run()
    assert sweep.results().keys() == NAMES | {"broken/same.json"}


def test_a_limit_is_marked_and_does_not_stand_for_the_whole(sweep):
    sweep.run("only=[base]", "limit=10")
    partial = sweep.results()["base/wer.json"]
    assert partial["n"] == 10 and partial["details"]["partial"] is True
    sweep.run("only=[base]")
    whole = sweep.results()["base/wer.json"]
    assert whole["n"] == 40 and "partial" not in whole["details"]


def test_a_dry_run_says_what_is_to_do(sweep, capsys, no_model):
    sweep.run("runtime.dry_run=true", "only=[run/epoch_1]")
    said = capsys.readouterr().out
    assert "run/epoch_1 wer: 40 items" in said and "2 of 2 cells to do, 60 items" in said
    assert sweep.results() == {}


def test_only_takes_checkpoints_epochs_and_tasks(sweep):
    job = config.load(Evaluate, sweep.path(), [])

    def names(*only: str) -> list[str]:
        job.only = list(only)
        return [f"{name} {task}" for name, _, task in cells_of(job)]

    assert names("run/epoch_1") == ["run/epoch_1 wer", "run/epoch_1 same"]
    assert names("same") == ["run/epoch_0 same", "run/epoch_1 same"]
    assert names("base", "run/epoch_0", "wer") == ["base wer", "run/epoch_0 wer"]
    assert len(names()) == len(NAMES)
    with pytest.raises(ValueError, match=r"named 'stage3'; there are wer, same, base, run"):
        names("stage3")
    (sweep.folder / "half" / "epoch_0").mkdir(parents=True)  # a run that is still being trained
    job.checkpoints[1]["path"] = str(sweep.folder / "half")
    assert names("base") == ["base wer"]
    with pytest.raises(ValueError, match="half holds no manifest"):
        names("run/epoch_0")


def broken(sweep: Sweep, what: str, tmp_path: Path) -> None:
    tasks, checkpoints = sweep.config["tasks"], sweep.config["checkpoints"]
    match what:
        case "dataset":
            tasks["same"]["data"] = str(tmp_path / "nowhere")
        case "column":
            tasks["same"]["reference"] = "answr"
        case "metric":
            tasks["same"]["metric"] = "accurracy"
        case "key":
            judge = {"_component_": "speechfuse.scores.Judge", "model": "m"}
            tasks["same"] |= {"metric": "judge", "judge": judge}
        case "weights":
            copy(sweep.parts / "expanded", tmp_path / "r/epoch_0")
            copy(sweep.parts / "expanded", tmp_path / "r/epoch_1")
            (tmp_path / "r/manifest.json").write_text("{}")
            (tmp_path / "r/epoch_1/model.safetensors").unlink()
            checkpoints[1]["path"] = str(tmp_path / "r")
        case "quantizer":
            other = copy(sweep.parts / "expanded", tmp_path / "other")
            text = (other / "config.json").read_text().replace("0" * 64, "1" * 64)
            (other / "config.json").write_text(text)
            checkpoints[1] |= {"path": str(other), "tasks": ["same"]}
        case "unfinished run":
            (tmp_path / "r/epoch_0").mkdir(parents=True)
            checkpoints[1]["path"] = str(tmp_path / "r")
        case "task":
            checkpoints[1]["tasks"] = ["wer", "mmlu"]
        case "argument":
            tasks["same"]["metrik"] = "wer"
        case "no tasks":
            checkpoints[0]["tasks"] = []
        case "none that is asked":
            checkpoints.clear()
        case "name that is a number":
            checkpoints[0]["name"] = 1.10
        case "name above" | "absolute name":
            checkpoints[0]["name"] = "a/../../b" if what == "name above" else str(tmp_path / "b")
        case "task above":
            tasks["../x"], checkpoints[0]["tasks"] = tasks["wer"], ["../x"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("dataset", "run/epoch_0 same: .*nowhere does not exist"),
        ("column", "run/epoch_0 same: .*row s0 has no 'answr'"),
        ("metric", "run/epoch_0 same: metric=accurracy: choose one of wer"),
        ("key", "run/epoch_0 same: judge m: no key in the environment variable"),
        ("weights", r"epoch_1 has no weights: model\.safetensors is not there"),
        ("quantizer", "run same: .*was made with quantizer 0000.* expanded for 1111"),
        ("unfinished run", "holds no manifest.json"),
        ("task", "run has the task 'mmlu', which tasks does not describe; it has wer, same"),
        ("argument", "unknown argument 'metrik'; did you mean 'metric'"),
        ("no tasks", "checkpoints: base has no tasks; name some, or remove it"),
        ("none that is asked", "checkpoints: no task is asked of any of them"),
        ("name that is a number", r"checkpoints: the name 1\.1 is no text; put it in quotes"),
        ("name above", r"checkpoints: 'a/\.\./\.\./b' leads out of .*evals"),
        ("absolute name", r"checkpoints: '/.*/b' leads out of .*evals"),
        ("task above", r"checkpoints: '\.\./x' leads out of .*evals"),
    ],
)
def test_what_cannot_succeed_is_said_before_any_work(
    sweep, tmp_path, what, says, no_model, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    broken(sweep, what, tmp_path)
    with pytest.raises(ValueError, match=says):
        sweep.run()
    assert not list(sweep.out.rglob("predictions.jsonl")) and sweep.results() == {}


@pytest.mark.parametrize(
    "override", ["batch_size=0", "batch_size=-1", "max_new_tokens=0", "limit=0", "num_fewshot=-1"]
)
def test_a_number_of_a_task_out_of_bounds_is_refused_by_its_key_at_once(sweep, override):
    name, value = override.split("=")
    with pytest.raises(ValueError, match=rf"^tasks\.wer\.{name}={value}: at least . is needed$"):
        config.load(Evaluate, sweep.path(), [f"tasks.wer.{override}"])


def test_a_failed_scoring_leaves_the_predictions(sweep, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patched:
        patched.setitem(METRICS, "accuracy", lambda r, p, c: fail() if r != p else None)
        with pytest.raises(SystemExit) as stopped:
            sweep.run("only=[run/epoch_0]")
    assert stopped.value.code == 1
    assert "error: run/epoch_0 same: RuntimeError: no such luck" in capsys.readouterr().err
    assert sweep.results().keys() == {"run/epoch_0/wer.json", "run/epoch_0/same.failed.json"}
    sweep.run("only=[run/epoch_0]")
    assert "1 results made, 1 were there; 0 items computed" in capsys.readouterr().out


def test_threads_are_those_of_the_configuration(sweep, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    sweep.run("runtime.threads=3", "only=[base]", "limit=2")
    sweep.run("only=[base]", "limit=3")
    assert asked == [3]


def test_cells_are_split_between_workers(sweep, capsys, monkeypatch):
    """With threads for processes, which take seconds to start; tests/prove_sweep.py has those."""
    asked: list[tuple] = []

    def pool(*arguments: Any) -> ThreadPoolExecutor:
        asked.append(arguments)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(sweep_module.workers, "pool", pool)
    sweep.run("runtime.processes=2", "runtime.threads=3", "only=[run]")
    assert asked == [(2, [], 3)]  # processes, GPUs, threads of each
    assert "4 results made, 0 were there; 120 items computed" in capsys.readouterr().out
    assert sweep.results().keys() == NAMES - {"base/wer.json"}

    def die(work: Work) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(sweep_module, "predict", die)
    with pytest.raises(SystemExit):
        sweep.run("runtime.processes=2")
    assert "error: base wer: a process was killed (out of memory?)" in capsys.readouterr().err
    assert sweep.results().keys() == NAMES - {"base/wer.json"} | {"base/wer.failed.json"}


def test_a_cell_is_worked_on_by_one_process_at_a_time(sweep, parts):
    task = Speech(str(parts / "speech"), "wer", limit=4, max_new_tokens=2)
    predictions = Predictions(sweep.out, "a" * 64, task)
    hold = (
        "import sys; from pathlib import Path; from speechfuse.evals.cells import Predictions\n"
        "kept = Predictions.__new__(Predictions); kept.folder = Path(sys.argv[1])\n"
        "with kept.locked() as ours:\n    print(ours, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(predictions.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "pipeline")},
    ) as other:
        assert other.stdout and other.stdout.readline() == "True\n"
        with predictions.locked(wait=False) as ours:
            assert ours is False
        other.communicate("")
    with predictions.locked(wait=False) as ours:
        assert ours is True


def test_a_checkpoint_is_hashed_once(parts, tmp_path, monkeypatch):
    first = cells.fingerprint(parts / "expanded", tmp_path)
    monkeypatch.setattr(cells.artifact, "sha256_of", None)
    assert cells.fingerprint(parts / "expanded", tmp_path) == first
    known = json.loads((tmp_path / "cells/fingerprints.json").read_text())
    assert any(name.endswith("model.safetensors") for name in known)
    assert not any(name.startswith("/") for name in known)


def test_the_listener_gives_replies_in_the_order_of_the_questions(parts):
    listener = Generator(parts / "expanded", None, "text", "cpu")
    turns = [
        [{"role": "user", "segments": [{"text": text}]}] for text in ("a", "long " * 9, "b c", "d")
    ]
    together = listener.reply(turns, 3, batch_size=2)
    assert together == [listener.reply([each], 3)[0] for each in turns]


def test_a_dry_run_without_files_names_what_is_missing_and_its_verb(
    sweep, tmp_path, monkeypatch, capsys
):
    (tmp_path / "recipes/mine").mkdir(parents=True)
    (tmp_path / "recipes/mine/stage2.yaml").write_text("out: run\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"_component_": "speechfuse.scores.Judge", "model": "m", "price_in": 1, "price_out": 1}
    asked = sweep.config["tasks"]["same"] | {"metric": "judge", "judge": judge}
    sweep.config["tasks"] |= {"same": asked, "far": asked | {"data": "data/far"}}
    sweep.config["checkpoints"][1] |= {"path": "run", "tasks": ["wer", "same", "far"]}
    sweep.run("runtime.dry_run=true")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["base wer: 40 items to compute", "run wer: 40 items to compute"]
    assert lines[2].startswith(
        "run same: 20 items to compute; judge m: 20 calls to make, at most $0.0"
    )
    assert lines[3].startswith("run far: items not known yet; for each of them judge m: 1 call to")
    in_all = lines.pop(6)
    assert in_all.startswith("in all judge m: 20 calls to make, at most $0.0")
    assert in_all.endswith(", and those of 1 cells whose items are not known yet")
    assert lines[4] == "run is not there; `just recipe=mine stage2` makes it"
    assert lines[5].startswith("data/far is not there; no recipe here makes it")
    assert "4 of 4 cells to do, 100 items and those not known; nothing was run" in lines[6]
    sweep.run("runtime.dry_run=true", "only=[run/epoch_3]")
    assert "run/epoch_3 wer: 40 items to compute" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run is not there; `just recipe=mine stage2` makes it"):
        sweep.run()


def test_a_task_that_may_be_absent_is_left_out_and_named(sweep, capsys):
    sweep.config["tasks"]["far"] = sweep.config["tasks"]["wer"] | {"data": "data/far"}
    sweep.config["checkpoints"][0]["tasks"].append("far")
    with pytest.raises(ValueError, match="data/far"):
        sweep.run("only=[base]")
    sweep.config["may_be_absent"] = ["far", "same"]
    said = "left out: far, as data/far is not there\n"
    sweep.run("runtime.dry_run=true")
    assert capsys.readouterr().out.endswith(
        f"5 of 5 cells to do, 160 items; nothing was run\n{said}"
    )
    sweep.run()
    assert capsys.readouterr().out.endswith(said) and sweep.results().keys() == NAMES
    sweep.config["may_be_absent"] = ["fra"]
    with pytest.raises(ValueError, match="may_be_absent: tasks does not describe fra"):
        sweep.run()


def test_tasks_with_points_in_their_names_have_results_of_their_own(sweep):
    sweep.config["tasks"] |= {
        "a.1": sweep.config["tasks"]["wer"],
        "a.2": sweep.config["tasks"]["same"],
    }
    sweep.config["checkpoints"] = [sweep.config["checkpoints"][0] | {"tasks": ["a.1", "a.2"]}]
    sweep.run()
    assert sweep.results().keys() == {"base/a.1.json", "base/a.2.json"}


@pytest.mark.parametrize(("own", "spins"), [({}, False), ({"OMP_WAIT_POLICY": "ACTIVE"}, True)])
def test_idle_threads_of_torch_do_not_spin_unless_asked_to(own, spins):
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    rest = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", "import speechfuse, torch"]
    shown = {**rest, "OMP_DISPLAY_ENV": "verbose", **own}
    said = subprocess.run(command, env=shown, capture_output=True, text=True, check=True).stderr
    assert ("GOMP_SPINCOUNT = '5000'" in said) != spins
