"""A Parquet dataset on the Hub with an audio column, streamed at one commit.

In: owner/name and a revision. Out: clips. Only the byte ranges that a shard needs are fetched.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from speechfuse import patterns
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.parquet import AudioTables
from speechfuse.corpora.planning import leads_out
from speechfuse.hub import data as hub_data
from speechfuse.rows.rejects import Reject


@dataclass
class Hub(AudioTables):
    """Parquet files of a dataset on the Hub, at one commit.

    `data_files` is a glob in the repository, e.g. german/train-*.parquet, or a list of such.
    `revision` is a commit, branch or tag; planning resolves it to a commit. The other arguments:
    see AudioTables. Of ids that come twice those in one shard are rejects, and others are refused
    at the end of the job: to find them before, the whole dataset would have to be fetched. A
    dataset that is a loading script is refused; the Hub may offer it as Parquet files at the
    revision refs/convert/parquet.
    """

    repo: str
    revision: str
    data_files: str | list[str]

    @property
    def source_name(self) -> str:
        return self.repo

    @cached_property
    def _sha(self) -> str:
        return hub_data.resolve(self.repo, self.revision)

    @property
    def fingerprint(self) -> str:
        return f"{self.repo}@{self._sha}"

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        named = [self.data_files] if isinstance(self.data_files, str) else self.data_files
        with hub_data.hub_errors(self.fingerprint):
            filesystem, root = hub_data.filesystem(), self._root(self._sha)
            try:
                names = patterns.matching(named, root, self.fingerprint, filesystem)
            except FileNotFoundError as error:
                script = filesystem.exists(f"{root}/{self.repo.split('/')[-1]}.py")
                raise FileNotFoundError(
                    f"{error}" + "; it is a loading script, which is not run" * script
                ) from None
            plan = self.plan_of(filesystem, root, names, shard_size)
        return [{**shard, "revision": self._sha} for shard in plan]

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        root = self._root(shard["revision"])
        for clip in self.clips_of(hub_data.filesystem(), root, shard):
            if isinstance(clip, Clip):
                clip = replace(clip, uri=f"hf://{root}/{clip.uri}")
            yield clip

    def _root(self, sha: str) -> str:
        return f"datasets/{self.repo}@{sha}"

    def audio_at(self, root: str, path: str) -> tuple[bytes, str]:
        if leads_out(path):
            raise ValueError("unsafe path: the name is absolute or has .. in it")
        try:
            return hub_data.filesystem().cat_file(f"{root}/{path}"), path
        except FileNotFoundError:
            raise ValueError("not found: no such file in the repository") from None
