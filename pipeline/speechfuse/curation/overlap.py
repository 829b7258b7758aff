"""Prompts that stand in the evaluation sets do not become training data."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from speechfuse import config
from speechfuse.corpora import Reject
from speechfuse.curation.step import Dropped
from speechfuse.texts import Conversation

PLAN = 100_000  # rows of an evaluation set that are planned at once


@dataclass
class Overlap:
    """Drops conversations of which a prompt, as it is or was before it was rewritten, shares
    `words` successive words with a prompt of the evaluation sets (13 as for GPT-3:
    arXiv:2005.14165, appendix C). An evaluation prompt of fewer words has to be there whole, one of
    fewer than `exact_under` has to be all there is.

    `evaluations`: sources of speechfuse.texts, as in the job. Their fingerprints are inputs of it.
    """

    evaluations: list[dict[str, Any]]
    words: int = 13
    exact_under: int = 6
    name: str = field(default="overlap", init=False)

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("overlap: evaluations is empty; name sources of speechfuse.texts")
        self._sources = [config.instantiate(spec) for spec in self.evaluations]

    @property
    def inputs(self) -> dict[str, str]:
        return {source.source_name: source.fingerprint for source in self._sources}

    @cached_property
    def _known(self) -> dict[int, dict[int, str]]:
        """Of sequences by their length in words, and of whole short texts (length 0): a hash and
        whose it is."""
        known: dict[int, dict[int, str]] = defaultdict(dict)
        for source in self._sources:
            for shard in source.plan(PLAN):
                for item in source.conversations(shard):
                    for text in [] if isinstance(item, Reject) else item.prompts:
                        words = _words(text)
                        size = min(len(words), self.words) if len(words) >= self.exact_under else 0
                        for gram in _grams(words, size):
                            known[size].setdefault(gram, f"{item.id}")
        return dict(known)

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        texts = [*conversation.prompts, *conversation.extra.get("original", {}).values()]
        for words in map(_words, texts):
            for size, known in self._known.items():
                for gram in _grams(words, size):
                    if gram in known:
                        return Dropped(f"evaluation: it shares words with {known[gram]}")
        return conversation


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(words: list[str], size: int) -> list[int]:
    """Hashes, good within this process, of all sequences of `size` words; 0: of the whole."""
    size = size or len(words)
    return [hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)] if size else []
