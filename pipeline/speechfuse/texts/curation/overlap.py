"""Prompts that stand in the evaluation sets do not become training data."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from speechfuse import config
from speechfuse.rows.rejects import Reject
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped

PLAN = 100_000  # rows of an evaluation set that are planned at once


@dataclass
class Overlap:
    """Drops conversations of which a prompt, as it is or was before it was rewritten, shares
    `words` successive words with a prompt of the evaluation sets (13 as for GPT-3:
    arXiv:2005.14165, appendix C). An evaluation prompt of fewer words has to be there whole, one of
    fewer than `exact_under` has to be all there is.

    `evaluations`: sources of texts, as in the job. Their fingerprints are inputs of it; ValueError
    for one that gives no prompt, of which nothing would ever be found.
    """

    evaluations: list[dict[str, Any]]
    words: int = 13
    exact_under: int = 6
    name: str = field(default="overlap", init=False)

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError(
                "overlap: evaluations is empty; name sources of speechfuse.texts.sources"
            )
        if self.words < 1 or self.exact_under < 0:
            raise ValueError(
                f"overlap: words={self.words} and exact_under={self.exact_under}: the first is at "
                "least 1, the second at least 0"
            )
        self._sources = [config.instantiate(spec) for spec in self.evaluations]
        names = [source.source_name for source in self._sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"overlap: two evaluations are named {twice[0]!r}; give one another name=..."
            )

    @property
    def inputs(self) -> dict[str, str]:
        return {source.source_name: source.fingerprint for source in self._sources}

    def at(self, inputs: dict[str, str]) -> dict[str, Any]:
        """Arguments that name the same, what is on the Hub at the commits that `inputs` has."""
        pairs = zip(self.evaluations, self._sources, strict=True)
        return {
            "evaluations": [
                {**spec, "path": inputs[s.source_name]} if s.documents.repo else spec
                for spec, s in pairs
            ]
        }

    @property
    def facts(self) -> dict[str, Any]:
        return {"evaluation_prompts": self._read[1]}

    @cached_property
    def _read(self) -> tuple[dict[int, dict[int, str]], dict[str, int]]:
        """Of sequences by their length in words, and of whole short texts (length 0): a hash and
        whose it is. And how many prompts each source has."""
        known: dict[int, dict[int, str]] = defaultdict(dict)
        prompts: dict[str, int] = {}
        for source in self._sources:
            rejects, found = [], 0
            for shard in source.plan(PLAN):
                for item in source.conversations(shard):
                    if isinstance(item, Reject):
                        rejects.append(item)
                        continue
                    for words in filter(None, map(_words, item.prompts)):
                        size = min(len(words), self.words) if len(words) >= self.exact_under else 0
                        for gram in _grams(words, size):
                            known[size].setdefault(gram, item.id)
                        found += 1
            if not found:
                first = f", the first {rejects[0].id}: {rejects[0].reason}" if rejects else ""
                raise ValueError(
                    f"overlap: evaluation {source.source_name!r} gives no prompt to look for "
                    f"(select={source.select}, rejected: {len(rejects)}{first}): correct its "
                    "select or the columns that it reads"
                )
            prompts[source.source_name] = found
        return dict(known), prompts

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        texts = [*conversation.prompts, *conversation.extra.get("original", {}).values()]
        for words in map(_words, texts):
            for size, known in self._read[0].items():
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
