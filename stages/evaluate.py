"""Score checkpoints: one JSON file per (checkpoint, task).

    python -m stages.evaluate recipes/demo/evaluate.yaml only=[stage2]

In: checkpoints (a run's folder stands for all its epochs) and tasks. Out:
<out>/<checkpoint>/<task>.json with scores, intervals and items. A file that is there for the same
checkpoint, task and data is not made again; one made from something else is moved aside.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speechfuse import artifact, config, hub

VERSION = 1


@dataclass
class Evaluate:
    out: str = field(metadata={"help": "folder of the result files"})
    checkpoints: list[dict[str, Any]] = field(metadata={"help": "entries {name, path, tasks}"})
    tasks: dict[str, dict[str, Any]] = field(metadata={"help": "task name -> {_component_, ...}"})
    only: list[str] = field(default_factory=list, metadata={"help": "names to score; empty: all"})


def expand(entry: dict[str, Any]) -> list[tuple[str, Path]]:
    """(name, folder) of a checkpoint, or of every epoch of a run that is complete."""
    path = Path(entry["path"])
    epochs = sorted(path.glob("epoch_*"), key=lambda p: int(p.name.removeprefix("epoch_")))
    if epochs:
        artifact.manifest_of(path)
        return [(f"{entry['name']}/{epoch.name}", epoch) for epoch in epochs]
    return [(entry["name"], path)]


def fingerprint(task: dict[str, Any], checkpoint: Path) -> str:
    """Of everything that a score depends on: the job, the task's settings, the data it names, the
    checkpoint."""
    data = {
        key: artifact.fingerprint_of(Path(value)) if (Path(value) / "manifest.json").exists()
        else artifact.fingerprint_of_files(Path(value))
        for key, value in task.items() if isinstance(value, str) and Path(value).is_dir()
    }  # fmt: skip
    key = [VERSION, task, data, artifact.fingerprint_of(checkpoint)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def pinned(task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task with the commits of its repo@revision data, and with the folders of those."""
    texts = {key: value for key, value in task.items() if isinstance(value, str)}
    pins = {key: pin for key, value in texts.items() if (pin := hub.pinned(value))}
    return {**task, **pins}, {**task, **{key: str(hub.local(pin)) for key, pin in pins.items()}}


def move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_suffix(f".old-{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} was made from something else: moved aside to {aside.name}")


def main(job: Evaluate) -> None:
    names = [entry["name"] for entry in job.checkpoints]
    for name in job.only:
        if name not in names:
            raise ValueError(f"only={job.only}: no checkpoint is named {name!r}; there are {names}")
    wanted = {task for entry in job.checkpoints for task in entry["tasks"]}
    tasks = {task: pinned(job.tasks[task]) for task in sorted(wanted)}
    made = kept = 0
    for entry in job.checkpoints:
        if job.only and entry["name"] not in job.only:
            continue
        for name, checkpoint in expand(entry):
            for task in entry["tasks"]:
                spec, here = tasks[task]
                cell = Path(job.out) / name / f"{task}.json"
                key = fingerprint(spec, checkpoint)
                if cell.exists() and json.loads(cell.read_text())["fingerprint"] == key:
                    kept += 1
                    continue
                if cell.exists():
                    move_aside(cell)
                scores, items = config.instantiate(here, checkpoint=checkpoint)
                result = {
                    "checkpoint": name, "fingerprint": key, "scores": [asdict(s) for s in scores],
                    "items": items,
                }  # fmt: skip
                artifact.write_json(cell, result)
                made += 1
                shown = ", ".join(f"{s.split} {s.metric} {s.value:.3f}" for s in scores)
                print(f"{name} {task}: {shown}")
    print(f"{job.out}: {made} results made, {kept} were there")


if __name__ == "__main__":
    config.main(main, Evaluate, __doc__)
