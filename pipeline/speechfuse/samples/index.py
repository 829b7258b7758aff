"""The index of a dataset: rows by number, and the length of each row's sample, for packing.

In: a complete dataset and a View of it. Out, in a cache folder that may be deleted at any time: the
rows as memory-mapped Arrow files (once for each dataset), and for each view the places and lengths
of its samples. Made once, by worker processes where there are many shards, and complete when
`index.json` is there; from then on a training opens a few files, however large the dataset is.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact, components, config, workers
from speechfuse.locks import exclusive_lock
from speechfuse.rows import selection, shards
from speechfuse.samples.instructions import question_files
from speechfuse.samples.view import Sample, View
from speechfuse.tokens import prompts, vocabulary
from speechfuse.tokens.vocabulary import Vocabulary

VERSION = 2
_vocabulary = cache(Vocabulary.load)
BATCH = 256  # rows of an Arrow batch; one of them is read to get at a row
SHARDS_A_WORKER = 16  # fewer are read sooner than another process has started


class Index:
    """The samples of one view by number.

    lengths         tokens of each sample, int32 (samples,), memory-mapped
    left_out        number of selected rows without a sample
    without_target  number of further ones whose sample has no token to learn
    rejected        {id, reason} of the selected rows that cannot be rendered
    """

    def __init__(self, folder: Path, rows: Path, view: View) -> None:
        counts = json.loads((folder / "index.json").read_text())
        self.view, self._rows, self.key = view, rows, folder.name
        self.left_out: int = counts["left_out"]
        self.without_target: int = counts["without_target"]
        self.rejected: list[dict[str, str]] = counts["rejected"]
        self.lengths = _mapped(folder / "lengths.npy")
        self._places = _mapped(folder / "places.npy")
        self._open: dict[int, pa.RecordBatchFileReader] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Sample:
        row = self.row(number)
        sample = self.view.render(row) if self.view.selects(row) else None
        assert sample is not None and len(sample.tokens) == self.lengths[number]
        return sample

    def at(self, number: int, step: int) -> Sample:
        """The sample as it is in a step (from 0), of which alone and its id all draws are made."""
        row = self.row(number)
        row["draw"] = f"{step}/{row['id']}"
        sample = self.view.render(row) if self.view.selects(row) else None
        assert sample is not None and len(sample.tokens) <= self.lengths[number]
        return self.view.at_step(sample, step) if self.view.at_step else sample

    def said(self) -> list[str]:
        """Return what became of selected rows that are no samples, in words."""
        counts = {
            "without a transcript": self.left_out,
            "with nothing to learn": self.without_target,
        }
        return [f"{n:,} rows {what} are left out" for what, n in counts.items() if n]

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
    `folder` unless it is there. Raises ValueError for a dataset that cannot be read."""
    view: View = config.instantiate(spec, vocabulary=_vocabulary(checkpoint))
    paths = shards.shard_paths(view.path)
    listed = artifact.manifest_of(view.path).get("outputs", {})
    # by content, not by what made it
    source = {path.name: listed.get(path.name) or artifact.sha256_of(path) for path in paths}
    settings = {key: value for key, value in spec.items() if key != "path"}
    files = question_files((spec.get("turns") or {}).get("questions"))
    asked = [artifact.sha256_of(Path(file)) for file in files]
    key = key_of(source, settings, *asked, _tokens_of(checkpoint), _code(spec), VERSION)
    rows, samples = folder / f"rows-{key_of(source, VERSION)}", folder / f"view-{key}"
    with exclusive_lock(folder):
        if not (samples / "index.json").exists():
            rows.mkdir(exist_ok=True)
            samples.mkdir(exist_ok=True)
            tasks = [(spec, checkpoint, path, rows / _arrow(i)) for i, path in enumerate(paths)]
            _write(samples, _indexed(tasks, view.path))
    return Index(samples, rows, view)


def _indexed(tasks: list[tuple], path: Path) -> list["_Shard"]:
    """index_shard of the tasks, in order."""
    processes = min(os.cpu_count() or 1, len(tasks) // SHARDS_A_WORKER)
    here = (index_shard(*task) for task in tasks)
    results = workers.processes(index_shard, tasks, processes, "cpu") if processes > 1 else here
    bar = tqdm(results, f"index of {path.name}", len(tasks), unit="shard", delay=2)
    return sorted(bar, key=lambda result: result.shard)


@dataclass(frozen=True)
class _Shard:
    shard: int
    places: np.ndarray  # of the samples, (shard, row of the shard), int32 (samples, 2)
    lengths: np.ndarray
    left_out: int
    without_target: int
    rejected: list[dict[str, str]]


def index_shard(spec: dict[str, Any], checkpoint: Path, path: Path, arrow: Path) -> _Shard:
    """Copy one shard to a memory-mappable file and count the tokens of its rows' samples."""
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
    shard, places, lengths, rejected = int(arrow.stem), [], [], []
    left_out = without_target = 0
    with pa.ipc.open_file(pa.memory_map(str(arrow))) as reader:
        for number in range(reader.num_record_batches):
            table = pa.Table.from_batches([reader.get_batch(number)])
            for place, row in enumerate(shards.rows_of(table), number * BATCH):
                if not view.selects(row):
                    continue
                try:
                    sample = view.render(row)
                except ValueError as error:
                    rejected.append({"id": row["id"], "reason": str(error)})
                    continue
                if sample is None:
                    left_out += 1
                elif not sample.targets[1:].any():
                    without_target += 1
                else:
                    places.append((shard, place))
                    lengths.append(len(sample.tokens))
    pairs = np.array(places, np.int32).reshape(-1, 2)
    return _Shard(shard, pairs, np.array(lengths, np.int32), left_out, without_target, rejected)


def _write(folder: Path, results: list[_Shard]) -> None:
    for name in ("places", "lengths"):
        values = np.concatenate([getattr(each, name) for each in results])
        with artifact.replacing(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, values)
    rejected = [reject for each in results for reject in each.rejected]
    names = ("left_out", "without_target")
    counts = {name: sum(getattr(each, name) for each in results) for name in names}
    artifact.write_json(folder / "index.json", {**counts, "rejected": rejected})


def key_of(*parts: Any) -> str:
    """16 hex digits of a hash of `parts`, as JSON: the key of a cache entry."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokens_of(checkpoint: Path) -> list[str]:
    """Hashes of the files that decide the ids of a sample."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [artifact.sha256_of(p) for name in names if (p := checkpoint / name).exists()]


def _code(spec: dict[str, Any]) -> str:
    """Hash of the modules that render samples, components of the user among them: part of the
    cache's key, as changed code can change lengths."""
    others = {module.__name__ for module in (prompts, vocabulary, selection)}
    room = sorted(Path(__file__).parent.glob("*.py"))  # a user's view may call any of it
    digests = [artifact.sha256_of(path) for path in room]
    own = components.code_digest(others | config.modules_of(spec))
    return artifact.json_digest([*digests, own])
