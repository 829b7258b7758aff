"""Exported tasks, run by lm-eval alone, give the numbers of stages.evaluate."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechfuse import config
from speechfuse.evals.speech import Speech
from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import Vocabulary
from stages import export_tasks
from tests.small_training import ROOT, make_parts

SPEECH = "speechfuse.evals.Speech"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("export"))
    model = AutoModelForCausalLM.from_pretrained(folder / "expanded")
    words = Vocabulary.load(folder / "expanded")
    # as in Llama 3's own generation_config: any of its ends ends a reply
    model.generation_config.eos_token_id = [words.end_of_turn, words.end]
    model.save_pretrained(folder / "expanded")
    return folder


def test_the_demo_has_a_task_to_export_which_asks_as_its_own_does():
    told = yaml.safe_load((ROOT / "recipes/demo/evaluate.yaml").read_text())["tasks"]
    asked = told["transcription_exported"]
    assert asked["_component_"] == SPEECH
    assert [asked["prompt"]] == [f"{r}{{speech}}" for r in told["transcription"]["requests"]]
    assert asked["data"] == told["transcription"]["path"]


def export(parts: Path, folder: Path, tasks: dict[str, dict[str, Any]], *overrides: str) -> Path:
    path = folder / "evaluate.yaml"
    described = {name: {"_component_": SPEECH, **spec} for name, spec in tasks.items()}
    path.write_text(yaml.safe_dump({"out": "unused", "checkpoints": [], "tasks": described}))
    job = config.load(export_tasks.ExportTasks, path, [f"out={folder / 'exported'}", *overrides])
    export_tasks.main(job)
    return folder / "exported"


def test_lm_eval_alone_gives_our_scores(parts, tmp_path):
    common = {"data": str(parts / "speech"), "max_new_tokens": 6, "batch_size": 8, "limit": 24}
    tasks = {
        "asr": {**common, "metric": "wer", "prompt": "repeat: {speech}"},
        "qa": {**common, "metric": "cer", "reference": "answer"},
    }
    folder = export(parts, tmp_path, tasks)
    assert sorted(path.name for path in folder.iterdir()) == [
        "asr.jsonl",
        "asr.yaml",
        "qa.jsonl",
        "qa.yaml",
        "speechfuse_cer.py",
        "speechfuse_wer.py",
    ]
    model = AutoModelForCausalLM.from_pretrained(parts / "expanded")
    tokenizer = AutoTokenizer.from_pretrained(parts / "expanded")
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    theirs = lm_eval.simple_evaluate(
        HFLM(model, tokenizer=tokenizer, batch_size=8),
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
    )
    for name, spec in tasks.items():
        task = Speech(**spec)
        batches = task.predict(parts / "expanded", task.ids())
        said = {entry["id"]: entry for batch in batches for entry in batch}
        ours = task.score([said[id] for id in task.ids()])
        samples = theirs["samples"][name]
        assert [s["doc"]["id"] for s in samples] == task.ids()
        assert [s["resps"][0][0].strip() for s in samples] == [
            said[id]["reply"] for id in task.ids()
        ]
        assert any(entry["reply"] for entry in said.values())
        assert theirs["results"][name][f"{spec['metric']},none"] == ours.scores[0].value


def test_the_prompt_is_read_as_the_ids_of_prompts_render(parts):
    task = Speech(str(parts / "speech"), "wer", "say: {speech} please", limit=5)
    words = Vocabulary.load(parts / "expanded")
    for row in task.rows.values():
        ids, _ = prompts.render(words, task.turns(row, row["codes"]), add_generation_prompt=True)
        text = export_tasks.prompt(task, row)
        assert words.tokenizer.encode(text, add_special_tokens=False) == ids


def test_what_a_judge_rates_is_only_predicted(parts, tmp_path):
    judge = {"_component_": "speechfuse.scores.Judge", "model": "m"}
    spec = {"data": str(parts / "speech"), "metric": "judge", "judge": judge, "limit": 3}
    folder = export(parts, tmp_path, {"chat": spec})
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    (task,) = manager.load("chat")["tasks"].values()
    assert list(task.aggregation()) == ["bypass"] and len(task.eval_docs) == 3


def test_what_cannot_be_exported_is_named(parts, tmp_path):
    data = {"data": str(parts / "speech"), "metric": "wer"}
    with pytest.raises(ValueError, match="only: 'b' is no speech task; there are a"):
        export(parts, tmp_path, {"a": data}, "only=[b]")
    other = {"_component_": "speechfuse.evals.TextMMLU"}
    with pytest.raises(ValueError, match=r"tasks has mc, none of .*Speech, which alone"):
        export(parts, tmp_path, {"mc": other})
    with pytest.raises(ValueError, match="a: only protocol clean"):
        export(parts, tmp_path, {"a": {**data, "protocol": "blog"}})
    with pytest.raises(ValueError, match="which lm-eval would take for a control token"):
        export(parts, tmp_path, {"a": {**data, "prompt": "<|eot_id|>{speech}"}})
