"""Overlap with evaluation sets: conversations whose prompts stand there are dropped."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from speechfuse import config
from speechfuse.rows.rejects import Reject
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped
from speechfuse.texts.shared_words import LENGTH, SharedWords

PLAN = 100_000  # rows of an evaluation set that are planned at once


@dataclass
class Overlap:
    """Drops a conversation when one of its prompts, before or after rewriting, shares `words`
    successive words with a prompt of the evaluation sets. An evaluation prompt of fewer words has
    to be contained whole; one of fewer than `exact_under` words has to be the whole prompt.

    `evaluations`: sources of texts, as in the job; their fingerprints are inputs of the step.
    Raises ValueError for one without prompts, which would never match.
    """

    evaluations: list[dict[str, Any]]
    words: int = LENGTH
    exact_under: int = 6
    name: str = field(default="overlap", init=False)

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("overlap: evaluations is empty; name sources of speechfuse.texts")
        if self.words < 1 or self.exact_under < 0:
            raise ValueError(
                f"overlap: words={self.words} and exact_under={self.exact_under}: the first is at "
                "least 1, the second at least 0"
            )
        self._sources = [config.instantiate(spec) for spec in self.evaluations]
        names = [source.source_name for source in self._sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"overlap: two evaluations are named {twice[0]!r}; set name= of one")

    @property
    def inputs(self) -> dict[str, str]:
        return {source.source_name: source.fingerprint for source in self._sources}

    def at(self, inputs: dict[str, str]) -> dict[str, Any]:
        """Return the step's arguments with Hub datasets at the commits in `inputs`."""
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
    def _read(self) -> tuple[SharedWords, dict[str, int]]:
        """(prompts of the evaluations, {source: number of its prompts})."""
        shared, prompts = SharedWords(self.exact_under, self.words), dict[str, int]()
        for source in self._sources:
            rejects, count = [], 0
            for shard in source.plan(PLAN):
                for item in source.conversations(shard):
                    if isinstance(item, Reject):
                        rejects.append(item)
                        continue
                    count += sum(shared.add(item.id, prompt) for prompt in item.prompts)
            if not count:
                first = f", the first {rejects[0].id}: {rejects[0].reason}" if rejects else ""
                raise ValueError(
                    f"overlap: evaluation {source.source_name!r} gives no prompt to look for "
                    f"(select={source.select}, rejected: {len(rejects)}{first}): correct its "
                    "select or the columns that it reads"
                )
            prompts[source.source_name] = count
        return shared, prompts

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        texts = [*conversation.prompts, *conversation.extra.get("original", {}).values()]
        for text in texts:
            for owners, *_ in self._read[0].find(text):
                return Dropped(f"evaluation: it shares words with {min(owners)}")
        return conversation
