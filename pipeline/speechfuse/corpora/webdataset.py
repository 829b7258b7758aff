"""Tar files: WebDataset corpora, and single members for tarred NeMo manifests.

In: plain tar files. Out: clips whose audio is the bytes of a member. Nothing is unpacked: headers
are read once to plan, then audio is read at its place. Links, devices and names that leave the
folder (absolute, or with `..`) are rejected; of a tar that is cut off, what is whole is used.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from speechfuse.artifact import json_digest
from speechfuse.audio.decoding import SUFFIXES
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject

SIDECAR_LIMIT = 1 << 20  # bytes of a .txt or .json; more is no description of a clip
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
_END = "end of the tar"  # stands for the members that a damaged tar has lost


class Member(NamedTuple):
    """A file in a tar: byte offsets of its header and its content. `fault`: why it is of no use."""

    name: str
    header: int
    start: int
    size: int
    fault: str | None


def members(path: Path, start: int = 0) -> Iterator[Member]:
    """Files of a tar in order, from the header at byte `start`; folders are left out.

    Where the tar breaks off, the last one has a fault: the member that is cut, or one that stands
    for all that may have followed.
    """
    length, end = path.stat().st_size, start
    with open(path, "rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header
                    name = planning.printable(info.name).removeprefix("./")
                    cut = info.isreg() and info.offset_data + info.size > length
                    if cut or info.size < 0:
                        fault = "unreadable: the tar is cut off inside this member"
                        yield Member(name, info.offset, 0, 0, fault)
                        return
                    end = tar.offset
                    if not info.isdir():
                        yield Member(name, info.offset, info.offset_data, info.size, _fault(info))
        except _BROKEN:
            pass  # seen below: what stands at `end` is not the end mark
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            what = f"the tar is damaged or cut off at byte {end}" if end else "not a tar"
            yield Member(_END, end, 0, 0, f"unreadable: {what}")


def _fault(info: tarfile.TarInfo) -> str | None:
    if not info.isreg() or info.issparse():
        return "unsafe path: a link, a device or a sparse file"
    if leaves(info.name):
        return "unsafe path: the name is absolute or has .. in it"
    if planning.printable(info.name) != info.name:
        return "bad name: it is not UTF-8"
    return None


def leaves(name: str) -> bool:
    """Whether a path is absolute or goes up, so that it may lead out of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


@lru_cache(maxsize=4)
def index(path: Path) -> dict[str, Member]:
    """Members of one tar by name; of equal names the last, as tar itself has it."""
    return {member.name: member for member in members(path)}


def find(path: Path, name: str) -> Member:
    """The member `name` of a tar; ValueError("kind: detail") when it has none.

    NeMo names the second and further parts of one recording x-sub1.wav, x-sub2.wav in the manifest;
    the tar has x.wav.
    """
    known, name = index(path), name.removeprefix("./")
    whole = re.sub(r"-sub\d+(\.\w+)?$", r"\1", name)
    if member := known.get(name) or known.get(whole):
        return member
    last = next(reversed(known.values()), None)
    if last and last.fault and last.fault.startswith("unreadable"):
        raise ValueError(last.fault)  # it may have been among what is lost
    raise ValueError(f"not found: {path.name} has no member of this name")


def read(file: BinaryIO, member: Member) -> bytes:
    """The content of a member of the open tar; ValueError("kind: detail") when it is not there."""
    if member.fault:
        raise ValueError(member.fault)
    file.seek(member.start)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("unreadable: the tar is shorter than when it was planned")
    return content


def described(entry: dict[str, Any], text_keys: tuple[str, ...]) -> dict[str, Any]:
    """What a JSON object says of a clip: `text` (the first of `text_keys` that it has), `speaker`,
    `language` (from `lang` or `language`), and the other keys as `extra`.

    ValueError for one of the wrong type.
    """
    rest = dict(entry)

    def take(keys: tuple[str, ...], kinds: type | tuple[type, ...]) -> str | None:
        for key in keys:
            if (value := rest.pop(key, None)) is not None:
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise ValueError(f"{key} is {value!r:.40}, not text")
                return utf8(str(value)).strip() or None
        return None

    return {
        "text": take(text_keys, str),
        "speaker": take(("speaker",), (str, int)),
        "language": take(("lang", "language"), str),
        "extra": rest,
    }


