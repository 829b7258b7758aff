"""Read the result files of an evaluation: scores, their items, and tasks that failed.

In: <evals>/<checkpoint>/<task>.json and <task>.failed.json, as stages.evaluate writes them. Out:
the checkpoints of each protocol in order of training, and the failures. No model is loaded.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.scores.intervals import Score

Key = tuple[str, str, str]  # task, split, metric
Items = list[dict[str, Any]]
CELLS = "cells"  # predictions, which are no results
LOWER_IS_BETTER = {"wer", "cer", "hallucination"}


@dataclass
class Run:
    name: str
    path: str


@dataclass
class Measure:
    task: str
    split: str
    metric: str


@dataclass
class Curve:
    """How one measure depends on a condition, such as the SNR: a score for each value of it."""

    title: str
    x: str = config.key("what changes from point to point, with its unit")
    points: dict[str, dict[str, str]] = config.key("label of a point: {task, split, metric}")

    def __post_init__(self) -> None:
        lacks = [label for label, of in self.points.items() if {*of} != {"task", "split", "metric"}]
        if lacks or not self.points:
            where = f"the point {lacks[0]}" if lacks else "points"
            raise ValueError(f"curves: {self.title}: {where} needs {{task, split, metric}}")

    @property
    def keys(self) -> dict[str, Key]:
        keys = {label: (of["task"], of["split"], of["metric"]) for label, of in self.points.items()}
        if len(metrics := {of[2] for of in keys.values()}) > 1:
            raise ValueError(f"curves: {self.title}: one metric a curve, not {', '.join(metrics)}")
        return keys


@dataclass(eq=False)
class ResultFile:
    """One result file; equal only to itself, so that what is computed of it can be cached."""

    checkpoint: str
    name: str
    protocol: str
    scores: dict[Key, Score]
    items: Items
    fingerprints: dict[str, str]
    details: dict[str, Any]


@dataclass
class Checkpoint:
    """The result files of one checkpoint by name, and the file that each score comes from."""

    files: dict[str, ResultFile] = field(default_factory=dict)

    @property
    def scores(self) -> dict[Key, Score]:
        return {key: score for file in self.files.values() for key, score in file.scores.items()}

    def file(self, key: Key) -> ResultFile:
        return next(file for file in self.files.values() if key in file.scores)


Checkpoints = dict[str, Checkpoint]


@dataclass(frozen=True)
class Failure:
    checkpoint: str
    task: str
    error: str


@dataclass
class Results:
    """The checkpoints of each protocol in order of training, and the tasks that failed."""

    protocols: dict[str, Checkpoints]
    failures: list[Failure]

    def of(self, protocol: str) -> Checkpoints:
        if protocol not in self.protocols:
            protocols = ", ".join(self.protocols) or "none"
            raise ValueError(f"no results of protocol={protocol}; there are: {protocols}")
        return self.protocols[protocol]


def key(entry: Any) -> Key:
    """Return (task, split, metric) of a score, a column or a floor."""
    return entry.task, entry.split, entry.metric


def lower_is_better(metric: str) -> bool:
    return not LOWER_IS_BETTER.isdisjoint(metric.split("_"))


def read(evals: Path, base: str | None, runs: list[Run]) -> Results:
    """Read all result files. One whose last evaluation failed is left out: it may be of other data
    or weights.

    Raises ValueError when there is none, and when one is malformed or in the wrong folder.
    """
    results = Results({}, [])
    paths = [p for p in sorted(evals.rglob("*.json")) if p.relative_to(evals).parts[0] != CELLS]
    for path in paths:
        if path.name.endswith(".failed.json"):
            results.failures.append(_failure(path))
        elif path.with_suffix(".failed.json") not in paths:
            file = _result_file(path, path.parent.relative_to(evals).as_posix())
            checkpoints = results.protocols.setdefault(file.protocol, {})
            checkpoint = checkpoints.setdefault(file.checkpoint, Checkpoint())
            if twice := sorted(file.scores.keys() & checkpoint.scores.keys()):
                raise ValueError(
                    f"{path} and {checkpoint.file(twice[0]).name}.json both hold "
                    f"{' '.join(twice[0])}: name the task of one of them differently"
                )
            checkpoint.files[file.name] = file
    if not results.protocols:
        failures = "; ".join(f"{f.checkpoint} {f.task}: {f.error}" for f in results.failures)
        failed = f" (failed: {failures})" if failures else ""
        raise ValueError(f"evals={evals} holds no <checkpoint>/<task>.json: evaluate first{failed}")
    results.protocols = {
        protocol: {name: checkpoints[name] for name in ordered(checkpoints, base, runs)}
        for protocol, checkpoints in sorted(results.protocols.items())
    }
    return results


def _failure(path: Path) -> Failure:
    try:
        return Failure(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a failure ({error}): remove it") from error


def _result_file(path: Path, folder: str) -> ResultFile:
    try:
        content = json.loads(path.read_text("utf-8"))
        if "fingerprint" in content and "protocol" not in content:
            raise ValueError("it is of an older form, without a protocol")
        if any("paired" not in score for score in content["scores"]):
            raise ValueError("it is of an older form, whose scores do not say whether they pair")
        scores = [Score(**score) for score in content["scores"]]
        names = ("checkpoint", "protocol", "items", "fingerprints", "details")
        rest = {name: content[name] for name in names}
        file = ResultFile(name=path.stem, scores={key(score): score for score in scores}, **rest)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no result file ({error}): move it and run stages.evaluate again"
        ) from error
    if file.checkpoint != folder:
        its = path.parents[len(Path(folder).parts)] / file.checkpoint
        raise ValueError(f"{path} holds scores of {file.checkpoint}: its place is {its}")
    return file


def ordered(names: Iterable[str], base: str | None, runs: list[Run]) -> list[str]:
    """Return `base`, what belongs to no run, then the runs in order; epoch_10 after epoch_9."""

    def place(name: str) -> tuple[int, list[str | int]]:
        run = [i for i, run in enumerate(runs) if f"{name}/".startswith(f"{run.name}/")]
        parts = re.split(r"(\d+)", name)  # text and numbers take turns, so any two names compare
        natural = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        return (-2 if name == base else run[0] if run else -1), natural

    return sorted(names, key=place)


def of_run(results: Checkpoints, run: str) -> list[str]:
    """Return the epochs of a run, or the checkpoint of this name."""
    return [name for name in results if f"{name}/".startswith(f"{run}/")]
