"""Shards: the Parquet files of a dataset of speech or of conversations.

In: rows as dicts. Out: `shard-00007.parquet`, written atomically, with the stream's description
(which quantizer made the codes) in the schema metadata, and `shard-00007.rejects.jsonl` beside it.
Reading goes through a complete artifact only: a folder whose manifest.json is there.

The schemas are published data and do not change. Codes are the quantizer's integers, never
vocabulary ids; dictionary encoding bit-packs them: about 9 bits each for 512 codes.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechfuse.artifact import manifest_of, replacing

SOURCE = pa.struct(
    {"uri": pa.string(), "offset": pa.float64(), "seconds": pa.float64(), "sha256": pa.string()}
)
SPEECH = pa.schema(
    {
        "id": pa.string(),
        "codes": pa.list_(pa.uint16()),  # null where only the audio is referenced
        "seconds": pa.float32(),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "source": SOURCE,
        "parent": pa.string(),
        "part": pa.int32(),
        "extra": pa.string(),  # JSON
    }
)
# what stages.encode_speech writes: a cache of recordings for one encoder, never published
FRAMES = SPEECH.append(pa.field("frames", pa.binary()))  # float16 (frames, width)
SEGMENT = pa.struct({"text": pa.string(), "speech": pa.struct(list(SPEECH))})
CONVERSATIONS = pa.schema(
    {
        "id": pa.string(),
        "turns": pa.list_(pa.struct({"role": pa.string(), "segments": pa.list_(SEGMENT)})),
        "extra": pa.string(),  # JSON
    }
)

_STREAM, _COUNTS = b"speechfuse.stream", b"speechfuse.counts"
_STREAM_KEYS = ("quantizer", "token_rate", "codebooks", "codebook_size")
_FRAME_KEYS = ("encoder", "frame_rate", "width")
# each row group repeats the dictionary of codes (2 kB for 512), so a group must hold many codes
_ROWS_PER_GROUP = 8192


def shard_name(index: int) -> str:
    """File name of a shard: 7 -> "shard-00007.parquet"."""
    return f"shard-{index:05d}.parquet"


def write_shard(
    path: Path,
    rows: Iterable[dict[str, Any]],
    schema: pa.Schema,
    stream: dict[str, Any] | None = None,
    counts: dict[str, int] | None = None,
) -> None:
    """Write `rows` in order to one Parquet file (zstd), which is whole or absent.

    A field that a row lacks is null; `codes` may be lists or numpy arrays. `stream` is {quantizer,
    token_rate, codebooks, codebook_size}, {} or None where no row has codes. `counts` {name: n}
    (clips that were resampled, split, ...) is stored with a stream for `read_counts`. Raises
    ValueError for a field that the schema lacks (keep it as JSON in `extra`) and for a value that
    does not fit.
    """
    if stream is not None:
        keys = _FRAME_KEYS if "frames" in schema.names else _STREAM_KEYS
        if stream and sorted(stream) != sorted(keys):
            raise ValueError(
                f"{path}: stream has the keys {sorted(stream)}; it must have exactly "
                f"{', '.join(keys)}"
            )
        metadata = {_STREAM: stream, _COUNTS: counts or {}}
        texts = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
        schema = schema.with_metadata(texts)
    remaining = iter(rows)
    with replacing(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while group := list(islice(remaining, _ROWS_PER_GROUP)):
                for row in group:
                    _check(row, pa.struct(list(schema)), f"{path}: row {row.get('id')!r}")
                writer.write_table(_table(group, schema, path))


def read_stream(folder: Path) -> dict[str, Any]:
    """{quantizer, token_rate, codebooks, codebook_size} of a complete artifact's codes, or
    {encoder, frame_rate, width} of its frames.

    {} where the shards hold neither. Raises ValueError when two shards have different streams.
    """
    paths = shard_paths(folder)
    streams = [json.loads(_metadata(path).get(_STREAM, b"{}")) for path in paths]
    for path, stream in zip(paths, streams, strict=True):
        if stream != streams[0]:
            raise ValueError(
                f"{folder}: shards of different streams cannot be mixed: {paths[0].name} has "
                f"{streams[0] or 'none'}, {path.name} has {stream or 'none'}; make the dataset "
                "again with one quantizer"
            )
    return streams[0]


def maker_of(folder: Path) -> str:
    """Identity of the quantizer or encoder of an artifact's speech; "" where it has none."""
    stream = read_stream(folder)
    return stream.get("quantizer", stream.get("encoder", ""))


