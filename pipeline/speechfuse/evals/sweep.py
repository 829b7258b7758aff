"""The sweep: which cells (checkpoint, task) there are, and each one predicted and scored.

In: the configuration of stages/evaluate.py. Out: one JSON result a cell. Predictions are cached by
content, so what was computed is never computed again.
"""

import json
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from itertools import filterfalse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, components, config, scores, workers
from speechfuse.config import key
from speechfuse.evals import cells
from speechfuse.evals.cells import Predictions
from speechfuse.evals.tasks import Task, json_digest
from speechfuse.hub import data as hub_data
from speechfuse.provenance import maker
from speechfuse.rows import selection
from speechfuse.scores.judge import Judge
from speechfuse.texts import shared_words

PATHS = {"data", "include", "train", "transcripts"}  # content counts, in a task's inputs or scoring
CHARACTERS = 4  # of a token, about
Cell = tuple[str, Path, str]  # name of the checkpoint, its folder, task
LEAST = {"batch_size": 1, "max_new_tokens": 1, "limit": 1, "num_fewshot": 0}  # of a task's numbers
SCORING = ("jiwer", "sacrebleu", "rouge_score", "openai-whisper")


@dataclass
class Runtime:
    processes: int = key("cells at a time, one GPU each", 1, least=1, most=4096)
    device: str = key("cpu, cuda, or auto", "auto")
    threads: int = key("CPU threads a process; 0: as torch has, most cores", 0, least=0, most=4096)
    dry_run: bool = key("say what would be done, and stop", False)


@dataclass
class Evaluate:
    out: str = key("folder of the result files")
    checkpoints: list[dict[str, Any]] = key("entries {name, path, tasks}")
    tasks: dict[str, dict[str, Any]] = key("task name -> {_component_, ...}")
    may_be_absent: list[str] = key("tasks left out where their files are not there", [])
    only: list[str] = key("checkpoints or tasks, e.g. [stage2/epoch_1, mmlu]", [])
    limit: int | None = key("items of each task, for a quick look; marked partial", None, least=1)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        for task, spec in self.tasks.items():
            for name, least in LEAST.items():
                if isinstance(value := spec.get(name), int | float) and value < least:
                    raise ValueError(f"tasks.{task}.{name}={value}: at least {least} is needed")
        if unknown := [task for task in self.may_be_absent if task not in self.tasks]:
            raise ValueError(f"may_be_absent: tasks does not describe {unknown[0]}")


@dataclass
class Work:
    """One cell to fill and to score; `name` is that of the checkpoint in results."""

    name: str  # of the checkpoint, as results call it
    checkpoint: Path
    task: str
    spec: dict[str, Any]
    predictions: Predictions
    fingerprint: str
    result: Path


def expand(entry: dict[str, Any]) -> list[tuple[str, Path]]:
    """Return (name, folder) of a checkpoint, or of every epoch of a run that is complete."""
    path = Path(entry["path"])
    epochs = sorted(path.glob("epoch_*"), key=lambda p: int(p.name.removeprefix("epoch_")))
    if epochs:
        artifact.manifest_of(path)
        return [(f"{entry['name']}/{epoch.name}", epoch) for epoch in epochs]
    return [(str(entry["name"]), path)]


def cells_of(job: Evaluate) -> list[Cell]:
    """Return the cells that `only` selects, without tasks that are `left_out`; other runs need not
    be there. Raises ValueError for an unknown name, and for a task that is not described."""
    names, chosen = [*job.tasks], []
    tasks, others = {*job.only} & {*job.tasks}, {*job.only} - {*job.tasks}
    for entry in job.checkpoints:
        if missing := {"name", "path", "tasks"} - entry.keys():
            raise ValueError(f"checkpoints: {entry} lacks {', '.join(sorted(missing))}")
        if not isinstance(entry["name"], str | int):  # YAML reads 1.10 as 1.1
            raise ValueError(f"checkpoints: the name {entry['name']} is no text; put it in quotes")
        name = str(entry["name"])
        if not entry["tasks"]:
            raise ValueError(f"checkpoints: {name} has no tasks; name some, or remove it")
        if name.split("/")[0] == "cells":
            raise ValueError("checkpoints: 'cells' is the folder of predictions; take another name")
        for part in (name, *map(str, entry["tasks"])):  # results are files below `out`
            if Path(part).is_absolute() or ".." in Path(part).parts:
                raise ValueError(f"checkpoints: {part!r} leads out of {job.out}; take another name")
        for task in entry["tasks"]:
            if task not in job.tasks:
                raise ValueError(
                    f"checkpoints: {name} has the task {task!r}, which tasks does not describe; it "
                    f"has {', '.join(job.tasks)}"
                )
        names.append(name)
        if others and not any(f"{other}/".startswith(f"{name}/") for other in others):
            continue
        epochs, path = expand(entry), Path(entry["path"])
        if not path.exists():  # an epoch of a run to come
            to_come = (each for each in others if each.startswith(f"{name}/"))
            epochs += [(each, path / each.removeprefix(f"{name}/")) for each in to_come]
        of_entry = [task for task in entry["tasks"] if not tasks or task in tasks]
        for full, checkpoint in epochs:
            names.append(full)
            if not others or {name, full} & others:
                chosen += [(full, checkpoint, task) for task in of_entry]
    if unknown := [name for name in job.only if name not in names]:
        raise ValueError(
            f"only={job.only}: no checkpoint or task is named {unknown[0]!r}; there are "
            f"{', '.join(dict.fromkeys(names))}"
        )
    if not chosen:
        raise ValueError("checkpoints: no task is asked of any of them; nothing would be evaluated")
    places = [(name, task) for name, _, task in chosen]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ValueError(f"checkpoints: {' '.join(twice[0])} is there twice; name them differently")
    return [cell for cell in chosen if cell[2] not in left_out(job)]


def left_out(job: Evaluate) -> dict[str, str]:
    """Return the tasks that may be absent, and are: which file of each is not there."""
    return {task: lost[0] for task in job.may_be_absent if (lost := absent(job.tasks[task]))}


def pinned(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the task with local folders in place of its repo@revision data."""
    texts = {key: value for key, value in spec.items() if isinstance(value, str)}
    pins = {key: pin for key, value in texts.items() if (pin := hub_data.pinned(value))}
    return {**spec, **{key: str(hub_data.local(pin)) for key, pin in pins.items()}}


_tasks: dict[str, Task] = {}


def instance(spec: dict[str, Any]) -> Task:
    """Return the task; one for all its cells, as it may hold much data."""
    text = json.dumps(spec)  # not sorted: its splits keep their order
    if text not in _tasks:
        _tasks[text] = config.instantiate(spec)
    return _tasks[text]


def spec_of(job: Evaluate, task: str) -> dict[str, Any]:
    """Return a task's settings as its cells have them."""
    limit = {} if job.limit is None else {"limit": job.limit}
    return {**pinned(job.tasks[task]), **limit}


def absent(spec: dict[str, Any]) -> list[str]:
    """Return the files and folders of a task that are not there."""
    paths = [str(spec[key]) for key in sorted(PATHS) if spec.get(key)]
    return [p for p in [*paths, *spec.get("contamination", [])] if not Path(p).exists()]


def survey(job: Evaluate) -> Iterator[str]:
    """Yield what a sweep would do: a line for each cell that is to be made, with what its judge
    costs. What is not there is named with the verb that makes it; what depends on it, as not
    known."""
    chosen = cells_of(job)
    specs = {task: spec_of(job, task) for _, _, task in chosen}
    lacks = {
        cell: [*filterfalse(Path.exists, cell[1:2]), *absent(specs[cell[2]])] for cell in chosen
    }
    works = prepare(job, [cell for cell in chosen if not lacks[cell]])
    todo: list[tuple[str, str, int | None]] = []
    for work in (work for work in works if not is_done(work)):
        count = len({*instance(work.spec).ids()} - work.predictions.read().keys())
        todo.append((work.name, work.task, count))
    for name, _, task in (cell for cell in chosen if lacks[cell]):
        known = specs[task].get("data") and not absent(specs[task])  # without data: the Hub's
        todo.append((name, task, len(instance(specs[task]).ids()) if known else None))
    judges: dict[Any, tuple[Judge, Counter[str]]] = {}
    for name, task, items in todo:
        said = "items not known yet" if items is None else f"{items:,} items to compute"
        if rater := getattr(instance(specs[task]), "rater", None):
            calls, most = judging(instance(specs[task]), items is not None)
            said += f"; {'for each of them ' * (items is None)}{rater.outlook(calls, most)}"
            costs = rater.model, rater.max_tokens, rater.price_in, rater.price_out
            asked = judges.setdefault(costs, (rater, Counter()))[1]
            if items is None:
                asked["unknown"] += 1
            else:
                asked.update(calls=calls, characters=most)
        yield f"{name} {task}: {said}"
    for path in dict.fromkeys(path for of_cell in lacks.values() for path in of_cell):
        yield f"{path} is not there; {maker(str(path))}"
    for rater, asked in judges.values():
        known = f"in all {rater.outlook(asked['calls'], asked['characters'])}"
        more = f", and those of {asked['unknown']} cells whose items are not known yet"
        yield known + more * bool(asked["unknown"])
    total, unknown = sum(items or 0 for *_, items in todo), any(items is None for *_, items in todo)
    yield (
        f"{job.out}: {len(todo)} of {len(chosen)} cells to do, {total:,} items"
        f"{' and those not known' * unknown}; nothing was run"
    )


def judging(task: Any, known: bool) -> tuple[int, int]:
    """Return (calls, characters of their prompts at most) that the judge of a task takes: for all
    its items where these are known, else for one."""
    rows = [*task.rows.values()] if known else []
    texts = [task.column(row, name) for row in rows for name in (task.question, task.reference)]
    calls = len(rows) or 1
    own = len(task.rater.prompt) + CHARACTERS * task.max_new_tokens
    return calls, sum(map(len, texts)) + calls * own


def prepare(job: Evaluate, chosen: list[Cell]) -> list[Work]:
    """Return the chosen cells, checked. Raises ValueError for the first that could not succeed."""
    out, specs = Path(job.out), {task: spec_of(job, task) for _, _, task in chosen}
    todo, fingerprint = [], cache(cells.fingerprint)
    for name, checkpoint, task in tqdm(chosen, "checking", unit="cell", leave=False, delay=1):
        content = fingerprint(checkpoint, out)
        spec, of_spec = specs[task], instance(specs[task])
        try:
            of_spec.check(checkpoint)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name} {task}: {error}") from error
        predictions = Predictions(out, content, of_spec)
        settings = {key: value for key, value in spec.items() if key not in PATHS}
        depends = [predictions.key, settings, of_spec.scoring(), code(spec)]
        result = out / name / f"{task}.json"
        todo.append(Work(name, checkpoint, task, spec, predictions, json_digest(depends), result))
    return todo


