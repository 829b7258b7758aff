"""lm-eval's own tasks: the official mmlu from a local folder or the Hub, and any other by name.

In: a Hugging Face folder, the name of a task or group of lm-eval, and its data: a folder, or what
its YAML names on the Hub. Out: scores by task and group, with each item's metrics and doc_hash.
Prompts, few-shot examples and metrics are lm-eval's, and so are the numbers; a task is the grain of
resuming. Its cache (use_cache) is never on: it does not know one checkpoint from another.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from speechfuse.components import Batch
from speechfuse.evals import task_content
from speechfuse.evals.harness_model import compiled_once, harness_model
from speechfuse.evals.tasks import Scored, json_digest, take_evenly
from speechfuse.scores.intervals import Score, mean
from speechfuse.tokens.prompts import render
from speechfuse.tokens.vocabulary import Vocabulary

OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
MMLU = OFFICIAL / "mmlu" / "default"
SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in MMLU.glob("mmlu_*.yaml"))
END_OF_TURN = "<|eot_id|>"
COLUMNS = {"question", "choices", "answer"}
SPLITS = ("test", "dev")  # what the official task reads
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is on settings not ours
SEED = 1234  # of lm-eval's simple_evaluate, for few-shot examples that are drawn


@dataclass
class Harness:
    """A task or group of lm-eval 0.4.13.

    `task`: e.g. mmlu, gsm8k, arc_challenge. `data`: a folder instead of the Hub's dataset; for mmlu
    <subject>/{test,dev}*.{parquet,jsonl} of 57 subjects. `num_fewshot` None: the task's own.
    `include`: a folder of further task files, whose multiple-choice questions are checked; where
    their choices hold the end of a turn, each prompt must have the ids that training shows. Scores
    are means over items: for a group that is weighting by size, as in the official mmlu; a group
    that aggregates nothing has none of its own.
    `metric`: the headline, by default the first. With `speech_on` a checkpoint that has a speech
    part beside its language model is asked with that part on, as it is when it listens; the
    splits then end in "_speech_on". `name` names the task in the scores.
    """

    task: str
    data: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    metric: str | None = None
    include: str | None = None
    batch_size: Batch = 16
    limit: int | None = None
    speech_on: bool = False
    name: str = ""
    protocol = "clean"

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """lm-eval's tasks by name, with their data. Raises ValueError where they cannot be had."""
        reading: AbstractContextManager[Any] = nullcontext()
        if self.data is not None:
            if not Path(self.data).is_dir():
                raise ValueError(f"data={self.data} is no folder: check the path")
            # `datasets` knows files by name and time: its cache goes with this task
            self._arrow = tempfile.TemporaryDirectory(prefix="speechfuse-lm-eval-")
            reading = _read_from(Path(self.data), self.task == "mmlu", self._arrow.name)
        manager = _manager(self.task, self.include)
        datasets.disable_progress_bars()
        try:
            with redirect_stderr(StringIO()), reading:
                tree = manager.load(self.task)
        except Exception as error:
            message = " ".join(str(error.__cause__ or error).split())
            where = self.data or "its dataset on the Hub"
            raise ValueError(f"task={self.task}: {where} cannot be loaded: {message}") from error
        self._groups = tree.get("group_map", {})
        group = tree.get("groups", {}).get(self.task)
        self._total = group is None or bool(group.aggregate_metric_list)
        return {name: self._set(task) for name, task in sorted(tree["tasks"].items())}

    def _set(self, task: Any) -> Any:
        """Set few-shot examples as simple_evaluate does, which would also reseed everything and ask
        the Hub. Raises ValueError for more examples than the task has."""
        own = task.get_config("num_fewshot")
        if own == 0 and self.num_fewshot:
            raise ValueError(f"num_fewshot={self.num_fewshot}: {task.task_name} fixes it to 0")
        shots = own or 0 if self.num_fewshot is None else self.num_fewshot
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(seed=SEED)
        if shots > (there := len(list(task.fewshot_docs() or []))):
            raise ValueError(
                f"num_fewshot={shots}: {task.task_name} has {there} examples to show; check its "
                "dev split"
            )
        if self.include and task.OUTPUT_TYPE == "multiple_choice":
            with compiled_once():
                _check_questions(task)
        return task

    def inputs(self) -> dict[str, Any]:
        tasks = self.loaded.items()
        docs = [[name, [*of.eval_docs], [*(of.fewshot_docs() or [])]] for name, of in tasks]
        content = json.dumps(docs, sort_keys=True, default=str)
        return {
            "task": self.task,
            "data": json_digest(content),
            "num_fewshot": self.num_fewshot,
            "chat_template": self.apply_chat_template,
            "batch_size": self.batch_size,
            "lm_eval": metadata.version("lm_eval"),
            "items": json_digest(self.ids()),
            "log_softmax": "float32",
            "group": [self._total, sorted(self._parts())],
            "config": json_digest({name: task_content.of_task(task) for name, task in tasks}),
            "files": task_content.of_files(self.include) if self.include else {},
            **({"speech_on": True} if self.speech_on else {}),  # older keys stay valid
        }

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        vocabulary = Vocabulary.load(checkpoint)
        if self.apply_chat_template and not vocabulary.tokenizer.chat_template:
            raise ValueError(f"apply_chat_template=true, but {checkpoint} has no chat template")
        if self.task == "mmlu" and (count := len(self.loaded)) != 57:
            raise ValueError(f"mmlu has {count} subjects here; the official group has 57")
        for name, task in self.loaded.items():
            if not _means(task):
                raise ValueError(
                    f"task={self.task}: no metric of {name} is a mean over items, so "
                    "it cannot be scored here"
                )

    def ids(self) -> list[str]:
        every = [f"{name}/{i}" for name, t in self.loaded.items() for i in range(len(t.eval_docs))]
        return take_evenly(every, self.limit)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield a batch for each task: {"id", "doc_hash", "metrics": {name: number}, "said",
        "target"}."""
        by_task: dict[str, list[int]] = {}
        for id in todo:
            name, _, number = id.rpartition("/")
            by_task.setdefault(name, []).append(int(number))
        lm = harness_model(checkpoint, self.batch_size, self.speech_on)
        vocabulary, chat = Vocabulary.load(checkpoint), self.apply_chat_template
        template = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
        for name, numbers in by_task.items():
            task = self.loaded[name]
            subset = None if len(numbers) == len(task.eval_docs) else {name: numbers}
            quiet = redirect_stderr(StringIO()), redirect_stdout(StringIO())  # many progress bars
            with quiet[0], quiet[1], compiled_once():
                tasks = {"tasks": {name: task}}
                results = evaluate(lm, tasks, samples=subset, bootstrap_iters=0, **template)
            if self.include and not task.get_config("num_fewshot"):
                for sample in results["samples"][name]:
                    _check_prompt(lm, vocabulary, task, sample)
            yield _predictions(name, results["samples"][name], _means(task))

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        metrics = list(dict.fromkeys(m for entry in predictions for m in entry["metrics"]))
        head = self.metric or metrics[0]
        if head not in metrics:
            raise ValueError(f"metric={head}: {self.task} has {', '.join(metrics)}")
        metrics.sort(key=lambda metric: metric != head)
        numbers = [entry["metrics"].get(head) for entry in predictions]
        binary, suffix = {*numbers} <= {0, 1}, "_speech_on" if self.speech_on else ""
        items = [
            {**entry, "split": entry["id"].rpartition("/")[0] + suffix}
            | ({"correct": bool(number)} if binary else {"value": number})
            for entry, number in zip(predictions, numbers, strict=True)
        ]
        total, parts = {"all": {*self.loaded}} if self._total else {}, self._parts()
        own = {name: {name} for name in self.loaded} if len(self.loaded) > 1 or not total else {}
        scores = []
        for split, names in {**total, **parts, **own}.items():
            names = {name + suffix for name in names}
            rows = [item["metrics"] for item in items if item["split"] in names]
            for metric in metrics:
                if values := [float(row[metric]) for row in rows if metric in row]:
                    paired, interval = metric == head and split not in parts, mean(values, None)
                    of = self.name, split + suffix, metric
                    scores.append(Score(*of, *interval, len(values), paired))
        shots = sorted({task.get_config("num_fewshot") for task in self.loaded.values()})
        about = (
            f"lm-eval {metadata.version('lm_eval')} {self.task}, {'/'.join(map(str, shots))}-shot, "
            f"{'the' if self.apply_chat_template else 'no'} chat template"
        )
        return Scored(scores, items, {"protocol": about})

    def _parts(self) -> dict[str, set[str]]:
        """Return the groups below the task that was asked for, with the tasks in each."""

        def leaves(name: str) -> set[str]:
            below = self._groups.get(name)
            return {name} if below is None else {leaf for of in below for leaf in leaves(of)}

        groups = {name: leaves(name) for name in self._groups}
        return {n: of for n, of in groups.items() if len(of) < len(self.loaded) and len(of) > 1}


def _check_questions(task: Any) -> None:
    """Raise ValueError for a question without text, with an empty choice, or without a right
    one."""
    for number, doc in enumerate(task.eval_docs):
        where = f"question {task.task_name}/{number}"
        try:
            question, choices = task.doc_to_text(doc), task.doc_to_choice(doc)
        except Exception as error:  # a template's, of whatever kind
            raise ValueError(f"{where}: its choices cannot be read ({error})") from error
        columns = doc.get("choices", choices)  # before a template makes texts of them
        texts = [question, *columns, *(choice.removesuffix(END_OF_TURN) for choice in choices)]
        if type(columns) is not list or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(
                f"{where}: {question!r} and the list of its choices {columns!r} must be texts, "
                "none of them empty"
            )
        if type(answer := task.doc_to_target(doc)) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{where}: answer={answer!r} must be the index of one of {len(choices)} choices, "
                "the first is 0"
            )


def _check_prompt(lm: Any, vocabulary: Vocabulary, task: Any, sample: dict[str, Any]) -> None:
    """Raise ValueError unless the model was shown the ids that training shows. Checked are choices
    that are whole replies, with the end of the turn."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    question = task.doc_to_text(sample["doc"])
    turn = {"role": "user", "segments": [{"text": question}]}
    prompt, _ = render(vocabulary, [turn], add_generation_prompt=True)
    choices = task.doc_to_choice(sample["doc"])
    for choice, arguments in zip(choices, sample["arguments"], strict=False):
        text = choice.removesuffix(END_OF_TURN)
        expected = [*prompt, *vocabulary.text(text), vocabulary.end_of_turn]
        if text != choice and lm.tok_encode("".join(arguments)) != expected:
            raise ValueError(
                f"the question {question!r} with the choice {text!r} is not tokenized as in "
                "training: either the checkpoint's chat template is not the one of the "
                "vocabulary, or a text starts with a line break or holds a control token; expand "
                "the checkpoint again or clean the text"
            )


