"""Sessions of two channels as a corpus: the user's channel of each, for an encoder.

In: a finished artifact of stages.build_duplex. Out: a clip for each session, whose `extra` holds
the turns {role, text, start, end, codes, cut}, in seconds from its beginning: with the frames of
the clip all that a training or a test needs is in one row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from speechfuse import artifact
from speechfuse.corpora.clip import Clip
from speechfuse.rows import shards


class Sessions:
    """The sessions in the folder `path`. Raises ValueError for another folder."""

    licence: str | None = None

    def __init__(self, path: str) -> None:
        self.path, manifest = Path(path), artifact.manifest_of(Path(path))
        if manifest["job"] != "build_duplex":
            raise ValueError(f"{path} holds no sessions: `just build-duplex` makes them")
        self.fingerprint, self.source_name = (
            manifest["fingerprint"],
            f"sessions of {self.path.name}",
        )

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        paths = shards.shard_paths(self.path)
        return [{"count": pq.read_metadata(p).num_rows, "shard": p.name} for p in paths]

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip]:
        for row in shards.read_shard(self.path / shard["shard"]):
            extra = json.loads(row["extra"])
            offset, turns = extra.pop("offset"), []
            for turn in row["turns"]:
                speech = turn["segments"][0]["speech"]
                start = speech["source"]["offset"] - offset
                times = {"start": start, "end": start + speech["source"]["seconds"]}
                own = {"role": turn["role"], "text": speech["text"], **times}
                if speech["codes"] is not None:
                    own |= {"codes": [int(code) for code in speech["codes"]]}
                turns.append(own | json.loads(speech["extra"] or "{}"))
                uri = speech["source"]["uri"]
            at = {"offset": offset, "seconds": extra["seconds"]}
            yield Clip(
                row["id"], self.path / uri, uri, **at, text="", extra=extra | {"turns": turns}
            )