@cache
def code_of_rooms() -> list[str]:
    """Return the hashes of all modules of evals and scores, and of the two beyond them that decide
    which items a split has and which are in the training data; and the versions of the libraries
    that count errors."""
    folders = Path(__file__).parent, Path(scores.__file__).parent
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    others = [Path(str(module.__file__)) for module in (selection, shared_words)]
    versions = [metadata.version(library) for library in SCORING]
    return [*(artifact.sha256_of(path) for path in [*paths, *others]), *versions]


def code(spec: dict[str, Any]) -> str:
    """Return the hash of the code that turns predictions into scores, the task's own and its
    components' included: when it changes, all is scored again."""
    return json_digest([components.code_digest(config.modules_of(spec)), *code_of_rooms()])


def is_done(work: Work) -> bool:
    """Return True if the result is there, of the same content, and lacks no verdict."""
    content = json.loads(work.result.read_text("utf-8")) if work.result.exists() else {}
    coverage = content.get("details", {}).get("coverage", 1.0)
    return content.get("fingerprint") == work.fingerprint and coverage == 1.0


def predict(work: Work) -> tuple[int, str | None]:
    """Return (items computed, the error or None) of one cell, in a worker process."""
    try:
        with work.predictions.locked():
            return sum(work.predictions.fill(instance(work.spec), work.checkpoint)), None
    except Exception as error:
        return 0, error_line(work, error)


def error_line(work: Work, error: Exception) -> str:
    """Return an error in one line; its traceback is written beside the predictions."""
    text = "".join(traceback.format_exception(error))
    artifact.write_atomic(work.predictions.folder / "traceback.txt", text)
    line = " ".join(str(error).split())
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def predict_all(
    todo: list[Work], runtime: Runtime, bar: tqdm
) -> Iterator[tuple[Work, int, str | None]]:
    """Yield (cell, items computed, error or None) as cells are finished."""
    devices = workers.gpus(runtime.device)[: runtime.processes]
    if runtime.processes > 1:
        with workers.pool(runtime.processes, devices, runtime.threads) as executor:
            futures = {executor.submit(predict, work): work for work in todo}
            for future in as_completed(futures):
                try:
                    computed, error = future.result()
                except BrokenProcessPool:
                    computed, error = 0, "a process was killed (out of memory?): run it again"
                bar.update(computed)
                yield futures[future], computed, error
        return
    workers.use(devices[0] if devices else "cpu", runtime.threads)
    waiting = deque((work, False) for work in todo)
    while waiting:
        work, wait = waiting.popleft()
        bar.set_postfix_str(f"{work.name} {work.task}")
        computed, error = 0, None
        try:
            with work.predictions.locked(wait) as ours:
                if not ours:  # another process is at work on it: look again when the rest is done
                    waiting.append((work, True))
                    continue
                for count in work.predictions.fill(instance(work.spec), work.checkpoint):
                    computed += count
                    bar.update(count)
        except Exception as failure:
            error = error_line(work, failure)
        yield work, computed, error


def result_of(work: Work, partial: bool) -> dict[str, Any]:
    """Return the result file's content, from predictions alone."""
    task, entries = instance(work.spec), work.predictions.read()
    scored = task.score([entries[id] for id in task.ids()])
    named = [replace(score, task=score.task or work.task) for score in scored.scores]
    head = named[0]
    return {
        "checkpoint": work.name,
        "task": work.task,
        "protocol": task.protocol,
        "metric": head.metric,
        "value": head.value,
        "interval": [head.ci_low, head.ci_high],
        "n": head.n,
        "fingerprint": work.fingerprint,
        "fingerprints": {
            "checkpoint": work.predictions.inputs["checkpoint"],
            "predictions": work.predictions.key,
            "data": work.predictions.inputs["task"]["data"],
            **{name: json_digest(value) for name, value in task.scoring().items()},
        },
        "scores": [asdict(score) for score in named],
        "items": scored.items,
        "details": {"coverage": 1.0, **work.predictions.about(), **scored.details}
        | ({"partial": True} if partial else {}),
    }
