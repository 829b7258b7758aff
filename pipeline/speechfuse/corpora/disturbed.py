"""A corpus several times, each clip disturbed anew: more recordings out of few.

In: any corpus and steps of augmentation. Out: its clips, decoded and disturbed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Ge

from speechfuse import artifact, config
from speechfuse.audio import augmentation as steps
from speechfuse.components import Count
from speechfuse.corpora.clip import Clip, decode
from speechfuse.rows.rejects import Reject


class Disturbed:
    """`copies` of each clip of `corpus` {_component_: ...}, each through the steps `augmentation`
    (speechfuse.audio) in its own way, which depends only on `seed`, the copy's number and the clip.

    The id of a copy is that of the clip with -0, -1 ... behind it; what was done to it stands in
    its `extra`. A copy has no phonemes, as their times are not followed.
    """

    def __init__(
        self,
        corpus: dict[str, Any],
        augmentation: list[dict[str, Any]],
        copies: Count = 1,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self.corpus, self.copies, self.seed = config.instantiate(corpus), copies, seed
        self.augmentation, files = augmentation, steps.check(augmentation)
        self.source_name, self.licence = self.corpus.source_name, self.corpus.licence
        self.fingerprint = artifact.json_digest([self.corpus.fingerprint, files])

    @property
    def ignored(self) -> Counter[str]:
        return Counter(getattr(self.corpus, "ignored", None))

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        plan = self.corpus.plan(max(1, shard_size // self.copies))
        for shard in plan:
            count, again, reserved = (shard.get(name) for name in ("count", "again", "reserved"))
            starts = range(0, count * self.copies, count)
            shard["count"] = count * self.copies
            if again:
                shard["again"] = [start + position for start in starts for position in again]
            if reserved:
                shard["reserved"] = {
                    str(start + int(position)): ends
                    for start in starts
                    for position, ends in reserved.items()
                }
        return plan

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        for copy in range(self.copies):
            for clip in self.corpus.clips(shard | {"count": shard["count"] // self.copies}):
                id = f"{clip.id}-{copy}"
                try:
                    yield replace(clip, id=id) if isinstance(clip, Reject) else self._copy(clip, id)
                except ValueError as error:
                    yield Reject(id, str(error))

    def _copy(self, clip: Clip, id: str) -> Clip:
        seed = artifact.id_digest(f"{self.seed}/{id}")
        waveform, records = steps.apply(decode(clip).waveform, self.augmentation, seed)
        return replace(
            clip,
            id=id,
            audio=waveform,
            uri=f"disturbed:{clip.uri}",  # no file: what lies there is the undisturbed recording
            offset=0.0,
            seconds=None,
            extra=clip.extra | {"augmentation": records},
            phonemes=[],
        )
