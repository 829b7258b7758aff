"""A folder of audio files.

In: a folder. Out: a clip for each audio file below it, with the transcript of its .txt sidecar or
its line in a .trans.txt.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import chain
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
    or the line "x-1 ..." of a/x.trans.txt, the first that is not empty; suffixes in any letter
    case, accents in either form of Unicode. A name that differs in letter case otherwise, X-1.TXT,
    is that of x-1.wav where nothing else could be meant. `require_text` rejects clips without one.
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
        plan = [_shard(rows[at : at + shard_size]) for at in range(0, len(rows), shard_size)]
        ordered = ([id for id, _ in s["rejects"]] + list(map(_id, s["files"])) for s in plan)
        planning.mark_ids(plan, chain.from_iterable(ordered))
        return plan

    def _items(self) -> Iterator[tuple[str, str, str]]:
        """Yield (id, name, fault) of every file and folder with a suffix of audio."""
        unreadable: list[OSError] = []
        for folder, folders, files in os.walk(self.path, onerror=unreadable.append):
            inside = Path(folder).relative_to(self.path)
            used = {texts[0] for texts in _transcripts(files).values()}
            self.ignored.update(kind for n in files if n not in used and (kind := _ignored(n)))
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


def _ignored(name: str) -> str | None:
    """Return the kind under which a file that is no transcript of a clip is counted; None for audio
    and for a chapter's transcripts."""
    if name.startswith("."):
        return "hidden file"
    if _is_audio(name) or name.lower().endswith(CHAPTER):
        return None
    return planning.printable(Path(name).suffix.lower()) or "no suffix"


def _transcript_text(path: Path) -> str | None:
    """Return the transcript of an audio file; None if there is none or it is empty. Raises
    ValueError if it cannot be read."""
    for suffix in SIDECARS:
        sidecar = _text_file(path.parent, path.stem, suffix)
        if sidecar and (text := _read(sidecar).strip()):
            return text
    start, hyphen, _ = path.stem.rpartition("-")
    if not hyphen or not (chapter := _text_file(path.parent, start, CHAPTER)):
        return None
    texts = _chapter(chapter).get(_nfc(path.stem), [None])
    if len(texts) > 1:
        raise ValueError(f"{chapter.name} has {len(texts)} lines for it")
    return texts[0]


def _text_file(folder: Path, stem: str, suffix: str) -> Path | None:
    exact = folder / (stem + suffix)
    if os.path.isfile(exact):
        return exact
    names = _transcripts_of(folder).get((_nfc(stem), suffix))
    return folder / names[0] if names else None


@lru_cache(maxsize=4)
def _transcripts_of(folder: Path) -> dict[tuple[str, str], list[str]]:
    return _transcripts([name for name in os.listdir(folder) if os.path.isfile(folder / name)])


def _transcripts(names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return which of the files of a folder are transcripts, the best first: by the name of the
    audio without its suffix, or what that begins with, and the suffix of the transcript."""
    stems = {_nfc(_id(name)) for name in names if _is_audio(name)}
    starts = {stem.rpartition("-")[0] for stem in stems}
    found: dict[tuple[str, str], list[str]] = {}
    for suffix in (*SIDECARS, CHAPTER):
        owners = starts if suffix == CHAPTER else stems
        folded: dict[str, tuple[list[str], list[str]]] = {
            name.casefold(): ([], []) for name in owners
        }
        for owner in owners:
            folded[owner.casefold()][0].append(owner)
        for name in sorted(names, reverse=True):
            stem = _nfc(name[: -len(suffix)])
            if not name.lower().endswith(suffix):
                continue
            if stem in owners:
                found.setdefault((stem, suffix), []).append(name)
            elif others := folded.get(stem.casefold()):
                others[1].append(name)
        for meant, texts in folded.values():
            if len(meant) == len(texts) == 1:
                found.setdefault((meant[0], suffix), texts)
    return found


def _nfc(name: str) -> str:
    """Return a name with its accents composed: macOS' tools write them apart."""
    return unicodedata.normalize("NFC", name)


@lru_cache(maxsize=4)
def _chapter(path: Path) -> dict[str, list[str | None]]:
    """Return the texts of a .trans.txt by id, each text once."""
    texts: dict[str, list[str | None]] = {}
    for line in _read(path).split("\n"):
        if len(parts := line.split(maxsplit=1)) == 2:
            of_id = texts.setdefault(_nfc(parts[0]), [])
            if (text := parts[1].strip()) not in of_id:
                of_id.append(text)
    return texts


def _read(path: Path) -> str:
    try:
        if "\0" not in (text := path.read_text("utf-8-sig")):  # which UTF-16 is full of
            return text
        raise ValueError(f"{path.name} holds U+0000: it is not UTF-8 text")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None
