"""Members of plain tar files, read in place.

In: a tar. Out: its members with their byte offsets, and the content of one. Headers are read once
to plan, content at its offset; nothing is unpacked. Links, devices and names that lead out of the
folder (absolute, or with `..`) have a fault; of a tar that is cut off, whole members are used.
"""

import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from speechfuse.corpora.planning import leads_out, printable

_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
_END = "end of the tar"  # name of the member that stands for all that a damaged tar has lost


class Member(NamedTuple):
    """A file in a tar, with the byte offsets of header and content. `fault`: why it is unusable."""

    name: str
    header: int
    start: int
    size: int
    fault: str | None


def members(path: Path, start: int = 0) -> Iterator[Member]:
    """Yield the files of a tar in order, from the header at byte `start`; no folders.

    Where the tar breaks off, the last member has a fault: it is the one that is cut, or stands for
    all that may have followed.
    """
    length, end = path.stat().st_size, start
    with open(path, "rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header
                    name = printable(info.name).removeprefix("./")
                    cut = info.isreg() and info.offset_data + info.size > length
                    if cut or info.size < 0:
                        fault = "unreadable: the tar is cut off inside this member"
                        yield Member(name, info.offset, 0, 0, fault)
                        return
                    end = tar.offset
                    if not info.isdir():
                        yield Member(name, info.offset, info.offset_data, info.size, _fault(info))
        except _BROKEN:
            pass  # reported below: the block at `end` is not the end mark
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            what = f"the tar is damaged or cut off at byte {end}" if end else "not a tar"
            yield Member(_END, end, 0, 0, f"unreadable: {what}")


def _fault(info: tarfile.TarInfo) -> str | None:
    if not info.isreg() or info.issparse():
        return "unsafe path: a link, a device or a sparse file"
    if leads_out(info.name):
        return "unsafe path: the name is absolute or has .. in it"
    if printable(info.name) != info.name:
        return "bad name: it is not UTF-8"
    return None


@lru_cache(maxsize=4)
def index(path: Path) -> dict[str, Member]:
    """Return the members of a tar by name; of equal names the last, as tar itself does."""
    return {member.name: member for member in members(path)}


def find(path: Path, name: str) -> Member:
    """Return the member `name` of a tar. Raises ValueError("kind: detail") when it has none.

    NeMo's manifests name the second and further parts of one recording x-sub1.wav, x-sub2.wav; the
    tar has x.wav.
    """
    by_name, name = index(path), name.removeprefix("./")
    recording = re.sub(r"-sub\d+(\.\w+)?$", r"\1", name)
    if member := by_name.get(name) or by_name.get(recording):
        return member
    last = next(reversed(by_name.values()), None)
    if last and last.fault and last.fault.startswith("unreadable"):
        raise ValueError(last.fault)  # it may have been in the part that is lost
    raise ValueError(f"not found: {path.name} has no member of this name")


def read(file: BinaryIO, member: Member) -> bytes:
    """Return the content of a member of the open tar. Raises ValueError("kind: detail")."""
    if member.fault:
        raise ValueError(member.fault)
    file.seek(member.start)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("unreadable: the tar is shorter than when it was planned")
    return content
