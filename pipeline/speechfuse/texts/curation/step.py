"""The interface of a curation step: a conversation in; the same, or a reason to drop it, out.

A step is a class named by dotted path in a job's YAML; its keyword arguments are the keys beside
`_component_`. It has

    name      under which rows are counted, e.g. "speakable"
    inputs    optional: {name: fingerprint} of other data that it reads (evaluation sets); with it
              `at(inputs) -> arguments` that read exactly these, for the workers
    facts     optional: JSON-able, for the step's line in the manifest; raises ValueError at
              planning for a step that would do nothing

and is one of two kinds. Local: `step(conversation) -> Conversation | Dropped`. Global, where the
decision needs all conversations that reach the step: `sketch(conversation)` runs in the workers and
returns something small; `decide` takes the (id, sketch) of all, in order, and returns {id: reason
for dropping it}.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from speechfuse.texts.conversations import Conversation, Turn


@dataclass(frozen=True)
class Dropped:
    """`reason` is "kind: detail"; kinds are counted."""

    reason: str


def rewritten(
    conversation: Conversation, changed: dict[int, str], kinds: Iterable[str]
) -> Conversation:
    """Return the conversation with the texts `changed` (by number of the turn) and, in `extra`,
    `original`, the texts before their first change, and `rewrites`, the kinds of rewriting."""
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
