"""What makes an lm-eval task: a part of the key of its predictions.

In: a loaded task, the folder of its file. Out: JSON without the names of folders; where it is
equal, prompts, filters and metrics are.
"""

from functools import partial
from pathlib import Path
from typing import Any

from speechfuse import artifact, components

PLACES = {"dataset_path", "dataset_name", "dataset_kwargs", "config_source"}  # keys of a task
DESCRIBES = ("yaml", "yml", ".py", ".txt", ".md", ".json", ".jinja", ".jinja2", ".j2")


def of_task(task: Any) -> list[Any]:
    """Return all that decides prompts, filters and metrics of a task, as JSON; its documents are
    beside it, and may lie anywhere."""
    return [_stated(part) for part in (type(task), task.config, getattr(task, "prompt", None))]


def _stated(value: Any) -> Any:
    """Return a value of a task's configuration as JSON, code by its name and its source."""
    if isinstance(value, partial):
        return [_stated(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, list | tuple):
        return [_stated(each) for each in value]
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return [name, components.code_digest({value.__module__})]
    if fields := getattr(value, "__dict__", value if isinstance(value, dict) else {}):
        return {str(key): _stated(each) for key, each in fields.items() if key not in PLACES}
    return value if isinstance(value, str | int | float | None) else str(value)


def of_files(folder: str) -> dict[str, str]:
    """Return the sha256 of each file below `folder` that describes a task, or that its code may
    read."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.name.endswith(DESCRIBES))
    return {path.relative_to(folder).as_posix(): artifact.sha256_of(path) for path in paths}
