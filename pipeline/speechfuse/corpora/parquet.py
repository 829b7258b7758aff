"""Parquet files with a column of audio: local ones, and for hub_dataset.py those on the Hub.

In: Parquet files of any fsspec filesystem. Out: clips. Of a Hub dataset only the byte ranges that
are needed are fetched, and none is kept. No code of a dataset is run.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip
from speechfuse.rows import tables
from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import json_value

ROWS_AT_ONCE = 8
FOOTERS_AT_ONCE = 8  # threads; a Hub dataset has thousands of files


@dataclass(kw_only=True)
class AudioTables:
    """Parquet files of an fsspec filesystem, of which one column is audio: base of Parquet and Hub.

    `audio_column` holds structs {bytes, path}, bytes of audio files, or their paths; of a row with
    bytes and a path the bytes are used. A clip's id is file/row, or the value of `id_column`;
    `extra_columns` are kept in `extra`. `language`: of rows that name none.
    """

    audio_column: str = "audio"
    text_column: str | None = None
    id_column: str | None = None
    speaker_column: str | None = None
    language_column: str | None = None
    extra_columns: list[str] | None = None
    language: str | None = None
    licence: str | None = None

    def audio_at(self, root: str, path: str) -> tuple[Path | bytes, str]:
        """Return the audio and the uri for a path that a row has in place of bytes. Raises
        ValueError("kind: detail") where it may not or cannot be read."""
        raise NotImplementedError

    def _columns(self) -> Iterator[tuple[str, str]]:
        """Yield (name of the argument, column) of all that are read."""
        for key in ("audio", "text", "id", "speaker", "language"):
            if column := getattr(self, f"{key}_column"):
                yield f"{key}_column", column
        yield from (("extra_columns", column) for column in self.extra_columns or ())

    def plan_of(
        self, filesystem: Any, root: str, names: list[str], shard_size: int
    ) -> list[dict[str, Any]]:
        """Return shards {file, row, count} of the files `names` below `root`.

        Shards end where row groups end; only a row group over `shard_size` is sliced. A file that
        cannot be read is one shard with one reject. Raises ValueError for a column that a file
        lacks, or of a type that cannot be used.
        """
        read = partial(self._row_groups, filesystem, root)
        plan: list[dict[str, Any]] = []
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            for name, groups in zip(names, pool.map(read, names), strict=True):
                if isinstance(groups, str):
                    plan.append({"file": name, "row": 0, "count": 1, "fault": groups})
                else:
                    cuts = _cuts(groups, shard_size)
                    plan += [{"file": name, "row": row, "count": count} for row, count in cuts]
        return plan

    def _row_groups(self, filesystem: Any, root: str, name: str) -> list[int] | str:
        """Return the number of rows of each row group, or why the file cannot be read."""
        try:
            with tables.opened(filesystem, f"{root}/{name}") as file:
                schema, metadata = file.schema_arrow, file.metadata
                groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except pa.ArrowException as error:
            return f"unreadable: {error!s:.120}"
        for key, column in self._columns():
            if column not in schema.names:
                raise ValueError(
                    f"{name}: no column {column!r} ({key}); it has {', '.join(schema.names)}"
                )
        kind = schema.field(self.audio_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if tables.type_of(kind) not in ("string", "binary", "null"):
            raise ValueError(
                f"{name}: audio_column {self.audio_column!r} holds {kind}; it is to be a struct "
                "{bytes, path}, binary (a file's bytes) or string (a file's path)"
            )
        kind = schema.field(self.text_column).type if self.text_column else pa.string()
        if tables.type_of(kind) not in ("string", "null"):  # null: not one row has a text
            raise ValueError(f"{name}: text_column {self.text_column!r} holds {kind}, not strings")
        return groups

    def clips_of(
        self, filesystem: Any, root: str, shard: dict[str, Any]
    ) -> Iterator[Clip | Reject]:
        """Yield the clips of a shard of `plan_of`, in order; their uri is FILE#ROW. The rows of a
        damaged row group are rejects; errors of the network are raised."""
        name, again = shard["file"], set(shard.get("again", ()))
        stem = name.removesuffix(".parquet")
        if "fault" in shard:
            yield Reject(stem, shard["fault"])
            return
        columns = list(dict.fromkeys(column for _, column in self._columns()))
        first, seen = shard["row"], set[str]()
        with tables.opened(filesystem, f"{root}/{name}") as file:
            for row, record in tables.rows(file, first, shard["count"], columns, ROWS_AT_ONCE):
                id = f"{stem}/{row}"
                try:
                    if isinstance(record, str):
                        raise ValueError(record)
                    if self.id_column:
                        value = record[self.id_column]
                        if value is None or not (own := _text(value)).strip():
                            raise ValueError(f"bad name: its id is {value!r}")
                        id = own
                    if row - first in again or id in seen:
                        raise ValueError(f"duplicate id: row {row} of {name}")
                    seen.add(id)
                    yield self._clip(id, record, root, f"{name}#{row}")
                except ValueError as error:
                    yield Reject(id, str(error))

    def _clip(self, id: str, record: dict[str, Any], root: str, uri: str) -> Clip:
        audio = record[self.audio_column]
        if isinstance(audio, dict):  # bytes may be null, or b"" beside a path
            audio = audio["bytes"] or audio.get("path") or audio["bytes"]
        if audio is None:
            raise ValueError("not found: the row has no audio")
        if isinstance(audio, str):
            audio, uri = self.audio_at(root, audio)

        def text_of(column: str | None) -> str | None:
            value = record[column] if column else None
            return None if value is None else _text(value).strip() or None

        return Clip(
            id,
            audio,
            uri,
            text=text_of(self.text_column),
            speaker=text_of(self.speaker_column),
            language=text_of(self.language_column) or self.language,
            extra={key: json_value(record[key]) for key in self.extra_columns or ()},
        )


@dataclass
class Parquet(AudioTables):
    """Local Parquet files. `path`: a file, a folder, a glob or a range ({000..127}), or a list.

    Audio that a row gives as a path, without bytes, is read below `audio_dir` (by default the
    folder of the files), and nothing outside of it is read. The other arguments: see AudioTables.
    """

    path: str | list[str]
    audio_dir: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.folder, self.names = planning.files(self.path, ".parquet")
        alone = len(self.names) == 1
        self.source_name = Path(self.names[0]).stem if alone else self.folder.name
        self.filesystem = LocalFileSystem()

    @cached_property
    def fingerprint(self) -> str:
        return planning.digest_of_sizes(self.folder, self.names)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        plan = self.plan_of(self.filesystem, str(self.folder), self.names, shard_size)
        if self.id_column:
            readable = [shard for shard in plan if "fault" not in shard]
            planning.mark_ids(readable, self._ids(readable))
        return plan

    def _ids(self, plan: list[dict[str, Any]]) -> Iterator[str]:
        """Yield all ids, in the order of the plan."""
        for name in dict.fromkeys(shard["file"] for shard in plan):
            with tables.opened(self.filesystem, f"{self.folder}/{name}") as file:
                row = 0
                try:
                    for batch in file.iter_batches(columns=[self.id_column], use_threads=False):
                        values = batch.column(0)
                        if tables.type_of(values.type) == "string":
                            values = values.cast(pa.large_binary())  # it need not be UTF-8
                        for id in values.to_pylist():
                            yield id.decode(errors="replace") if isinstance(id, bytes) else str(id)
                        row += len(batch)
                except (pa.ArrowException, OSError):
                    pass  # rows that cannot be read are rejected when their turn comes
                yield from (f"{name}#{lost}" for lost in range(row, file.metadata.num_rows))

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        return self.clips_of(self.filesystem, str(self.folder), shard)

    def audio_at(self, root: str, path: str) -> tuple[Path, str]:
        folder = Path(self.audio_dir or root).absolute()
        uri = os.path.relpath(folder / path, folder)
        if planning.leads_out(uri) or "\0" in path:
            raise ValueError("unsafe path: it leads out of audio_dir")
        return folder / uri, uri


def _cuts(groups: list[int], shard_size: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of each shard."""
    start = row = 0
    for rows in groups:
        if row > start and row + rows - start > shard_size:
            yield start, row - start
            start = row
        row += rows
        while row - start > shard_size:
            yield start, shard_size
            start += shard_size
    if row > start:
        yield start, row - start


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(json_value(value))
