"""Texts that share words with others: evaluation items in training data, and the other way round.

In: texts with their owners, added once, and texts that are looked at one by one. Out: whose text is
there. A text of at least `fewest` words is found by any `length` of its words in a row (a shorter
one by all of them), a text of fewer words only where it is all there is.
"""

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from speechfuse.scores.words import words

Words = tuple[str, ...]
LENGTH = 13  # as for GPT-3: arXiv:2005.14165, appendix C
_BASE = 0x9E3779B97F4A7C15  # of the hash, odd


class SharedWords:
    """Texts by their words, each a number, about 20 bytes a word.

    Runs are looked up by a hash of their first words, and then compared. Time to look at a text
    grows with its length, not with their number.
    """

    def __init__(self, fewest: int, length: int = LENGTH) -> None:
        self.fewest, self.length = fewest, length
        self.head = max(1, min(fewest, length))  # words of a run by which it is looked up
        self.owners: list[Any] = []
        self.number_of: dict[str, int] = {}  # of a word
        self.numbers = array("i")  # of the words of all texts
        self.ends = array("q")  # of the texts in `numbers`
        self.whole: dict[int, list[int]] = {}  # hash of all words of a text: such texts
        self._index: tuple[np.ndarray, ...] | None = None

    def add(self, owner: Any, text: str) -> bool:
        """Look for `text` from now on; False where it has no words."""
        of_text = words(text)
        if of_text:
            self._index, known = None, self.number_of
            self.numbers.extend(known.setdefault(word, len(known)) for word in of_text)
            self.whole.setdefault(hash(of_text), []).append(len(self.owners))
            self.ends.append(len(self.numbers))
            self.owners.append(owner)
        return bool(of_text)

    def _runs(self) -> tuple[np.ndarray, ...]:
        """Return all runs in the order of their hashes (uint64): the hashes, where each starts in
        `numbers`, and its text; and `numbers` and the starts of all texts."""
        numbers, ends = np.frombuffer(self.numbers, np.int32), np.frombuffer(self.ends, np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        sizes = ends - starts
        many = np.where(sizes >= self.fewest, sizes - np.minimum(sizes, self.length) + 1, 0)
        texts = np.repeat(np.arange(len(sizes), dtype=np.int32), many)
        within = np.arange(len(texts)) - np.repeat(np.cumsum(many) - many, many)
        at = starts[texts] + within
        hashes = self._hashes(numbers)[at]
        order = np.argsort(hashes, kind="stable")
        return hashes[order], at[order], texts[order], numbers, starts

    def _hashes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the hash of the `head` words from each place on."""
        values = np.zeros(max(0, len(numbers) - self.head + 1), np.uint64)
        for i in range(self.head):
            values = values * np.uint64(_BASE) + numbers[i : i + len(values)].astype(np.uint64)
        return values

    def find(self, text: str) -> Iterator[tuple[set[Any], Words, bool]]:
        """(owners, the words that their texts and `text` share, whether these are all of both)."""
        of_text = words(text)
        if not of_text or not self.owners:
            return
        self._index = self._index or self._runs()
        hashes, places, texts, numbers, starts = self._index
        own = np.array([self.number_of.get(word, -1) for word in of_text], np.int32)

        def same(place: int, start: int, size: int) -> bool:
            return np.array_equal(numbers[place : place + size], own[start : start + size])

        of_hash = self.whole.get(hash(of_text), [])
        whole = [t for t in of_hash if self.ends[t] - starts[t] == len(own)]
        if owners := {self.owners[t] for t in whole if same(starts[t], 0, len(own))}:
            yield owners, of_text, True
        looked_up = self._hashes(own)
        low, high = (np.searchsorted(hashes, looked_up, side) for side in ("left", "right"))
        for start in np.flatnonzero(low < high).tolist():
            found: dict[int, set[Any]] = {}  # by the length of the run
            for i in range(low[start], high[start]):
                size = min(self.length, self.ends[texts[i]] - int(starts[texts[i]]))
                if same(places[i], start, size):
                    found.setdefault(size, set()).add(self.owners[texts[i]])
            yield from ((of, of_text[start : start + size], False) for size, of in found.items())
