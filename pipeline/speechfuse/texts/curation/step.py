"""What every step of curation is: a conversation in, the conversation or why it is dropped out.

A step is a class named by dotted path in a job's YAML; its keyword arguments are the keys beside
`_component_`. It has

    name      for counting, e.g. "speakable"
    inputs    {what: fingerprint} of data that it reads besides (evaluation sets), else absent;
              with it `at(inputs) -> arguments` that read just these, for the workers
    facts     JSON-able, for its line in the manifest, else absent; ValueError, when the work is
              planned, where it could do nothing

and is one of two kinds: local, `step(conversation) -> Conversation | Dropped`, or global, which has
to see all that reach it: `sketch(conversation)` is called in the workers and gives something small,
and `decide` is given the (id, sketch) of all, in order, and returns {id: why it is dropped}.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from speechfuse.texts.conversations import Conversation, Turn


@dataclass(frozen=True)
class Dropped:
    """`reason` is "kind: detail"; kinds are counted."""

    reason: str


class Step(Protocol):
    name: str

    def __call__(self, conversation: Conversation) -> Conversation | Dropped: ...


class GlobalStep(Protocol):
    name: str

    def sketch(self, conversation: Conversation) -> Any: ...

    def decide(self, sketches: Iterable[tuple[str, Any]]) -> dict[str, str]: ...


def rewritten(
    conversation: Conversation, changed: dict[int, str], kinds: Iterable[str]
) -> Conversation:
    """With the texts of some turns `changed` (by number), and a record of it in `extra`: what they
    were when they were first changed, and by which `kinds` of rewriting."""
    if not changed:
        return conversation
    turns = [Turn(t.role, changed.get(i, t.text)) for i, t in enumerate(conversation.turns)]
    before = {str(i): conversation.turns[i].text for i in changed}
    extra = conversation.extra
    record = {
        "original": {**before, **extra.get("original", {})},
        "rewrites": list(dict.fromkeys([*extra.get("rewrites", []), *kinds])),
    }
    return replace(conversation, turns=turns, extra={**extra, **record})
