"""Text normalisation: sums of money, fractions and whole numbers of many digits.

In: a text. Out: the same with what is certainly a quantity put into words. Dates, scores, pages,
codes and telephone numbers are written alike and not read as quantities: what may be one of them is
left as it is, for speakable.py to refuse.
"""

import re

from num2words import num2words

# atomic: what is left of a number is no number
_AMOUNT = r"((?>\d+(?:,\d{3})*+(?:\.\d+)?|\.\d+))(?![.,]?\d)"
_SIZES = {
    **dict.fromkeys(("k", "K"), "thousand"),
    **dict.fromkeys(("m", "mn", "M"), "million"),
    **dict.fromkeys(("b", "bn", "B"), "billion"),
    **dict.fromkeys(("tn", "T"), "trillion"),
}
_CURRENCIES = {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees"}

# 9/11, 24/7 and the day in 5/30 are none
_PART = r"(\d{1,2})/([2-9]|10|12|16|20|100)(?![\w/:-]|[.,]\d)"
_FRACTION = re.compile(rf"(?<![\w.,/:-])(?:(\d+) )?{_PART}")
_NO_FRACTION = re.compile(  # before these words it is a day, a score, a place
    r"\b(?:on|by|between|since|until|from|dated?|due|before|after|rat\w+|scor\w+|(?:jan|febr)uary|march"
    r"|april|may|june|july|august|(?:sept|nov|dec)ember|october|(?:mon|tues|wednes|thurs|fri|satur"
    r"|sun)day|pages?|parts?|chapters?|steps?|sections?|questions?|levels?|grades?|episodes?"
    r"|version|windows|room|got|won|lost) (?:it )?$",
    re.I,
)
_FRACTION_OF = re.compile(  # and behind it what there is a fraction of
    r"\s*(?:(?:and|or|to) (?:\d+ )?\d{1,2}/\d{1,2} )?(?:of|an?|the|as|cups?|tea ?spoons?"
    r"|table ?spoons?|tsps?|tbsps?|inch(?:es)?|feet|foot|yards?|miles?|acres?|ounces?|oz|pounds?"
    r"|lbs?|pints?|quarts?|gallons?|lit(?:er|re)s?|met(?:er|re)s?|grams?|k?g|k?m|cm|mm|ml|hours?"
    r"|minutes?|days?|weeks?|months?|years?|way|full|empty|price|size|length|height|width|majority"
    r"|vote|share|chance|cans?|sticks?|slices?|pizzas?|plus|minus|times|divided|equals?|squared)\b"
)
_OPERATOR = re.compile(r"\b(?:plus|minus|times|divided by|equals|than) $")
_ARITHMETIC = re.compile(
    r"\b(?:fractions?|decimals?|percent(?:age)?s?|numerators?|denominators?|simplif\w+|reciprocal"
    r"|calculat\w+|comput\w+|multipl\w+|divid\w+|subtract\w*|equations?|solve|evaluate"
    r"|probability|square root)\b",
    re.I,
)

_NUMBER = re.compile(r"(?<![\w.,:/-])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![\w:/]|[.,-]\d)")
_CODE = re.compile(  # of what is behind these words every digit counts for itself
    r"\b(?:(?:zip|pin|codes?|accounts?|(?:tele)?phone|ticket|serial|postal|extension|passwords?"
    r"|license)\W+(?:[a-z']+\W+){0,3}|(?:call|dial|text|fax|ids?|number|no|room)\W+)$",
    re.I,
)
_COUNTED = re.compile(  # a number of things, or one that is reckoned with
    r"\s(?!(?:is|was|has|as|this|does|its|us|always|perhaps|yes)\b)(?:[a-z]+s|people|men|women"
    r"|children|feet|km|kg|percent|yen|(?:square|cubic|us|more|new|different) [a-z]+s"
    r"|plus|minus|divided|squared|cubed|hundred|thousand|million|billion)\b",
    re.I,
)


def money(text: str) -> str:
    """Put sums of money into English words."""
    for sign, word in _CURRENCIES.items():
        if sign in text:
            text = _money(text, re.escape(sign), word)
    return text


def _money(text: str, sign: str, word: str) -> str:
    """Rewrite $5, 5$, $5-$10, $2.5 million, $40k, $1.5bn; a $5 bill is a 5 dollar bill."""
    unit = word.removesuffix("s")

    def amount_in_words(match: re.Match[str]) -> str:
        article, first, second, size, compound = match.groups()
        first, second = (f"0{n}" if n and n[0] == "." else n for n in (first, second))
        noun = re.match(r" [a-z]", match.string[match.end() :])
        one = compound or (article and noun) or (first == "1" and not second and not size)
        amount = f"{first} to {second}" if second else first
        amount += f" {_SIZES.get(size, size)}" if size else ""
        return f"{article or ''}{amount} {unit if one else word}{' ' if compound else ''}"

    text = re.sub(rf"(?<![\w.,]){_AMOUNT}\s?{sign}(?!\s?[\d.])", rf"{sign[-1]}\1", text)
    sizes = "|".join(sorted(_SIZES, key=len, reverse=True))
    return re.sub(
        rf"(\b(?:an?|another|extra) )?(?<![\w$€£¥₹.,]){sign}\s?{_AMOUNT}"
        rf"(?:\s?-\s?{sign}?{_AMOUNT})?(?:\s?(hundred|thousand|million|billion|trillion|{sizes})\b)?"
        rf"(?:(-)(?:{unit}s?[ -])?(?=[a-z])|(?:\s{unit}s?\b)?(?![\w$€£¥₹]))",
        amount_in_words,
        text,
    )


def fractions(text: str) -> str:
    """Put 1/4 as one quarter, 2 1/2 as 2 and one half, where it can be nothing else."""
    if "/" not in text:
        return text
    several = len({match[3] for match in _FRACTION.finditer(text)}) > 1  # scores have one scale
    arithmetic = several or bool(_ARITHMETIC.search(text))

    def in_words(match: re.Match[str]) -> str:
        whole, over, under = match[1], int(match[2]), int(match[3])
        before, after = text[: match.start()], text[match.end() :]
        sure = whole or arithmetic or _OPERATOR.search(before) or _FRACTION_OF.match(after)
        if not 0 < over < under or not sure or _NO_FRACTION.search(before):
            return match[0]
        name = {2: "half", 4: "quarter"}.get(under)
        name = name or num2words(under, to="ordinal").replace("-", " ")
        part = f"{num2words(over)} {name}{'s' if over > 1 else ''}"
        return f"{whole} and {part}" if whole else part

    return _FRACTION.sub(in_words, text)


def numbers(text: str, language: str) -> str:
    """Put whole numbers over 4 digits into words where they count something; with a zero in front
    digit by digit."""

    def in_words(match: re.Match[str]) -> str:
        digits, decimals = match[1].replace(",", ""), match[2] or ""
        if len(digits) <= 4 and "," not in match[1]:
            return match[0]
        if digits[0] == "0" or len(digits) > 12 or len(decimals) > 3:
            zip_code = digits[0] == "0" and len(digits) <= 6 and not decimals
            return _digits(digits, language) if zip_code else match[0]
        if language != "en" if decimals else "," not in match[1] and not _counts(match, language):
            return match[0]
        whole = num2words(int(digits), lang=language).replace(",", "")
        return f"{whole} point {_digits(decimals[1:], language)}" if decimals else whole

    try:
        return _NUMBER.sub(in_words, text)
    except NotImplementedError:  # num2words has no such language: the digits are refused later
        return text


def _counts(match: re.Match[str], language: str) -> bool:
    """Return True if a bare run of digits is a count, not a code."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    if _CODE.search(before):
        return False
    if language != "en":
        return bool(re.match(r"\s\w", after))
    operated = _OPERATOR.search(before) or _COUNTED.match(after)
    return match[1].endswith("000") or bool(operated) or bool(_ARITHMETIC.search(match.string))


def _digits(digits: str, language: str) -> str:
    return " ".join(num2words(int(digit), lang=language) for digit in digits)
