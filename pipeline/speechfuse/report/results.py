"""Result files of an evaluation, read: scores, the items behind them, and cells that failed.

In: <evals>/<checkpoint>/<task>.json and <task>.failed.json, as stages.evaluate writes them. Out:
the checkpoints of each protocol in order of training, and the failures. Nothing here knows a model.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from speechfuse.scores.intervals import Score

Key = tuple[str, str, str]  # task, split, metric
Items = list[dict[str, Any]]
CELLS = "cells"  # predictions, which are no results
LOWER_IS_BETTER = {"wer", "cer"}

# What a metric may be made of, {field of an item: ...}: the part above the line and the one below.
PARTS: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    lambda item: {"errors": item["errors"], "words": item["words"]},
    lambda item: {"correct": item["correct"]},
    lambda item: {"value": item["value"]},
]

ABOVE = ("errors", "correct", "value")


@dataclass
class Run:
    name: str
    path: str


@dataclass
class Baseline:
    """A row of its own for a cell that is no epoch's: a cascade, transcripts instead of speech."""

    name: str = field(metadata={"help": "what the row is called"})
    checkpoint: str = field(metadata={"help": "checkpoint of the result file"})
    task: str = field(metadata={"help": "name of the result file"})
    as_task: str = field(metadata={"help": "task in whose columns its scores stand"})


@dataclass
class Curve:
    """Scores side by side: how one measure goes with the strength of something."""

    title: str
    x: str = field(metadata={"help": "what changes from point to point, with its unit"})
    points: dict[str, dict[str, str]] = field(
        metadata={"help": "label of a point: {task, split, metric}, in order"}
    )

    @property
    def keys(self) -> dict[str, Key]:
        return {label: (of["task"], of["split"], of["metric"]) for label, of in self.points.items()}


@dataclass(eq=False)
class ResultFile:
    """One result file; equal to itself alone, so that what is computed of it can be kept."""

    checkpoint: str
    name: str
    protocol: str
    scores: dict[Key, Score]
    items: Items
    fingerprints: dict[str, str]
    details: dict[str, Any]


@dataclass
class Checkpoint:
    """Cells by the name of their file, and where each score comes from."""

    cells: dict[str, ResultFile] = field(default_factory=dict)

    @property
    def scores(self) -> dict[Key, Score]:
        return {key: score for cell in self.cells.values() for key, score in cell.scores.items()}

    def cell(self, key: Key) -> ResultFile:
        return next(cell for cell in self.cells.values() if key in cell.scores)


ResultsByCheckpoint = dict[str, Checkpoint]


@dataclass(frozen=True)
class Failure:
    checkpoint: str
    task: str
    error: str


@dataclass
class Results:
    """By protocol the checkpoints in order, and every cell that failed."""

    protocols: dict[str, ResultsByCheckpoint]
    failures: list[Failure]

    def of(self, protocol: str) -> ResultsByCheckpoint:
        if protocol not in self.protocols:
            known = ", ".join(self.protocols) or "none"
            raise ValueError(f"no results of protocol={protocol}; there are: {known}")
        return self.protocols[protocol]


def key(entry: Any) -> Key:
    """(task, split, metric) of whatever has them: a score, a column, a floor."""
    return entry.task, entry.split, entry.metric


def lower_is_better(metric: str) -> bool:
    return not LOWER_IS_BETTER.isdisjoint(metric.split("_"))


