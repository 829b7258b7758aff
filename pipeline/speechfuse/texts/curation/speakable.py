"""Speakable prompts: numbers and symbols with one reading are put into words; a conversation with
anything that cannot be read aloud is dropped.

In: a conversation. Out: the same with its prompts as they are to be read aloud, or why it is
dropped. Code, tables and formulas are looked for first; after normalisation a prompt may hold
letters of the voice's script, numbers of few digits and plain punctuation, and nothing else.
Answers are not touched: nobody speaks them.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache

import regex

from speechfuse.scores.words import DENSE
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.normalization import EMOJI, bare, normalize
from speechfuse.texts.curation.step import Dropped, rewritten

_STRUCTURES = {
    "latex": re.compile(
        r"\\[a-zA-Z]{2,}|\\[()\[\]]|\$\$|\$[^$\n]*[\\^_={}][^$\n]*\$|\{[^{}\n]*\}\^|\^\{|_\{|\w_\d\b"
    ),
    "table": re.compile(
        r"^[^\n|]*\|[^\n|]*\|[^\n]*$|^\s*\|?\s*:?-{3,}|\+-{2,}\+|^[^\n\t]+\t[^\n]+\n[^\n\t]+\t"
        r"|(?:^[^\n,\s][^\n]*(?:,\S[^\n,]*){2,}\n){2}|(?:^\S[^\n]*\S {3,}\S[^\n]*\n){2}",
        re.M,
    ),
    "code": re.compile(
        r"```|~~~"
        r"|^\s*(?:def|class)\s+\w+.*:\s*$|^\s*from\s+[\w.]+\s+import\s"
        r"|^\s*import\s+(?:[\w.]+\s+as\s+\w+|\w+(?:\.[\w*]+)+|os|sys|re|json|math|time|random|csv)\s*$"
        r"|^\s*import\s+[\w.*]+;\s*$|^[^\n]*(?:[=\[\]{}<>]|\w\(|\+\+|->)[^\n]*;\s*$"
        r"|^\s*(?:return\b[^\n]{0,20}|break|continue|(?:int|float|double|char|string|bool)\s\w+);\s*$"
        r"|^\s*#include\b|\bpublic\s+(?:static|class|void)\b|\bconsole\.log\b|\bprintf?\s*\("
        r"|\bSELECT\b[\s\S]{1,200}\bFROM\b|\bINSERT INTO\b|\bCREATE TABLE\b|\bUPDATE \w+ SET\b"
        r"|^\s*(?:for|while|if|elif|else)\b[^\n]*:\s*\n[ \t]+\S"
        r"|^\s*(?:let|const|var|int|float|double|char|string|bool)\s+\w+\s*="
        r"|=>|\(\)|[{}]\s*$|&&|\|\||[=!]=|:=|\+=|</\w+>|<\?\w+|\$\(|^\s*\$\s+\w+"
        r"|^\s*(?:sudo|pip|npm|git|docker) \w"
        r"|\b[a-z]+_[a-z_]+\b|\b[a-z]+[A-Z]\w*\(|\b\w+\[[^\]]*\]|\blambda \w+:"
        r"|\w\((?!s\)|es\)|k\))[^()\s]*(?:,\s?[^()\s]*)*\)"
        r"|(?:^|\s)(?:~?/[\w.-]+){2,}|\b[A-Z]:\\|\\[nt]\b"
        r"|\b\w+\.(?:py|js|ts|cpp|java|sh|exe|json|yaml|yml|csv|txt|md|html|css|pdf|xml)\b",
        re.M,
    ),
}
_UNSPEAKABLE = {
    "email": re.compile(r"(?!\bhttps?:|\bftp:)[^\s/]@[^\s/]+\.\w"),
    "url": re.compile(
        r"\bhttps?:|\bftp:|\bwww\.|\S@\S+\.\w"
        r"|\b[\w-]+\.(?:com|org|net|gov|edu|io|co|uk|de|info)\b(?:/|\?)?"
        r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|[a-z]\.[a-z]{2,}/[\w~?-]"
        r"|\b(?:localhost|[\w-]*[a-z][\w-]*\.[\w.-]+):\d|[a-z]:(?:[38]\d{3}|\d{5})\b",
        re.I,
    ),
    "emoji": re.compile(rf"[{EMOJI}]|(?<!\w)(?:[:;=]-?[)(DPp/|\\]|<3|\^_\^|xD)(?!\w)"),
    "placeholder": re.compile(r"\[[A-Za-z][^\[\]]*\]|<[A-Za-z][^<>]*>|\{\{?\w+\}?\}"),
    "number": re.compile(
        r"\d{5,}|\(\d{3}\) ?\d|\d[\d.,]*\d,\d|\d(?:[ -]?\d){6,}|\d+\.\d{4,}"
        r"|\d+(?:\.\d+){2,}|\d+(?:-\d+)+|\d+(?:/\d+)+"
        r"|(?=\w*\d\w*[A-Za-z]\w*\d|\w*[A-Za-z]\w*\d\w*[A-Za-z])\w{9,}|\b0[xX][0-9a-fA-F]+|\b\d+(?:\.\d+)?[eE][-+]?\d+\b"
    ),
    "symbol": re.compile(r"(?:[.-]+ ){3,}|-{3,}"),
}
# U+200C and U+200D join letters, or keep them apart
_PUNCTUATION = frozenset(" .,;:!?'\"()-¿¡。、「」『』・।॥؟،؛\u200c\u200d")
_OF_SCRIPTS = {"IDEOGRAPHIC": "CJK", "EXTENDED": "ARABIC"}  # first words of other characters' names
_UNSPACED = regex.compile(f"[{DENSE}]")
LONGEST_WORD = 45  # characters, enough for German numbers; longer ones are keys or noise


@dataclass
class Speakable:
    """Keeps conversations whose prompts a voice can read. `language`: of numbers and symbols in
    words; `scripts`: of letters, as Unicode names them (LATIN, CYRILLIC, CJK, ...); `rewrite:
    false` drops what would have to be rewritten."""

    language: str = "en"
    scripts: list[str] = field(default_factory=lambda: ["LATIN"])
    rewrite: bool = True
    name: str = field(default="speakable", init=False)

    def __post_init__(self) -> None:
        if not self.scripts or any(script != script.upper() for script in self.scripts):
            raise ValueError(
                f"speakable: scripts={self.scripts}: name at least one, as Unicode does: LATIN"
            )

    def __call__(self, conversation: Conversation) -> Conversation | Dropped:
        changed: dict[int, str] = {}
        kinds: list[str] = []
        for number, turn in enumerate(conversation.turns):
            if turn.role != "user":
                continue
            if fault := structure(turn.text):
                return Dropped(fault)
            text, rewrites = normalize(turn.text, self.language)
            if fault := unspeakable(text, tuple(self.scripts)):
                return Dropped(fault)
            if rewrites:
                changed[number] = text
                kinds += rewrites
        if changed and not self.rewrite:
            return Dropped(f"{kinds[0]}: it would have to be rewritten")
        return rewritten(conversation, changed, [f"{self.name} {kind}" for kind in kinds])


def structure(text: str) -> str | None:
    """Return the structure of a written text that cannot be put into words ("code: ...", "table:
    ...", "latex: ..."), or None."""
    return _first_match(_STRUCTURES, bare(text))


def unspeakable(text: str, scripts: tuple[str, ...] = ("LATIN",)) -> str | None:
    """Return why a voice cannot read a text, as "kind: the part that it cannot read", or None."""
    if fault := _first_match(_UNSPEAKABLE, text):
        return fault
    if not any(map(str.isalpha, text)):
        return f"empty: {_shown(text)}"
    for character in text:
        if not _readable(character, scripts):
            kind = "script" if character.isalpha() else "symbol"
            return f"{kind}: {_shown(character)} ({unicodedata.name(character, 'no name')})"
    parts = re.split(r"[\s-]+", text)
    if long := next((w for w in parts if len(w) > LONGEST_WORD and not _UNSPACED.search(w)), None):
        return f"symbol: a word of {len(long)} characters, {_shown(long)}"
    return None


def _first_match(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    for kind, pattern in patterns.items():
        if match := pattern.search(text):
            return f"{kind}: {_shown(match[0])}"
    return None


@lru_cache(maxsize=1 << 16)
def _readable(character: str, scripts: tuple[str, ...]) -> bool:
    if character in _PUNCTUATION or character in "0123456789":
        return True
    kind = unicodedata.category(character)
    first = re.split("[ -]", unicodedata.name(character, ""))[0]
    return kind in ("Mn", "Mc") or (
        (kind[0] in "LP" or kind == "Nd") and _OF_SCRIPTS.get(first, first) in scripts
    )


def _shown(text: str) -> str:
    return repr(text.strip()[:40])
