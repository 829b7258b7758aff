"""The table of fusions: its rows, which epoch stands for one, and sentences that follow from it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechfuse import config
from speechfuse.evals import latency
from speechfuse.report import comparison
from stages import compare, expand_vocab
from tests.eval_results import score, write

RECIPE = Path("recipes/demo/compare.yaml")
QA, HEARD = "unseen_facts_unseen_voices", "spoken_qa"
QUESTIONS = 40


def answers(
    evals: Path, checkpoint: str, name: str, task: str, split: str, replies: list[str]
) -> None:
    """A result file whose items are right where the reply is "yes"."""
    items = [
        {"id": f"{split.removesuffix('_speech_on')}-{i}", "split": split, "answer": reply}
        | {"correct": reply == "yes", "heard": f"words {i}"}
        for i, reply in enumerate(replies)
    ]
    right = sum(reply == "yes" for reply in replies) / len(replies)
    whole = score(task, split, right, n=len(replies)) | {"paired": True}
    write(evals, checkpoint, name, [whole], items)


class Rows:
    """Result files of rows, and the manifests of their trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.evals, self.rows = folder, folder / "evals", list[dict[str, Any]]()

    def add(self, name: str, heard: int, kept: int = QUESTIONS, minutes: float = 1.0, **row: Any):
        """A row that answers so many questions, and keeps so many replies while it listens. With
        `minutes` it has two epochs of a run, the first of them worse."""
        run = self.folder / name
        checkpoints = {f"{name}/epoch_0": max(0, heard - 5), f"{name}/epoch_1": heard}
        if minutes:
            (run / "epoch_1").mkdir(parents=True)
            (run / "epoch_1/speech.json").write_text("{}")
            totals = {"tokens": 1000, "trained_parameters": 50}
            (run / "manifest.json").write_text(json.dumps({"totals": totals}))
            (run / "metrics.jsonl").write_text(json.dumps({"seconds": 60 * minutes}) + "\n")
            self.rows.append({"name": name, "about": name, "trainings": [str(run)], **row})
        else:
            checkpoints = {name: heard}
            self.rows.append({"name": name, "about": name, "checkpoint": str(run), **row})
        for checkpoint, right in checkpoints.items():
            replies = ["yes"] * right + ["no"] * (QUESTIONS - right)
            answers(self.evals, checkpoint, "qa", HEARD, QA, replies)
            answers(self.evals, checkpoint, "validation", HEARD, "validation", replies)
            on = ["yes"] * kept + ["no"] * (QUESTIONS - kept)
            answers(self.evals, checkpoint, "off", "text", "all", ["yes"] * QUESTIONS)
            answers(self.evals, checkpoint, "on", "text", "all_speech_on", on)

    def compare(self, **changes: Any) -> tuple[list[dict[str, Any]], str]:
        """The lines of report.json, and the page in Markdown."""
        keys: dict[str, Any] = {"out": str(self.folder / "out"), "evals": str(self.evals)}
        keys |= {"rows": self.rows, "base": "base", "more": [], "quantizer": None}
        keys |= {"text": [{"task": "text", "split": "all", "metric": "acc"}]} | changes
        arguments = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items()]
        compare.main(config.load(compare.Compare, RECIPE, arguments))
        out = self.folder / "out"
        return json.loads((out / "report.json").read_text()), (out / "compare.md").read_text()


@pytest.fixture
def rows(tmp_path) -> Rows:
    rows = Rows(tmp_path)
    rows.add("frozen", heard=20, minutes=4)
    rows.add("lora", heard=38, kept=20, minutes=3)
    rows.add("replay", heard=37, kept=39, minutes=2.5)
    rows.add("plain", heard=10, kept=10, minutes=2)
    rows.add("base", heard=40, minutes=0, listens=False)
    return rows


def test_sentences_follow_from_the_rows(rows, capsys):
    _, page = rows.compare()
    assert "**Best listening**: take lora, which answers 0.950 of the spoken questions" in page
    assert (
        "keeps 0.500 of the base's scores in writing while it listens; not significantly worse: "
        in page
    )
    assert "replay (0.925). Where the base reads the questions it answers 1.000." in page
    assert "**Text untouched**: take frozen: all 40 answers in writing are the" in page
    assert (
        "Or take replay, which answers 0.925" in page and "while it listens 39 of 40 are." in page
    )
    assert "take plain, 2.0 minutes of steps, which answers 0.250 of the" in page
    assert "of those that listen best replay is the cheapest, 2.5 minutes." in page
    assert "Best listening: take lora" in capsys.readouterr().out


