"""The order of a conversation: the user asks, the assistant answers, in turn."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped


@dataclass
class Turns:
    """Keeps conversations in which user and assistant take turns, the user first, and no turn is
    empty. A last question without an answer is cut off, unless it is the only turn; `answered:
    false` keeps it (prompts that are only to be transcribed have no answer).

    A system message may change what the right answer is, and training renders none: it drops the
    conversation, or with `remove_system` is removed.
    """

    answered: bool = True
    remove_system: bool = False
    name: str = field(default="turns", init=False)

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        turns, removed = conversation.turns, []
        if turns and turns[0].role == "system" and (self.remove_system or not turns[0].text):
            turns, removed = turns[1:], ["turns system removed"]
        if any(turn.role == "system" for turn in turns):
            return Dropped("system: it has a system message")
        if not turns or turns[0].role != "user":
            return Dropped("order: the user does not begin")
        if any(turn.role == after.role for turn, after in pairwise(turns)):
            return Dropped("order: the same role twice in a row")
        if self.answered and turns[-1].role == "user":
            if len(turns) == 1:
                return Dropped("unanswered: there is no answer")
            turns, removed = turns[:-1], [*removed, "turns unanswered cut"]
        for turn in turns:
            if not any(map(str.isalnum, turn.text)):
                return Dropped(f"empty: the {turn.role} says {turn.text[:20]!r}")
        if not removed:
            return conversation
        rewrites = [*conversation.extra.get("rewrites", []), *removed]
        extra = {**conversation.extra, "rewrites": rewrites}
        return replace(conversation, turns=turns, extra=extra)
