"""A folder of audio files.

In: a folder. Out: a clip for each audio file below it, with the transcript of its .txt sidecar or
its line in a .trans.txt.
"""

import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from speechfuse import artifact
from speechfuse.audio import decoding
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject

SIDECARS = (".txt", ".normalized.txt")  # the second is LibriTTS's
CHAPTER = ".trans.txt"  # LibriSpeech's


class Folder:
    """Every file below `path` with a suffix of audio.

    A clip's id is its path below `path` without the suffix; of two files with one id the second is
    rejected, under its whole name. The transcript of a/x-1.wav is a/x-1.txt, a/x-1.normalized.txt,
    or the line "x-1 ..." of a/x.trans.txt; `require_text` rejects clips without one.
    Links to files are followed wherever they lead, links to folders are not. Links to folders,
    hidden files and folders (.git, macOS's ._x.wav) and files of other suffixes are counted in
    `ignored` by `plan`. `licence` goes into the data card. Raises ValueError when `path` holds no
    file.
    """

    def __init__(
        self,
        path: str,
        language: str | None = None,
        licence: str | None = None,
        require_text: bool = False,
    ) -> None:
        self.path, self.language, self.licence = Path(path), language, licence
        self.require_text = require_text
        self.source_name = self.path.absolute().name
        self.ignored: Counter[str] = Counter()
        if not any(files for _, _, files in os.walk(self.path)):
            raise ValueError(f"{path} is not a folder with files in it; check the path of the data")

    @cached_property
    def fingerprint(self) -> str:
        return artifact.fingerprint_of_files(self.path)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        self.ignored.clear()
        rows: list[tuple[str, str, str]] = []  # id, name, reason for rejecting it if any
        first = ("", "")
        for id, name, fault in sorted(self._items()):
            if fault:
                rows.append((id, name, fault))
            elif id == first[0]:
                rows.append((name, name, f"duplicate id: {first[1]} has the same without suffix"))
            else:
                first = (id, name)
                rows.append((id, name, ""))
        return [_shard(rows[at : at + shard_size]) for at in range(0, len(rows), shard_size)]

    def _items(self) -> Iterator[tuple[str, str, str]]:
        """Yield (id, name, fault) of every file and folder with a suffix of audio."""
        unreadable: list[OSError] = []
        for folder, folders, files in os.walk(self.path, onerror=unreadable.append):
            inside = Path(folder).relative_to(self.path)
            ids = {_id(name) for name in files if _is_audio(name)}
            self.ignored.update(kind for name in files if (kind := _ignored(name, ids)))
            for name in folders[:]:
                if name.startswith("."):
                    self.ignored["hidden folder"] += 1
                    folders.remove(name)
                elif not _is_audio(name) and os.path.islink(os.path.join(folder, name)):
                    self.ignored["link to a folder"] += 1
            for name in filter(_is_audio, folders + files):
                path = (inside / name).as_posix()
                if (printable := planning.printable(path)) != path:
                    yield _id(printable), printable, "bad name: it is not UTF-8"
                    continue
                try:
                    decoding.check_file(self.path / path)
                    yield _id(path), path, ""
                except ValueError as fault:
                    yield _id(path), path, str(fault)
        for error in unreadable:
            name = planning.printable(Path(error.filename).relative_to(self.path).as_posix())
            yield name, name, f"unreadable: {error.strerror}"

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        for id, reason in shard["rejects"]:
            yield Reject(id, reason)
        for name in shard["files"]:
            path = self.path / name
            try:
                text = _transcript_text(path)
            except ValueError as error:
                yield Reject(_id(name), f"bad transcript: {error}")
                continue
            if text is None and self.require_text:
                reason = "no transcript: no .txt sidecar and no line in a .trans.txt"
                yield Reject(_id(name), reason)
                continue
            yield Clip(_id(name), path, name, text=text, language=self.language)


def _shard(rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "count": len(rows),
        "files": [name for _, name, fault in rows if not fault],
        "rejects": [[id, fault] for id, _, fault in rows if fault],
    }


def _id(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _is_audio(name: str) -> bool:
    return name.lower().endswith(decoding.SUFFIXES) and not name.startswith(".")


def _ignored(name: str, ids: set[str]) -> str | None:
    """Return the kind under which an ignored file is counted; None for audio and for a transcript
    of one of `ids`."""
    if name.startswith("."):
        return "hidden file"
    sidecar = any(name.endswith(s) and name.removesuffix(s) in ids for s in SIDECARS)
    if sidecar or name.endswith(CHAPTER) or _is_audio(name):
        return None
    return planning.printable(Path(name).suffix.lower()) or "no suffix"


def _transcript_text(path: Path) -> str | None:
    """Return the transcript of an audio file; None if there is none or it is empty. Raises
    ValueError if it cannot be read."""
    for suffix in SIDECARS:
        sidecar = path.with_suffix(suffix)
        if os.path.isfile(sidecar):
            return _read(sidecar).strip() or None
    chapter, hyphen, _ = path.stem.rpartition("-")
    return _chapter(path.parent / (chapter + CHAPTER)).get(path.stem) if hyphen else None


@lru_cache(maxsize=4)
def _chapter(path: Path) -> dict[str, str]:
    if not os.path.isfile(path):
        return {}
    lines = (line.split(maxsplit=1) for line in _read(path).split("\n"))
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None