def test_other_rows_make_other_sentences(tmp_path):
    rows = Rows(tmp_path)
    rows.add("frozen", heard=35, minutes=1)
    rows.add("lora", heard=20, kept=20, minutes=3)
    rows.add("base", heard=40, minutes=0, listens=False)
    _, page = rows.compare()
    assert "**Best listening**: take frozen, which answers 0.875" in page
    assert "not significantly worse" not in page
    assert "Or take lora, which answers 0.500" in page
    assert "take frozen, 1.0 minutes of steps, which answers 0.875 of the spoken questions." in page


def test_a_row_whose_text_nothing_restores_leaves_none_untouched(tmp_path):
    rows = Rows(tmp_path)
    rows.add("token", heard=20, kept=20)
    answers(rows.evals, "token/epoch_1", "off", "text", "all", ["no"] * QUESTIONS)
    (tmp_path / "token/epoch_1/speech.json").unlink()
    rows.add("base", heard=40, minutes=0, listens=False)
    _, page = rows.compare()
    assert "**Text untouched**: no row leaves every reply in writing as it was." in page
    text = page.partition("## Text")[2]
    (line,) = (line for line in text.splitlines() if line.startswith("| token | 0.500"))
    assert "none" in line, "it has no speech part that could be off"


def test_a_row_of_another_language_model_is_measured_by_its_own(tmp_path):
    rows = Rows(tmp_path)
    rows.add("other", heard=30, kept=20, base="own")
    rows.add("own", heard=40, minutes=0, listens=False)
    rows.add("base", heard=40, minutes=0, listens=False)
    half = ["yes", "no"] * (QUESTIONS // 2)
    answers(rows.evals, "base", "off", "text", "all", half)
    assert "| other | 0.500" in rows.compare()[1].partition("## Text")[2]
    rows.rows[0]["base"] = None
    assert "| other | 1.000" in rows.compare()[1].partition("## Text")[2]


def test_lines_are_those_of_the_demos_report_and_the_epoch_is_named(rows):
    lines, _ = rows.compare()
    of = {(each["checkpoint"], each["task"], each["split"]): each for each in lines}
    line = of["replay", HEARD, QA]
    assert {*line} == {*asdict(compare.Score("", "", "", 0, 0, 0, 0))} - {"paired"} | {
        "checkpoint",
        "chosen",
        "epoch",
    }
    assert line["value"] == 37 / QUESTIONS and line["epoch"] == "replay/epoch_1"
    assert {name for name, *_ in of} == {"frozen", "lora", "replay", "plain", "base"}
    assert {each["checkpoint"] for each in lines if each["chosen"]} == {"lora"}
    costs = {
        e["metric"]: e["value"]
        for e in lines
        if (e["checkpoint"], e["task"]) == ("lora", "training")
    }
    assert costs == {"tokens": 1000, "minutes": 3, "parameters": 50}
    out = rows.folder / "out"
    assert "<table>" in (out / "compare.html").read_text() and (out / "fusions.png").exists()


def test_a_row_that_was_not_evaluated_is_named(rows, capsys):
    rows.rows.append({"name": "Later", "about": "x", "trainings": ["out/later"]})
    _, page = rows.compare()
    assert "Not evaluated yet: Later." in page
    assert "5 rows; not evaluated yet: Later" in capsys.readouterr().out
    with pytest.raises(ValueError, match="base=Later has no results"):
        rows.compare(base="Later")


def test_scores_of_a_part_of_the_items_are_said(rows):
    said = "Some scores are of a part of the items alone."
    assert said not in rows.compare()[1]
    path = rows.evals / "plain/epoch_1/qa.json"
    result = json.loads(path.read_text())
    result["details"]["partial"] = True  # as a sweep with limit= writes it
    path.write_text(json.dumps(result))
    assert said in rows.compare()[1]


def test_a_cascade_without_its_recognizer_is_named(rows):
    answers(rows.evals, "tiny", "on", "text", "all_speech_on", ["yes"] * QUESTIONS)
    rows.rows.append({"name": "tiny", "about": "x", "checkpoint": "c"})
    _, page = rows.compare()
    assert "Not evaluated yet: tiny." in page


def test_a_cascade_reads_what_a_row_heard(rows):
    rows.add("cascade", heard=30, minutes=0, recognizer="replay")
    write(rows.evals, "replay/epoch_1", "words", [score("words", "all", 0.1, "wer")])
    lines, _ = rows.compare(heard=["words"])
    heard = [e for e in lines if (e["checkpoint"], e["task"]) == ("cascade", "words")]
    assert [each["value"] for each in heard] == [0.1]
    keys = {"out": str(rows.folder / "out"), "evals": str(rows.evals), "transcripts_of": "replay"}
    arguments = [*(f"{k}={v}" for k, v in keys.items()), f"rows={json.dumps(rows.rows)}"]
    compare.main(config.load(compare.Compare, RECIPE, arguments))
    path = rows.folder / "out/transcripts/qa.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"id": f"{QA}-0", "text": "words 0"}
    with pytest.raises(ValueError, match=r"transcripts_of=other: .* has no such row"):
        compare.main(config.load(compare.Compare, RECIPE, [*arguments, "transcripts_of=other"]))


class Spoken:
    """A generator that remembers what it was asked, and how long its reply might be."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], int]] = []

    def speech(self, encoder: Any, waveforms: list[Any]) -> list[dict[str, Any]]:
        return [{"speech": encoder}]

    def reply(self, turns: list[list[dict[str, Any]]], tokens: int) -> list[str]:
        segments = turns[0][0]["segments"]
        self.asked.append(([part.get("text", "speech") for part in segments], tokens))
        return ["what is one\none"]


def test_a_cascades_first_token_comes_after_all_that_was_heard():
    asked = latency.Asked("ears", "repeat:{speech}", np.zeros(16_000, np.float32))
    ears, base = Spoken(), Spoken()
    middle, least, most = latency.first_token(ears, asked)
    assert 0 < least <= middle <= most
    assert ears.asked == [(["repeat:", "speech"], 1)] * (latency.TIMES + 1)
    ears.asked.clear()
    latency.first_token(ears, asked, base)
    assert ears.asked[0] == (["repeat:", "speech"], latency.WORDS)
    assert base.asked[0] == (["what is one"], 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": []}, "text is empty"),
        ({"listening": {"task": "a", "split": "b", "metric": "wer"}}, "a b wer: of listening and"),
        ({"text": [{"task": "a", "split": "b", "metric": "cer"}]}, "a b cer: of listening and"),
        ({"rows": [{"name": "a", "about": "x"}]}, "a needs trainings or a checkpoint"),
        (
            {"rows": [{"name": "a", "about": "x", "checkpoint": "c", "recognizer": "b"}]},
            "a: no row is its recognizer, b",
        ),
        (
            {"rows": [{"name": "a", "about": "x", "checkpoint": "c", "base": "b"}]},
            "a: no row is its base, b",
        ),
        ({"rows": [{"name": "a", "about": "x", "checkpoint": "c"}] * 2}, "the name a comes twice"),
    ],
)
def test_a_table_that_could_not_be_is_refused(rows, changes, match):
    with pytest.raises(ValueError, match=match):
        rows.compare(**changes)


def test_a_row_whose_listening_failed_is_shown_without_it_and_named(rows):
    failure = {"checkpoint": "plain/epoch_1", "task": "qa", "error": "out of memory"}
    (rows.evals / "plain/epoch_1/qa.failed.json").write_text(json.dumps(failure))
    lines, page = rows.compare()
    assert "Failed, and not shown: plain/epoch_1 qa." in page
    assert {each["checkpoint"] for each in lines if each["chosen"]} == {"lora"}
    assert "| plain |" in page


def test_the_first_token_of_a_token_model_and_of_a_cascade_is_timed(tmp_path):
    base, expanded = "recipes/demo/models/base", tmp_path / "expanded"
    quantizer = "recipes/demo/models/quantizer"
    expand_vocab.main(expand_vocab.ExpandVocab(str(expanded), base, quantizer))
    rows = [
        comparison.Row("token", "x", checkpoint=str(expanded)),
        comparison.Row("deaf", "no sound tokens", checkpoint=base),
        comparison.Row("cascade", "x", checkpoint=base, recognizer="token"),
        comparison.Row("reads", "x", checkpoint=base, listens=False),
    ]
    job = config.load(compare.Compare, RECIPE, ["runtime.device=cpu", "runtime.threads=1"])
    scores = compare.first_tokens(job, rows, {row.name: Path(row.checkpoint) for row in rows})
    assert scores.keys() == {"token", "cascade"}
    assert all(of.value > 0 and of.n == latency.TIMES for (of,) in scores.values())
