"""Files by pattern, as a shell reads it: braces and wildcards.

In: patterns such as data/train-{000..127}.tar or data/*.parquet. Out: the names of the files. A
part of a path that exists is taken as it is written, so that brackets and braces in the name of a
folder are no wildcards.
"""

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from braceexpand import alphabet, braceexpand

MOST = 1_000_000  # names that the braces of a pattern may give
_STEP = r"(?:\.\.-?(\d+))?"


def local(pattern: str, root: str | Path = "") -> Iterator[tuple[str, list[Path]]]:
    """Yield (name, files and folders that it matches, sorted) for each name that the braces of
    `pattern` give. Hidden files match only a pattern that begins with a dot. Raises ValueError
    for a brace that is not closed, and for more than MOST names."""
    folder, parts = Path(root), Path(pattern).parts
    while parts and os.path.exists(folder / parts[0]):
        folder, parts = folder / parts[0], parts[1:]
    for name in _expanded("/".join(parts)):
        yield str(folder / name), sorted(_matching(folder, Path(name).parts))


def _expanded(pattern: str) -> Iterator[str]:
    if (count := _count(pattern)) > MOST:
        raise ValueError(f"{pattern} gives {count:,} names; at most {MOST:,} are looked for")
    return braceexpand(pattern)


def _count(pattern: str) -> int:
    """Return how many names the braces of a pattern give, without making them: the innermost are
    replaced by their number, between two NULs, until there are none."""

    def product(text: str) -> int:
        return math.prod(map(int, re.findall("\0([0-9]+)\0", text)))

    def number(braces: re.Match[str]) -> str:
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)" + _STEP, braces[1]):
            first, last = int(numbers[1]), int(numbers[2])
        elif letters := re.fullmatch(r"([A-Za-z])\.\.([A-Za-z])" + _STEP, braces[1]):
            first, last = map(alphabet.index, letters.groups()[:2])
        else:
            return f"\0{sum(map(product, braces[1].split(',')))}\0"
        step = int((numbers or letters)[3] or 1) or 1  # type: ignore[index]
        return f"\0{abs(last - first) // step + 1}\0"

    text = re.sub(r"\\.|\0", "", pattern, flags=re.S)
    while text != (text := re.sub(r"\{([^{}]*)\}", number, text)):
        pass
    return product(text)


def _matching(folder: Path, parts: tuple[str, ...]) -> Iterable[Path]:
    if not parts:
        return [folder]
    first, rest = parts[0], parts[1:]
    if os.path.exists(folder / first):
        return _matching(folder / first, rest)
    if first == "**":
        names = glob.glob("/".join(parts), root_dir=folder, recursive=True)
        return [folder / name for name in names]
    names = glob.glob(first, root_dir=folder)
    return [path for name in names for path in _matching(folder / name, rest)]


def matching(patterns: list[str], root: str, where: str, filesystem: Any = None) -> list[str]:
    """Return the files below the folder `root` of this machine, or of an fsspec `filesystem`, that
    the patterns name: relative to it, each once, sorted for each name.

    Raises FileNotFoundError, which begins with `where`, for a pattern that names none.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        if filesystem:
            matches = ((n, filesystem.glob(f"{root}/{n}")) for n in _expanded(pattern))
        else:
            matches = ((n, [p for p in paths if p.is_file()]) for n, paths in local(pattern, root))
        for name, paths in matches:
            if not paths:
                missing = name.removeprefix(f"{root}/")
                raise FileNotFoundError(f"{where} has no file that matches {missing}")
            names.update(dict.fromkeys(sorted(str(p).removeprefix(f"{root}/") for p in paths)))
    return list(names)
