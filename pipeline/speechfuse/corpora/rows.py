"""Rows of Parquet files as clips, from any fsspec filesystem.

In: Parquet files whose audio column is a struct {bytes, path} (what `datasets` writes for its Audio
feature), binary (the bytes of an audio file), or string (the path of one). Out: plans and clips.
Row groups are read a few rows at a time and only in the columns that are used.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from speechfuse.corpora.clip import Clip, Reject

ROWS_AT_ONCE = 8
BUFFER = 4 << 20  # bytes that are read at once of a column, and of a Hub file beyond them
FOOTERS_AT_ONCE = 8  # threads; a Hub dataset has thousands of files


class Columns(NamedTuple):
    """Names of the columns that are used; None for what the table does not have."""

    audio: str
    text: str | None
    id: str | None
    speaker: str | None
    language: str | None
    extra: tuple[str, ...]

    def used(self) -> list[str]:
        return list(dict.fromkeys(name for name in (*self[:-1], *self.extra) if name))


def plan_of(
    filesystem: Any, root: str, names: list[str], columns: Columns, shard_size: int
) -> list[dict[str, Any]]:
    """Shards {file, row, count} of the Parquet files `names` below `root` of an fsspec filesystem.

    Shards end where row groups end; only a row group over `shard_size` is sliced. A file that
    cannot be read is one shard with one reject. ValueError for a column that a file lacks, or of a
    type that cannot be used.
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


def _row_groups(filesystem: Any, root: str, columns: Columns, name: str) -> list[int] | str:
    """Rows of each row group, or why the file cannot be read."""
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
    """(first row, rows) of each shard."""
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
    columns: Columns,
    language: str | None,
    audio_at: Callable[[str], tuple[Path | bytes, str]],
) -> Iterator[Clip | Reject]:
    """Clips of a shard of `plan_of`, in order; their uri is FILE#ROW.

    `audio_at` gives the audio and the uri for a path that a row has in place of bytes. A row group
    that is damaged is so many rejects; errors of the network are raised.
    """
    name, again = shard["file"], set(shard.get("again", ()))
    stem = name.removesuffix(".parquet")
    if "fault" in shard:
        yield Reject(stem, shard["fault"])
        return
    seen: set[str] = set()
    for row, found in _rows(filesystem, root, shard, columns):
        id = f"{stem}/{row}"
        try:
            if isinstance(found, str):
                raise ValueError(found)
            record = _values(found)
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
                id, audio, uri, text=_text(record, columns.text),
                speaker=_text(record, columns.speaker),
                language=_text(record, columns.language) or language,
                extra={key: _plain(record[key]) for key in columns.extra},
            )  # fmt: skip
        except ValueError as error:
            yield Reject(id, str(error))


def _rows(
    filesystem: Any, root: str, shard: dict[str, Any], columns: Columns
) -> Iterator[tuple[int, pa.RecordBatch | str]]:
    """(row in the file, the row, or why it cannot be read) for each of a shard."""
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


def _text(record: dict[str, Any], column: str | None) -> str | None:
    value = record[column] if column else None
    return None if value is None else str(value).strip() or None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
