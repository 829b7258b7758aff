"""Write speech tasks as ordinary lm-eval tasks, for anybody's lm-eval.

    python -m stages.export_tasks recipes/early_fusion_8b/evaluate.yaml out=exported
    lm_eval run --model hf --model_args pretrained=CHECKPOINT --include_path exported --tasks NAME

In: the configuration of stages.evaluate. Out: for each of its tasks that is a
speechfuse.evals.Speech (of the demo transcription_exported alone) <out>/<task>.yaml, the
prompts as text (audio as sound tokens) in <out>/<task>.jsonl, and a <out>/speechfuse_<metric>.py
that scores as stages.evaluate does, with speechfuse installed. What a judge would rate is only
predicted. Prompts hold the whole chat layout: no --apply_chat_template.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speechfuse import artifact, config
from speechfuse.evals.speech import Speech
from speechfuse.hub import data as hub_data
from speechfuse.scores.metrics import METRICS
from speechfuse.tokens.vocabulary import END, SOUND, START

FUNCTIONS = '''"""Rows and the metric {metric} of the tasks beside this file."""

import json
from pathlib import Path

from datasets import Dataset
from speechfuse.scores.metrics import METRICS


def rows(file, **_):
    text = (Path(__file__).parent / file).read_text("utf-8")
    return {{"test": Dataset.from_list([json.loads(line) for line in text.split("\\n") if line])}}


def process(doc, results):
    return {{"{metric}": (doc["reference"], results[0].strip())}}


def aggregate(pairs):
    references, predictions = zip(*pairs)
    return METRICS["{metric}"](list(references), list(predictions), None).scores[0][1]
'''


@dataclass
class ExportTasks:
    tasks: dict[str, dict[str, Any]] = field(metadata={"help": "task name -> {_component_, ...}"})
    out: str = field(metadata={"help": "folder of the exported tasks"})
    only: list[str] = field(default_factory=list, metadata={"help": "tasks; empty: all of speech"})
    limit: int | None = field(default=None, metadata={"help": "items of each task"})
    checkpoints: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "of stages.evaluate"}
    )
    runtime: dict[str, Any] = field(default_factory=dict, metadata={"help": "of stages.evaluate"})


class Function(str):
    """Written as lm-eval's YAML tag !function."""


class Dumper(yaml.SafeDumper):
    pass


Dumper.add_representer(Function, lambda dumper, path: dumper.represent_scalar("!function", path))


def prompt(task: Speech, row: dict[str, Any]) -> str:
    """The ids that the model is shown, as text; its tokenizer reads sound tokens as single ids."""
    said = []
    for segment in task.turns(row, row["codes"])[0]["segments"]:
        if "speech" in segment:
            sound = "".join(SOUND.format(code) for code in segment["speech"]["codes"])
            said.append(f"{START}{sound}{END}")
        elif "<|" in segment["text"]:
            raise ValueError(
                f"row {row['id']}: its text holds <|, which lm-eval would take for a "
                "control token; clean the text"
            )
        else:
            said.append(segment["text"])
    return (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{''.join(said)}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def export(name: str, task: Speech, out: Path) -> int:
    """Write one task; gives the number of its items."""
    if task.protocol != "clean" or task.input == "shuffled":
        raise ValueError(f"{name}: only protocol clean with input speech or transcript is exported")
    rows = [
        {"id": id, "prompt": prompt(task, row), "reference": task.column(row, task.reference)}
        for id, row in task.rows.items()
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    artifact.write_atomic(out / f"{name}.jsonl", lines)
    rated = task.metric not in METRICS
    module = f"speechfuse_{'accuracy' if rated else task.metric}"
    text = FUNCTIONS.format(metric="accuracy" if rated else task.metric)
    artifact.write_atomic(out / f"{module}.py", text)
    better = {"higher_is_better": task.metric not in ("wer", "cer")}
    metric = {"metric": task.metric, "aggregation": Function(f"{module}.aggregate"), **better}
    content: dict[str, Any] = {
        "task": name,
        "custom_dataset": Function(f"{module}.rows"),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "reference",
        "num_fewshot": 0,
        "metadata": {"version": 1.0, "file": f"{name}.jsonl"},
        "generation_kwargs": {
            "until": ["<|eot_id|>", "<|end_of_text|>"],
            "do_sample": False,
            "max_gen_toks": task.max_new_tokens,
        },
        "process_results": Function(f"{module}.process"),
        "metric_list": [metric],
    }
    if rated:  # lm-eval keeps the replies and scores nothing
        del content["process_results"]
        content["metric_list"] = [{"metric": "bypass"}]
    artifact.write_atomic(out / f"{name}.yaml", yaml.dump(content, Dumper=Dumper, sort_keys=False))
    return len(rows)


def main(job: ExportTasks) -> None:
    speech = {
        name: spec
        for name, spec in job.tasks.items()
        if isinstance(component := config.resolve(spec["_component_"]), type)
        and issubclass(component, Speech)
    }
    if unknown := [name for name in job.only if name not in speech]:
        raise ValueError(f"only: {unknown[0]!r} is no speech task; there are {', '.join(speech)}")
    limit = {} if job.limit is None else {"limit": job.limit}
    for name in job.only or speech:
        spec = dict(speech[name])
        for key, value in spec.items():
            if isinstance(value, str) and (pin := hub_data.pinned(value)):
                spec[key] = str(hub_data.local(pin))
        count = export(name, config.instantiate(spec, **limit), Path(job.out))
        print(f"{Path(job.out) / name}.yaml: {count:,} items")
    if not speech:
        raise ValueError(
            f"tasks has {', '.join(job.tasks)}, none of speechfuse.evals.Speech, which "
            "alone is exported; stages.evaluate runs the others"
        )


if __name__ == "__main__":
    config.main(main, ExportTasks, __doc__)