def _means(task: Any) -> set[str]:
    """Return the metrics of a task that are means over its items."""
    aggregations = task.aggregation().items()
    return {metric for metric, how in aggregations if getattr(how, "__name__", "") == "mean"}


def _predictions(name: str, samples: list[dict[str, Any]], means: set[str]) -> list[dict[str, Any]]:
    """Return lm-eval's log of a task, an entry for each item; a filter's metrics are named
    metric,filter."""
    entries: dict[int, dict[str, Any]] = {}
    for sample in samples:
        reply = sample["filtered_resps"][0]
        if isinstance(reply, (list, tuple)):  # log-likelihoods: which choice is the likeliest
            values = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
            reply = values.index(max(values))
        entry = {"id": f"{name}/{sample['doc_id']}", "doc_hash": sample["doc_hash"]}
        entry |= {"metrics": {}, "said": reply, "target": str(sample["target"])}
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        own = [metric for metric in sample["metrics"] if metric in means]
        entries.setdefault(sample["doc_id"], entry)["metrics"] |= {
            f"{metric}{suffix}": float(sample[metric]) for metric in own
        }
    return list(entries.values())


@cache
def _manager(task: str, include: str | None) -> TaskManager:
    """Return lm-eval's index of tasks: for mmlu of its own folder alone, as reading all others
    takes seconds. Raises ValueError for a folder or task that is not there."""
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"include={include} is no folder of task files: check the path")
    folders: list[str | Path] = [MMLU] if task == "mmlu" else []
    folders += [include] if include else []
    manager = TaskManager(include_defaults=task != "mmlu" and not include, include_path=folders)
    if task not in manager.all_tasks:
        raise ValueError(
            f"task={task}: lm-eval {metadata.version('lm_eval')} has no task or group of this name"
            + (f" in {include}" if include else "; `lm_eval ls tasks` lists them")
        )
    return manager