def read_counts(path: Path) -> dict[str, int]:
    """The `counts` of one shard, see `write_shard`; {} for a shard without a stream."""
    return json.loads(_metadata(path).get(_COUNTS, b"{}"))


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a shard that Parquet cannot read."""
    return ValueError(
        f"{path} cannot be read ({' '.join(str(error).split())}): `just verify {path.parent}` says "
        "what is damaged; copy it again, or make it again"
    )


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a complete artifact, in order. Raises ValueError when it or one of them is
    missing."""
    listed = manifest_of(folder).get("outputs", {})
    paths = sorted(folder.glob("shard-*.parquet"))
    if not paths:
        raise ValueError(f"{folder} holds no shard-*.parquet: it is not a dataset; check the path")
    paths = [path for path in paths if path.name in listed or not listed]  # no stray file is data
    names = {name for name in listed if name.endswith(".parquet")}
    if lost := ", ".join(sorted(names - {path.name for path in paths})):
        raise ValueError(f"{folder}: {lost} of its manifest is not there; copy the whole folder")
    return paths


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of all shards in order, one row group in memory at a time.

    `columns` are top-level names, None for all. `codes` of a speech row is a numpy uint16 array
    (n,) or None; inside turns it stays a list. Raises ValueError for an incomplete folder or an
    unknown column.
    """
    for path in shard_paths(folder):
        yield from read_shard(path, columns)


def read_shard(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of one shard, as `read_rows`, whether or not its dataset is complete. Raises ValueError
    also for a damaged one."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if unknown := [name for name in columns or [] if name not in names]:
                raise ValueError(f"{path}: no column '{unknown[0]}'; it has {', '.join(names)}")
            for group in range(file.num_row_groups):
                yield from rows_of(file.read_row_group(group, columns=columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of a table in one of the schemas, or in some of its columns, as `read_rows`."""
    codes = table.column("codes") if "codes" in table.column_names else None
    rest = table.drop_columns(["codes"]) if codes is not None else table
    rows = rest.to_pylist() if rest.num_columns else [{} for _ in range(len(table))]
    if codes is not None:
        for row, item in zip(rows, codes, strict=True):
            row["codes"] = None if item.values is None else np.array(item.values)
    yield from rows


def _table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        for row in rows if len(rows) > 1 else []:  # to name the row
            _table([row], schema, path)
        raise ValueError(
            f"{path}: row {rows[0].get('id')!r} does not fit the schema: {error} "
            "(codes are whole numbers from 0 to 65535)"
        ) from error


def _check(value: Any, kind: pa.DataType, where: str) -> None:
    """Raise ValueError, at any depth, for what Arrow would alter silently: unknown keys, codes
    like 1.5."""
    if isinstance(value, dict) and pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        for key, item in value.items():
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                guess = f"did you mean '{close[0]}'? " if close else ""
                raise ValueError(
                    f"{where}: the schema has no field '{key}'; {guess}It has "
                    f"{', '.join(fields)}; keep others as JSON in 'extra'"
                )
            _check(item, fields[key], where)
    elif pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        for item in value or []:
            _check(item, kind.value_type, where)
    elif pa.types.is_list(kind) and value is not None and len(value):
        if np.asarray(value).dtype.kind not in "iu":
            raise ValueError(f"{where}: codes are whole numbers from 0 to 65535, not {value!r:.60}")


class Shard(NamedTuple):
    """Content of a shard's files: rows, rejects {id, reason} and the counts of `write_shard`.
    `files`: bytes of further files by name, which stand beside it as shard-00007.NAME."""

    rows: list[dict[str, Any]]
    rejects: list[dict[str, str]]
    counts: dict[str, int]
    files: dict[str, bytes] = {}  # noqa: RUF012
