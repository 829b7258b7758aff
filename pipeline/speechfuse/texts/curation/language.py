"""The language of the prompts, by py3langid: its wheel holds the model of 139 languages, so nothing
is downloaded."""

from dataclasses import dataclass, field
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # without Nigerian Pidgin: short English looks like it
    identifier.set_languages(set(identifier.labels) - {"pcm"})
    return identifier


@dataclass
class Language:
    """Keeps conversations in one of `languages` (ISO 639-1).

    A conversation is dropped when another language is more probable by `margin`. Short prompts look
    like many languages: under `min_characters` the answer is added, and a conversation that is
    short all the same is kept.
    """

    languages: list[str] = field(default_factory=lambda: ["en"])
    margin: float = 0.3
    min_characters: int = 40
    name: str = field(default="language", init=False)

    def __post_init__(self) -> None:
        if not self.languages or not 0 <= self.margin <= 1:
            raise ValueError(
                f"language: languages={self.languages} and margin={self.margin}: name at least one "
                "language, and a margin in 0 to 1"
            )
        if unknown := sorted(set(self.languages) - set(_identifier().labels)):
            raise ValueError(
                f"languages: {unknown[0]!r} is none that py3langid knows: "
                f"{', '.join(sorted(_identifier().labels))}"
            )

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        text = " ".join(conversation.prompts)
        if len(text) < self.min_characters:
            text = " ".join([text, *conversation.answers])[: 10 * self.min_characters]
        if len(text) < self.min_characters:
            return conversation
        ranked = _identifier().rank(text)
        likely, highest = ranked[0]
        ours = sum(share for language, share in ranked if language in self.languages)
        if highest - ours > self.margin:
            names = "/".join(self.languages)
            return Dropped(f"{likely}: {highest:.0%} likely, {names} {ours:.0%}")
        return conversation
