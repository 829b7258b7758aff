"""Rows of Parquet files that others wrote, of any of Arrow's types.

In: Parquet files of any fsspec filesystem. Out: rows, or why one cannot be read.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BUFFER = 4 << 20  # bytes read at once of a column, and of a Hub file beyond the range needed
Row = tuple[int, dict[str, Any] | str]  # number in its file; the row, or why it cannot be read


@contextmanager
def opened(filesystem: Any, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Raises pa.ArrowException for one that is damaged, OSError of the disk or
    the network."""
    with filesystem.open(path, "rb", block_size=BUFFER) as file:
        try:
            table = pq.ParquetFile(file, buffer_size=BUFFER)
        except (OSError, UnicodeDecodeError) as error:  # the latter of the name of a column
            if is_of_disk(error):
                raise
            raise pa.ArrowInvalid(str(error)) from None
        with table:
            yield table


def is_of_disk(error: Exception) -> bool:
    """Return whether an error is of the disk or the network; that of Arrow for damaged data is an
    OSError without a number."""
    return isinstance(error, OSError) and (type(error) is not OSError or bool(error.errno))


def type_of(kind: pa.DataType) -> str:
    """Return "string" or "binary" for each of Arrow's types of text or bytes (large_string,
    binary_view, a dictionary or an extension of them, ...), for others their name."""
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return re.sub(r"^large_|^fixed_size_|_view$|\[\d+\]$", "", str(kind))


def rows(
    file: pq.ParquetFile, first: int, count: int, columns: list[str], at_once: int
) -> Iterator[Row]:
    """Yield `count` rows from number `first` on, those of `columns` that the file has; `at_once`
    rows are in memory. All rows of a damaged row group from the damage on are unreadable. Raises
    OSError of the disk or the network."""
    last, end = first + count, 0
    for group in range(file.num_row_groups):
        row, end = end, end + file.metadata.row_group(group).num_rows
        if row >= last or end <= first:
            continue
        try:
            for batch in file.iter_batches(at_once, [group], columns, use_threads=False):
                for position in range(max(first - row, 0), min(last - row, len(batch))):
                    yield row + position, _values(batch.slice(position, 1))
                row += len(batch)
                if row >= last:
                    return
        except (pa.ArrowException, OSError) as error:
            if is_of_disk(error):
                raise
            for lost in range(max(row, first), min(end, last)):
                yield lost, f"unreadable: {error!s:.120}"


def _values(row: pa.RecordBatch) -> dict[str, Any] | str:
    try:
        return row.to_pylist()[0]
    except (ValueError, LookupError, OverflowError) as error:  # no UTF-8, no such zone or year
        return f"unreadable: {error!s:.120}"
