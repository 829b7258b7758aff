"""JSON lines: files with one JSON object a line, read with the place of every line.

In: a path, or an open file. Out: lines with their numbers and byte offsets, and the object that a
line holds. UTF-8, with a byte order mark or without. Blank lines are skipped. A line ends at \\n or
\\r\\n, and not at U+2028, which JSON leaves as it is. At most LIMIT bytes are in memory.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

LIMIT = 1 << 24  # bytes of a line
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def lines(file: BinaryIO, start: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """Yield (byte offset, line number, line) of every line that is not blank, from byte `start` on,
    where line `number` begins. A line over the limit is cut to it.

    Raises ValueError for a file that is compressed, no UTF-8, or one object or array over several
    lines.
    """
    _refuse_other(file)
    file.seek(start)
    while line := file.readline(LIMIT):
        if line.strip().removeprefix(BOM_UTF8):
            yield start, number, line
        rest = line
        while len(rest) == LIMIT and not rest.endswith(b"\n"):
            start += len(rest)
            rest = file.readline(LIMIT)
        start += len(rest)
        number += 1


def _refuse_other(file: BinaryIO) -> None:
    file.seek(0)
    head = file.read(1 << 16)
    if head.startswith(COMPRESSED):
        raise ValueError("it is compressed, and its lines are read from anywhere: decompress it")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise ValueError("it is UTF-16 or UTF-32: save it as UTF-8")
    if head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError("it is a JSON array, and not one object a line: `jq -c .[]` writes that")
    first, second, *_ = (*filter(None, map(bytes.strip, head.split(b"\n"))), b"", b"")
    begun = first.removeprefix(BOM_UTF8).startswith(b"{") and not first.endswith(b"}")
    if begun and second and not second.startswith(b"{"):
        raise ValueError(
            "its first object goes on over several lines, so it is one object and no rows: write "
            "one object a line"
        )


def parse(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds. Raises ValueError, which says why, where it is none: NaN
    and a key that comes twice are no JSON."""
    if len(line) >= LIMIT:
        raise ValueError(f"longer than {LIMIT >> 20} MiB")
    try:
        value = _decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (character {error.pos + 1})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.40} comes twice")
    return value


_decode = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object).decode


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file. Raises ValueError, with the file and the line, for one
    that is no JSON object; FileNotFoundError for no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: a file of JSON lines is needed")
    where = f"{path}"
    try:
        with open(path, "rb") as file:
            for _, number, line in lines(file):
                where = f"{path}, line {number}"
                yield number, parse(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
