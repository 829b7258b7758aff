"""The report: the right epoch is chosen, every score is there, and a missed floor fails the job."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from speechfuse import config
from speechfuse.report import plots
from stages import report
from tests import eval_results
from tests.eval_results import score

ROOT = Path(__file__).parent.parent
KEYS = {"checkpoint", "chosen", "task", "split", "metric", "value", "ci_low", "ci_high", "n"}
QA, TEXT = "spoken_qa", "text_mmlu"


def items(split: str, count: int) -> list[dict]:
    return [
        {
            "id": f"{split}-{i}",
            "question": f"what is {i} | two",
            "heard": f"what <{i}>\n",
            "answer": f"a{i}",
            "expected": "a2",
            "split": split,
            "correct": i == 2,
        }
        for i in range(count)
    ]


class Demo:
    """A folder as the demo leaves it, with made-up scores, and the job run on it as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.evals = folder, folder / "evals"
        self.config = {
            "out": str(folder),
            "evals": str(self.evals),
            "base": "base",
            "runs": [{"name": run, "path": str(folder / run)} for run in ("stage1", "stage2")],
            "rule": {
                "choose_from": "stage2",
                "task": QA,
                "split": "validation",
                "metric": "acc",
                "paired": False,
            },
            "table": [
                {"task": TEXT, "split": "replayed", "metric": "acc"},
                {"task": QA, "split": "unseen", "metric": "acc"},
            ],
            "samples": "unseen",
            "legend": {"expanded": "before training"},
            "floors": [{"task": QA, "split": "unseen", "metric": "acc", "at_least": 0.5}],
        }
        self.text("base", 0.8, 0.9)
        self.text("expanded", 0.8, 0.9)
        self.text("stage1/epoch_0", 0.6, 0.5)
        for epoch, validation in enumerate((0.3, 0.7, 0.6)):
            self.epoch(epoch, validation, unseen=0.4 + 0.1 * epoch)
        for run, steps in (("stage1", 300), ("stage2", 900)):
            self.metrics(run, steps)

    def cell(self, checkpoint: str, task: str, scores: list[dict], found=()) -> None:
        eval_results.write(self.evals, checkpoint, task, scores, found)

    def epoch(self, epoch: int, validation: float, unseen: float) -> None:
        name = f"stage2/epoch_{epoch}"
        scores = [score(QA, "validation", validation), score(QA, "unseen", unseen)]
        self.cell(name, QA, scores, items("validation", 30) + items("unseen", 25))
        self.text(name, 0.76, 0.7)

    def text(self, checkpoint: str, replayed: float, not_replayed: float) -> None:
        scores = [score(TEXT, "replayed", replayed), score(TEXT, "not_replayed", not_replayed)]
        self.cell(checkpoint, TEXT, scores)

    def metrics(self, run: str, steps: int) -> None:
        lines = [
            {
                "step": step,
                "epoch": step // 301,
                "loss": 5 * math.exp(-step / 200) + step % 7 / 20,
                "lr": 1e-3,
                "tokens": 1000,
                "seconds": 0.5,
            }
            for step in range(1, steps + 1)
        ]
        (self.folder / run).mkdir(exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / run / "metrics.jsonl").write_text(text)

    def yaml(self) -> Path:
        path = self.folder / "report.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def report(self, *overrides: str) -> list[dict]:
        report.main(config.load(report.Report, self.yaml(), list(overrides)))
        return json.loads((self.folder / "report.json").read_text())

    def process(self, *overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "stages.report", str(self.yaml()), *overrides]
        env = {"PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture
def drawn(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


@pytest.fixture
def demo(drawn: Demo, monkeypatch) -> Demo:
    """The same with empty plots: drawing takes most of a report's time."""
    for name in ("loss", "text", "speech"):
        monkeypatch.setattr(plots, name, lambda *_: Figure())
    return drawn


def chosen(rows: list[dict]) -> str:
    [name] = {row["checkpoint"] for row in rows if row["chosen"]}
    return name


def section(folder: Path, title: str) -> str:
    text = (folder / "report.md").read_text()
    return text.partition(f"\n## {title}")[2].partition("\n## ")[0]


def test_the_epoch_with_the_best_validation_is_chosen(demo, capsys):
    rows = demo.report()
    assert chosen(rows) == "stage2/epoch_1"  # not epoch_2, which is best on the reported split
    assert all(row.keys() == KEYS for row in rows)
    assert all(row["chosen"] == (row["checkpoint"] == "stage2/epoch_1") for row in rows)
    assert len(rows) == 3 * 2 + 3 * 4 and sum(row["chosen"] for row in rows) == 4
    first = {"checkpoint": "base", "chosen": False, **score(TEXT, "replayed", 0.8)}
    assert rows[0] == {name: value for name, value in first.items() if name in KEYS}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "stage2/epoch_1 has the highest spoken_qa validation acc, 0.700; no other is equal."
    )
    assert len(lines) == 2 and "chosen stage2/epoch_1; text_mmlu replayed acc 0.760" in lines[1]


def test_the_page_shows_table_rule_plots_and_samples(drawn):
    demo = drawn
    demo.report()
    text = (demo.folder / "report.md").read_text()
    assert "Partial" not in text
    for sentence in (
        "highest acc on spoken_qa, split validation",
        "of equals the earliest",
        "Differences are not tested: a",
        "No column under Results is of that split",
        "**expanded**: before training",
    ):
        assert sentence in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (demo.folder / link).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\]\((.*?)\)", text)) == 3
    results = section(demo.folder, "Results").splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in results if line.startswith("|")][2:]
    epochs = ["stage2/epoch_0", "**stage2/epoch_1**", "stage2/epoch_2"]
    assert rows == ["base", "expanded", "stage1/epoch_0", *epochs]
    assert "validation" not in "".join(results)
    assert "| stage1/epoch_0 | 0.600 \u00b1 0.050<br>75% of base |  |" in results
    samples = [row for row in section(demo.folder, "What it says").splitlines() if row[:1] == "|"]
    assert len(samples) == 2 + 10 and samples[2].endswith("| a0 | a2 | wrong |")
    assert samples[3] == (
        "| what is 2 &#124; two | what &lt;2&gt; | a2 | a2 | right |"
    )  # what a model said cannot break the table


