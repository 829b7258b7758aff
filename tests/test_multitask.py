"""The demo's manifests of several tasks: who is asked what, and what a reply's form says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechfuse import config
from speechfuse.corpora.nemo import Nemo
from speechfuse.samples.instructions import context
from speechfuse.tokens.prompts import read_form
from tests.corpus_clips import everything
from tests.demo_code import FOLDER, demo

ROOT = FOLDER.parent.parent
CLIPS = {"transcribe": 6, "answer": 6, "count": 4, "voice": 4, "first": 5, "second": 5}
LINES = {"train": 40, "seen_facts": 9, "unseen_facts": 9}  # questions by split


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multitask")
    lines = [
        {"id": f"{split}-{n}", "split": split, "kind": "question", "answer": "seven", "fact": "f"}
        | {"voices": "train" if split == "train" else "unseen", "text": f"how much is {n} plus two"}
        for split, count in LINES.items()
        for n in range(count)
    ]
    lines += [line | {"id": f"{line['id']}-b", "kind": "phrase"} for line in lines]
    (folder / "speak.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    changes = [f"out={folder}/made", f"corpus.lines={folder}/speak.jsonl", "test_clips=3"]
    changes += [f"clips.{task}={count}" for task, count in CLIPS.items()]
    multitask = demo("multitask")
    multitask.main(config.load(multitask.Multitask, FOLDER / "multitask.yaml", changes))
    return folder / "made"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_recording_is_asked_about_in_one_task_of_the_training(made):
    lines = {task: read(made / f"{task}.jsonl") for task in CLIPS}
    assert {task: len(of) for task, of in lines.items()} == CLIPS
    alone = [of["audio_filepath"] for task in list(CLIPS)[:4] for of in lines[task]]
    assert len({*alone}) == len(alone) == 20
    for task in ("first", "second"):
        for entry in lines[task]:
            assert len({*entry["audio_filepath"]}) == 2 and {*entry["audio_filepath"]} < {*alone}
    assert all("context" not in entry for of in lines.values() for entry in of)
    assert {entry["answer"] for entry in lines["count"]} == {"6 words"}
    assert {entry["answer"] for entry in lines["answer"]} == {"seven"}


def test_each_recording_of_the_test_is_asked_about_in_every_task(made):
    lines = read(made / "test.jsonl")
    of = {
        task: {n: e for e in lines if e["task"] == task and (n := str(e["audio_filepath"]))}
        for task in CLIPS
    }
    assert all(len(entries) == 6 for entries in of.values())
    assert of["transcribe"].keys() == of["answer"].keys() == of["voice"].keys()
    assert of["first"].keys() == of["second"].keys()  # the same pairs
    for pair, entry in of["first"].items():
        one, other = (of["transcribe"][path]["answer"] for path in entry["audio_filepath"])
        assert (entry["answer"], of["second"][pair]["answer"]) == (one, other)
    assert {e["context"] for e in lines if e["task"] == "count"} == {
        *(FOLDER / "questions/count.txt").read_text().splitlines()
    }


def test_the_lines_are_nemos_and_place_both_recordings(made):
    clips = everything(Nemo(str(made / "test.jsonl"), id_key="id"))
    assert len(clips) == 36
    for clip in clips:
        extra = clip.extra | ({"_recordings": [{"seconds": 1}] * 2} if clip.recordings else {})
        row = {"id": clip.id, "text": clip.text, "extra": extra}
        asked, reply = context(row)
        segments = asked["either"][0][0]
        assert sum("speech" in each for each in segments) == (2 if clip.recordings else 1)
        assert reply["segments"] == [{"text": clip.extra["answer"]}]


def test_the_form_of_a_reply_says_its_task(made):
    tasks = yaml.safe_load((FOLDER / "evaluate_multitask.yaml").read_text())["tasks"]
    forms = tasks["four_decided"]["reply"]["forms"]
    for entry in read(made / "test.jsonl"):
        if entry["task"] in forms:
            assert read_form(entry["answer"], forms) == (entry["answer"], entry["task"])
    assert read_form("12 words", forms)[1] == "count"
    assert read_form("welsh voice", forms)[1] == "voice"
    assert read_form("x", {"count": "words$"}) == ("x", "")


def test_tasks_without_questions_are_refused(made, tmp_path):
    multitask = demo("multitask")
    changes = [f"out={tmp_path}/x", f"corpus.lines={made.parent}/speak.jsonl", "clips.sing=3"]
    with pytest.raises(ValueError, match="the same of the tasks transcribe, answer"):
        multitask.main(config.load(multitask.Multitask, FOLDER / "multitask.yaml", changes))
