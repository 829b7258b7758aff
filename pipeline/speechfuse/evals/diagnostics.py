"""What stands beside a score: empty, endless and refused replies, and items seen in training.

In: predictions, and the rows they are of. Out: entries of a result's details.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speechfuse import artifact
from speechfuse.evals.contamination import Training

REFUSAL = re.compile(
    r"\W*((i'?m|i am) (sorry|afraid|unable|not able)|sorry|i can(no|')t|as an ai\b|unfortunately)",
    re.IGNORECASE,
)
KINDS = ("exact", "ngram", "codes")


def of_replies(replies: list[str], capped: Iterable[bool]) -> dict[str, Any]:
    """{empty, loops, refusals, mean_words}; a loop has no end (`capped`), or says a group of three
    words five times."""
    words = [reply.split() for reply in replies]
    loops = [end or _repeats(each) for end, each in zip(capped, words, strict=True)]
    return {
        "empty": sum(not each for each in words), "loops": sum(loops),
        "refusals": sum(bool(REFUSAL.match(reply)) for reply in replies),
        "mean_words": sum(map(len, words)) / len(words),
    }  # fmt: skip


def _repeats(words: list[str]) -> bool:
    groups = list(zip(words, words[1:], words[2:], strict=False))
    return any(groups.count(group) >= 5 for group in set(groups))


def check_training(paths: list[str]) -> list[str]:
    """Fingerprints of training datasets; ValueError for one that is not there."""
    return [artifact.fingerprint_of(Path(path)) for path in paths]


def seen_in(paths: list[str], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Hits of speech rows in training datasets, as contamination.Training has them."""
    items = [
        {"id": id, "text": row["text"] or "", "codes": row["codes"]} for id, row in rows.items()
    ]
    return Training.of(paths).hits(items)


def contamination(hits: list[dict[str, Any]], without: float | None) -> dict[str, Any]:
    """The entry of a result: items by kind of hit, the headline `without` them, and the hits."""
    kinds = {kind: len({hit["id"] for hit in hits if hit["kind"] == kind}) for kind in KINDS}
    return {**kinds, "without_hits": without, "hits": hits}
