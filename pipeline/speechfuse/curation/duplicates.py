"""Near-duplicates: of prompts that say almost the same, the first is kept.

MinHash and its index are datasketch's. A sketch of 128 permutations takes 512 bytes, of
which the process that plans holds one for every row.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from speechfuse.texts import Conversation


@dataclass
class Duplicates:
    """Drops a conversation whose prompts are like those of an earlier one that was kept: their sets
    of `shingle`-word sequences have a Jaccard similarity of about `threshold` (0 to 1) or more.

    Prompts with other numbers are not alike, however long: problems differ in nothing else.
    Upper case, punctuation and the answer make no difference.
    """

    threshold: float = 0.8
    permutations: int = 128
    shingle: int = 3
    name: str = field(default="duplicates", init=False)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"duplicates: threshold={self.threshold} is no share: over 0, up to 1")
        self._empty = MinHash(self.permutations, scheme="affine32")

    def sketch(self, conversation: Conversation) -> np.ndarray:
        """Hash values of the prompts, (permutations,)."""
        words = re.findall(r"\w+", " | ".join(conversation.prompts).lower())
        numbers = " ".join(word for word in words if word.isdigit())
        padded = ["^", *words, "$"]
        size = min(self.shingle, len(padded))
        parts = {" ".join(padded[i : i + size]) for i in range(len(padded) - size + 1)}
        made = self._empty.copy()
        made.update_batch([f"{part}\t{numbers}".encode() for part in sorted(parts)])
        return made.hashvalues

    def decide(self, sketches: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
        """{id: "near-duplicate: of which, how like"} of those that are dropped."""
        index = MinHashLSH(self.threshold, self.permutations)
        kept: dict[str, MinHash] = {}
        dropped = {}
        for id, values in tqdm(sketches, desc=self.name, unit="row"):
            mine = self._empty.copy()  # to make one anew is to draw its permutations again
            mine.hashvalues = values
            alike = [(mine.jaccard(kept[other]), other) for other in index.query(mine)]
            alike = [pair for pair in alike if pair[0] >= self.threshold]
            if alike:
                likeness = max(likeness for likeness, _ in alike)
                first = min(other for found, other in alike if found == likeness)
                dropped[id] = f"near-duplicate: {likeness:.2f} like {first}"
            else:
                kept[id] = mine
                index.insert(id, mine)
        return dropped
