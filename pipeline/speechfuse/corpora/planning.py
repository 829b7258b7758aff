"""Planning of corpora: files by pattern, lines with their byte offsets, shards of neighbouring
items, ids that come twice.

In: patterns from configuration; items with their ids and places. Out: paths; dicts for plan.json.
"""

import glob
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from speechfuse import json_lines
from speechfuse.artifact import id_digest, json_digest

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def files(patterns: str | list[str], suffix: str) -> tuple[Path, list[str]]:
    """Return the files that one pattern or several name, in that order, each once: the folder that
    holds them all, and their names relative to it.

    A pattern is a path, a folder (all files below whose name ends in `suffix`), a glob, or holds
    ranges: {000..127}, {a,b}, or NeMo's _OP_0..127_CL_. Raises FileNotFoundError for one that names
    nothing.
    """
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _braces(pattern.replace("_OP_", "{").replace("_CL_", "}")):
            path = Path(name)
            if path.is_dir():
                matches = sorted(path.rglob(f"*{suffix}"))
            elif path.exists():
                matches = [path]
            else:
                matches = sorted(map(Path, glob.glob(name, recursive=True)))
            if not (there := [match.absolute() for match in matches if match.is_file()]):
                raise FileNotFoundError(f"no file at {name}; a {suffix} file is needed")
            paths.update(dict.fromkeys(there))
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, [path.relative_to(folder).as_posix() for path in paths]


def digest_of_sizes(folder: Path, names: list[str]) -> str:
    """Return a hash of the names and sizes of files below `folder`."""
    return json_digest([(name, (folder / name).stat().st_size) for name in names])


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


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a file that holds a gzip, bzip2, xz or zstandard stream."""
    with open(path, "rb") as file:
        if file.read(8).startswith(_COMPRESSED):
            raise ValueError(
                f"{path} is compressed; clips are read from anywhere in it, which needs it plain: "
                "decompress it first"
            )


def lines(path: Path, start: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """Yield the lines of a file as json_lines.lines does; its ValueError names the file."""
    try:
        with open(path, "rb") as file:
            yield from json_lines.lines(file, start, number)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def shards(
    parts: Iterable[Iterable[tuple[str, dict[str, Any]]]], shard_size: int
) -> list[dict[str, Any]]:
    """Cut each part (the items of one file, in order) into shards of at most `shard_size` items.

    An item is (id, place). A shard is the place of its first item with `count` and `again`: the
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
    """Add `again` to the shards that hold an item whose id came before. `ids`: digests of the ids
    of all items, in the order of the plan."""
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
    """Return a file name as text that can be written: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def leads_out(name: str) -> bool:
    """Return True if a path is absolute or has `..`, so that it may lead out of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts
