"""Which language the prompts are in, told by py3langid: a model of 139 languages in its wheel, so
nothing is fetched when it runs."""

from dataclasses import dataclass, field
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped


@cache
def _identifier() -> LanguageIdentifier:
    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found.set_languages(set(found.labels) - {"pcm"})  # Nigerian Pidgin: short English looks like it
    return found


@dataclass
class Language:
    """Keep what is in one of `languages` (ISO 639-1).

    A conversation goes when another language is more likely by `margin`, in probability; a short
    prompt looks like many languages, so under `min_characters` its answer is read with it, and what
    is short all the same is kept.
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
        likely, most = ranked[0]
        wanted = sum(share for language, share in ranked if language in self.languages)
        if most - wanted > self.margin:
            return Dropped(f"{likely}: {most:.0%} likely, {'/'.join(self.languages)} {wanted:.0%}")
        return conversation
