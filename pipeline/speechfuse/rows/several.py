"""Several recordings in one row of speech: their codes or frames one after the other.

In: a row for each recording. Out: the columns of a row that holds them all, and those rows again.
Under "_recordings" of `extra` stands where each comes from and how long it is in its column, so
that the published schema stays as it is.
"""

from typing import Any

import numpy as np

RECORDINGS = "_recordings"
TURNS = "conversations"  # key of `extra`: turns of NeMo's conversation, whose audio they are


def joined(rows: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row of all recordings of `rows`, its `extra` with them. What was
    heard in them is one text."""
    columns: dict[str, Any] = {"extra": extra | {RECORDINGS: [row["source"] for row in rows]}}
    if heard := [row["text"] for row in rows if row["text"]]:
        columns["text"] = " ".join(heard)
    for name in ("codes", "frames"):
        if values := [row[name] for row in rows if name in row]:
            columns[name] = b"".join(values) if name == "frames" else np.concatenate(values)
            pairs = zip(rows, values, strict=True)
            listed = [row["source"] | {"length": len(value)} for row, value in pairs]
            columns["extra"] = extra | {RECORDINGS: listed}
    return columns


def recordings_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each recording of a row whose `extra` has been read: itself where it is of
    one."""
    if (listed := row["extra"].get(RECORDINGS)) is None:
        return [row]
    rows, start = list[dict[str, Any]](), 0
    for source in listed:
        end = start + source.get("length", 0)
        columns = {n: row[n][start:end] for n in ("codes", "frames") if row.get(n) is not None}
        names = {"id": f"{row['id']}[{len(rows)}]", "part": None, "text": None}
        rows.append(names | {"source": source, "seconds": source["seconds"]} | columns)
        start = end
    return rows


def alone(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of one recording. Raises ValueError for one of several, or none."""
    if (listed := row["extra"].get(RECORDINGS)) is not None:
        raise ValueError(
            f"row {row['id']} has {len(listed)} recordings: its turns are made by "
            "{_component_: speechfuse.samples.context}"
        )
    return row
