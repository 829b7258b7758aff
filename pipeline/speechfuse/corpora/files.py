"""A folder of audio files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechfuse import artifact
from speechfuse.audio import SUFFIXES
from speechfuse.corpora.clip import Clip, Reject


class Folder:
    """Every audio file below `path`; a file `x.txt` beside `x.wav` is its transcript.

    A clip's id is its path below `path` without the suffix; of two files with one id the second is
    rejected. `licence` goes into the data card.
    """

    def __init__(self, path: str, language: str | None = None, licence: str | None = None) -> None:
        self.path, self.language, self.licence = Path(path), language, licence
        self.source_name = self.path.name
        self.fingerprint = artifact.fingerprint_of_files(self.path)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        names = sorted(
            p.relative_to(self.path).as_posix()
            for p in self.path.rglob("*")
            if p.suffix.lower() in SUFFIXES
        )
        shards = []
        first: dict[str, str] = {}
        for start in range(0, len(names), shard_size):
            files = names[start : start + shard_size]
            shard: dict[str, Any] = {"count": len(files), "files": files}
            again = {}
            for name in files:
                if first.setdefault(_id(name), name) != name:
                    again[name] = first[_id(name)]
            shards.append(shard | ({"again": again} if again else {}))
        return shards

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        for name in shard["files"]:
            path = self.path / name
            transcript = path.with_suffix(".txt")
            if name in shard.get("again", {}):
                yield Reject(_id(name), f"duplicate id: {name} beside {shard['again'][name]}")
                continue
            try:
                text = transcript.read_text("utf-8").strip() if transcript.is_file() else None
            except (UnicodeDecodeError, OSError) as error:
                yield Reject(_id(name), f"bad transcript: {transcript.name}: {_why(error)}")
                continue
            yield Clip(_id(name), path, name, text=text, language=self.language)


def _id(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
