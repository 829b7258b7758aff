"""NeMo manifests: JSON lines that name audio files, or members of tars.

In: manifests, read a line at a time, and their audio. Out: clips. The plan holds the byte offset of
each shard's first line, so it is small, and a shard is read without the lines before it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from speechfuse import json_lines
from speechfuse.artifact import json_digest, sha256_of
from speechfuse.corpora import conversation, planning
from speechfuse.corpora.clip import Clip, clip_fields, name_of
from speechfuse.corpora.tar_members import find, read
from speechfuse.rows.rejects import Reject
from speechfuse.rows.several import TURNS

_CONVERSATIONS = ("conversations", "turns", "messages")  # keys of what is no recording
_ALIASES = {"audio_filename", "audio_file"}  # which NeMo takes for audio_filepath
_CONVERSATION = "a conversation, but none of NeMo's multimodal_conversation, and not a recording"


class Nemo:
    """Manifests of NeMo: each line is a JSON object {audio_filepath, duration, offset, text, ...};
    audio_filename and audio_file are other names of the first.

    `manifest` is a path, a glob or a range (manifest_{0..3}.json, manifest__OP_0..3_CL_.json), or a
    list of such. Relative audio paths start at the manifest's folder, or at `audio_dir` if that is
    given; with `audio_dir`, no audio outside of it is read. Ids and uris are relative to
    `audio_dir` or the folder that holds all manifests; where a line names audio outside of that
    folder, they are relative to the folder that holds all audio.

    `tars` are the tar files of a tarred set: either one for each manifest, or any number for a
    single manifest. In that case the last number in a tar's name is the `shard_id` of the lines
    whose audio it holds. Manifests and tars belong together by what differs in their names, the
    whole name or its numbers, and where these are not the same on both sides in the order in which
    they are listed. Raises ValueError, at the latest in `plan`, when the numbers, or the `shard_id`
    of a line, say that a manifest stands beside the tar of another one.

    A clip's text is the line's `text`; `text_key` names another key instead, as answer where that
    is the transcript. `lang` and `speaker` are read. `offset` and `duration` (seconds; null: to the
    end) say which part of the recording is the clip. A `text` or `context` that is absent is read
    from the file that `text_filepath` or `context_filepath` names. All other keys are kept in
    `extra`, the `context` and `answer` of a spoken question among them. Lines with `_skipme` are
    filtered, as in NeMo. A clip's id is its path without the suffix, followed by @offset+duration
    where an offset is given. `id_key` names a key that holds the id instead, for a manifest with
    several lines for one recording.

    A line may have a list of recordings, with lists of as many `offset` and `duration`, or be a
    conversation (multimodal_conversation: {id, conversations: [{from, type, value, ...}]}), whose
    recordings are its turns of type audio; samples.context makes turns of both. A manifest of which
    some lines are conversations, and others not, is refused, and so is one of other conversations.
    """

    def __init__(
        self,
        manifest: str | list[str],
        audio_dir: str | None = None,
        tars: str | list[str] | None = None,
        text_key: str | None = None,
        id_key: str | None = None,
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        self.folder, self.manifests = planning.files(manifest, ".jsonl")
        self.audio_dir = audio_dir
        self.root = os.path.abspath(audio_dir or self.folder)
        self.text_key, self.id_key = text_key or "text", id_key
        self.language, self.licence = language, licence
        alone = len(self.manifests) == 1
        self.source_name = Path(self.manifests[0]).stem if alone else self.folder.name
        self.tars: dict[str, Path] = {}  # by manifest or, for a single manifest, by shard_id
        if tars is not None:
            self.tar_folder, names = planning.files(tars, ".tar")
            listed = [[each] if isinstance(each, str) else each for each in (manifest, tars)]
            # names that a folder or a wildcard put in order, and not the user
            self._by_pattern = any(
                Path(each).is_dir() or ({*"*?["} & {*each} and not Path(each).exists())
                for each in chain(*listed)
            )
            self.tars = self._paired([self.tar_folder / name for name in names])

    def _paired(self, tars: list[Path]) -> dict[str, Path]:
        names = [os.path.splitext(self._tar_name(tar))[0] for tar in tars]
        last = (ints[-1:] for ints in map(_ints, names))
        self.number_of = {tar: str(n[0]) for tar, n in zip(tars, last, strict=True) if n}
        by_number = {number: tar for tar, number in self.number_of.items()}
        self.numbers = by_number.keys()
        if len(tars) != len(self.manifests):
            if len(self.manifests) > 1 or len(by_number) < len(tars):
                raise ValueError(
                    f"tars: {len(tars)} tar files beside {len(self.manifests)} manifests: give as "
                    "many of both, or one manifest with shard_id in its lines and a number in each "
                    "tar's name"
                )
            return by_number
        manifests = [os.path.splitext(name)[0] for name in self.manifests]
        pairs: list[tuple[list[Any], list[Any]]] = [(manifests, names)]
        pairs += [(each(manifests), each(names)) for each in (_differing, _distinct)]
        for keys, of_tars in pairs:
            if sorted(keys) == sorted(of_tars):
                if len({*keys}) == len(keys):
                    tar_of = dict(zip(of_tars, tars, strict=True))
                    tars = [tar_of[key] for key in keys]
                    break
                if keys != of_tars:
                    raise ValueError(
                        "tars: their numbers are those of the manifests in another order, and some "
                        "occur more than once: list both in the same order"
                    )
        else:
            if len(tars) > 1 and self._by_pattern:  # the order of names is nobody's word
                raise ValueError(
                    f"tars: what differs in the names of the manifests ({manifests[0]}, ...) and "
                    f"of the tars ({names[0]}, ...) is not the same, so a pattern or a folder does "
                    "not say which belong together: list both in the same order, or with ranges "
                    "{0..9}"
                )
        return dict(zip(self.manifests, tars, strict=True))

    def _check_shard(self, manifest: str, number: int, clip: Clip) -> None:
        """Raise ValueError for a line whose `shard_id` is not that of the lines above it, or that
        of another tar than its manifest's."""
        id, tar = str(clip.extra.get("shard_id")), self.tars.get(manifest)
        if not tar or clip.extra.get("shard_id") is None:
            return
        above = self._shard_ids.setdefault(manifest, id)
        another = id in self.numbers and self.number_of.get(tar) != id
        if id != above or another:
            raise ValueError(
                f"{manifest}: line {number} has shard_id {id}"
                + (f", those above it {above}" * (id != above))
                + f", but all lines are to be in {self._tar_name(tar)}: give each manifest the tar "
                "of its shard_id, or one manifest and all tars"
            )

    @cached_property
    def fingerprint(self) -> str:
        manifests = [(name, sha256_of(self.folder / name)) for name in self.manifests]
        tars = [(self._tar_name(tar), tar.stat().st_size) for tar in self.tars.values()]
        return json_digest([manifests, tars])

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        for path in [*(self.folder / name for name in self.manifests), *self.tars.values()]:
            planning.refuse_compressed(path)
        self._common, self._shard_ids = "", dict[str, str]()
        self._talks: bool | None = None  # whether its lines are conversations
        plan = planning.shards((self._items(name) for name in self.manifests), shard_size)
        base = os.path.relpath(self._common or self.root, self.root)
        return plan if base == "." else [{**shard, "base": base} for shard in plan]

    def _items(self, manifest: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for start, number, line in planning.lines(self.folder / manifest):
            clip = self._clip(manifest, number, line)
            if isinstance(clip, Reject) and clip.reason.endswith(_CONVERSATION):
                raise ValueError(
                    f"{self.folder / manifest}: line {number} is {_CONVERSATION}: one of text is "
                    "read by speechfuse.texts.Messages; of recordings each turn has from, type "
                    "(text or audio) and value"
                )
            if isinstance(clip, Clip):
                talks = TURNS in clip.extra
                if self._talks not in (None, talks):
                    what = ("a recording", "a conversation")
                    raise ValueError(
                        f"{self.folder / manifest}: line {number} is {what[talks]}, and a line "
                        f"above it {what[not talks]}: keep the two in manifests of their own"
                    )
                self._talks = talks
                if self.tars:
                    self._check_shard(manifest, number, clip)
            for each in _recordings_of(clip) if not self.tars else ():
                outside = each.uri.startswith("../")
                path = os.path.normpath(os.path.join(self.root, each.uri))
                folder = os.path.dirname(path) if outside else self.root
                if not self._common:
                    self._common = folder
                elif not f"{folder}/".startswith(f"{self._common}/"):
                    self._common = os.path.commonpath([self._common, folder])
            yield clip.id, {"manifest": manifest, "start": start, "line": number}

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        manifest, again = shard["manifest"], set(shard.get("again", ()))
        lines = planning.lines(self.folder / manifest, shard["start"], shard["line"])
        for position, (_, number, line) in enumerate(islice(lines, shard["count"])):
            clip = self._clip(manifest, number, line, shard.get("base", ""))
            if position in again and isinstance(clip, Clip):
                why = f"duplicate id: line {number} of {manifest}; name a key of its own by id_key"
                clip = Reject(clip.id, why)
            yield self._loaded(clip) if self.tars and isinstance(clip, Clip) else clip

    def _clip(self, manifest: str, number: int, line: bytes, base: str = "") -> Clip | Reject:
        """Return the clip that a line describes, or a Reject. In a tarred set `audio` is the path
        of the tar; `_loaded` replaces it by the member's bytes."""
        name = f"{manifest}:{number}"
        try:
            entry = json_lines.parse(line)
            for alias in _ALIASES & entry.keys() if "audio_filepath" not in entry else ():
                entry["audio_filepath"] = entry.pop(alias)
            talks = TURNS in entry and conversation.is_nemos(entry)
            if not (talks or "audio_filepath" in entry or entry.keys().isdisjoint(_CONVERSATIONS)):
                raise ValueError(_CONVERSATION)
            for key in ("text", "context"):  # which may stand in a file of their own
                if (file := entry.pop(f"{key}_filepath", None)) and not entry.get(key):
                    entry[key] = self._text_of(manifest, str(file))
            several = talks or isinstance(entry.get("audio_filepath"), list)
            listed = conversation.recordings(entry) if talks else _listed(entry)
            where = manifest, entry.get("shard_id"), base
            recordings = [self._recording(each, *where) for each in listed]
            skipped, answer = entry.pop("_skipme", False), entry.get("answer")
            skipped = skipped or (talks and (entry.get("custom") or {}).get("_skipme"))
            fields = clip_fields(entry, self.text_key)
            id = "+".join(each.id for each in recordings)
            if talks or self.id_key:
                id = name_of(entry, self.id_key or "id")
        except ValueError as error:
            return Reject(name, f"bad manifest line: line {number}: {error}")
        if skipped:
            return Reject(name, "filter skipme: the line has _skipme")
        fenced = recordings if self.audio_dir and not self.tars else []
        if any(planning.leads_out(each.uri) for each in fenced):
            return Reject(id, "unsafe path: it leads out of audio_dir")
        if answer is not None:
            fields["extra"]["answer"] = answer  # kept there even where it is also the text
        fields["language"] = fields["language"] or self.language
        if several:
            return Clip(id, b"", "", recordings=recordings, **fields)
        return replace(recordings[0], id=id, **fields)

    def _recording(self, entry: dict[str, Any], manifest: str, shard_id: Any, base: str) -> Clip:
        path = name_of(entry, "audio_filepath")
        offset, seconds = _seconds(entry, "offset"), _seconds(entry, "duration")
        if seconds == 0:
            raise ValueError("duration is 0")
        audio, uri, id = self._place(manifest, path, shard_id, base)
        if offset is not None:
            id += f"@{offset}" + (f"+{seconds}" if seconds else "")
        return Clip(id, audio, uri, offset or 0.0, seconds)

    def _text_of(self, manifest: str, name: str) -> str:
        folder = (self.folder / manifest).parent.resolve()
        if not (path := (folder / name).resolve()).is_relative_to(folder):
            raise ValueError(f"{name[-80:]} leads out of the manifest's folder")
        try:
            return path.read_text("utf-8").strip()
        except OSError as error:
            raise ValueError(f"{name:.80} cannot be read: {error.strerror}") from None

    def _place(self, manifest: str, name: str, shard_id: Any, base: str) -> tuple[Path, str, str]:
        """Return (file, uri, id) for the audio_filepath `name`; in a tarred set the file is the
        tar. Raises ValueError for a `shard_id` that no tar has."""
        if not self.tars:
            start = "" if self.audio_dir else os.path.dirname(manifest)
            uri = os.path.normpath(os.path.join(start, name))
            if os.path.isabs(uri):
                uri = os.path.relpath(uri, self.root)
            if base:
                uri = os.path.relpath(os.path.join(self.root, uri), os.path.join(self.root, base))
            path = uri if self.audio_dir else os.path.join(start, name)
            return Path(os.path.join(self.root, path)), uri, os.path.splitext(uri)[0]
        tar = self.tars.get(manifest) or self.tars.get(str(shard_id))
        if not tar:
            raise ValueError(f"shard_id is {shard_id!r}; the tars are {', '.join(self.tars)}")
        uri = f"{self._tar_name(tar)}/{name.removeprefix('./')}"
        return tar, uri, os.path.splitext(uri.replace(".tar/", "/", 1))[0]

    def _tar_name(self, tar: Path) -> str:
        return tar.relative_to(self.tar_folder).as_posix()

    def _loaded(self, clip: Clip) -> Clip | Reject:
        if clip.recordings is not None:
            recordings = list[Clip]()
            for each in map(self._loaded, clip.recordings):
                if isinstance(each, Reject):
                    return Reject(clip.id, f"{each.reason} ({each.id})")
                recordings.append(each)
            return replace(clip, recordings=recordings)
        assert isinstance(clip.audio, Path)
        tar = self._tar_name(clip.audio)
        try:
            member = find(clip.audio, clip.uri.removeprefix(f"{tar}/"))
            with open(clip.audio, "rb") as file:
                return replace(clip, audio=read(file, member), uri=f"{tar}/{member.name}")
        except ValueError as error:
            return Reject(clip.id, str(error))


def _recordings_of(clip: Clip | Reject) -> list[Clip]:
    if isinstance(clip, Reject):
        return []
    return [clip] if clip.recordings is None else clip.recordings


def _listed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {audio_filepath, offset, duration} of each recording of a line, which loses them."""
    own = {name: entry.pop(name, None) for name in ("audio_filepath", "offset", "duration")}
    if not isinstance(paths := own["audio_filepath"], list):
        return [own]
    columns = {n: [None] * len(paths) if v is None else v for n, v in own.items()}
    for name, values in columns.items():
        if not isinstance(values, list) or not len(values) == len(paths) > 0:
            raise ValueError(
                f"{name} is {values!r:.40}, and audio_filepath has {len(paths)} recordings: give "
                "a list of as many, one at least"
            )
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _ints(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"[0-9]+", name)))


def _differing(names: list[str]) -> list[tuple[int, ...]]:
    """Return of each name the numbers that are not the same in all of them."""
    rows = [_ints(name) for name in names]
    if len({*map(len, rows)}) > 1:
        return [row[-1:] for row in rows]
    columns = {column: None for column in zip(*rows, strict=True) if len({*column}) > 1}
    return list(zip(*columns, strict=True)) or [()] * len(names)


def _distinct(names: list[str]) -> list[str]:
    """Return the names without what all of them begin and end with."""

    def shared(texts: list[str]) -> int:
        same = (len({*characters}) == 1 for characters in zip(*texts, strict=False))
        return sum(takewhile(bool, same))

    rest = [name[shared(names) :] for name in names]
    end = shared([name[::-1] for name in rest])
    return [name[: len(name) - end] for name in rest]


def _seconds(entry: dict[str, Any], key: str) -> float | None:
    value = entry.pop(key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"{key} is {value!r:.40}, not a number of seconds")
    return value