def test_no_error_rate_is_plotted_as_accuracy(drawn):
    drawn.config["text"] = "transcription"
    scores = [score("transcription", "all", 0.4, metric="wer")]
    drawn.cell("stage2/epoch_1", "transcription", scores)
    with pytest.raises(ValueError, match="text=transcription: it is scored by wer, and what is pl"):
        drawn.report()


def test_the_report_is_made_anew_and_equal(drawn):
    demo = drawn
    demo.report()
    first = {path.name: path.read_bytes() for path in demo.folder.iterdir() if path.is_file()}
    demo.report()
    assert first == {p.name: p.read_bytes() for p in demo.folder.iterdir() if p.is_file()}
    demo.epoch(2, validation=0.9, unseen=0.9)
    assert chosen(demo.report()) == "stage2/epoch_2"


def test_of_equal_epochs_the_earliest_is_chosen(demo):
    for epoch in (2, 9, 10, 11):
        demo.epoch(epoch, validation=0.8 if epoch > 8 else 0.1, unseen=0.5)
    rows = demo.report()
    assert chosen(rows) == "stage2/epoch_9"  # epoch_10 comes first by name
    order = list(dict.fromkeys(row["checkpoint"] for row in rows))
    assert order[-3:] == ["stage2/epoch_9", "stage2/epoch_10", "stage2/epoch_11"]


def test_a_column_that_may_be_absent_stands_where_it_is_scored(demo):
    column = {"task": QA, "split": "neural", "metric": "acc", "may_be_absent": True}
    demo.config["table"].append(column)
    demo.report()
    assert "neural" not in section(demo.folder, "Results")
    demo.cell("stage2/epoch_1", "other", [score(QA, "neural", 0.25)])
    demo.report()
    assert "neural" in section(demo.folder, "Results")
    del column["may_be_absent"]
    (demo.evals / "stage2/epoch_1/other.json").unlink()
    with pytest.raises(ValueError, match="no result has spoken_qa neural acc"):
        demo.report()


