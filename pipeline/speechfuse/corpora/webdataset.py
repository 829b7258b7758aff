"""WebDataset corpora: tars whose neighbouring members make a sample.

In: plain tar files (speechfuse.corpora.tar_members). Out: clips whose audio is the bytes of a
member.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from speechfuse import json_lines
from speechfuse.audio.decoding import SUFFIXES
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip, clip_fields
from speechfuse.corpora.tar_members import Member, members, read
from speechfuse.rows.rejects import Reject

SIDECAR_LIMIT = 1 << 20  # bytes of a .txt, .json or .cls; a clip with a larger one is rejected


class WebDataset:
    """Tars of samples. A sample is a run of neighbouring members with the same key, which is a
    member's path up to the first dot of its file name: `000017` for `000017.flac`, `000017.txt`,
    `000017.json` and `000017.cls`.

    `tars` is a path, a folder, a glob or a range ({000..127}), or a list of such. The audio member
    is recognized by its suffix; `audio_suffix` (e.g. mic1.wav) names the one to take where a sample
    has several. A clip's text is the content of .txt or, without one, the value of `text_key` in
    .json. The other keys of .json are kept in `extra`, and there also the content of .cls as `cls`.
    A clip's id is tar/key. Members without a suffix are counted as ignored.
    """

    def __init__(
        self,
        tars: str | list[str],
        audio_suffix: str | None = None,
        text_key: str = "text",
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        self.folder, self.tars = planning.files(tars, ".tar")
        self.audio_suffix, self.text_key = audio_suffix, text_key
        self.language, self.licence = language, licence
        self.source_name = self.folder.name
        self.ignored: Counter[str] = Counter()

    @cached_property
    def fingerprint(self) -> str:
        return planning.digest_of_sizes(self.folder, self.tars)

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
                    fields = _fields(file, parts, self.text_key)
                    fields["language"] = fields["language"] or self.language
                    yield Clip(id, read(file, member), f"{tar}/{member.name}", **fields)
                except ValueError as error:
                    yield Reject(id, str(error))

    def _audio(self, parts: dict[str, Member]) -> Member:
        if fault := next(iter(parts.values())).fault:
            raise ValueError(fault)
        suffixes = [suffix for suffix in parts if self._is_audio(suffix)]
        if len(suffixes) == 1:
            return parts[suffixes[0]]
        if suffixes:
            raise ValueError(f"bad name: {', '.join(suffixes)} are all audio; set audio_suffix")
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
    """Yield (key, members by lower-case suffix) of each sample; a member with a fault is a sample
    of its own."""
    key: str | None = None
    parts: dict[str, Member] = {}
    for member in members(path, start):
        folder, slash, name = member.name.rpartition("/")
        base, _, suffix = name.partition(".")
        if not member.fault and not (base and suffix):
            ignored["members without a suffix"] += 1
            continue
        its_key = member.name if member.fault else folder + slash + base
        if key is not None and (its_key != key or member.fault or suffix.lower() in parts):
            yield key, parts
            parts = {}
        key = its_key
        parts[suffix.lower()] = member
    if key is not None:
        yield key, parts


def _fields(file: BinaryIO, parts: dict[str, Member], text_key: str) -> dict[str, Any]:
    """Return the fields of a clip that the .json, .txt and .cls of its sample give."""
    entry: dict[str, Any] = {}
    suffix = ""
    try:
        for suffix in [suffix for suffix in ("json", "txt", "cls") if suffix in parts]:
            if parts[suffix].size > SIDECAR_LIMIT:
                raise ValueError("more than 1 MiB")
            content = read(file, parts[suffix])
            if suffix == "json":
                entry = json_lines.parse(content)
            else:
                text = content.decode("utf-8-sig").strip()
                entry[text_key if suffix == "txt" else "cls"] = text
        return clip_fields(entry, text_key)
    except ValueError as error:
        raise ValueError(f"bad transcript: .{suffix}: {error}") from None
