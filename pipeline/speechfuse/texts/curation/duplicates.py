"""Near-duplicates: of prompts that say almost the same, the first is kept.

MinHash and its index, both datasketch's, find the few earlier prompts that may be alike; how alike
they are is then counted. The process that plans holds about 6 kB of every row.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.texts.conversations import Conversation

Sketch = tuple[np.ndarray, np.ndarray]


@dataclass
class Duplicates:
    """Drops a conversation whose prompts are like those of an earlier one that was kept: of the
    `shingle`-word sequences that either has, both have at least the share `threshold` (Jaccard).

    Prompts with other numbers are not alike, however long: problems differ in nothing else.
    Upper case, punctuation and the answer make no difference. At 0.85 one other word in less than
    about 35 makes another prompt.
    """

    threshold: float = 0.85
    permutations: int = 128
    shingle: int = 3
    name: str = field(default="duplicates", init=False)

    def __post_init__(self) -> None:
        if not 0.2 <= self.threshold <= 1:
            raise ValueError(f"duplicates: threshold={self.threshold} is not in 0.2 to 1")
        if self.permutations < 2 or self.shingle < 1:
            raise ValueError(
                f"duplicates: permutations={self.permutations} and shingle={self.shingle}: the "
                "first is at least 2, the second at least 1"
            )
        self._empty = MinHash(self.permutations, scheme="affine32")

    def sketch(self, conversation: Conversation) -> Sketch:
        """MinHash values (permutations,) and sorted hashes of all sequences (n,)."""
        words = re.findall(r"\w+", " | ".join(conversation.prompts).lower())
        numbers = " ".join(word for word in words if word.isdigit())
        padded = ["^", *words, "$"]
        size = min(self.shingle, len(padded))
        parts = {" ".join(padded[i : i + size]) for i in range(len(padded) - size + 1)}
        known = [f"{part}\t{numbers}" for part in parts]
        made = self._empty.copy()
        made.update_batch([each.encode() for each in known])
        return made.hashvalues, np.sort(np.array([artifact.id_digest(k) for k in known], np.uint64))

    def decide(self, sketches: Iterable[tuple[str, Sketch]]) -> dict[str, str]:
        """{id: "near-duplicate: how like which"} of those that are dropped."""
        # an index for a lower threshold: it gives what it was asked for, and misses less of it
        index = MinHashLSH(self.threshold - 0.15, self.permutations)
        kept: dict[str, np.ndarray] = {}
        dropped = {}
        made = self._empty.copy()
        for id, (made.hashvalues, parts) in tqdm(sketches, desc=self.name, unit="row"):
            found = [(_jaccard(parts, kept[other]), other) for other in index.query(made)]
            like, first = min(found, key=lambda pair: (-pair[0], pair[1]), default=(0.0, ""))
            if like >= self.threshold:
                dropped[id] = f"near-duplicate: {like:.0%} like {first}"
            else:
                kept[id] = parts
                index.insert(id, made)
        return dropped


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
