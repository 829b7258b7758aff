"""Predictions: the replies of one checkpoint to one task, kept by content, never computed twice.

In: a checkpoint, a task. Out: <out>/cells/<key>/predictions.jsonl, a line an item, and inputs.json,
what the key was made of. The key is a hash of the checkpoint's content and of all else that
predictions depend on; names of folders never enter it. Lines are appended batch by batch and reach
the disk before the next batch starts; a blank line ends a batch, and a batch that a kill cut short
is dropped when the cell is opened again. One process at a time is at work on a cell.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, components, failures, workers
from speechfuse.evals.tasks import Task, json_digest
from speechfuse.locks import exclusive_lock
from speechfuse.provenance import maker
from speechfuse.tokens import weights

CONTENT = (
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "lora/*",
    "speech.safetensors",
)
NOT_CONTENT = {"manifest.json", "plan.json"}
LIBRARIES = ("torch", "transformers", "lm_eval")
END = b"\n\n"  # of a batch


def fingerprint(checkpoint: Path, out: Path) -> str:
    """Return the sha256 of a Hugging Face folder's content: config, tokenizer and weights.

    Files are read once: their hashes are remembered by path, size and time of change in
    <out>/cells/fingerprints.json. Raises ValueError for a folder without config or weights.
    """
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint} is not there; {maker(str(checkpoint))}")
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it holds no config.json; check the path")
    cache = out / "cells" / "fingerprints.json"
    hashes = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    files = {*weights.files(checkpoint)} | {
        path.relative_to(checkpoint).as_posix()
        for pattern in CONTENT
        for path in checkpoint.glob(pattern)
    }
    content, hashed = [], False
    names = tqdm(sorted(files - NOT_CONTENT), f"hashing {checkpoint}", leave=False, delay=1)
    for name in names:
        path, stat = checkpoint / name, (checkpoint / name).stat()
        place = os.path.relpath(path, out)
        entry = hashes.get(place)
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            sha = _config(path) if name == "config.json" else artifact.sha256_of(path)
            hashes[place], hashed = [stat.st_size, stat.st_mtime_ns, sha], True
        content.append((name, hashes[place][2]))
    if hashed:
        artifact.write_json(cache, hashes)
    return json_digest(content)


def _config(path: Path) -> str:
    """Return the hash of a config without the name of the folder that it was once loaded from."""
    config = json.loads(path.read_text("utf-8"))
    return json_digest({key: value for key, value in config.items() if key != "_name_or_path"})


class Predictions:
    """The predictions of one checkpoint for one task, below `out`."""

    def __init__(self, out: Path, checkpoint: str, task: Task) -> None:
        self.inputs: dict[str, Any] = {"checkpoint": checkpoint, "task": task.inputs()}
        if not (module := type(task).__module__).startswith("speechfuse."):
            self.inputs["code"] = components.code_digest({module})
        self.key = json_digest(self.inputs)
        self.folder = out / "cells" / self.key[:32]
        self.path = self.folder / "predictions.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return finished predictions by id. Raises ValueError for an item that stands twice, and
        for a line that is not JSON."""
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        lines = data[: data.rfind(END) + 1].split(b"\n")
        try:
            entries = [json.loads(line) for line in lines if line]
        except ValueError:
            raise ValueError(f"{self.path} is damaged: move its folder aside, run again") from None
        by_id = {entry["id"]: entry for entry in entries}
        if len(by_id) < len(entries):
            [(id, _)] = Counter(entry["id"] for entry in entries).most_common(1)
            raise ValueError(f"{self.path} has {id} twice: move its folder aside")
        return by_id

    def locked(self, wait: bool = True) -> AbstractContextManager[bool]:
        """Keep other processes off the cell; False when one is at work there and `wait` is
        false."""
        return exclusive_lock(self.folder, wait)

    def fill(self, task: Task, checkpoint: Path) -> Iterator[int]:
        """Compute the missing predictions; yield the number of items of each batch once it is on
        disk. The caller holds `locked`. Raises ValueError when the task left items out."""
        artifact.write_json(self.folder / "inputs.json", self.inputs)
        done, ids = self.read(), task.ids()
        todo = [id for id in ids if id not in done]
        if not todo:
            return
        started, count = time.monotonic(), 0
        try:
            with failures.writing(self.path), open(self.path, "ab") as file:
                whole = self.path.read_bytes().rfind(END) + len(END)
                file.truncate(whole if whole >= len(END) else 0)  # what a kill left of a batch
                for batch in task.predict(checkpoint, todo):
                    lines = (json.dumps(entry, ensure_ascii=False).encode() for entry in batch)
                    file.write(b"\n".join(lines) + END)
                    file.flush()
                    os.fsync(file.fileno())
                    count += len(batch)
                    yield len(batch)
        finally:
            self._note(count, time.monotonic() - started)
        if lost := len(set(ids) - self.read().keys()):
            raise ValueError(f"{lost} of {len(ids)} items were not predicted")

    def _note(self, items: int, seconds: float) -> None:
        """Add a line to the cell's log: items, seconds, versions of libraries, device."""
        versions = {name: metadata.version(name) for name in ("speechfuse", *LIBRARIES)}
        entry = {"items": items, "seconds": round(seconds, 3), "versions": versions}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({**entry, "device": workers.device()}) + "\n")

    def about(self) -> dict[str, Any]:
        """Return {minutes, versions} of the processes that filled the cell; a killed one left no
        line."""
        path = self.folder / "log.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        log = [json.loads(line) for line in lines]
        minutes = sum(entry["seconds"] for entry in log) / 60
        return {"minutes": round(minutes, 2), "versions": log[-1]["versions"] if log else {}}
