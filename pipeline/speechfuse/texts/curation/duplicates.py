"""Near-duplicates: of prompts that are almost the same, the first is kept.

datasketch's MinHash and its index find the few earlier prompts that may be alike; their Jaccard
similarity is then counted exactly. The planning process holds about 6 kB of every row.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.components import Count
from speechfuse.scores.words import WORD
from speechfuse.texts.conversations import Conversation

Sketch = tuple[np.ndarray, np.ndarray]


@dataclass
class Duplicates:
    """Drops a conversation whose prompts are like those of an earlier one that was kept: the
    Jaccard similarity of their sets of `shingle`-word sequences is at least `threshold`.

    Prompts with other numbers are not alike, however long: problems differ in nothing else.
    Upper case, punctuation and the answer are ignored. At 0.85, prompts of under about 35 words
    that differ in one word are not alike.
    """

    threshold: Annotated[float, Ge(0.2), Le(1)] = 0.85
    permutations: Annotated[int, Ge(2), Le(4096)] = 128
    shingle: Count = 3
    name: str = field(default="duplicates", init=False)

    def __post_init__(self) -> None:
        self._empty = MinHash(self.permutations, scheme="affine32")

    def sketch(self, conversation: Conversation) -> Sketch:
        """Return MinHash values (permutations,) and the sorted hashes of all sequences (n,)."""
        words = WORD.findall(" | ".join(conversation.prompts).lower())
        numbers = " ".join(word for word in words if word.isdigit())
        padded = ["^", *words, "$"]
        size = min(self.shingle, len(padded))
        parts = {" ".join(padded[i : i + size]) for i in range(len(padded) - size + 1)}
        shingles = [f"{part}\t{numbers}" for part in parts]
        minhash = self._empty.copy()
        minhash.update_batch([shingle.encode() for shingle in shingles])
        return minhash.hashvalues, np.sort(
            np.array([artifact.id_digest(shingle) for shingle in shingles], np.uint64)
        )

    def decide(self, sketches: Iterable[tuple[str, Sketch]]) -> dict[str, str]:
        """Return {id: "near-duplicate: how like which"} of those that are dropped."""
        # the index is approximate: for a lower threshold it misses fewer of those above ours
        index = MinHashLSH(self.threshold - 0.15, self.permutations)
        shingles_by_id: dict[str, np.ndarray] = {}  # of those that are kept
        dropped = {}
        minhash = self._empty.copy()
        for id, (minhash.hashvalues, shingles) in tqdm(sketches, desc=self.name, unit="row"):
            others = index.query(minhash)
            alike = [(_jaccard(shingles, shingles_by_id[other]), other) for other in others]
            similarity, first = min(alike, key=lambda pair: (-pair[0], pair[1]), default=(0.0, ""))
            if similarity >= self.threshold:
                dropped[id] = f"near-duplicate: {similarity:.0%} like {first}"
            else:
                shingles_by_id[id] = shingles
                index.insert(id, minhash)
        return dropped


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