def _read_from(folder: Path, mmlu: bool, arrow: str) -> AbstractContextManager[Any]:
    """Return a context in which lm-eval's tasks read `folder` instead of the dataset that they
    name, by way of the folder `arrow`; those of mmlu read a subject's files each. Raises ValueError
    unless all 57 subjects are there."""
    load = datasets.load_dataset
    if mmlu and (lost := [name for name in SUBJECTS if not (folder / name).is_dir()]):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"data={folder} has {57 - len(lost)} of the 57 subjects of MMLU: {lost[0]}{more} is "
            "not there; copy cais/mmlu again, whole"
        )

    def read(path: str, name: str | None = None, **options: Any) -> Any:
        options["cache_dir"] = arrow
        if not mmlu:
            return load(str(folder.absolute()), name, **options)
        kind, files = subject_files(folder / str(name))
        rows = load(kind, data_files=files, **options)
        for split, names in rows.column_names.items():
            if lost := sorted(COLUMNS - {*names}):
                raise ValueError(
                    f"{files[split][0]} has no column {', '.join(lost)}; it has "
                    f"{', '.join(sorted(names))}, and MMLU needs {', '.join(sorted(COLUMNS))}"
                )
        return rows

    return patch.object(datasets, "load_dataset", read)


def subject_files(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """Return (the reader of `datasets`, files by split) of one subject of cais/mmlu. Raises
    ValueError when a split has no file."""
    for suffix, kind in (("parquet", "parquet"), ("jsonl", "json")):
        files = {s: sorted(map(str, folder.glob(f"{s}*.{suffix}"))) for s in SPLITS}
        if all(files.values()):
            return kind, files
    raise ValueError(f"{folder} has no {' and '.join(SPLITS)}, each *.parquet or each *.jsonl")
