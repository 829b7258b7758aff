"""Members of plain tar files, read in place.

In: a tar. Out: its members with their byte offsets, and the content of a member. Planning reads all
headers once; content is then read at its offset, and nothing is unpacked to disk. A link, a device
and a name that leads out of the folder (absolute, or with `..`) are members with a fault. A tar
that is cut off still gives the members before the cut.
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
    """Yield the members of a tar, but no folders, in order from the header at byte `start` on.

    Where the tar breaks off, the last member has a fault: it is the member that is cut off, or it
    stands for all members that may have followed.
    """
    length, end = path.stat().st_size, start
    with open(path, "rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
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
    """Return the members of a tar by name. Of members with one name the last counts, as in tar."""
    return {member.name: member for member in members(path)}


def find(path: Path, name: str) -> Member:
    """Return the member `name` of a tar. Raises ValueError("kind: detail") when it has none.

    NeMo's manifests call the second and further parts of a recording x.wav x-sub1.wav, x-sub2.wav,
    ...; for these names the member x.wav is returned, unless the tar has them.
    """
    by_name, name = index(path), name.removeprefix("./")
    recording = re.sub(r"-sub\d+(\.\w+)?$", r"\1", name)
    if member := by_name.get(name) or by_name.get(recording):
        return member
    last = next(reversed(by_name.values()), None)
    if last and last.fault and last.fault.startswith("unreadable"):
        raise ValueError(last.fault)  # the member may lie in the part that is lost
    raise ValueError(f"not found: {path.name} has no member of this name")


def read(file: BinaryIO, member: Member) -> bytes:
    """Return the content of a member of the open tar. Raises ValueError("kind: detail") for a
    member with a fault, and for a tar that has become shorter since the member was found."""
    if member.fault:
        raise ValueError(member.fault)
    file.seek(member.start)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("unreadable: the tar is shorter than when it was planned")
    return content
