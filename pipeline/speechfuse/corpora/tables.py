"""Tables with a column of audio: local Parquet files, or a Hub dataset at a pinned revision.

In: Parquet files, see speechfuse.corpora.rows. Out: clips. Of a Hub dataset only the ranges that
are used are fetched, and none is kept. No code of a dataset is run.
"""

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from speechfuse import hub
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip, Reject
from speechfuse.corpora.rows import Columns, clips_of, is_text, opened, plan_of
from speechfuse.corpora.tars import leaves


class Parquet:
    """Local Parquet files. `path`: a file, a folder, a glob or a range ({000..127}), or a list.

    A row whose audio is a path and no bytes is looked for below `audio_dir` (by default the folder
    of the files), and nothing outside of it is read. A clip's id is file/row, or what `id_column`
    has; `extra_columns` are kept in `extra`.
    """

    def __init__(
        self,
        path: str | list[str],
        audio_column: str = "audio",
        text_column: str | None = None,
        id_column: str | None = None,
        speaker_column: str | None = None,
        language_column: str | None = None,
        extra_columns: list[str] | None = None,
        audio_dir: str | None = None,
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        paths = planning.files(path, ".parquet")
        self.folder = planning.folder_of(paths)
        self.names = [p.absolute().relative_to(self.folder).as_posix() for p in paths]
        self.columns = Columns(
            audio_column, text_column, id_column, speaker_column, language_column,
            tuple(extra_columns or ()),
        )  # fmt: skip
        self.audio_dir = Path(audio_dir).absolute() if audio_dir else self.folder
        self.language, self.licence = language, licence
        self.source_name = paths[0].stem if len(paths) == 1 else self.folder.name
        self.filesystem = LocalFileSystem()

    @cached_property
    def fingerprint(self) -> str:
        sizes = [(name, (self.folder / name).stat().st_size) for name in self.names]
        return sha256(json.dumps(sizes).encode()).hexdigest()

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        root = str(self.folder)
        plan = plan_of(self.filesystem, root, self.names, self.columns, shard_size)
        if self.columns.id:
            readable = [shard for shard in plan if "fault" not in shard]
            planning.mark_repeated(readable, self._ids(readable))
        return plan

    def _ids(self, plan: list[dict[str, Any]]) -> array:
        """Digests of all ids, in the order of the plan."""
        ids = array("Q")
        for name in dict.fromkeys(shard["file"] for shard in plan):
            with opened(self.filesystem, str(self.folder), name) as file:
                end = len(ids) + file.metadata.num_rows
                try:
                    for batch in file.iter_batches(columns=[self.columns.id], use_threads=False):
                        values = batch.column(0)
                        if is_text(values.type):
                            values = values.cast(pa.large_binary())  # it need not be UTF-8
                        ids.extend(planning.digest(str(value)) for value in values.to_pylist())
                except (pa.ArrowException, OSError):
                    pass  # rows that cannot be read are rejected when their turn comes
                ids.extend(planning.digest(f"{name}#{row}") for row in range(len(ids), end))
        return ids

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        return clips_of(
            self.filesystem, str(self.folder), shard, self.columns, self.language, self._audio_at
        )

    def _audio_at(self, path: str) -> tuple[Path, str]:
        uri = os.path.relpath(self.audio_dir / path, self.audio_dir)
        if leaves(uri) or "\0" in path:
            raise ValueError("unsafe path: it leads out of audio_dir")
        return self.audio_dir / uri, uri


class Hub:
    """Parquet files of a dataset on the Hub, at one commit.

    `data_files`: a glob in the repository, or several, e.g. german/train-*.parquet. `revision`: a
    commit, or a branch or tag, which is resolved when the work is planned. Columns as in Parquet.
    Repeated ids are only seen within a shard: to know them all at once would be to fetch them all.
    A dataset that is a loading script is refused; its Parquet form may be at refs/convert/parquet.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        data_files: str | list[str],
        audio_column: str = "audio",
        text_column: str | None = None,
        id_column: str | None = None,
        speaker_column: str | None = None,
        language_column: str | None = None,
        extra_columns: list[str] | None = None,
        language: str | None = None,
        licence: str | None = None,
    ) -> None:
        self.repo, self.revision = repo, revision
        self.patterns = [data_files] if isinstance(data_files, str) else data_files
        self.columns = Columns(
            audio_column, text_column, id_column, speaker_column, language_column,
            tuple(extra_columns or ()),
        )  # fmt: skip
        self.language, self.licence = language, licence
        self.source_name = repo

    @cached_property
    def _sha(self) -> str:
        return hub.resolve(self.repo, self.revision)

    @property
    def fingerprint(self) -> str:
        return f"{self.repo}@{self._sha}"

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        with hub.told(self.fingerprint):
            return self._plan(shard_size)

    def _plan(self, shard_size: int) -> list[dict[str, Any]]:
        filesystem, root = self._at(self._sha)
        names = [
            path.removeprefix(f"{root}/")
            for pattern in self.patterns
            for path in sorted(filesystem.glob(f"{root}/{pattern}"))
        ]
        if not names:
            script = f"{root}/{self.repo.split('/')[-1]}.py"
            raise FileNotFoundError(
                f"{self.repo}@{self._sha} has no file that matches {', '.join(self.patterns)}"
                + ("; it is a loading script, which is not run" * filesystem.exists(script))
            )
        plan = plan_of(filesystem, root, list(dict.fromkeys(names)), self.columns, shard_size)
        return [{**shard, "revision": self._sha} for shard in plan]

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        filesystem, root = self._at(shard["revision"])
        audio_at = partial(_repository_file, filesystem, root)
        for clip in clips_of(filesystem, root, shard, self.columns, self.language, audio_at):
            if isinstance(clip, Clip):
                clip = replace(clip, uri=f"hf://{root}/{clip.uri}")
            yield clip

    def _at(self, sha: str) -> tuple[Any, str]:
        return hub.filesystem(self.repo, sha), f"datasets/{self.repo}@{sha}"


def _repository_file(filesystem: Any, root: str, path: str) -> tuple[bytes, str]:
    if leaves(path):
        raise ValueError("unsafe path: the name is absolute or has .. in it")
    try:
        return filesystem.cat_file(f"{root}/{path}"), path
    except FileNotFoundError:
        raise ValueError("not found: no such file in the repository") from None