def test_only_the_named_run_is_chosen_from(demo):
    scores = [score(QA, "validation", 0.99), score(QA, "unseen", 0.99)]
    demo.cell("stage2_plain/epoch_0", QA, scores)
    assert chosen(demo.report()) == "stage2/epoch_1"


UNSEEN, REPLAYED = {"task": QA, "split": "unseen"}, {"task": TEXT, "split": "replayed"}
FLOORS = [  # of the chosen epoch: unseen is 0.5, replayed 0.76 where the base has 0.8
    ({**UNSEEN, "at_least": 0.5}, {"at_least": 0.51}, "BELOW"),
    ({**UNSEEN, "at_most": 0.5}, {"at_most": 0.49}, "ABOVE"),
    ({**REPLAYED, "of_base_at_least": 0.94}, {"of_base_at_least": 0.96}, "BELOW"),
    ({**REPLAYED, "at_least": 0.0}, {"split": "typo"}, "MISSING"),
]


@pytest.mark.parametrize(("kept", "change", "verdict"), FLOORS)
def test_a_floor_is_kept_or_missed(demo, capsys, kept, change, verdict):
    demo.config["floors"] = [{"metric": "acc", **kept}, {"metric": "acc", **kept, **change}]
    demo.report()  # not checked, not failed
    assert verdict not in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"stage2/epoch_1 misses 1 of 2 floors: {verdict}"):
        demo.report("check=true")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ok ") and out[1].startswith(verdict) and "chosen" in out[-1]
    assert verdict in section(demo.folder, "Floors")


def test_as_a_command_a_missed_floor_is_exit_code_2(demo):
    done = demo.process("check=true")
    assert (done.returncode, done.stderr) == (0, "")
    demo.config["floors"][0]["at_least"] = 0.9
    done = demo.process("check=true")
    assert done.returncode == 2
    assert done.stderr.startswith("error: stage2/epoch_1 misses 1 of 1 floors: BELOW")
    assert done.stderr.count("\n") == 1


