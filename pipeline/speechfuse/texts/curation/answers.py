"""Answers that are not worth learning: those of a model that says it cannot hear or is an AI, that
repeat themselves, or that repeat the question. Code, links and tables are allowed: an answer is
read, not heard."""

import re
from collections import Counter
from dataclasses import dataclass, field

from speechfuse.scores.words import WORD
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped

_CANNOT = (
    r"(?:can ?not|can't|am not able to|am unable to|am not capable of|unable to"
    r"|(?:don't|do not) have the (?:ability|capability) to|have no ability to)"
)
_HEARD = (  # the user, a recording, or nothing is named; music at work may be anybody's
    r"(?: to)?(?:\s*(?:[.!?,;]|$)| (?:and|or)\b| (?:(?:any|the|an?|your|spoken|live) )*"
    r"(?:you|your|audio|sounds?|voices?|speech|recordings?|files?|clips?|this|that|it|what you"
    r"|anything)\b)"
)
_HEAR = (
    r"(?:(?:actually|directly|physically|really|currently) )?"
    rf"(?:(?:hear|hearing|listen|listening){_HEARD}|process(?:ing)? (?:audio|voice|sound)"
    r"|access audio|understand (?:audio|speech)|play(?:ing)? audio)"
)
_AI = (
    r"(?:[\w-]+ ){0,3}(?:AI|artificial intelligence|language model|LLM|chat ?bot)\b"
    r"(?! (?!computer|character|helper)"  # what a person or a company is
    r"(?:fan|nerd|company|startup|expert|student|consultant|analyst|\w+(?:er|or|ist|ian|iast))s?\b)"
)
_IS_AI = (
    rf"(?:^|[.!?\n]\s*)as an? {_AI}(?: (?:language )?(?:model|assistant|system|program|bot))?,"
    rf"|(?<!such )\bas an? {_AI}[^.!?\n]{{0,100}}\b(?:I|my|me)\b"
    rf"|\bI\b[^.!?\n]{{0,60}}(?<!such )\bas an? {_AI}"
    rf"|\bI(?:'m| am) (?:just |only |merely )?an? {_AI}"
)
_DEAF = (
    rf"\bI(?:'m| am)?\b[^.!?\n]{{0,60}}\b{_CANNOT}\b[^.!?\n]{{0,15}}\b{_HEAR}",
    r"\bI(?:'m| am)(?: only| just)? (?:an? )?(?:[\w-]+ ){0,3}text[- ](?:based|only)\b",
    r"\bas an? text[- ](?:based|only) (?:AI|model|assistant|language|program|chat|system)",
    r"\bI (?:don't|do not) have (?:any )?(?:ears|(?:audio|hearing) (?:cap|input|abilit)\w*"
    r"|access to (?:any )?(?:audio|sound|microphone)s?)\b",
    r"\bI can(?:not|'t)? only (?:process|read|understand|respond to|use) (?:\w+ )?text\b",
)
FAULTS = {  # kind of fault: how such answers word it
    "deaf": re.compile("|".join(_DEAF), re.I),
    "as an AI": re.compile(_IS_AI, re.I),
}


@dataclass
class Answers:
    """Drops a conversation when one of its answers says that it cannot hear or (`as_an_ai`) that it
    comes from an AI, when more than `max_repeated` of the answer's 5-word sequences came before in
    it, or when it is its question again."""

    as_an_ai: bool = True
    max_repeated: float = 0.3
    name: str = field(default="answers", init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_repeated <= 1:
            raise ValueError(f"answers: max_repeated={self.max_repeated} is not in 0 to 1")

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        question = ""
        for turn in conversation.turns:
            if turn.role == "assistant" and (fault := self._fault(question, turn.text)):
                return Dropped(fault)
            question = turn.text
        return conversation

    def _fault(self, question: str, text: str) -> str | None:
        text = text.replace("\u2019", "'")
        for kind, pattern in FAULTS.items():
            if (kind == "deaf" or self.as_an_ai) and (match := pattern.search(text)):
                return f"{kind}: {match[0][:60]!r}"
        words = WORD.findall(text.lower())
        if len(words) > 4 and words == WORD.findall(question.lower()):
            return "echo: the answer is the question"
        grams = Counter(tuple(words[i : i + 5]) for i in range(len(words) - 4))
        repeated = 1 - len(grams) / max(1, grams.total())
        if grams.total() >= 20 and repeated > self.max_repeated:
            return f"repetition: {repeated:.0%} of its 5-word sequences came before"
        return None
