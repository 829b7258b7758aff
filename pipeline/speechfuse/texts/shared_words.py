"""Texts that share words with others: evaluation items in training data, and the other way round.

In: texts with their owners, added once, and texts that are looked at one by one. Out: whose text is
there. A text of at least `fewest` words is found by any `length` of its words in a row (a shorter
one by all of them), a text of fewer words only where it is all there is.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

Words = tuple[str, ...]
LENGTH = 13  # as for GPT-3: arXiv:2005.14165, appendix C
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, Japanese, Chinese: a word a character
_WORD = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}]+")


def words(text: str) -> Words:
    """The words of `text`, for comparing: NFKC, case folded, letters and digits only."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class SharedWords:
    """Texts by their words. Time to look at a text grows with its length, not with their number."""

    def __init__(self, fewest: int, length: int = LENGTH) -> None:
        self.fewest, self.length = fewest, length
        self.head = max(1, min(fewest, length))  # words of a run by which it is looked up
        self.whole: dict[Words, set[Any]] = {}
        self.runs: dict[Words, dict[Words, set[Any]]] = {}

    def add(self, owner: Any, text: str) -> bool:
        """Look for `text` from now on; False where it has no words."""
        of_text = words(text)
        if of_text:
            self.whole.setdefault(of_text, set()).add(owner)
        length = min(self.length, len(of_text))
        for start in range(
            len(of_text) - length + 1 if length and len(of_text) >= self.fewest else 0
        ):
            run = of_text[start : start + length]
            self.runs.setdefault(run[: self.head], {}).setdefault(run, set()).add(owner)
        return bool(of_text)

    def find(self, text: str) -> Iterator[tuple[set[Any], Words, bool]]:
        """(owners, the words that their texts and `text` share, whether these are all of both)."""
        of_text = words(text)
        if owners := self.whole.get(of_text):
            yield owners, of_text, True
        for start in range(len(of_text) - self.head + 1):
            for run, owners in self.runs.get(of_text[start : start + self.head], {}).items():
                if of_text[start : start + len(run)] == run:
                    yield owners, run, False