def broken(demo: Demo, what: str) -> None:
    qa = demo.evals / "stage2" / "epoch_2" / "spoken_qa.json"
    match what:
        case "nothing evaluated":
            demo.config["evals"] = str(demo.folder / "none")
        case "no base":
            demo.config["base"] = "bass"
        case "epoch without the score":
            qa.unlink()
        case "cell of another checkpoint":
            qa.write_text(qa.read_text().replace("stage2/epoch_2", "stage2/epoch_3"))
        case "half a cell":
            qa.write_text(qa.read_text()[:100])
        case "run not evaluated":
            demo.config["rule"]["choose_from"] = "stage3"
        case "old form":
            qa.write_text(qa.read_text().replace('"protocol"', '"protokoll"'))
        case "older form":
            qa.write_text(qa.read_text().replace('"paired"', '"pared"'))
        case "column that chose":
            demo.config["table"].append({"task": QA, "split": "validation", "metric": "acc"})
        case "column of nothing":
            demo.config["table"].append({"task": QA, "split": "unsene", "metric": "acc"})
        case "samples of nothing":
            demo.config["samples"] = "unsene"
        case "curve of two metrics":
            of = {"task": QA, "split": "unseen"}
            points = {"a": of | {"metric": "acc"}, "b": of | {"metric": "wer"}}
            demo.config["curves"] = [{"title": "Both", "x": "x", "points": points}]
        case "curve without points":
            demo.config["curves"] = [{"title": "None", "x": "x", "points": {}}]
        case "curve of half a point":
            points = {"a": {"task": QA, "split": "unseen"}}
            demo.config["curves"] = [{"title": "Half", "x": "x", "points": points}]
        case "share of no base":
            del demo.config["base"]
            demo.config["floors"][0] = {"task": TEXT, "split": "replayed", "metric": "acc"}
            demo.config["floors"][0]["of_base_at_least"] = 0.5
        case "check of nothing":
            demo.config["floors"] = []
        case "floor with two bounds":
            demo.config["floors"][0]["at_most"] = 0.9
        case "no losses":
            (demo.folder / "stage1" / "metrics.jsonl").write_text("")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nothing evaluated", "none holds no <checkpoint>/<task>.json"),
        ("no base", "base=bass has no results; there are: base, expanded"),
        ("epoch without the score", "no spoken_qa validation acc of stage2/epoch_2"),
        ("cell of another checkpoint", "holds scores of stage2/epoch_3"),
        ("half a cell", "is no result file"),
        ("run not evaluated", "no results of rule.choose_from=stage3"),
        ("old form", "is no result file .*older form.* run stages.evaluate again"),
        (
            "older form",
            "is no result file .*do not say whether they pair.* run stages.evaluate again",
        ),
        ("column that chose", "spoken_qa validation is what the epoch is chosen by"),
        ("column of nothing", "no result has spoken_qa unsene acc; there are: .*spoken_qa unseen"),
        ("samples of nothing", "no such items; there are: unseen, validation"),
        ("curve of two metrics", "curves: Both: one metric a curve, not acc, wer|wer, acc"),
        ("curve without points", r"curves: None: points needs \{task, split, metric\}"),
        ("curve of half a point", r"curves: Half: the point a needs \{task, split, metric\}"),
        ("share of no base", "base is not set, but text_mmlu replayed acc is compared with it"),
        ("check of nothing", "check=true without floors"),
        ("floor with two bounds", "it has at_least, at_most"),
        ("no losses", "metrics.jsonl is empty: train stage1"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(demo, what, says):
    broken(demo, what)
    with pytest.raises(ValueError, match=says):
        demo.report("check=true")
    left = {path.name for path in demo.folder.iterdir() if path.is_file()}
    assert left == {"report.yaml"}


def test_the_demo_asks_for_scores_that_it_evaluates():
    job = config.load(report.Report, ROOT / "recipes" / "demo" / "report.yaml", [])
    evaluated = yaml.safe_load((ROOT / "recipes" / "demo" / "evaluate.yaml").read_text())
    splits: dict[str, set[str]] = {}
    for task, spec in evaluated["tasks"].items():
        splits.setdefault(spec.get("name", task), set()).update(spec.get("splits", ()))
    splits[TEXT] |= {"replayed", "not_replayed"}
    splits["question_transcript"] = {*evaluated["tasks"]["spoken_qa"]["transcript_splits"]}
    splits[QA] |= {"shuffled_audio", "majority_answer"}
    for entry in (job.rule, *job.table, *job.floors):
        assert entry.split in splits[entry.task]
    assert job.samples in splits[QA] and len(job.floors) == 9
    assert {run.name for run in job.runs} <= {entry["name"] for entry in evaluated["checkpoints"]}


def test_a_curve_is_drawn_of_the_chosen_epoch_and_the_last_of_other_runs(demo):
    for name, high in (
        ("stage1/epoch_0", 0.3),
        ("stage2/epoch_0", 0.7),
        ("stage2/epoch_1", 0.9),
        ("stage2/epoch_2", 0.8),
    ):
        for snr in (20, 0):
            demo.cell(name, f"snr_{snr}", [score(f"snr_{snr}", "all", high * (snr + 10) / 30)])
    of = {"split": "all", "metric": "acc"}
    points = {str(snr): {"task": f"snr_{snr}", **of} for snr in (20, 0)}
    demo.config["curves"] = [{"title": "In noise", "x": "SNR, dB", "points": points}]
    demo.report()
    text = section(demo.folder, "In noise")
    assert "| SNR, dB | 0 | 20 |" in text and "curve0.png" in text
    assert "| stage2/epoch_1 | 0.300" in text and "| stage1/epoch_0 | 0.100" in text
    assert "stage2/epoch_0" not in text and "stage2/epoch_2" not in text
    demo.config["curves"][0]["points"]["5"] = {"task": "snr_5", **of}
    with pytest.raises(ValueError, match=r"curves.0: no checkpoint has all .* snr_5 all acc"):
        demo.report()
    eval_results.write_failure(demo.evals, "stage2/epoch_2", "snr_5", "it broke")
    demo.report()
    assert "no checkpoint has all of its points" in section(demo.folder, "In noise")


def test_a_font_that_is_not_installed_is_not_spoken_of():
    figure = "Figure().text(0, 0, 'x', family='No Such').figure.draw_without_rendering()"
    script = f"import speechfuse; from matplotlib.figure import Figure; {figure}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
