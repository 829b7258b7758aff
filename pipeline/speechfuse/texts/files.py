"""Rows of JSON, JSON-lines and Parquet files, on this disk or in a dataset on the Hub.

In: a path and, for a folder or a repository, patterns of its files. Out: a plan of shards, and the
rows of a shard, read from their place in the file. A Hub dataset is read at one commit, and no code
of it is run.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec.implementations.local import LocalFileSystem

from speechfuse import artifact, patterns
from speechfuse.hub import data as hub_data

SUFFIXES = (".json", ".jsonl", ".parquet")
CHUNK = 1 << 20  # bytes of a JSON array that are read at once
SAMPLED_ROWS = 1000  # of a JSON file, whose keys are its columns
_SKIPPED = re.compile(r"[ \t\r\n,]*")
_NESTING = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[\[\]{}]', re.S)
Row = tuple[int, dict[str, Any] | str]  # number in its file; the row, or why it cannot be read


class Documents:
    """Files of rows.

    `path`: a file, a folder, or owner/name@revision on the Hub; `data_files`: globs in the last
    two, e.g. data/train-*.parquet. A revision is resolved to its commit when the work is planned. A
    .json file is an array of objects, or lines of them. Raises ValueError or FileNotFoundError if
    there is no such file.
    """

    def __init__(self, path: str, data_files: str | list[str] | None = None) -> None:
        self.path = path
        self.patterns = [data_files] if isinstance(data_files, str) else data_files or []
        match = None if Path(path).exists() else hub_data.PATH.fullmatch(path)
        self.repo = match[1] if match else None
        self.revision = match[2] if match else ""
        if not self.repo and not Path(path).exists():
            raise FileNotFoundError(
                f"{path}: no such file or folder; a dataset on the Hub is owner/name@COMMIT"
            )
        if not self.patterns and (self.repo or Path(path).is_dir()):
            raise ValueError(f"{path}: say which files of it, e.g. data_files=data/train-*.parquet")
        if self.patterns and Path(path).is_file():
            raise ValueError(f"{path} is a file; data_files is for a folder or a Hub dataset")

    @property
    def name(self) -> str:
        return self.repo or Path(self.path).absolute().stem

    @cached_property
    def root(self) -> str:
        """Folder of the files, in the file system they are in."""
        if self.repo:
            return f"datasets/{self.repo}@{hub_data.resolve(self.repo, self.revision)}"
        path = Path(self.path).absolute()
        return str(path.parent if path.is_file() else path)

    @cached_property
    def fingerprint(self) -> str:
        """owner/name@commit, or a hash of the names and bytes of the files."""
        if self.repo:
            return self.root.removeprefix("datasets/")
        files = [(name, artifact.sha256_of(Path(self.root) / name)) for name in self.files]
        return artifact.json_digest(files)

    @cached_property
    def files(self) -> list[str]:
        """Relative to the root, sorted for each pattern."""
        if Path(self.path).is_file():
            names = [Path(self.path).name]
        else:
            remote = self._filesystem(self.root) if self.repo else None
            with self._hub_errors():
                names = patterns.matching(self.patterns, self.root, self.path, remote)
        if other := [name for name in names if not name.lower().endswith(SUFFIXES)]:
            raise ValueError(f"{self.path}: {other[0]} is none of {', '.join(SUFFIXES)}")
        return names

    def _hub_errors(self) -> AbstractContextManager[None]:
        return hub_data.hub_errors(self.path) if self.repo else nullcontext()

    @contextmanager
    def _open(self, root: str, name: str) -> Iterator[Any]:
        with self._hub_errors(), self._filesystem(root).open(f"{root}/{name}", "rb") as file:
            try:
                yield file
            except (pa.ArrowException, ValueError) as error:
                raise ValueError(f"{self.path}: {name} cannot be read: {error!s:.120}") from None

    def _filesystem(self, root: str) -> Any:
        if not self.repo:
            return LocalFileSystem()
        return hub_data.filesystem()

    def licence(self) -> str | None:
        """Return the licence on the card of a Hub dataset, or None."""
        if not self.repo:
            return None
        filesystem = self._filesystem(self.root)
        with self._hub_errors():
            if not filesystem.exists(f"{self.root}/README.md"):
                return None
            card = filesystem.cat_file(f"{self.root}/README.md")
        head = card.decode("utf-8", "replace").split("---")
        try:
            stated = yaml.safe_load(head[1])["license"] if len(head) > 2 else None
        except (yaml.YAMLError, KeyError, TypeError):
            return None
        return stated if isinstance(stated, str) else None

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        """Return shards {root, file, row, start, count}: `count` rows of a file from number `row`,
        which in JSON begins at byte `start`. Raises ValueError for a file that cannot be read."""
        plan: list[dict[str, Any]] = []
        for name in self.files:
            room = 0
            for row, start in self._places(name):
                if not room:
                    plan.append(
                        {"root": self.root, "file": name, "row": row, "start": start, "count": 0}
                    )
                    room = shard_size
                room -= 1
                plan[-1]["count"] += 1
        return plan

    def _places(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield (number, first byte) of every row of a file."""
        with self._open(self.root, name) as file:
            if name.endswith(".parquet"):
                yield from ((row, 0) for row in range(pq.ParquetFile(file).metadata.num_rows))
            elif (start := _array(file)) is not None:
                yield from ((row, at) for row, (at, _) in enumerate(_elements(file, start)))
            else:
                yield from ((row, at) for row, at, _ in _lines(file, 0, 0))

    def columns(self, name: str) -> list[str]:
        """Return the columns of a Parquet file, or the keys of the first thousand JSON objects."""
        with self._open(self.root, name) as file:
            if name.endswith(".parquet"):
                return pq.ParquetFile(file).schema_arrow.names
        first = {"root": self.root, "file": name, "row": 0, "count": SAMPLED_ROWS}
        start = next((start for _, start in self._places(name)), 0)
        rows = (row for _, row in self.rows({**first, "start": start}) if isinstance(row, dict))
        return list(dict.fromkeys(key for row in rows for key in row))

    def rows(self, shard: dict[str, Any], columns: list[str] | None = None) -> Iterator[Row]:
        """Yield the rows of one shard of `plan`, in order; of Parquet only `columns` are read."""
        row, count, start = shard["row"], shard["count"], shard["start"]
        with self._open(shard["root"], shard["file"]) as file:
            if shard["file"].endswith(".parquet"):
                yield from _parquet(pq.ParquetFile(file), row, count, columns)
            elif _array(file) is not None:
                for number, (_, value) in enumerate(islice(_elements(file, start), count), row):
                    yield number, _row(value)
            else:
                for number, _, line in islice(_lines(file, start, row), count):
                    yield number, _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        return _row(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"unreadable: no JSON ({error!s:.80})"


def _row(value: Any) -> dict[str, Any] | str:
    if isinstance(value, Exception):
        return f"unreadable: {value!s:.80}"
    return value if isinstance(value, dict) else "unreadable: no object"


def _lines(file: Any, start: int, number: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, first byte, line) of the lines that are not blank."""
    file.seek(start)
    while line := file.readline():
        if line.strip():
            yield number, start, line
        start += len(line)
        number += 1


def _array(file: Any) -> int | None:
    """Return the byte of the first element of a JSON array; None for a file that is no array."""
    file.seek(0)
    head = file.read(CHUNK)
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    return len(head) - len(body) + 1 if body[:1] == b"[" else None


def _elements(file: Any, start: int) -> Iterator[tuple[int, Any]]:
    """Yield (first byte, value) of the elements of a JSON array from byte `start` on, one chunk in
    memory at a time. The value of an element that Python cannot hold (nested too deeply, an endless
    number) is the exception."""
    file.seek(start)
    decode, parse = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
    text, more = "", True
    while more:
        chunk = file.read(CHUNK)
        more, at = bool(chunk), 0
        text += decode(chunk, final=not more)
        while (begin := _SKIPPED.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            start, at = start + begin - at, begin  # what is skipped is ASCII
            if text[at] == "]":
                return
            try:
                value, end = parse(text, at)
            except (ValueError, RecursionError) as error:
                value, end = error, 0 if isinstance(error, json.JSONDecodeError) else _end(text, at)
                if not end and more:
                    break  # perhaps it goes on in the next chunk
                if not end:
                    why = getattr(error, "msg", error)
                    raise ValueError(f"byte {start} of the JSON array: {why}") from None
            yield start, value
            start, at = start + len(text[at:end].encode()), end
        text = text[at:]
    raise ValueError("the JSON array has no end: the file is cut off")


def _end(text: str, at: int) -> int:
    """Return the end of the object or array that begins at `at`; 0 if it has none."""
    depth = 0
    for match in _NESTING.finditer(text, at):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if not depth:
            return match.end()
    return 0


def _parquet(
    file: pq.ParquetFile, row: int, count: int, columns: list[str] | None
) -> Iterator[Row]:
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        begin, end = max(row, first), min(row + count, first + rows)
        if begin < end:
            try:
                table = file.read_row_group(group, columns).slice(begin - first, end - begin)
            except (pa.ArrowException, OSError) as error:
                yield from ((number, f"unreadable: {error!s:.80}") for number in range(begin, end))
            else:
                yield from zip(range(begin, end), _values(table), strict=True)
        first += rows


def _values(table: pa.Table) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a table, read one by one if one of them is not UTF-8."""
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError as error:
        if len(table) == 1:
            yield f"unreadable: {error!s:.80}"
            return
        for number in range(len(table)):
            yield from _values(table.slice(number, 1))