def utf8(text: str) -> str:
    r"""`text` itself; ValueError when it cannot be written as UTF-8 (JSON's "\ud800")."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r:.40} holds half a character") from None
    return text


class WebDataset:
    """Tars of samples: neighbouring members that share their name up to the first dot of its last
    part, as `000017.flac`, `000017.txt`, `000017.json`, `000017.cls`.

    `tars`: a path, a folder, a glob or a range ({000..127}), or a list of such. The audio member is
    told by its suffix; `audio_suffix` (e.g. mic1.wav) names it where a sample has several. The text
    comes from .txt, else from `text_key` of .json, whose other keys are kept in `extra`, with .cls
    as `cls`. A clip's id is tar/key. Members without a suffix are ignored, which is counted.
    """

    def __init__(
        self,
        tars: str | list[str],
        audio_suffix: str | None = None,
        text_key: str = "text",
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        paths = planning.files(tars, ".tar")
        self.folder = planning.folder_of(paths)
        self.tars = [path.absolute().relative_to(self.folder).as_posix() for path in paths]
        self.audio_suffix, self.text_key = audio_suffix, text_key
        self.language, self.licence = language, licence
        self.source_name = self.folder.name
        self.ignored: Counter[str] = Counter()

    @cached_property
    def fingerprint(self) -> str:
        sizes = [(name, (self.folder / name).stat().st_size) for name in self.tars]
        return json_digest(sizes)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        self.ignored.clear()
        return planning.shards((self._items(tar) for tar in self.tars), shard_size)

    def _items(self, tar: str) -> Iterator[tuple[str, dict[str, Any]]]:
        path = self.folder / tar
        planning.refuse_compressed(path)
        for key, parts in _samples(path, 0, self.ignored):
            yield _id(tar, key), {"tar": tar, "start": next(iter(parts.values())).header}

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        tar, again = shard["tar"], set(shard.get("again", ()))
        path = self.folder / tar
        samples = islice(_samples(path, shard["start"], Counter()), shard["count"])
        with open(path, "rb") as file:
            for position, (key, parts) in enumerate(samples):
                id = _id(tar, key)
                try:
                    if position in again:
                        raise ValueError(
                            "duplicate id: the members of one sample are to be neighbours in a tar"
                        )
                    member = self._audio(parts)
                    said = _beside(file, parts, self.text_key)
                    said["language"] = said["language"] or self.language
                    yield Clip(id, read(file, member), f"{tar}/{member.name}", **said)
                except ValueError as error:
                    yield Reject(id, str(error))

    def _audio(self, parts: dict[str, Member]) -> Member:
        if fault := next(iter(parts.values())).fault:
            raise ValueError(fault)
        found = [suffix for suffix in parts if self._is_audio(suffix)]
        if len(found) == 1:
            return parts[found[0]]
        if found:
            raise ValueError(
                f"bad name: {', '.join(found)} are all audio; choose one by audio_suffix"
            )
        raise ValueError(f"not found: no audio among the members {', '.join(parts)}")

    def _is_audio(self, suffix: str) -> bool:
        if self.audio_suffix:
            return suffix == self.audio_suffix.lower().lstrip(".")
        return f".{suffix}".endswith(SUFFIXES)


def _id(tar: str, key: str) -> str:
    return f"{tar.removesuffix('.tar')}/{key}"


def _samples(
    path: Path, start: int, ignored: Counter[str]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, members by lower-case suffix) of each sample; a member that has a fault is alone."""
    key: str | None = None
    parts: dict[str, Member] = {}
    for member in members(path, start):
        folder, slash, name = member.name.rpartition("/")
        base, _, suffix = name.partition(".")
        if not member.fault and not (base and suffix):
            ignored["members without a suffix"] += 1
            continue
        own = member.name if member.fault else folder + slash + base
        if key is not None and (own != key or member.fault or suffix.lower() in parts):
            yield key, parts
            parts = {}
        key = own
        parts[suffix.lower()] = member
    if key is not None:
        yield key, parts


def _beside(file: BinaryIO, parts: dict[str, Member], text_key: str) -> dict[str, Any]:
    """What the .json, .txt and .cls of a sample say, as `described`."""
    entry: dict[str, Any] = {}
    suffix = ""
    try:
        for suffix in [suffix for suffix in ("json", "txt", "cls") if suffix in parts]:
            if parts[suffix].size > SIDECAR_LIMIT:
                raise ValueError("more than 1 MiB")
            text = read(file, parts[suffix]).decode()
            if suffix != "json":
                entry[text_key if suffix == "txt" else "cls"] = text.strip()
            elif isinstance(found := json.loads(text), dict):
                entry = found
            else:
                raise ValueError("not an object")
        return described(entry, (text_key,))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bad transcript: .{suffix}: {error}") from None
