"""What a checkpoint knows in text: multiple-choice questions, scored by lm-eval.

In: a Hugging Face folder and a folder of <subject>.jsonl in the columns of cais/mmlu (question,
subject, choices, answer). Out: one item a question, scores by subject. A choice is not a letter
here but the whole reply: its score is the log-likelihood of the choice and the end of the turn, not
divided by its length, and the highest of four is chosen. The end of the turn belongs to it because
otherwise "twenty" could never lose to "twenty one". lm-eval's own cache is not used: it does not
know one checkpoint from another.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from speechfuse.evals.harness_model import harness_model
from speechfuse.evals.tasks import Scored, json_digest, take_evenly
from speechfuse.scores.intervals import Score, mean
from speechfuse.tokens.prompts import render
from speechfuse.tokens.vocabulary import Vocabulary

END_OF_TURN = "<|eot_id|>"
TASK = {  # an ordinary lm-eval task; each subject adds its name and its rows
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": f"{{{{[{', '.join(f'choices[{i}] ~ {END_OF_TURN!r}' for i in range(4))}]}}}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
COLUMNS = ("question", "subject", "choices", "answer")
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is on settings not ours to change


@dataclass
class TextMMLU:
    """Accuracy on each subject as a split of the task. ValueError for a missing or empty folder, a
    row that is no 4-choice question, and a checkpoint whose template does not give the prompts of
    training."""

    folder: str
    batch_size: int = 64
    limit: int | None = None
    protocol = "clean"

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows by id, "<subject>/<number>", in the order of subjects (files) and lines."""
        subjects = read_subjects(Path(self.folder))
        every = [(name, i, row) for name, rows in subjects.items() for i, row in enumerate(rows)]
        return {f"{name}/{i}": row for name, i, row in take_evenly(every, self.limit)}

    def inputs(self) -> dict[str, Any]:
        return {
            "task": "text_mmlu",
            "data": json_digest(self.rows),
            "lm_eval": [metadata.version("lm_eval"), {**TASK, "batch_size": self.batch_size}],
        }

    def scoring(self) -> dict[str, Any]:
        return {}

    def check(self, checkpoint: Path) -> None:
        Vocabulary.load(checkpoint)
        self.ids()

    def ids(self) -> list[str]:
        return list(self.rows)

    def predict(self, checkpoint: Path, todo: list[str]) -> Iterator[list[dict[str, Any]]]:
        """A batch a subject: {"id", "correct": bool, "chosen": 0-3}."""
        subjects: dict[str, list[str]] = {}
        for id in todo:
            subjects.setdefault(id.rpartition("/")[0], []).append(id)
        vocabulary = Vocabulary.load(checkpoint)
        lm = harness_model(checkpoint, self.batch_size)
        for subject, ids in subjects.items():
            batch, rows = [], [self.rows[id] for id in ids]
            for id, row, sample in zip(ids, rows, ask(lm, subject, rows), strict=True):
                check_prompt(lm, vocabulary, row, sample)
                likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
                chosen = max(range(4), key=likelihoods.__getitem__)
                batch.append({"id": id, "correct": bool(sample["acc"]), "chosen": chosen})
            yield batch

    def score(self, predictions: list[dict[str, Any]]) -> Scored:
        items, right = [], dict[str, list[float]]()
        for said in predictions:
            row = self.rows[said["id"]]
            further = {key: value for key, value in row.items() if key not in ("choices", "answer")}
            items.append({**further, **said, "split": said["id"].rpartition("/")[0]})
            right.setdefault(items[-1]["split"], []).append(float(said["correct"]))
        scores = [
            Score("text_mmlu", subject, "acc", *mean(values, None), len(values))
            for subject, values in right.items()
        ]
        return Scored(scores, items)


def ask(lm: HFLM, subject: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's log of each row: `acc`, and by choice `arguments` and `filtered_resps`."""
    data = Dataset.from_list([{key: row[key] for key in COLUMNS} for row in rows])
    # rows in memory: a dataset read from files would be cached by path and time, not by content
    task = {**TASK, "task": subject, "custom_dataset": lambda **_: {"test": data}}
    with redirect_stderr(StringIO()):  # its many progress bars; errors are raised, not printed
        loaded = TaskManager(include_defaults=False).load([task])
        # not simple_evaluate: it asks the Hub for the model's revision and reseeds everything
        results = evaluate(
            lm, loaded, bootstrap_iters=0, apply_chat_template=True, fewshot_as_multiturn=True
        )
    return results["samples"][subject]


def check_prompt(
    lm: HFLM, vocabulary: Vocabulary, row: dict[str, Any], sample: dict[str, Any]
) -> None:
    """ValueError unless the model was shown the ids that training shows for these replies."""
    turn = {"role": "user", "segments": [{"text": row["question"]}]}
    prompt, _ = render(vocabulary, [turn], add_generation_prompt=True)
    for choice, arguments in zip(row["choices"], sample["arguments"], strict=True):
        expected = [*prompt, *vocabulary.text(choice), vocabulary.end_of_turn]
        if lm.tok_encode("".join(arguments)) != expected:
            raise ValueError(
                f"the question {row['question']!r} with the choice {choice!r} is not tokenized as "
                "in training: either the checkpoint's chat template is not the one of "
                "the vocabulary, or a text starts with a line break or holds a control token; "
                "expand the checkpoint again or clean the text"
            )


def read_subjects(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name without its ending, files sorted; ValueError names a bad file and line."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"{folder} holds no <subject>.jsonl files: check the path, or first run the job that "
            "writes the questions"
        )
    subjects = {path.stem: read_questions(path) for path in paths}
    if empty := [f"{name}.jsonl" for name, rows in subjects.items() if not rows]:
        raise ValueError(f"{folder}: no questions in {', '.join(empty)}; fill or remove")
    return subjects


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of one subject, checked: text, 4 choices, the index of the right one."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            question, subject, choices, answer = (row[key] for key in COLUMNS)
        except (ValueError, TypeError, KeyError) as error:
            columns = ", ".join(COLUMNS)
            raise ValueError(f"{where}: not JSON with the keys {columns} ({error})") from error
        if not isinstance(choices, list) or len(choices) != 4:
            raise ValueError(f"{where}: choices={choices!r} must be a list of 4 texts")
        if not all(isinstance(text, str) and text for text in (question, subject, *choices)):
            raise ValueError(f"{where}: question, subject and choices must be text, none empty")
        if type(answer) is not int or answer not in range(4):
            raise ValueError(f"{where}: answer={answer!r} must be 0, 1, 2 or 3: a choice's index")
        rows.append(row)
    return rows
