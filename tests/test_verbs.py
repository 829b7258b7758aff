"""What the verbs of several jobs start, with which arguments, and what they refuse before the first
job. Jobs are not run here."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechfuse import yaml_values

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
    """In a folder with recipes and without `out`, so that no stage 2 is complete."""
    made = Started()
    monkeypatch.setattr("subprocess.run", made)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("models"))
    monkeypatch.chdir(tmp_path)
    return made


def verb(name: str, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verbs.py", name, "recipes/demo", *arguments])
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
    [planned, (first, _, *given), (second, path, *more)] = started.jobs
    assert planned == ["report", "recipes/demo/report.yaml", "plan=recipes/demo/evaluate.yaml"]
    assert (first, given, second, more) == ("evaluate", arguments, "report", report)
    assert path == "recipes/demo/report.yaml"


@pytest.mark.parametrize("argument", ["--dry-run", "runtime.dry_run=true", "runtime.dry_run=True"])
def test_a_dry_run_reports_and_judges_nothing(started, monkeypatch, capsys, argument):
    assert verb("sweep", monkeypatch, argument) == 0
    assert [name for name, *_ in started.jobs] == ["report", "evaluate"]
    assert verb("stage2", monkeypatch, argument) == 0
    assert started.jobs[2:] == [["train", "recipes/demo/stage2.yaml", argument]]
    assert capsys.readouterr().out == "gate: not asked in a dry run\n"


@pytest.mark.parametrize(("evaluated", "jobs"), [(1, 3), (2, 2), (130, 2), (-15, 2)])
def test_failed_cells_are_reported_and_what_did_not_run_is_not(
    started, monkeypatch, evaluated, jobs
):
    started.codes["evaluate"] = evaluated
    assert verb("sweep", monkeypatch) == evaluated and len(started.jobs) == jobs


def test_what_the_report_needs_and_no_task_scores_stops_a_sweep(started, monkeypatch):
    started.codes["report"] = 2
    assert verb("sweep", monkeypatch) == 2 and len(started.jobs) == 1


def test_the_gate_judges_what_is_trained_on_or_says_that_it_does_not(started, monkeypatch, capsys):
    assert verb("stage2", monkeypatch, "seed=1", "runtime.threads=1", "gate=true") == 0
    (first, _, *only), (second, path), train = started.jobs
    assert (first, second) == ("evaluate", "gate")
    assert only == ["only=[base,stage1/epoch_0,text_mmlu]", "runtime.threads=1"]
    assert train == ["train", "recipes/demo/stage2.yaml", "seed=1", "runtime.threads=1"]
    assert path.endswith("gate.yaml") and capsys.readouterr().out == ""
    assert verb("stage2", monkeypatch, "checkpoint=out/x/epoch_0", "ranks=2") == 0
    assert started.jobs[3][2:] == ["runtime.ranks=2", "checkpoint=out/x/epoch_0"]
    said = capsys.readouterr().out
    assert "judges out/demo/stage1/epoch_0 and this run begins with out/x/epoch_0" in said
    assert verb("stage2", monkeypatch, "gate=false") == 0 and len(started.jobs) == 5
    started.codes["gate"] = 1
    assert verb("stage2", monkeypatch) == 1 and started.jobs[-1][0] == "gate"
    Path("recipes/demo/gate.yaml").unlink()
    assert verb("stage2", monkeypatch) == 0 and started.jobs[-1][0] == "train"
    assert "gate: not asked, as recipes/demo/gate.yaml is not there" in capsys.readouterr().out


def test_the_gate_has_what_it_reads_evaluated_and_nothing_else(started, monkeypatch, capsys):
    path = Path("recipes/demo/gate.yaml")
    words = {"task": "question_transcript", "split": "unseen_voices", "metric": "wer"}
    judged = yaml.safe_load(path.read_text()) | {"floors": [words | {"at_most": 0.5}]}
    path.write_text(yaml.safe_dump(judged))
    assert verb("stage2", monkeypatch) == 0
    assert started.jobs[0][2] == "only=[stage1/epoch_0,spoken_qa,spoken_qa_in_text,cascade_qa]"
    path.write_text(path.read_text().replace("question_transcript", "mmlu"))
    assert verb("stage2", monkeypatch) == 2 and len(started.jobs) == 3
    assert "no task of recipes/demo/evaluate.yaml scores mmlu" in capsys.readouterr().err


def test_each_seed_is_scored_by_its_own_runs(started, monkeypatch):
    assert verb("demo-seeds", monkeypatch) == 0
    (scored,) = (
        each for each in started.jobs if "out=out/demo_1/evals" in each and each[0] != "report"
    )
    names = [each["name"] for each in yaml_values.settings(Path(scored[1]))["checkpoints"]]
    for name in ("stage1", "stage2"):
        assert f"checkpoints.{names.index(name)}.path=out/demo_1/{name}" in scored


def test_a_neural_voice_is_tokenized_where_it_was_made(started, monkeypatch):
    made = Path("out/data/neural/manifest.json")
    made.parent.mkdir(parents=True)
    made.touch()
    assert verb("data", monkeypatch, "runtime.workers=1") == 0
    neural = ["tokenize_speech", "recipes/demo/tokenize_neural.yaml", "runtime.workers=1"]
    assert started.jobs[-1] == neural


def test_keys_of_the_synthetic_corpus_reach_the_synthetic_sets_alone(started, monkeypatch):
    assert verb("data", monkeypatch, "corpus.snr=[5,5]", "batch_size=8") == 0
    keys = {Path(path).stem: own for name, path, *own in started.jobs if name == "tokenize_speech"}
    both, own = ["corpus.snr=[5,5]", "batch_size=8"], ["batch_size=8"]
    synthetic = {"tokenize_train": both, "tokenize_test": both}
    assert keys == synthetic | {"tokenize_slt": own, "tokenize_people": own}


def test_a_cascade_hears_where_its_whisper_is(started, monkeypatch, capsys):
    assert verb("data", monkeypatch, "runtime.workers=1", "quantizer.checkpoint=x") == 0
    assert "no cascade, as models/tiny.en.pt is not there: `just fetch-" in capsys.readouterr().out
    assert [name for name, *_ in started.jobs] == DATA
    Path("models").mkdir()
    Path("models/tiny.en.pt").touch()
    assert verb("data", monkeypatch, "runtime.workers=1", "quantizer.checkpoint=x") == 0
    names = "test", "slt", "people"
    heard = [[f"recipes/demo/recognize_{name}.yaml", "runtime.workers=1"] for name in names]
    assert [arguments for name, *arguments in started.jobs if name == "recognize_speech"] == heard
    assert verb("compare", monkeypatch) == 0
    (noisy,) = (each for each in started.jobs if "out=out/data/heard_test_10_db" in each)
    assert noisy[:2] == ["recognize_speech", "recipes/demo/recognize_test.yaml"]
    assert "corpus.snr=[10,10]" in noisy


def test_a_complete_stage_2_is_not_judged_again(started, monkeypatch):
    done = Path("out/demo/stage2")
    done.mkdir(parents=True)
    (done / "manifest.json").touch()
    assert verb("stage2", monkeypatch) == 0 and [name for name, *_ in started.jobs] == ["train"]


DATA = ["world", "neural", *["tokenize_speech"] * 4]
ROAD = [*DATA, "expand_vocab", "train", "evaluate", "gate", "train"]
SCORED = ["report", "evaluate", "report"]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("demo", []),
        ("demo-plain", ["train", "evaluate", "report"]),
        (
            "compare",
            ["train", "evaluate", "report", *["encode_speech"] * 4]
            + ["tokenize_speech", "encode_speech"] * 2
            + ["train"] * 10
            + ["evaluate", "compare"] * 2,
        ),
        ("demo-seeds", ["train", "train", "evaluate", "report"] * 2 + ["seed_variance"]),
        (
            "demo-robust",
            ["world", "dialogues", "curate_texts", "synthesize_instructions", "curate_texts"]
            + ["synthesize_instructions"] * 6
            + ["train", "train", "evaluate", "report"],
        ),
    ],
)
def test_the_whole_road_in_order(started, monkeypatch, name, more):
    threads = "runtime.threads=1"
    assert verb(name, monkeypatch, "ranks=2", "gate=true", threads) == 0
    assert [job for job, *_ in started.jobs] == [*ROAD, *SCORED, *more]
    ranks = ["runtime.ranks=2" in job for job in started.jobs]
    assert ranks == [job[0] == "train" for job in started.jobs]
    told = [threads in job for job in started.jobs]
    assert told == [job[0] in ("train", "evaluate", "compare") for job in started.jobs]
    assert not any(argument.startswith("gate=") for job in started.jobs for argument in job)


@pytest.mark.parametrize("flite", [None, "/usr/bin/flite"])
def test_two_channels_in_order_and_a_clean_voice_where_there_is_one(started, monkeypatch, flite):
    monkeypatch.setattr("shutil.which", lambda name: flite)
    assert verb("demo-duplex", monkeypatch, "ranks=2", "runtime.threads=1") == 0
    made = ["build_duplex", "encode_speech"] * 2
    names = ["world", "curate_texts", *made, "train", "evaluate", "report"]
    assert [job for job, *_ in started.jobs] == names
    assert ("checkpoints.2=null" in started.jobs[-2]) is not bool(flite)
    assert [job[0] for job in started.jobs if "runtime.ranks=2" in job] == ["train"]


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("demo-duplex", "duplex_lora.yaml", "step:", "stepp:"),
        ("demo", "report.yaml", "floors:", "flors:"),
        ("demo", "tokenize_test.yaml", "quantizer:", "quantiser:"),
        ("demo-robust", "report_robust.yaml", "curves:", "curvs:"),
        ("data", "tokenize_test.yaml", "quantizer:", "quantiser:"),
        ("synthesize", "synthesize.yaml", "kinds:", "kind:"),
        ("sweep", "report.yaml", "table:", "tabel:"),
        ("stage2", "stage2.yaml", "epochs:", "epoch:"),
        ("stage2", "gate.yaml", "floors:", "floors: []\nfloor:"),
    ],
)
def test_a_misspelt_key_of_any_job_stops_a_verb_before_its_first(
    started, monkeypatch, capsys, name, file, old, new
):
    path = Path("recipes/demo") / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert verb(name, monkeypatch) == 2 and started.jobs == []
    assert "unknown key" in capsys.readouterr().err


def test_a_recipe_or_a_file_that_is_not_there_is_said_with_what_there_is(
    started, monkeypatch, capsys
):
    shutil.rmtree("recipes/demo")
    assert verb("stage2", monkeypatch) == 2
    assert (
        "there is no recipe demo for just recipe=NAME: early_fusion_1b, early"
        in capsys.readouterr().err
    )
    Path("recipes/demo").mkdir()
    assert verb("sweep", monkeypatch) == 2
    said = capsys.readouterr().err
    assert "recipes/demo/report.yaml: No such file; copy that of another recipe: " in said
    assert "recipes/early_fusion_8b/report.yaml" in said and started.jobs == []
    shutil.copy(ROOT / "recipes/demo/stage1.yaml", "recipes/demo")
    for name, says in (("stge1", "did you mean recipes/demo/stage1.yaml?"), ("x", "no recipe has")):
        with pytest.raises(
            FileNotFoundError, match=re.escape(f"{name}.yaml: No such file; {says}")
        ):
            yaml_values.settings(Path(f"recipes/demo/{name}.yaml"))


def test_texts_are_chosen_and_then_spoken(started, monkeypatch, capsys):
    assert verb("synthesize", monkeypatch, "samples=9") == 0
    names = [name for name, *_ in started.jobs]
    assert names == ["world", "dialogues", "curate_texts", "synthesize_instructions"]
    assert started.jobs[2][2:] == [] and started.jobs[3][2:] == ["samples=9"]
    assert verb("synthesize", monkeypatch, "--dry-run") == 0
    assert [name for name, *_ in started.jobs[4:]] == names
    assert started.jobs[6][2:] == ["--dry-run"]
    assert started.jobs[7][2:] == ["--dry-run", "--check"], "there are no texts yet"
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


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("sweep", "report evaluate"),
        ("synthesize", "world dialogues curate_texts synthesize_instructions"),
        ("stage2", "evaluate gate train"),
        ("data", "world neural tokenize_speech"),
        ("demo", "world neural tokenize_speech expand_vocab train evaluate gate report"),
        ("train-quantizer", "world train_quantizer"),
    ],
)
def test_help_is_of_every_job_and_runs_none(started, monkeypatch, name, jobs):
    assert verb(name, monkeypatch, "limit=20", "--help") == 0
    assert started.jobs == [[job, "--help"] for job in jobs.split()]
    assert verb(name, monkeypatch, "-h") == 0 and len(started.jobs) == 2 * len(jobs.split())


def test_the_demo_takes_no_other_keys(started, monkeypatch, capsys):
    assert verb("demo", monkeypatch, "limit=20") == 2 and started.jobs == []
    assert "limit=20: just demo takes runtime.threads and" in capsys.readouterr().err


def test_a_small_comparison_is_small_in_what_is_its_own(started, monkeypatch, capsys):
    few = ["steps=2", "limit=3"]
    assert verb("compare", monkeypatch, *few) == 0
    given = [(job, [a for a in own if a in few]) for job, *own in started.jobs]
    demo, own = given[: len([*ROAD, *SCORED])], given[len([*ROAD, *SCORED]) :]
    assert [job for job, _ in demo] == [*ROAD, *SCORED] and not any(few for _, few in demo)
    reaches = {"train": few[:1], "evaluate": few[1:]}
    assert own == [(job, reaches.get(job, [])) for job, _ in own]
    assert [job for job, _ in own].count("train") == 11
    begun = "checkpoint=out/compare/rwkv_state/epoch_0"  # the only one of two steps
    assert [job[1][-11:] for job in started.jobs if begun in job] == [
        "scribe.yaml",
        "answer.yaml",
        "_count.yaml",
    ]
    for wrong in ("steps=0", "limit=0", "step=2"):
        assert verb("compare", monkeypatch, wrong) == 2 and len(started.jobs) == len(given)
    assert "runtime.device and steps and limit alone" in capsys.readouterr().err


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


def test_nothing_that_just_is_told_is_run_by_the_shell(tmp_path):
    just, bad = str(shutil.which("just")), "x; echo INJECTED >&2; $(touch ran)"
    (tmp_path / "python").write_text('#!/bin/sh\nfor each; do echo "<$each>"; done\n')
    (tmp_path / "python").chmod(0o755)
    for told in (
        [f"recipe={bad}", "stage1"],
        [f"recipe={bad}", "sweep"],
        [f"ranks={bad}", "stage1"],
        [f"gate={bad}", "stage2"],
        ["prove", bad],
        ["bench", bad],
        ["setup", bad],
    ):
        command = [just, "--no-deps", f"python={tmp_path}/python", *told]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        assert "INJECTED" not in lines and not (ROOT / "ran").exists()


def test_of_two_setups_one_waits_and_finds_the_work_done(tmp_path):
    for name in ("justfile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    own = f"""#!/bin/sh
        if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
        echo "$2" >> made
        sleep 1
        [ -e .venv ] || {{ mkdir -p .venv/bin; cp "$0" .venv/bin/python; }}
        """
    (tmp_path / "python").write_text(own)
    (tmp_path / "python").chmod(0o755)
    command = [str(shutil.which("just")), "setup", "./python"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = [each.communicate(timeout=60)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "venv\npip\n"
    assert sorted(said) == ["", "waiting for another just setup\n"]


def test_just_calls_them(tmp_path):
    lines = '#!/bin/sh\nfor each; do echo "<$each>"; done\n'
    (tmp_path / "python").write_text(lines)
    (tmp_path / "python").chmod(0o755)
    names = "data synthesize stage2 sweep train-base train-rwkv train-quantizer demo"
    for name in names.split():
        command = [str(shutil.which("just")), "--no-deps", f"python={tmp_path}/python", name, "a=b"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        script, verb, recipe, *rest = [line[1:-1] for line in done.stdout.splitlines()]
        assert (script, verb, recipe) == ("recipes/verbs.py", name, "recipes/demo")
        ranks, gates = ["ranks=1"], ["gate=true"]
        more = {"stage2": ranks + gates, "demo": ranks + gates, "train-base": ranks}
        more = (more | {"train-rwkv": ranks}).get(name, [])
        assert rest == [*more, "a=b"]


@pytest.mark.parametrize("job", ["inspect_dataset", "listen", "verify"])
def test_a_dataset_is_named_by_its_folder_alone(job, tmp_path):
    """As README's `just inspect out/data/mine`."""
    command = [sys.executable, "-m", f"stages.{job}", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no key=value" not in done.stderr
    assert str(tmp_path / "nowhere") in done.stderr
