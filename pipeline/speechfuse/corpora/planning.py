"""Planning of corpora: files by pattern, lines with their byte offsets, shards of neighbouring
items, ids that are not unique.

In: patterns from configuration; items with their ids and places. Out: paths; dicts for plan.json.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from speechfuse import json_lines, patterns
from speechfuse.artifact import id_digest, json_digest

# id of a piece of a clip that is split, and of one whose first name another clip has
_PIECE = re.compile(r"(.+)#((?:0|[1-9][0-9]{0,8})#*)", re.S)


def files(names: str | list[str], suffix: str) -> tuple[Path, list[str]]:
    """Return the files that one pattern or several name, in that order, each once: the folder that
    holds them all, and their names relative to it.

    A pattern is a path, a folder (all files below whose name ends in `suffix`, in any letter case,
    but for hidden ones), or has braces and wildcards (speechfuse.patterns); _OP_0..127_CL_ are
    NeMo's braces. Raises FileNotFoundError for one that names nothing, and ValueError for a name
    that is not UTF-8 and for two names that differ in the suffix alone.
    """
    paths: dict[Path, None] = {}
    for pattern in [names] if isinstance(names, str) else names:
        if not os.path.exists(pattern):
            pattern = pattern.replace("_OP_", "{").replace("_CL_", "}")
        for name, matches in patterns.local(pattern):
            there = [file.absolute() for path in matches for file in _files(path, suffix)]
            if not there:
                raise FileNotFoundError(f"no file at {name}; a {suffix} file is needed")
            paths.update(dict.fromkeys(there))
    if not paths:
        raise FileNotFoundError(f"the list of {suffix} files is empty: name at least one")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    relative = [path.relative_to(folder).as_posix() for path in paths]
    first: dict[str, str] = {}
    for name in relative:
        if printable(name) != name:
            raise ValueError(f"{folder}: the name {printable(name)} is not UTF-8: rename the file")
        if (other := first.setdefault(name.removesuffix(suffix), name)) != name:
            raise ValueError(f"{folder}: {other} and {name} differ in their suffix alone: use one")
    return folder, relative


def _files(path: Path, suffix: str) -> list[Path]:
    """Return a file, or the files with the suffix below a folder."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    below = (p for p in sorted(path.rglob("*")) if p.name.lower().endswith(suffix) and p.is_file())
    return [p for p in below if not any(n.startswith(".") for n in p.relative_to(path).parts)]


def digest_of_sizes(folder: Path, names: list[str]) -> str:
    """Return a hash of the names and sizes of files below `folder`."""
    return json_digest([(name, (folder / name).stat().st_size) for name in names])


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a file that holds a gzip, bzip2, xz or zstandard stream."""
    with open(path, "rb") as file:
        if file.read(8).startswith(json_lines.COMPRESSED):
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

    An item is (id, place). A shard is the place of its first item with `count` and what
    `mark_ids` adds.
    """
    plan: list[dict[str, Any]] = []

    def ids() -> Iterator[str]:
        for items in map(iter, parts):
            while part := list(islice(items, shard_size)):
                plan.append({**part[0][1], "count": len(part)})
                yield from (id for id, _ in part)

    mark_ids(plan, ids())
    return plan


def mark_ids(plan: list[dict[str, Any]], ids: Iterable[str]) -> None:
    """Add to the shards of `plan` what is needed to make the ids of rows unique. `ids`: those of
    all items, in the order of the plan; 8 bytes of each are held in memory.

    A shard's `again` lists the positions of items whose id came before. The pieces of a long item x
    will be called x#0, x#1 ...; where another item already has such a name, `reserved` of the
    shard of x lists what is taken: {position of x: ["1"]} if there is an item x#1.
    """
    digests, bases, ends = array("Q"), array("Q"), list[str]()
    for id in ids:
        digests.append(id_digest(id))
        if piece := _PIECE.fullmatch(id):
            bases.append(id_digest(piece[1]))
            ends.append(piece[2])
    values = np.frombuffer(digests, np.uint64)
    order = np.argsort(values, kind="stable")
    values = values[order]
    repeated = np.sort(order[1:][values[1:] == values[:-1]])
    start, starts = 0, []
    for shard in plan:
        starts.append(start)
        low, high = np.searchsorted(repeated, (start, start + shard["count"]))
        if low < high:
            shard["again"] = (repeated[low:high] - start).tolist()
        start += shard["count"]
    places = np.searchsorted(values, np.frombuffer(bases, np.uint64))
    for base, place, end in zip(bases, places.tolist(), ends, strict=True):
        if place < len(values) and values[place] == base:
            item = int(order[place])
            number = int(np.searchsorted(starts, item, "right")) - 1
            reserved = plan[number].setdefault("reserved", {})
            reserved.setdefault(str(item - starts[number]), []).append(end)


def printable(name: str) -> str:
    """Return a file name as text that can be written: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def leads_out(name: str) -> bool:
    """Return True if a path is absolute or has `..`, so that it may lead out of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts
