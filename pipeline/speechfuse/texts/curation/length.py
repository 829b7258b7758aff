"""How long a conversation may be: prompts in words and in expected seconds of speech, answers in
words."""

from dataclasses import dataclass, field

from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped


@dataclass
class Length:
    """Of every prompt `min_words` to `max_words` and at most `max_seconds`, of every answer
    `min_answer_words` to `max_answer_words`; of the conversation at most `max_turns`.

    Seconds are characters over `characters_per_second`: 15 is what the original's synthesis was set
    to. `max_seconds` belongs below the quantizer's window (30 s for published WhisperVQ), for the
    slowest voice.
    """

    min_words: int = 1
    max_words: int = 75
    max_seconds: float = 25.0
    characters_per_second: float = 15.0
    min_answer_words: int = 1
    max_answer_words: int = 1000
    max_turns: int | None = None
    name: str = field(default="length", init=False)

    def __post_init__(self) -> None:
        for kind in ("words", "answer_words"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low > high:
                raise ValueError(
                    f"min_{kind}={low} is more than max_{kind}={high}: nothing is kept"
                )
        if self.characters_per_second <= 0:
            raise ValueError(f"characters_per_second={self.characters_per_second}: over 0, e.g. 15")

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        if self.max_turns and len(conversation.turns) > self.max_turns:
            return Dropped(f"turns: {len(conversation.turns)} are over {self.max_turns}")
        for text in conversation.prompts:
            words, seconds = len(text.split()), len(text) / self.characters_per_second
            if words < self.min_words:
                return Dropped(f"prompt short: {words} words are under {self.min_words}")
            if words > self.max_words:
                return Dropped(f"prompt long: {words} words are over {self.max_words}")
            if seconds > self.max_seconds:
                return Dropped(
                    f"prompt long: {seconds:.1f} s expected are over {self.max_seconds:g}"
                )
        for text in conversation.answers:
            words = len(text.split())
            if words < self.min_answer_words:
                return Dropped(f"answer short: {words} words are under {self.min_answer_words}")
            if words > self.max_answer_words:
                return Dropped(f"answer long: {words} words are over {self.max_answer_words}")
        return conversation
