"""Provenance: what a manifest records of how its artifact was made.

In: a job's configuration. Out: the configuration without absolute paths, the differences between
two records, the versions of libraries, the commit of this checkout, the time.
"""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

# where and how a job runs; none of these may change the bytes it writes
NOT_IDENTITY = ("out", "fresh", "runtime")
_LIBRARIES = (
    "speechfuse torch torchtune torchao transformers tokenizers safetensors datasets pyarrow numpy "
    "soundfile soxr openai-whisper vector-quantize-pytorch lm_eval peft huggingface_hub datasketch "
    "py3langid num2words"
).split()

VERBS = {  # recipe file whose `out` it is: the verb that makes it
    "expand_vocab": "expand",
    "init_base": "train-base",
    "train_base": "train-base",
    "train_quantizer": "train-quantizer",
    "stage1": "stage1",
    "stage2": "stage2",
    "world": "data",
    "neural": "data",
    "curate_texts": "synthesize",
    "synthesize": "synthesize",
    "report": "sweep",
}


def portable(value: Any) -> Any:
    """Return config as JSON without absolute paths: relative to the current folder, or .../name."""
    if isinstance(value, dict):
        return {str(key): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and os.path.isabs(value) and "\n" not in value:
        path = Path(value)
        inside = path.is_relative_to(Path.cwd())
        return path.relative_to(Path.cwd()).as_posix() if inside else f".../{path.name}"
    return value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys by which two plans or manifests differ, as "key: 1 there, 2 now"."""
    there, now = _identity(old), _identity(new)
    return [
        f"{key.removeprefix('config.')}: {_shown(there, key)} there, {_shown(now, key)} now"
        for key in sorted(there.keys() | now.keys())
        if _shown(there, key) != _shown(now, key)
    ]


def _identity(record: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return what makes the identity, by dotted keys, of an identity, a plan or a manifest."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if not prefix and key not in ("job", "version", "config", "inputs"):
            continue
        if prefix == "config." and key in NOT_IDENTITY:
            continue
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))  # so that one key of one of them is shown, not all
        if isinstance(value, dict) and value:
            flat |= _identity(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], sort_keys=True, ensure_ascii=False) if key in flat else "absent"


def libraries() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that decide results."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """Return the commit of this file's checkout, -dirty if it was changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def maker(path: str, recipes: Path = Path("recipes")) -> str:
    """Return a clause for messages: with which verb a missing folder is made."""
    commands: dict[str, str] = {}  # by the folder that they write; the innermost is the one
    for file in sorted(recipes.glob("*/*.yaml")):
        kind, verb = file.stem.split("_")[0], VERBS.get(file.stem)
        reads = kind in ("encode", "tokenize")
        out = (yaml.safe_load(file.read_text("utf-8")) or {}).get("out")
        if (reads or verb) and out and Path(path).is_relative_to(out):
            command = f"{kind} {file}" if reads else f"recipe={file.parent.name} {verb}"
            commands.setdefault(out, command)
    if commands:
        return f"`just {commands[max(commands, key=len)]}` makes it"
    return "no recipe here makes it: check the path, or put it there"