def read(evals: Path, base: str, runs: list[Run], baselines: Iterable[Baseline] = ()) -> Results:
    """All result files. ValueError when there is none, or one is of another form or place.

    A result whose last evaluation failed is not read: it may be of other data or weights.
    """
    results = Results({}, [])
    every = sorted(evals.rglob("*.json"))
    paths = [path for path in every if path.relative_to(evals).parts[0] != CELLS]
    for path in paths:
        if path.name.endswith(".failed.json"):
            results.failures.append(_failure(path))
        elif path.with_suffix(".failed.json") not in paths:
            cell = _cell(path, path.parent.relative_to(evals).as_posix())
            found = results.protocols.setdefault(cell.protocol, {})
            checkpoint = found.setdefault(cell.checkpoint, Checkpoint())
            if twice := sorted(cell.scores.keys() & checkpoint.scores.keys()):
                raise ValueError(
                    f"{path} and {checkpoint.cell(twice[0]).name}.json both hold "
                    f"{' '.join(twice[0])}: name the task of one of them differently"
                )
            checkpoint.cells[cell.name] = cell
    if not results.protocols:
        failed = "; ".join(f"{f.checkpoint} {f.task}: {f.error}" for f in results.failures)
        failed = f" (failed: {failed})" if failed else ""
        raise ValueError(
            f"evals={evals} holds no <checkpoint>/<task>.json: run stages.evaluate{failed}"
        )
    for baseline in baselines:
        _stand(results, baseline)
    results.protocols = {
        protocol: {name: found[name] for name in ordered(found, base, runs)}
        for protocol, found in sorted(results.protocols.items())
    }
    return results


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _failure(path: Path) -> Failure:
    try:
        told = _read(path)
        return Failure(told["checkpoint"], told["task"], told["error"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of a failure ({error}): remove it") from error


def _cell(path: Path, place: str) -> ResultFile:
    try:
        told = _read(path)
        if "fingerprint" in told and "protocol" not in told:
            raise ValueError("it is of an older form, without a protocol")
        scores = [Score(**score) for score in told["scores"]]
        cell = ResultFile(
            told["checkpoint"],
            path.stem,
            told["protocol"],
            {key(s): s for s in scores},
            told["items"],
            told["fingerprints"],
            told["details"],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no result file ({error}): move it and run stages.evaluate again"
        ) from error
    if cell.checkpoint != place:
        its = path.parents[len(Path(place).parts)] / cell.checkpoint
        raise ValueError(f"{path} holds scores of {cell.checkpoint}: its place is {its}")
    return cell


def _stand(results: Results, baseline: Baseline) -> None:
    """Give a baseline its row. One that failed has none, and is among the failures."""
    if (baseline.checkpoint, baseline.task) in {(f.checkpoint, f.task) for f in results.failures}:
        return
    for found in results.protocols.values():
        cell = found.get(baseline.checkpoint, Checkpoint()).cells.get(baseline.task)
        if cell:
            moved = [replace(score, task=baseline.as_task) for score in cell.scores.values()]
            cell = replace(cell, checkpoint=baseline.name, scores={key(s): s for s in moved})
            found.setdefault(baseline.name, Checkpoint()).cells[baseline.task] = cell
            return
    raise ValueError(
        f"baselines: there is no {baseline.checkpoint}/{baseline.task}.json for {baseline.name}: "
        "run stages.evaluate on it, or take the entry out"
    )


def ordered(names: Iterable[str], base: str, runs: list[Run]) -> list[str]:
    """`base`, then what belongs to no run, then the runs in order; epoch_10 after epoch_9."""

    def place(name: str) -> tuple[int, list[str | int]]:
        of = [i for i, run in enumerate(runs) if f"{name}/".startswith(f"{run.name}/")]
        parts = re.split(r"(\d+)", name)  # text and numbers take turns, so any two names compare
        natural = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        return (-2 if name == base else of[0] if of else -1), natural

    return sorted(names, key=place)


def of_run(found: ResultsByCheckpoint, run: str) -> list[str]:
    return [name for name in found if name.startswith(f"{run}/")]


@lru_cache(maxsize=4096)
def numbers(cell: ResultFile, of: Key) -> Items | None:
    """The items behind a score, {id, cluster?, and its number}; None where the file has none.

    A file may hold several scores. Items are those of the score's split, or all of them, and they
    count only when they give its very value over its very n.
    """
    score = cell.scores[of]
    mine = [item for item in cell.items if item.get("split") == score.split]
    for items in (mine, cell.items):
        for part in PARTS:
            try:
                found = [{**_about(item), **part(item)} for item in items]
            except KeyError:
                continue
            told = [item for item in found if None not in item.values()]  # the rest: no verdict
            above = sum(next(item[name] for name in ABOVE if name in item) for item in told)
            below = sum(item.get("words", 1) for item in told)
            same = below and math.isclose(above / below, score.value, rel_tol=1e-6, abs_tol=1e-9)
            once = len({item["id"] for item in found}) == len(found)
            if same and once and len(told) == score.n:
                return found
    return None


def _about(item: dict[str, Any]) -> dict[str, Any]:
    return {"id": item["id"], "cluster": item.get("cluster", item["id"])}
