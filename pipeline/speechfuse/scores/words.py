"""The words of a text in any script, without case and punctuation, for comparing texts."""

import re
import unicodedata

import regex

# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces, a letter with its marks is a word
DENSE = (
    r"\p{Script=Thai}\p{Script=Lao}\p{Script=Myanmar}\p{Script=Khmer}\p{Script=Hiragana}"
    r"\p{Script=Katakana}\p{Script=Han}"
)
_LETTERS = rf"[\p{{L}}\p{{N}}--{DENSE}]"
_WORD = regex.compile(rf"[{DENSE}&&\p{{L}}]\p{{M}}*|[{_LETTERS}\p{{M}}]+", regex.V1)
WORD = regex.compile(r"[\w\p{M}\p{N}]+")  # as \w+ of re, and the marks of letters
_UNSEEN = regex.compile(r"\p{Cf}")  # joiners and marks of direction inside a word


_ASCII = re.compile(r"[a-z0-9]+")  # the same of plain English, and fast


def words(text: str) -> tuple[str, ...]:
    """Return the words of `text`: NFKC, case folded; letters, their marks and digits only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        return tuple(_ASCII.findall(folded))
    return tuple(_WORD.findall(_UNSEEN.sub("", folded)))


def plain(text: str) -> str:
    """Return the words of `text` with spaces between. This is compared where there is no normaliser
    for the language of the text."""
    return " ".join(words(text))
