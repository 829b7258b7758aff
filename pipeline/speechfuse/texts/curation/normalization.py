"""Text normalisation: written text to text that a voice reads as it is meant.

In: a prompt as people write it. Out: the same in letters, short numbers and plain punctuation, and
the kinds of rewriting that were applied. Only what has one reading is rewritten; what has none, or
several, is left as it is, for speakable.py to refuse.
"""

# ruff: noqa: RUF001 -- the characters that are rewritten here are meant

import html
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import zip_longest

from num2words import num2words

from speechfuse.scores.words import plain
from speechfuse.texts.curation.quantities import fractions, money, numbers

EMOJI = (
    "\U0001f000-\U0001faff\U000e0020-\U000e007f\u2600-\u27bf\u2b00-\u2bff\u231a\u231b\u23e9-\u23fa"
    "\u20e3\ufe0f"
)
Rewrites = list[tuple[str, str]]  # pattern and replacement, applied in this order
Rule = tuple[str, Callable[[str], str]]  # kind, as it is counted, and the rewriting

# quotes, dashes and spaces that mean what ASCII has, and letters that are marks
_CHARACTERS = str.maketrans(
    "‘’‚‛`´ʼ" + "“”„‟«»" + "‐‑−" + "⁄" + "\u2028\u2029\u0085" + "⋅✕✖➗",
    "'" * 7 + '"' * 6 + "---" + "/" + "\n\n\n" + "·××÷",
    "®™©\u00ad\u200b\u2060\ufeff\u200e\u200f"
    "\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
)
_UNITS = (
    "km|mi|miles?|m|MB|GB|L|ml|gallons?|feet|ft|dollars?|cents?|pounds?|kg|g|mg|words?|pages?"
    "|calories|units?"
)
_PER = (
    "hour|minute|second|day|night|week|month|year|person|mile|gallon|kg|lb|pound|unit|word|page"
    "|item|piece"
)
# a number or a letter, in front and behind
_LEFT = r"(?:(?<=[\d²³)%])|(?<=\b[a-zA-Z])|(?<=\d[a-zA-Z]))"
_RIGHT = r"(?=\d|[a-zA-Z]\b|[a-zA-Z][\^²³]|\()"
_BASE = r"(?:(?<=\d)|(?<=\b[a-zA-Z])|(?<=\d[a-zA-Z])|(?<=[cdkm]m)|(?<=\bft)|(?<=\bin)|(?<=\bmi))"
_MATHS = re.compile(
    r"\b(calculate|compute|solve|evaluate|simplify|equation|sum|difference|equals?|"
    r"what(?: is|'s) -?\d+|how much is -?\d+)\b|=",
    re.I,
)
_SYMBOLS: Rewrites = [  # each has one reading where it matches
    (r"\bC\+\+", "C plus plus"),
    (r"\bC#", "C sharp"),
    (rf"{_LEFT}\s*\+\s*{_RIGHT}", " plus "),
    (rf"{_LEFT}\s*[×·]\s*{_RIGHT}", " times "),
    (rf"(?<=\d)\s*\*\s*{_RIGHT}", " times "),
    (rf"{_LEFT}\s*÷\s*{_RIGHT}", " divided by "),
    (rf"{_LEFT}\s*=\s*(?:{_RIGHT}|(?=-\d|\?|_))", " equals "),
    (r"\b24/7\b", "twenty four seven"),
    (r"\band/or\b", "and or"),
    (r"\bw/o\b", "without"),
    (r"\b[nN]/[aA]\b", "not applicable"),
    (r"\b401\(k\)", "401 k"),
    (rf"(?<![A-Za-z])({_UNITS})\s?/\s?(?:an? )?(?:h|hr)\b", r"\1 per hour"),
    (rf"(?<![A-Za-z])({_UNITS})\s?/\s?(?:s|sec)\b", r"\1 per second"),
    (rf"(?<![A-Za-z])({_UNITS})\s?/\s?min\b", r"\1 per minute"),
    (rf"(?<![A-Za-z])({_UNITS})\s?/\s?({_PER})\b", r"\1 per \2"),
    (r"(?<=\d)km(?= per\b)", " kilometers"),
    (r"\bkm(?= per\b)", "kilometers"),
    (r"(?<=\d) ?: ?(?=\d+(?: ?: ?\d+)? ratio\b)", " to "),
    (r"(?<=\d) : (?=\d)", " to "),
    (r"(?<=\bratio of )(\d+) ?: ?(?=\d)", r"\1 to "),
    (r"(?<=\d)\s*°\s*C\b", " degrees Celsius"),
    (r"(?<=\d)\s*°\s*F\b", " degrees Fahrenheit"),
    (r"(?<=\d)\s*°(?!\w)", " degrees"),
    (r"#(?=\d+\b)", "number "),
    (r"(?<!\w)~\s*(?=\d)", "about "),
    (r"(?<=\d)\s*%", " percent"),
    (r"(?<=[\w.,])\s*&\s*(?=\w)", " and "),
    (r"_{2,}", "blank"),
    (r"(?<=\w)\(s\)", "s"),
    (rf"{_BASE}²", " squared"),
    (rf"{_BASE}³", " cubed"),
    (r"\b1\s?Ω(?!\w)", "1 ohm"),
    (r"(?<=\d)\s?Ω(?!\w)", " ohms"),
    (r"(?<=\w)\^2\b", " squared"),
    (r"(?<=\w)\^3\b", " cubed"),
    (r"\b(\w+)\^(\d{1,2})\b", r"\1 to the power of \2"),
    (r"√\s*(?=\d)", "the square root of "),
    (r"(?<=\d)\s*=\s*$", " equals"),
    (r"(?<=\d)\s+/\s+(?=\d)", " divided by "),
    (r"(?<=\d)\s+x\s+(?=\d)", " times "),
    (r"(?<=\d)\+(?!\w)", " plus"),
    # dy/dx, mi/gal, text/html and docs.python.dev/guide are no choice
    (
        r"(?<![/.])\b(?!d[a-z]/d[a-z]\b|mi/|text/(?:html|plain|css))([a-zA-Z]{2,})/([a-z]{2,})\b(?!/)",
        r"\1 or \2",
    ),
    (r"(?<=\d)½", " and a half"),
    (r"(?<=\d)¼", " and a quarter"),
    (r"½", "one half"),
    (r"¼", "one quarter"),
    (r"¾", "three quarters"),
]
_MARKS = re.compile(r"[+*/=×·÷^²³√#%&°~_½¼¾:(Ω]|\d x \d")  # without one nothing above matches
# not 555-2671: that is a telephone
_HYPHEN = re.compile(
    r"(?<![\w.,/)-])(?!\d{3}-\d{3}[1-9])(\d{1,4})\s?-\s?(\d{1,4})(?![\w/]|[-.,]\d|-[A-Z])"
)
_MINUS = re.compile(rf"{_LEFT}\s+-\s+{_RIGHT}")
_DOMAIN = re.compile(
    r"(?<![\w@/.:-])((?:[A-Za-z][A-Za-z-]+\.){1,2})(com|org|net|gov|edu|io)\b(?![\w/.:@?]\w|/)"
)


