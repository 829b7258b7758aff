"""Multilingual LibriSpeech (MLS), one language in OpenSLR's layout.

In: transcripts.txt and segments.txt, read a line at a time and side by side, and audio/. Out:
clips. A plan holds byte offsets: the English part has eleven million lines.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from speechfuse.artifact import json_digest, sha256_of
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject

_NAMES = "dutch english french german italian polish portuguese spanish".split()
_LANGUAGES = dict(zip(_NAMES, "nl en fr de it pl pt es".split(), strict=True))


class Mls:
    """Multilingual LibriSpeech from OpenSLR (resource 94): `path` is one language's folder, with
    SPLIT/transcripts.txt, SPLIT/segments.txt and SPLIT/audio/SPEAKER/BOOK/ID.flac (or .opus).

    `subset`: a limited-supervision part of the training split: 9hr, 1hr, 1hr/0 ... 1hr/5 (10
    minutes each), or 10hr for 9hr and 1hr. The language is read from the folder's name, mls_german.
    `extra` has url, start and end (seconds) of the recording that a clip was cut from. MLS as a Hub
    dataset is read by `hub`:

        corpus:
          _component_: speechfuse.corpora.hub
          repo: facebook/multilingual_librispeech
          revision: main
          data_files: german/train-*.parquet
          text_column: transcript
          id_column: id
          speaker_column: speaker_id
          language: de
    """

    def __init__(
        self,
        path: str,
        split: str,
        subset: str | None = None,
        language: str | None = None,
        licence: str | None = "cc-by-4.0",
    ) -> None:
        self.path, self.split = Path(path), split
        self.transcripts = self.path / split / "transcripts.txt"
        self.segments = self.path / split / "segments.txt"
        if not self.transcripts.is_file():
            raise FileNotFoundError(
                f"no transcripts at {self.transcripts}: path is the folder of one language, split "
                "one of train, dev, test"
            )
        name = self.path.absolute().name
        self.language = language or _LANGUAGES.get(name.removeprefix("mls_").partition("_")[0])
        self.licence = licence
        self.source_name = "/".join([name, split, *([subset] if subset else [])])
        self.handles = self._subset(subset) if subset else None
        self.ignored: Counter[str] = Counter()

    def _subset(self, subset: str) -> set[str]:
        folder = self.path / self.split / "limited_supervision"
        lists = sorted((folder if subset == "10hr" else folder / subset).rglob("handles.txt"))
        if not lists:
            raise FileNotFoundError(
                f"no handles.txt below {folder} for subset {subset}: choose 9hr, 1hr, 1hr/0 or 10hr"
            )
        return {name.strip() for path in lists for name in path.read_text("utf-8").split()}

    @cached_property
    def fingerprint(self) -> str:
        size = self.segments.stat().st_size if self.segments.is_file() else None
        return json_digest([sha256_of(self.transcripts), size, sorted(self.handles or ())])

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        self.ignored.clear()
        absent = set(self.handles or ())
        shards = planning.shards([self._items(absent)], shard_size)
        if absent:
            shards.append({"count": len(absent), "absent": sorted(absent)})
        return shards

    def _items(self, absent: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for id, place, _, segment in self._listed({"start": 0, "line": 1, "segment": 0}):
            absent.discard(id)
            if segment and not _origin(id, segment):
                self.ignored["lines of segments.txt in another order"] += 1
            yield id, place

    def _listed(self, at: dict[str, int]) -> Iterator[tuple[str, dict[str, int], bytes, bytes]]:
        """Yield (id, place, transcript, line of segments.txt) of the lines of the subset from a
        place on.

        The two files have the same ids in the same order, so they are read side by side.
        """
        has_segments = self.segments.is_file()
        segments = planning.lines(self.segments, at["segment"]) if has_segments else iter(())
        endless = chain(segments, repeat((0, 0, b"")))
        transcripts = planning.lines(self.transcripts, at["start"], at["line"])
        for (start, number, line), (other, _, segment) in zip(transcripts, endless, strict=False):
            name, _, transcript = line.partition(b"\t")
            id = name.decode("utf-8-sig", "backslashreplace").strip()[:80]
            if self.handles is None or id in self.handles:
                yield id, {"start": start, "line": number, "segment": other}, transcript, segment

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        if "absent" in shard:
            for id in shard["absent"]:
                yield Reject(id, "bad transcript: transcripts.txt has no line for it")
            return
        again = set(shard.get("again", ()))
        listed = islice(self._listed(shard), shard["count"])
        for position, (id, place, transcript, segment) in enumerate(listed):
            match = re.fullmatch(r"(\d+)_(\d+)_\d+", id, re.ASCII)
            try:
                text = transcript.decode().strip()
            except UnicodeDecodeError:
                text = ""
            if position in again:
                yield Reject(id, f"duplicate id: line {place['line']} of transcripts.txt")
            elif not match or not text:
                why = "no SPEAKER_BOOK_NUMBER, tab and text in UTF-8"
                yield Reject(id, f"bad transcript: line {place['line']}: {why}")
            else:
                speaker, book = match.groups()
                audio = self.path / self.split / "audio" / speaker / book / f"{id}.flac"
                if not audio.exists() and audio.with_suffix(".opus").exists():
                    audio = audio.with_suffix(".opus")
                uri, origin = audio.relative_to(self.path).as_posix(), _origin(id, segment)
                yield Clip(
                    id, audio, uri, text=text, speaker=speaker, language=self.language, extra=origin
                )


def _origin(id: str, segment: bytes) -> dict[str, Any]:
    """Return url, start and end (seconds) from a line of segments.txt; {} if it is another
    clip's."""
    try:
        name, url, start, end = segment.decode("utf-8-sig").strip().split("\t")
        return {"url": url, "start": float(start), "end": float(end)} if name == id else {}
    except ValueError:
        return {}
