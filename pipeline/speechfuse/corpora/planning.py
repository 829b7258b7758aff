"""What corpora of large files need to plan: the files that a pattern names, lines and where they
are, shards of neighbouring items, and the ids that come twice.

In: patterns from configuration; items with their ids and places. Out: paths; dicts for plan.json.
"""

import glob
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse.artifact import id_digest

LINE_LIMIT = 1 << 20  # bytes; a longer line is none of a list of clips
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def files(patterns: str | list[str], suffix: str) -> list[Path]:
    """Files that one pattern or several name, in that order, each once.

    A pattern is a path, a folder (all files below whose name ends in `suffix`), a glob, or holds
    ranges: {000..127}, {a,b}, or NeMo's _OP_0..127_CL_. FileNotFoundError when one names nothing.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _braces(pattern.replace("_OP_", "{").replace("_CL_", "}")):
            path = Path(name)
            if path.is_dir():
                named = sorted(path.rglob(f"*{suffix}"))
            else:
                matches = glob.glob(name, recursive=True)
                named = [path] if path.exists() else sorted(map(Path, matches))
            if not named:
                raise FileNotFoundError(f"no file at {name} ({suffix} is what is looked for)")
            found.update(dict.fromkeys(p for p in named if p.is_file()))
    return list(found)


def _braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if not match or Path(pattern).exists():
        return [pattern]
    first, last, names = match.groups()
    values = names.split(",") if names is not None else _range(first, last)
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for value in values for name in _braces(f"{before}{value}{after}")]


def _range(first: str, last: str) -> list[str]:
    width = max(len(first), len(last)) if first[0] == "0" else 0  # {000..127} keeps its zeros
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def folder_of(paths: list[Path]) -> Path:
    """The folder that all `paths` are below; corpora name their files relative to it."""
    return Path(os.path.commonpath([path.parent.absolute() for path in paths]))


def refuse_compressed(path: Path) -> None:
    """ValueError for a file that holds a gzip, bzip2, xz or zstandard stream."""
    with open(path, "rb") as file:
        if file.read(8).startswith(_COMPRESSED):
            raise ValueError(
                f"{path} is compressed; clips are read from anywhere in it, which needs it plain: "
                "decompress it first"
            )


def lines(path: Path, start: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """(byte offset, line number, line) of every line that is not blank, from byte `start` on, where
    line `number` begins. A line over the limit is cut to it."""
    with open(path, "rb") as file:
        file.seek(start)
        while line := file.readline(LINE_LIMIT):
            if line.strip():
                yield start, number, line
            rest = line
            while len(rest) == LINE_LIMIT and not rest.endswith(b"\n"):
                start += len(rest)
                rest = file.readline(LINE_LIMIT)
            start += len(rest)
            number += 1


def shards(
    parts: Iterable[Iterable[tuple[str, dict[str, Any]]]], shard_size: int
) -> list[dict[str, Any]]:
    """Cut each part (the items of one file, in order) into shards of at most `shard_size` items.

    An item is (id, place). A shard is the place of its first item with `count`, and `again`: the
    positions in it of items whose id an earlier item of the corpus has.
    """
    plan: list[dict[str, Any]] = []
    ids = array("Q")
    for items in parts:
        room = 0
        for id, place in items:
            if not room:
                plan.append({**place, "count": 0})
                room = shard_size
            room -= 1
            plan[-1]["count"] += 1
            ids.append(id_digest(id))
    mark_repeated(plan, ids)
    return plan


def mark_repeated(plan: list[dict[str, Any]], ids: array) -> None:
    """Add `again` to the shards that hold an item whose id came before; `ids`: their digests."""
    values = np.frombuffer(ids, np.uint64)
    order = np.argsort(values, kind="stable")
    values = values[order]
    repeated = np.sort(order[1:][values[1:] == values[:-1]])
    start = 0
    for shard in plan:
        low, high = np.searchsorted(repeated, (start, start + shard["count"]))
        if low < high:
            shard["again"] = (repeated[low:high] - start).tolist()
        start += shard["count"]


def printable(name: str) -> str:
    """A name as text that can be written: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
