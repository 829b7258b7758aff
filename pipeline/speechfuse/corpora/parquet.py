"""Parquet files with a column of audio: local ones, and for hub_dataset.py those on the Hub.

In: Parquet files of any fsspec filesystem. Out: clips. Of a Hub dataset only the byte ranges that
are needed are fetched, and none is kept. No code of a dataset is run.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds
from fsspec.implementations.local import LocalFileSystem

from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import json_value


class Parquet:
    """Local Parquet files. `path`: a file, a folder, a glob or a range ({000..127}), or a list.

    Audio that a row gives as a path, without bytes, is read below `audio_dir` (by default the
    folder of the files), and nothing outside of it is read. A clip's id is file/row, or the value
    of `id_column`; `extra_columns` are kept in `extra`.
    """

    def __init__(
        self,
        path: str | list[str],
        audio_column: str = "audio",
        text_column: str | None = None,
        id_column: str | None = None,
        speaker_column: str | None = None,
        language_column: str | None = None,
        extra_columns: list[str] | None = None,
        audio_dir: str | None = None,
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        self.folder, self.names = planning.files(path, ".parquet")
        extra = tuple(extra_columns or ())
        self.columns = AudioColumns(
            audio_column, text_column, id_column, speaker_column, language_column, extra
        )
        self.audio_dir = Path(audio_dir).absolute() if audio_dir else self.folder
        self.language, self.licence = language, licence
        alone = len(self.names) == 1
        self.source_name = Path(self.names[0]).stem if alone else self.folder.name
        self.filesystem = LocalFileSystem()

    @cached_property
    def fingerprint(self) -> str:
        return planning.digest_of_sizes(self.folder, self.names)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        root = str(self.folder)
        plan = plan_of(self.filesystem, root, self.names, self.columns, shard_size)
        if self.columns.id:
            readable = [shard for shard in plan if "fault" not in shard]
            planning.mark_ids(readable, self._ids(readable))
        return plan

    def _ids(self, plan: list[dict[str, Any]]) -> Iterator[str]:
        """Yield all ids, in the order of the plan."""
        for name in dict.fromkeys(shard["file"] for shard in plan):
            with opened(self.filesystem, str(self.folder), name) as file:
                row = 0
                try:
                    for batch in file.iter_batches(columns=[self.columns.id], use_threads=False):
                        values = batch.column(0)
                        if is_text(values.type):
                            values = values.cast(pa.large_binary())  # it need not be UTF-8
                        for id in values.to_pylist():
                            yield id.decode(errors="replace") if isinstance(id, bytes) else str(id)
                        row += len(batch)
                except (pa.ArrowException, OSError):
                    pass  # rows that cannot be read are rejected when their turn comes
                yield from (f"{name}#{lost}" for lost in range(row, file.metadata.num_rows))

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        return clips_of(
            self.filesystem, str(self.folder), shard, self.columns, self.language, self._audio_at
        )

    def _audio_at(self, path: str) -> tuple[Path, str]:
        uri = os.path.relpath(self.audio_dir / path, self.audio_dir)
        if planning.leads_out(uri) or "\0" in path:
            raise ValueError("unsafe path: it leads out of audio_dir")
        return self.audio_dir / uri, uri


ROWS_AT_ONCE = 8
BUFFER = 4 << 20  # bytes read at once of a column, and of a Hub file beyond the range needed
FOOTERS_AT_ONCE = 8  # threads; a Hub dataset has thousands of files


class AudioColumns(NamedTuple):
    """Names of the columns to read; None for what the table does not have."""

    audio: str
    text: str | None
    id: str | None
    speaker: str | None
    language: str | None
    extra: tuple[str, ...]

    def used(self) -> list[str]:
        return list(dict.fromkeys(name for name in (*self[:-1], *self.extra) if name))


def plan_of(
    filesystem: Any, root: str, names: list[str], columns: AudioColumns, shard_size: int
) -> list[dict[str, Any]]:
    """Return shards {file, row, count} of the Parquet files `names` below `root` of an fsspec
    filesystem.

    Shards end where row groups end; only a row group over `shard_size` is sliced. A file that
    cannot be read is one shard with one reject. Raises ValueError for a column that a file lacks,
    or of a type that cannot be used.
    """
    read = partial(_row_groups, filesystem, root, columns)
    plan: list[dict[str, Any]] = []
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        for name, groups in zip(names, pool.map(read, names), strict=True):
            if isinstance(groups, str):
                plan.append({"file": name, "row": 0, "count": 1, "fault": groups})
            else:
                cuts = _cuts(groups, shard_size)
                plan += [{"file": name, "row": row, "count": count} for row, count in cuts]
    return plan


def _row_groups(filesystem: Any, root: str, columns: AudioColumns, name: str) -> list[int] | str:
    """Return the number of rows of each row group, or why the file cannot be read."""
    try:
        with opened(filesystem, root, name) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except pa.ArrowException as error:
        return f"unreadable: {error!s:.120}"
    for key, used in columns._asdict().items():
        for column in used if key == "extra" else [used] if used else []:
            if column not in schema.names:
                raise ValueError(
                    f"{name}: no column {column!r} ({key}_column); it has {', '.join(schema.names)}"
                )
    kind = schema.field(columns.audio).type
    if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    usable = (is_text, kinds.is_binary, kinds.is_large_binary, kinds.is_null)
    if not any(check(kind) for check in usable):
        raise ValueError(
            f"{name}: audio_column {columns.audio!r} holds {kind}; it is to be a struct {{bytes, "
            "path}, binary (a file's bytes) or string (a file's path)"
        )
    if columns.text and not is_text(schema.field(columns.text).type):
        kind = schema.field(columns.text).type
        raise ValueError(f"{name}: text_column {columns.text!r} holds {kind}, not strings")
    return groups


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return kinds.is_string(kind) or kinds.is_large_string(kind)


@contextmanager
def opened(filesystem: Any, root: str, name: str) -> Iterator[pq.ParquetFile]:
    with filesystem.open(f"{root}/{name}", "rb", block_size=BUFFER) as file:
        with pq.ParquetFile(file, buffer_size=BUFFER) as table:
            yield table


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


def clips_of(
    filesystem: Any,
    root: str,
    shard: dict[str, Any],
    columns: AudioColumns,
    language: str | None,
    audio_at: Callable[[str], tuple[Path | bytes, str]],
) -> Iterator[Clip | Reject]:
    """Yield the clips of a shard of `plan_of`, in order; their uri is FILE#ROW.

    `audio_at` returns the audio and the uri for a path that a row has in place of bytes. Every row
    of a damaged row group is a reject; errors of the network are raised.
    """
    name, again = shard["file"], set(shard.get("again", ()))
    stem = name.removesuffix(".parquet")
    if "fault" in shard:
        yield Reject(stem, shard["fault"])
        return
    seen: set[str] = set()
    for row, batch in _rows(filesystem, root, shard, columns):
        id = f"{stem}/{row}"
        try:
            if isinstance(batch, str):
                raise ValueError(batch)
            record = _values(batch)
            if columns.id:
                if record[columns.id] is None:
                    raise ValueError("bad name: its id is null")
                id = str(record[columns.id])
            if row - shard["row"] in again or id in seen:
                raise ValueError(f"duplicate id: row {row} of {name}")
            seen.add(id)
            audio, uri = record[columns.audio], f"{name}#{row}"
            if isinstance(audio, dict):
                audio = audio.get("path") if audio["bytes"] is None else audio["bytes"]
            if audio is None:
                raise ValueError("not found: the row has no audio")
            if isinstance(audio, str):
                audio, uri = audio_at(audio)
            yield Clip(
                id,
                audio,
                uri,
                text=_text_or_none(record, columns.text),
                speaker=_text_or_none(record, columns.speaker),
                language=_text_or_none(record, columns.language) or language,
                extra={key: json_value(record[key]) for key in columns.extra},
            )
        except ValueError as error:
            yield Reject(id, str(error))


def _rows(
    filesystem: Any, root: str, shard: dict[str, Any], columns: AudioColumns
) -> Iterator[tuple[int, pa.RecordBatch | str]]:
    """Yield (number in the file, the row as a batch or why it cannot be read) for each row of a
    shard."""
    row, last = 0, shard["row"] + shard["count"]
    with opened(filesystem, root, shard["file"]) as file:
        for group in range(file.num_row_groups):
            first, row = row, row + file.metadata.row_group(group).num_rows
            if first < last and row > shard["row"]:
                for each in _group(file, group, first, columns.used()):
                    if shard["row"] <= each[0] < last:
                        yield each
                    if each[0] >= last:
                        break


def _group(
    file: pq.ParquetFile, group: int, row: int, names: list[str]
) -> Iterator[tuple[int, pa.RecordBatch | str]]:
    end = row + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, [group], names, use_threads=False):
            for position in range(len(batch)):
                yield row, batch.slice(position, 1)
                row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise  # of the disk or the network; that of Arrow for damaged data has no number
        for lost in range(row, end):
            yield lost, f"unreadable: {error!s:.120}"


def _values(row: pa.RecordBatch) -> dict[str, Any]:
    try:
        return row.to_pylist()[0]
    except ValueError as error:  # a string that is not UTF-8
        raise ValueError(f"unreadable: {error!s:.120}") from None


def _text_or_none(record: dict[str, Any], column: str | None) -> str | None:
    value = record[column] if column else None
    return None if value is None else str(value).strip() or None