_TAGS = "b|big|br|center|em|i|p|small|strong|u"  # without attributes they only colour a text
_AROUND_WORDS: Rewrites = [
    (rf"(?i)</?(?:{_TAGS})\s?/?>", " "),
    (r"!?\[([^\[\]\n]+)\]\((?:https?://|www\.|/|#)[^\s()]*\)", r"\1"),  # link
    (r"`([A-Za-z][A-Za-z' -]*)`", r"\1"),
    (r"(?<![\w$\\])\$([A-Za-z]|-?\d{1,4})\$(?![\w$])", r"\1"),
]
_MARKUP: Rewrites = [
    (r"(?m)^#{1,6}\s+(.*?)#*\s*$", r"\1"),  # heading
    (r"(?m)^\s*(?:[-*_]\s*){3,}$", ""),  # rule
    (r"(?m)^>\s?", ""),  # quotation
    (r"(\*\*\*|\*\*|__|~~)(?=\S)(.+?)(?<=\S)\1", r"\2"),  # bold
    (r"(?<![\w*])\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*(?![\w*])", r"\1"),  # italic
    (r"(?<![\w_])_(?=[^\s_])([^_\n]+?)(?<=[^\s_])_(?![\w_])", r"\1"),
]
_SMILEY = rf"(?:\u200d?[{EMOJI}]\u200d?|(?<![\w])[:;=]-?[)(DPp](?!\w))"
_SMILEYS = rf"\s*{_SMILEY}(?:\s*{_SMILEY})*"
_ORNAMENTS: Rewrites = [
    (rf"(?<=[.!?,\w)\"']){_SMILEYS}\s*(?=$|\n)", ""),
    (rf"(?<=[.!?]){_SMILEYS}\s+(?=[A-Z\"'])", " "),
    (rf"(?<=\w){_SMILEYS}\s*(?=[.!?](?:\s|$))", ""),
    (rf"^{_SMILEYS}\s+(?=\w)", ""),
]
_LABELS = (
    r"^\s*(?:Q|Question|Human|User|Prompt|Instruction)\s*:\s+"
    r"|\s+(?:A|Answer|Assistant|Response)\s*:\s*$"
)
_PUNCTUATION: Rewrites = [
    (r"([!?,])(?:\s?\1)+", r"\1"),
    (r"(?:[!?]){2,}", "?"),
    (r"\.{4,}", "..."),
    (r"\s+([,.!?;:])(?=\s|$)", r"\1"),
    (r",\s*(?=[.!?,;:])", ""),
]
_LETTER = re.compile(r"(?<![\u0370-\u03ff\w])[\u0391-\u03c9](?![\u0370-\u03ff\w])")  # Greek
_ITEM = re.compile(r"^\s*(?:[-*•●▪‣·+]\s+|(?:\(?(\d{1,2}|[A-Za-z])[.)])\s+)")  # of a list


