"""Limits on the length of a conversation: prompts in words and in expected seconds of speech,
answers in words."""

from dataclasses import dataclass, field

from speechfuse.components import Count, Positive
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped


@dataclass
class Length:
    """Keeps conversations whose prompts have `min_words` to `max_words` and at most `max_seconds`,
    whose answers have `min_answer_words` to `max_answer_words`, and that have at most `max_turns`.

    Seconds are characters over `characters_per_second`: the original's synthesis used 15. Choose
    `max_seconds` below the quantizer's window (30 s for published WhisperVQ), for the slowest
    voice.
    """

    min_words: int = 1
    max_words: int = 75
    max_seconds: Positive = 25.0
    characters_per_second: Positive = 15.0
    min_answer_words: int = 1
    max_answer_words: int = 1000
    max_turns: Count | None = None
    name: str = field(default="length", init=False)

    def __post_init__(self) -> None:
        for kind in ("words", "answer_words"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low > high:
                raise ValueError(f"min_{kind}={low} is more than max_{kind}={high}: none is kept")

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        if self.max_turns and len(conversation.turns) > self.max_turns:
            return Dropped(f"turns: {len(conversation.turns)} are over {self.max_turns}")
        for text in conversation.prompts:
            if fault := _fault("prompt", text, self.min_words, self.max_words):
                return Dropped(fault)
            seconds, limit = len(text) / self.characters_per_second, self.max_seconds
            if seconds > limit:
                return Dropped(f"prompt long: {seconds:.1f} s expected are over {limit:g}")
        for text in conversation.answers:
            if fault := _fault("answer", text, self.min_answer_words, self.max_answer_words):
                return Dropped(fault)
        return conversation


def _fault(what: str, text: str, low: int, high: int) -> str | None:
    words = len(text.split())
    if low <= words <= high:
        return None
    size, limit = ("short", f"under {low}") if words < low else ("long", f"over {high}")
    return f"{what} {size}: {words} words are {limit}"
