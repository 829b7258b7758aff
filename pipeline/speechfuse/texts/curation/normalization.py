"""Text normalisation: written text to text that a voice reads as it is meant.

In: a prompt as people write it. Out: the same in letters, short numbers and plain punctuation, and
which kinds of rewriting it took. Only what has one reading is rewritten; what has none, or several,
is left as it is, for speakable.py to refuse.
"""

# ruff: noqa: RUF001 -- the characters that are rewritten here are meant

import html
import re
import unicodedata
from collections.abc import Callable

from speechfuse.texts.curation.quantities import fractions, money, numbers

EMOJI = (
    "\U0001f000-\U0001faff\U000e0020-\U000e007f\u2600-\u27bf\u2b00-\u2bff\u231a\u231b\u23e9-\u23fa"
    "\u200d\u20e3\ufe0f"
)
_CHARACTERS = {  # quotes, dashes and spaces that mean what ASCII has, and letters that are marks
    **dict.fromkeys("‘’‚‛`´ʼ", "'"),
    **dict.fromkeys("“”„‟«»", '"'),
    "‐": "-",
    "‑": "-",
    "−": "-",
    "…": "...",
    **dict.fromkeys("®™©\u00ad\u200b\u2060\ufeff\u200e\u200f", ""),
    "⁄": "/",
    "\u2028": "\n",
    "\u2029": "\n",
    "\u0085": "\n",
    "⋅": "·",
    "✕": "×",
    "✖": "×",
    "➗": "÷",
}
_CHARACTERS_TABLE = str.maketrans(_CHARACTERS)
_TAGS = "b|big|br|center|em|i|p|small|strong|u"  # without attributes they only colour a text
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
_ENGLISH: list[tuple[str, str]] = [  # in order; each has one reading where it matches
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
_SYMBOLS = {"en": [(re.compile(pattern), words) for pattern, words in _ENGLISH]}
_MARKS = re.compile(r"[+*/=×·÷^²³√#%&°~_½¼¾:(Ω]|\d x \d")  # without one nothing above matches
# not 555-2671: that is a telephone
_HYPHEN = re.compile(
    r"(?<![\w.,/)-])(?!\d{3}-\d{3}[1-9])(\d{1,4})\s?-\s?(\d{1,4})(?![\w/]|[-.,]\d|-[A-Z])"
)
_MINUS = re.compile(rf"{_LEFT}\s+-\s+{_RIGHT}")
_DOT = {"en": "dot"}
_DOMAIN = re.compile(
    r"(?<![\w@/.:-])((?:[A-Za-z][A-Za-z-]+\.){1,2})(com|org|net|gov|edu|io)\b(?![\w/.:@?]\w|/)"
)


def normalize(text: str, language: str = "en") -> tuple[str, list[str]]:
    """(text, kinds of rewriting in order). Symbols are put into words in English; in another
    language only numbers are."""
    kinds = []
    for kind, rewrite in RULES:
        after = rewrite(text, language)
        if after != text:
            text = after
            kinds.append(kind)
    return " ".join(text.split()), kinds


def _characters(text: str, _: str) -> str:
    if text.isascii():
        return text
    text = text.translate(_CHARACTERS_TABLE)
    text = re.sub(r"\s*[—–]\s*(?=\D|$)|(?<=\D)\s*[—–]\s*", ", ", text).replace("–", "-")
    return "".join(c if _of_its_own(c) else unicodedata.normalize("NFKC", c) for c in text)


def _of_its_own(character: str) -> bool:
    """Whether it is not what NFKC makes of it: ⁶ of 10⁶ is no 6, ½ no three characters."""
    return character in "½¼¾" or unicodedata.decomposition(character).startswith("<super>")


def bare(text: str, _: str = "en") -> str:
    """Without what stands around words only: character references, <b>, links, `words`, $x$."""
    text = html.unescape(text)
    text = re.sub(rf"</?(?:{_TAGS})\s?/?>", " ", text, flags=re.I)
    text = re.sub(r"!?\[([^\[\]\n]+)\]\((?:https?://|www\.|/|#)[^\s()]*\)", r"\1", text)  # link
    text = re.sub(r"`([A-Za-z][A-Za-z' -]*)`", r"\1", text)
    return re.sub(r"(?<![\w$\\])\$([A-Za-z]|-?\d{1,4})\$(?![\w$])", r"\1", text)


def _markup(text: str, _: str) -> str:
    text = re.sub(r"^#{1,6}\s+(.*?)#*\s*$", r"\1", text, flags=re.M)  # heading
    text = re.sub(r"^\s*(?:[-*_]\s*){3,}$", "", text, flags=re.M)  # rule
    text = re.sub(r"^>\s?", "", text, flags=re.M)  # quotation
    text = re.sub(r"(\*\*\*|\*\*|__|~~)(?=\S)(.+?)(?<=\S)\1", r"\2", text)  # bold
    text = re.sub(r"(?<![\w*])\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*(?![\w*])", r"\1", text)  # italic
    text = re.sub(r"(?<![\w_])_(?=[^\s_])([^_\n]+?)(?<=[^\s_])_(?![\w_])", r"\1", text)
    return text


def _labels(text: str, _: str) -> str:
    """Q: ... A: around a single question."""
    bare = re.sub(r"^\s*(?:Q|Question|Human|User|Prompt|Instruction)\s*:\s+", "", text)
    bare = re.sub(r"\s+(?:A|Answer|Assistant|Response)\s*:\s*$", "", bare)
    return text if re.search(r"\b(?:Q|A|Question|Answer|Human|Assistant)\s*:", bare) else bare


def _emoji(text: str, _: str) -> str:
    """Without emoji that only colour what is said: at the end of a sentence or of the text. Between
    words, or where the text is about them, they are part of what is meant."""
    if not re.search(rf"[{EMOJI}:;=]", text):
        return text
    if re.search(r"\b(?:emojis?|emoticons?|smileys?|symbols?|icons?)\b", text, re.I):
        return text
    run = rf"(?:[{EMOJI}]|(?<![\w])[:;=]-?[)(DPp](?!\w))"
    text = re.sub(rf"(?<=[.!?,\w)\"'])\s*{run}(?:\s*{run})*\s*(?=$|\n)", "", text)
    text = re.sub(rf"(?<=[.!?])\s*{run}(?:\s*{run})*\s+(?=[A-Z\"'])", " ", text)
    text = re.sub(rf"(?<=\w)\s*{run}(?:\s*{run})*\s*(?=[.!?](?:\s|$))", "", text)
    return re.sub(rf"^\s*{run}(?:\s*{run})*\s+(?=\w)", "", text)


def _lines(text: str, _: str) -> str:
    """One line: a list is read with commas, other lines as sentences."""
    item = re.compile(r"^\s*(?:[-*•●▪‣·+]\s+|(?:\(?(\d{1,2}|[A-Za-z])[.)])\s+)")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = ""
    for i, line in enumerate(lines):
        match = item.match(line)
        body = line[match.end() :] if match and line[match.end() :] else line
        if match and match[1] and body != line:
            body = f"{match[1]}, {body}"
        said += body
        if i + 1 < len(lines):
            in_list = match and item.match(lines[i + 1])
            ends = said[-1] in '.!?:;,"' or said.endswith(".)")
            said += " " if ends else ", " if in_list else ". "
    return said if len(lines) > 1 or item.match(text) else text


def _domains(text: str, language: str) -> str:
    dot = _DOT.get(language)
    if not dot:
        return text
    return _DOMAIN.sub(
        lambda m: f"{m[1].removeprefix('www.').replace('.', f' {dot} ')}{m[2]}".strip(), text
    )


def _hyphen(match: re.Match[str], maths: bool) -> str:
    """12-15 is a range, in maths 15-12 is a difference; the others may be either."""
    rises = int(match[1]) < int(match[2])
    if rises == maths:
        return match[0]
    return f"{match[1]} {'to' if rises else 'minus'} {match[2]}"


def _symbols(text: str, language: str) -> str:
    if language == "en":
        maths = bool(_MATHS.search(text))
        text = _HYPHEN.sub(lambda m: _hyphen(m, maths), text) if "-" in text else text
        text = _MINUS.sub(" minus ", text) if maths else text
    for pattern, words in _SYMBOLS.get(language, ()) if _MARKS.search(text) else ():
        text = pattern.sub(words, text)
    text = fractions(text, language)
    return re.sub(
        r"(?<![\u0370-\u03ff\w])[\u0391-\u03c9](?![\u0370-\u03ff\w])",
        lambda m: unicodedata.name(m[0]).rsplit(" ", 1)[-1].lower(),
        text,
    )


def _punctuation(text: str, _: str) -> str:
    text = re.sub(r"([!?,])(?:\s?\1)+", r"\1", text)
    text = re.sub(r"(?:[!?]){2,}", "?", text)
    text = re.sub(r"\.{4,}", "...", text)
    text = re.sub(r"\s+([,.!?;:])(?=\s|$)", r"\1", text)
    return re.sub(r",\s*(?=[.!?,;:])", "", text)


RULES: list[tuple[str, Callable[[str, str], str]]] = [
    ("markup", bare),
    ("characters", _characters),
    ("markup", _markup),
    ("markup", _labels),
    ("emoji", _emoji),
    ("lines", _lines),
    ("url", _domains),
    ("number", money),
    ("symbol", _symbols),
    ("number", numbers),
    ("punctuation", _punctuation),
]
