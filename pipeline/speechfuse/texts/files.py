"""Rows of JSON, JSON-lines and Parquet files, on this disk or in a dataset on the Hub.

In: a path and, for a folder or a repository, patterns of its files. Out: a plan of shards, and the
rows of a shard, read from their place in the file. A Hub dataset is read at one commit, and no code
of it is run.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from speechfuse import artifact, json_lines, patterns
from speechfuse.hub import data as hub_data
from speechfuse.rows import tables

SUFFIXES = (".json", ".jsonl", ".parquet")
CHUNK = 1 << 20  # bytes of a JSON array that are read at once
ROWS = 1000  # of Parquet in memory; of a JSON file, whose keys are its columns
_SKIPPED = re.compile(r"[ \t\r\n,]*")


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
            remote = self._filesystem() if self.repo else None
            with self._hub_errors():
                names = patterns.matching(self.patterns, self.root, self.path, remote)
        if other := [name for name in names if not name.lower().endswith(SUFFIXES)]:
            raise ValueError(f"{self.path}: {other[0]} is none of {', '.join(SUFFIXES)}")
        return names

    def _hub_errors(self) -> AbstractContextManager[None]:
        return hub_data.hub_errors(self.path) if self.repo else nullcontext()

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        with self._hub_errors():
            try:
                yield
            except (pa.ArrowException, ValueError) as error:
                raise ValueError(f"{self.path}: {name} cannot be read: {error!s:.300}") from None

    @contextmanager
    def _open(self, root: str, name: str) -> Iterator[Any]:
        with self._readable(name), self._filesystem().open(f"{root}/{name}", "rb") as file:
            yield io.BufferedReader(file) if self.repo else file

    @contextmanager
    def _table(self, root: str, name: str) -> Iterator[Any]:
        with self._readable(name), tables.opened(self._filesystem(), f"{root}/{name}") as table:
            yield table

    def _filesystem(self) -> Any:
        return hub_data.filesystem() if self.repo else LocalFileSystem()

    def licence(self) -> str | None:
        """Return the licence on the card of a Hub dataset, or None."""
        if not self.repo:
            return None
        filesystem = self._filesystem()
        with self._hub_errors():
            if not filesystem.exists(f"{self.root}/README.md"):
                return None
            return hub_data.licence_on(filesystem.cat_file(f"{self.root}/README.md").decode())

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        """Return shards {root, file, row, start, count}: `count` rows of a file from number `row`,
        which in JSON begins at byte `start`. Raises ValueError for a file that cannot be read."""
        plan: list[dict[str, Any]] = []
        for name in self.files:
            places = self._places(name)
            while part := list(islice(places, shard_size)):
                place = {"root": self.root, "file": name, "row": part[0][0], "start": part[0][1]}
                plan.append({**place, "count": len(part)})
        return plan

    def _places(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield (number, first byte) of every row of a file."""
        if name.lower().endswith(".parquet"):
            with self._table(self.root, name) as table:
                yield from ((row, 0) for row in range(table.metadata.num_rows))
        else:
            with self._open(self.root, name) as file:
                yield from ((row, start) for row, start, _ in _json(file))

    def columns(self, name: str) -> list[str]:
        """Return the columns of a Parquet file, or the keys of the first thousand JSON objects."""
        if name.lower().endswith(".parquet"):
            with self._table(self.root, name) as table:
                return table.schema_arrow.names
        row, start = next(self._places(name), (0, 0))
        first = {"root": self.root, "file": name, "row": row, "count": ROWS, "start": start}
        rows = (row for _, row in self.rows(first, []) if isinstance(row, dict))
        return list(dict.fromkeys(key for row in rows for key in row))

    def rows(self, shard: dict[str, Any], columns: list[str]) -> Iterator[tables.Row]:
        """Yield the rows of one shard of `plan`, in order; of Parquet only `columns` are read."""
        root, name, row, count = (shard[key] for key in ("root", "file", "row", "count"))
        if name.lower().endswith(".parquet"):
            with self._table(root, name) as table:
                yield from tables.rows(table, row, count, columns, ROWS)
            return
        with self._open(root, name) as file:
            is_array = _array(file) is not None
            for number, _, text in islice(_json(file, shard["start"], row), count):
                try:
                    yield number, json_lines.parse(text)
                except ValueError as error:
                    place = f"row {number}" if is_array else f"line {number + 1}"
                    yield number, f"unreadable: {name}, {place}: {error}"


def _json(file: Any, start: int = 0, row: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, first byte, JSON) of the rows of a file, an array of them or lines, from byte
    `start` on, where row `row` begins."""
    if (first := _array(file)) is None:
        lines = json_lines.lines(file, start, row)
        yield from ((number, at, line) for at, number, line in lines)
    else:
        elements = _elements(file, max(start, first))
        yield from ((number, at, text) for number, (at, text) in enumerate(elements, row))


def _array(file: Any) -> int | None:
    """Return the byte of the first element of a JSON array; None for a file that is no array."""
    file.seek(0)
    head = file.read(CHUNK)
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    return len(head) - len(body) + 1 if body[:1] == b"[" else None


def _elements(file: Any, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (first byte, JSON) of the elements of a JSON array from byte `start` on, a chunk in
    memory at a time. Raises ValueError, with the place, where it is no array or not all of the
    file."""
    file.seek(start)
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # rows are checked
    element, text, more = json.JSONDecoder().raw_decode, "", True
    while more:
        chunk = file.read(CHUNK)
        more, at = bool(chunk), 0
        text += decode(chunk, final=not more)
        while (begin := _SKIPPED.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            start, at = start + begin - at, begin  # what is skipped is ASCII
            if text[at] == "]":
                rest = text[at + 1 :].lstrip()
                while not rest and (chunk := file.read(CHUNK)):
                    rest = chunk.decode("utf-8", "replace").lstrip()
                if rest:
                    raise ValueError(
                        f"its JSON array ends in {_place(file, start)}, and behind it stands "
                        f"{rest[:20]!r}: it holds several arrays; write one array of objects, or "
                        "one object a line"
                    )
                return
            try:
                _, end = element(text, at)
            except (ValueError, RecursionError) as error:
                why, position = getattr(error, "msg", str(error)), getattr(error, "pos", 0)
                if more and (position > len(text) - 20 or why.startswith("Unterminated string")):
                    if len(text) - at < json_lines.LIMIT:
                        break  # perhaps it goes on in the next chunk
                    why = f"a row of over {json_lines.LIMIT >> 20} MiB"
                raise ValueError(f"its JSON array, {_place(file, start)}: {why}") from None
            row = text[at:end].encode("utf-8", "surrogateescape")
            yield start, row
            start, at = start + len(row), end
        text = text[at:]
    raise ValueError("its JSON array has no end: the file is cut off")


def _place(file: Any, byte: int) -> str:
    file.seek(0)
    before = iter(lambda: file.read(min(CHUNK, byte - file.tell())), b"")
    line = 1 + sum(chunk.count(b"\n") for chunk in before)
    return f"line {line} (byte {byte})"
