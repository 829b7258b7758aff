"""What a judge is asked, and how its reply is read.

In: the reply of a model that was asked to rate an answer. Out: a number from 0 to 5, or None.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

RUBRIC, BLOG_RUBRIC = (
    Path(__file__).with_name(f"{name}.txt").read_text("utf-8").removesuffix("\n")
    for name in ("rubric", "blog_rubric")
)

_RATING = re.compile(
    r"""\brating\b (?:\s*\([^)\n]*\))? [\s*_`"']* [:\uff1a=] [\s*_`"'(\[]*  # Rating (0-5): **
        (?P<value> [-+]?\d+ (?:\.\d+)?) [*_`"')\]]*+""",
    re.IGNORECASE | re.VERBOSE,
)
_OF_FIVE = re.compile(  # what may follow the number: nothing that makes it a range or another scale
    r"[ \t]*(?:/|out\s+of)[ \t]*5(?![\d.]*\d)"
    r"|(?!\w|\.\d|[ \t]*(?:%|/|out\s+of|(?:[-\u2013]|to|or)[ \t]*\d))",
    re.IGNORECASE,
)
_BARE = re.compile(r"[*_`\s]*([-+]?\d+(?:\.\d+)?)(?:\s*/\s*5)?[*_`.\s]*")


def read_verdict(reply: str) -> float | None:
    """Return the rating that a judge's reply ends on, from 0 to 5; None when there is none, it is
    out of range or of another scale. Nothing is clamped.

    Read are JSON with a "rating" and "Rating: 4" (also "**4**", "4/5"), of which the last counts: a
    rating quoted before it does not, nor one inside the JSON's texts. Or the reply is a number.
    """
    if _BARE.fullmatch(reply):
        return _rating(reply)
    ratings: dict[tuple[int, int], Any] = {}  # by where they start and end
    for start in [match.start() for match in re.finditer(r"\{", reply)]:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(reply, start)
        except (ValueError, RecursionError):
            continue
        keys = {key.lower(): rating for key, rating in value.items()}
        if "rating" in keys and not any(a <= start < b for a, b in ratings):
            ratings[start, end] = keys["rating"]
    for match in _RATING.finditer(reply):
        if not any(a <= match.start() < b for a, b in ratings):
            of_five = _OF_FIVE.match(reply, match.end())
            ratings[match.span()] = match["value"] if of_five else None
    return _rating(ratings[max(ratings)]) if ratings else None


def _rating(value: Any) -> float | None:
    if isinstance(value, str):
        bare = _BARE.fullmatch(value)
        value = float(bare[1]) if bare else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 5 else None


def read_last_word(reply: str) -> float | None:
    """Return the last word of a reply as a number, whatever its size; None where it is none."""
    try:
        value = float((reply.split() or [""])[-1])
    except ValueError:
        return None
    return value if math.isfinite(value) else None
