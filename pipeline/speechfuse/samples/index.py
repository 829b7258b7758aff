"""Rows by number, and the length of each one's sample: what packing needs before it renders any.

In: a complete dataset, which of its rows are wanted, and how a row becomes a sample. Out, in a
cache folder that may be deleted at any time: the rows as memory-mapped Arrow files (once for each
dataset), and for each use of them the numbers and lengths of its samples. Made once, by worker
processes where there is much to read, and complete when `index.json` is there; from then on a start
costs the opening of a few files, however large the dataset is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact, config, workers
from speechfuse.rows import shards
from speechfuse.tokens import prompts, vocabulary
from speechfuse.tokens.vocabulary import Vocabulary

VERSION = 1
BATCH = 256  # rows of an Arrow batch; one of them is read to get at a row
SHARDS_A_WORKER = 16  # fewer are read sooner than another process has started


@dataclass(frozen=True)
class Sample:
    """`tokens` int32 (n,); `targets` bool (n,): which tokens the model is to predict."""

    name: str
    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class View:
    """Which rows of the dataset at `path` are wanted, `select` {key of extra: value}, and what
    makes a sample of one: None for a row that is left out, ValueError for one that is broken."""

    path: Path
    select: dict[str, Any]
    render: Callable[[dict[str, Any]], Sample | None]

    def wants(self, row: dict[str, Any]) -> bool:
        """Whether `select` keeps a row, whose `extra` is read on the way."""
        row["extra"] = json.loads(row["extra"] or "{}")
        return all(row["extra"].get(key) == value for key, value in self.select.items())


class Index:
    """The samples of one view by number. `lengths` int32 (samples,), memory-mapped; `left_out` and
    `rejected`: rows that are none."""

    def __init__(self, folder: Path, rows: Path, view: View) -> None:
        about = json.loads((folder / "index.json").read_text())
        self.view, self._rows, self.key = view, rows, folder.name
        self.left_out: int = about["left_out"]
        self.rejected: list[dict[str, str]] = about["rejected"]
        self.lengths = _mapped(folder / "lengths.npy")
        self._places = _mapped(folder / "places.npy")
        self._open: dict[int, pa.RecordBatchFileReader] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Sample:
        row = self.row(number)
        sample = self.view.render(row) if self.view.wants(row) else None
        assert sample is not None and len(sample.tokens) == self.lengths[number]
        return sample

    def row(self, number: int) -> dict[str, Any]:
        """The row behind a sample, as shards.read_rows gives it."""
        shard, place = (int(value) for value in self._places[number])
        if shard not in self._open:
            self._open[shard] = pa.ipc.open_file(pa.memory_map(str(self._rows / _arrow(shard))))
        batch = self._open[shard].get_batch(place // BATCH).slice(place % BATCH, 1)
        return next(shards.rows_of(pa.Table.from_batches([batch])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a process opens its own files


def _mapped(path: Path) -> np.ndarray:
    # an empty file cannot be mapped
    return np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)


def _arrow(shard: int) -> str:
    return f"{shard:05d}.arrow"


def build(spec: dict[str, Any], checkpoint: Path, folder: Path) -> Index:
    """The index of a recipe's dataset entry `spec` {_component_, path, ...}, made in the cache
    `folder` where it is not there yet. ValueError for a dataset that cannot be read."""
    view: View = config.instantiate(spec, vocabulary=_vocabulary(checkpoint))
    paths = shards.shard_paths(view.path)
    source = artifact.manifest_of(view.path)["outputs"]  # by content, not by what made it
    use = {key: value for key, value in spec.items() if key != "path"}
    rows = folder / f"rows-{key_of(source, VERSION)}"
    made = folder / f"view-{key_of(source, use, _tokens_of(checkpoint), _code(spec), VERSION)}"
    with artifact.exclusive_lock(folder):
        if not (made / "index.json").exists():
            rows.mkdir(exist_ok=True)
            made.mkdir(exist_ok=True)
            tasks = [(spec, checkpoint, path, rows / _arrow(i)) for i, path in enumerate(paths)]
            _write(made, list(_read(tasks, view.path)))
    return Index(made, rows, view)


def _read(tasks: list[tuple], path: Path) -> Iterator["_Read"]:
    processes = min(os.cpu_count() or 1, len(tasks) // SHARDS_A_WORKER)
    with tqdm(total=len(tasks), desc=f"index of {path.name}", unit="shard", delay=2) as bar:
        alone = (read_shard(*task) for task in tasks)
        many = workers.processes(read_shard, tasks, processes, "cpu")
        for each in alone if processes < 2 else many:
            bar.update()
            yield each


@dataclass(frozen=True)
class _Read:
    shard: int
    places: np.ndarray  # of the samples, among the shard's rows
    lengths: np.ndarray
    left_out: int
    rejected: list[dict[str, str]]


def read_shard(spec: dict[str, Any], checkpoint: Path, path: Path, arrow: Path) -> _Read:
    """Copy one shard to a memory-mappable file and measure the samples of its rows."""
    view: View = config.instantiate(spec, vocabulary=_vocabulary(checkpoint))
    if not arrow.exists():
        try:
            table = pq.read_table(path).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise shards.damaged(path, error) from None
        with artifact.replacing(arrow) as temporary:
            with pa.OSFile(str(temporary), "wb") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=BATCH)
    places, lengths, rejected, left_out = [], [], [], 0
    with pa.ipc.open_file(pa.memory_map(str(arrow))) as reader:
        for number in range(reader.num_record_batches):
            table = pa.Table.from_batches([reader.get_batch(number)])
            for place, row in enumerate(shards.rows_of(table), number * BATCH):
                if not view.wants(row):
                    continue
                try:
                    sample = view.render(row)
                except ValueError as error:
                    rejected.append({"id": row["id"], "reason": str(error)})
                    continue
                if sample is None:
                    left_out += 1
                else:
                    places.append(place)
                    lengths.append(len(sample.tokens))
    return _Read(
        int(arrow.stem), np.array(places, np.int32), np.array(lengths, np.int32), left_out, rejected
    )


def _write(folder: Path, read: list[_Read]) -> None:
    read.sort(key=lambda each: each.shard)
    shard = np.concatenate([np.full(len(each.places), each.shard, np.int32) for each in read])
    places = np.stack([shard, np.concatenate([each.places for each in read])], axis=1)
    for name, values in (
        ("places", places),
        ("lengths", np.concatenate([each.lengths for each in read])),
    ):
        with artifact.replacing(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, values)
    about = {
        "left_out": sum(each.left_out for each in read),
        "rejected": [reject for each in read for reject in each.rejected],
    }
    artifact.write_json(folder / "index.json", about)


def key_of(*what: Any) -> str:
    """A name for what is made of `what`."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _vocabulary(checkpoint: Path) -> Vocabulary:
    return Vocabulary.load(checkpoint)


def _tokens_of(checkpoint: Path) -> list[str]:
    """What decides the ids of a sample."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return [artifact.sha256_of(p) for name in names if (p := checkpoint / name).exists()]


def _code(spec: dict[str, Any]) -> str:
    """Hash of the modules that render samples, components of the user among them: part of the
    cache's key, as changed code can change lengths."""
    return artifact.code_digest({prompts.__name__, vocabulary.__name__, *config.modules_of(spec)})