def normalize(text: str, language: str = "en") -> tuple[str, list[str]]:
    """Return (text, kinds of rewriting in order). Symbols are put into words in English; in another
    language only numbers and Greek letters are."""
    kinds = []
    english = _ENGLISH if language == "en" else []
    words: Rule = ("number", partial(numbers, language=language))
    for kind, rewrite in (*_WRITING, *english, _GREEK, words, _SPACES):
        after = rewrite(text)
        if after != text:
            text = after
            kinds.append(kind)
    return " ".join(text.split()), kinds


def spoken_words(text: str) -> str:
    """Return the words of an English text as they are said, in lower case and without punctuation:
    "What's 3 + 4?" gives "what is three plus four"."""
    text = re.sub(r"(?i)\b(what|where|how)'s\b", r"\1 is", normalize(text)[0])
    # of more than 9 digits in a row nine at a time
    return plain(re.sub(r"\d{1,9}", lambda match: f" {num2words(int(match[0]))} ", text))


def _apply(rewrites: Rewrites, text: str) -> str:
    for pattern, replacement in rewrites:
        text = re.sub(pattern, replacement, text)
    return text


def _characters(text: str) -> str:
    if text.isascii():
        return text
    text = text.translate(_CHARACTERS).replace("…", "...")
    text = re.sub(r"\s*[—–]\s*(?=\D|$)|(?<=\D)\s*[—–]\s*", ", ", text).replace("–", "-")
    return "".join(c if _of_its_own(c) else unicodedata.normalize("NFKC", c) for c in text)


def _of_its_own(character: str) -> bool:
    """Return True if NFKC would change the meaning: ⁶ of 10⁶ is no 6, ½ no three characters."""
    return character in "½¼¾" or unicodedata.decomposition(character).startswith("<super>")


def bare(text: str) -> str:
    """Return the text without what stands around words only: character references, <b>, links,
    `words`, $x$."""
    return _apply(_AROUND_WORDS, html.unescape(text))


def _labels(text: str) -> str:
    """Remove the Q: and A: around a single question."""
    question = re.sub(_LABELS, "", text)
    several = re.search(r"\b(?:Q|A|Question|Answer|Human|Assistant)\s*:", question)
    return text if several else question


def _emoji(text: str) -> str:
    """Remove emoji at the end of a sentence or of the text, where they only colour what is said.
    Between words, or where the text is about them, they are part of what is meant."""
    meant = re.search(r"(?i)\b(?:emojis?|emoticons?|smileys?|symbols?|icons?)\b", text)
    return text if meant or not re.search(rf"[{EMOJI}:;=]", text) else _apply(_ORNAMENTS, text)


def _lines(text: str) -> str:
    """Join lines to one: a list is read with commas, other lines as sentences."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = ""
    for line, following in zip_longest(lines, lines[1:]):
        match = _ITEM.match(line)
        body = line[match.end() :] if match else ""
        if match and match[1] and body:
            body = f"{match[1]}, {body}"
        joined += body or line
        if following is not None:
            in_list = match and _ITEM.match(following)
            ends = joined[-1] in '.!?:;,"' or joined.endswith(".)")
            joined += " " if ends else ", " if in_list else ". "
    return joined if len(lines) > 1 or _ITEM.match(text) else text


def _domains(text: str) -> str:
    return _DOMAIN.sub(lambda m: f"{m[1].removeprefix('www.').replace('.', ' dot ')}{m[2]}", text)


def _hyphen(match: re.Match[str], maths: bool) -> str:
    """Rewrite 12-15, a range, and in maths 15-12, a difference; the others may be either."""
    rises = int(match[1]) < int(match[2])
    if rises == maths:
        return match[0]
    return f"{match[1]} {'to' if rises else 'minus'} {match[2]}"


def _symbols(text: str) -> str:
    maths = bool(_MATHS.search(text))
    text = _HYPHEN.sub(lambda m: _hyphen(m, maths), text) if "-" in text else text
    text = _MINUS.sub(" minus ", text) if maths else text
    return fractions(_apply(_SYMBOLS, text) if _MARKS.search(text) else text)


def _greek(text: str) -> str:
    return _LETTER.sub(lambda m: unicodedata.name(m[0]).rsplit(" ", 1)[-1].lower(), text)


_WRITING: list[Rule] = [
    ("markup", bare),
    ("characters", _characters),
    ("markup", partial(_apply, _MARKUP)),
    ("markup", _labels),
    ("emoji", _emoji),
    ("lines", _lines),
]
_ENGLISH: list[Rule] = [("url", _domains), ("number", money), ("symbol", _symbols)]
_GREEK: Rule = ("symbol", _greek)
_SPACES: Rule = ("punctuation", partial(_apply, _PUNCTUATION))
