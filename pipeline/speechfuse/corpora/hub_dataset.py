"""A Parquet dataset on the Hub with an audio column, streamed at one commit.

In: owner/name and a revision. Out: clips. Only the byte ranges that a shard needs are fetched.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from speechfuse import patterns
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.parquet import AudioColumns, clips_of, plan_of
from speechfuse.corpora.planning import leads_out
from speechfuse.hub import data as hub_data
from speechfuse.rows.rejects import Reject


class Hub:
    """Parquet files of a dataset on the Hub, at one commit.

    `data_files` is a glob in the repository, e.g. german/train-*.parquet, or a list of such.
    `revision` is a commit, branch or tag; planning resolves it to a commit. The `..._column`
    arguments are those of corpora.parquet.Parquet. A repeated id is detected only within a shard:
    to find all, the whole dataset would have to be fetched. A dataset that is a loading script is
    refused; the Hub may offer it as Parquet files at the revision refs/convert/parquet.
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
        extra = tuple(extra_columns or ())
        self.columns = AudioColumns(
            audio_column, text_column, id_column, speaker_column, language_column, extra
        )
        self.language, self.licence = language, licence
        self.source_name = repo

    @cached_property
    def _sha(self) -> str:
        return hub_data.resolve(self.repo, self.revision)

    @property
    def fingerprint(self) -> str:
        return f"{self.repo}@{self._sha}"

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        with hub_data.hub_errors(self.fingerprint):
            return self._plan(shard_size)

    def _plan(self, shard_size: int) -> list[dict[str, Any]]:
        filesystem, root = self._at(self._sha)
        try:
            names = patterns.matching(self.patterns, root, self.fingerprint, filesystem)
        except FileNotFoundError as error:
            script = filesystem.exists(f"{root}/{self.repo.split('/')[-1]}.py")
            raise FileNotFoundError(
                f"{error}" + "; it is a loading script, which is not run" * script
            ) from None
        plan = plan_of(filesystem, root, names, self.columns, shard_size)
        return [{**shard, "revision": self._sha} for shard in plan]

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        filesystem, root = self._at(shard["revision"])
        audio_at = partial(_repository_file, filesystem, root)
        for clip in clips_of(filesystem, root, shard, self.columns, self.language, audio_at):
            if isinstance(clip, Clip):
                clip = replace(clip, uri=f"hf://{root}/{clip.uri}")
            yield clip

    def _at(self, sha: str) -> tuple[Any, str]:
        return hub_data.filesystem(), f"datasets/{self.repo}@{sha}"


def _repository_file(filesystem: Any, root: str, path: str) -> tuple[bytes, str]:
    if leads_out(path):
        raise ValueError("unsafe path: the name is absolute or has .. in it")
    try:
        return filesystem.cat_file(f"{root}/{path}"), path
    except FileNotFoundError:
        raise ValueError("not found: no such file in the repository") from None
