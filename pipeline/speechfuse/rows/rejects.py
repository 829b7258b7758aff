"""Rejects: clips and rows that a dataset lacks, a JSON line {id, reason} each, beside the shard."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from speechfuse.artifact import write_atomic


@dataclass(frozen=True)
class Reject:
    """A clip or row that a dataset lacks. `reason` is "kind: detail"; kinds are counted in the
    manifest. Faults are

    not found, not a file, unreadable, not audio, truncated, empty, cancelled, not finite,
    out of range, bad rate, bad offset, bad duration, too short, bad name, bad manifest line,
    bad transcript, no transcript, no sound, duplicate id, unsafe path.

    A kind that begins with "filter " was asked for by the configuration and is no fault.
    """

    id: str
    reason: str


FILTERED = "filter "
Rejects = list[dict[str, str]]


def faults_of(rejects: Rejects) -> Rejects:
    """The rejects that no filter asked for."""
    return [each for each in rejects if not each["reason"].startswith(FILTERED)]


def by_reason(rejects: Rejects) -> dict[str, dict[str, int]]:
    """{rejected: {kind: n}, filtered: {kind: n}}; the kind stands before the reason's colon."""
    counts: dict[str, Counter[str]] = {"rejected": Counter(), "filtered": Counter()}
    for reject in rejects:
        kind = reject["reason"].partition(":")[0]
        counts["filtered" if kind.startswith(FILTERED) else "rejected"][kind] += 1
    return {name: dict(sorted(kinds.items())) for name, kinds in counts.items()}


def write_rejects(path: Path, rejects: Iterable[dict[str, str]]) -> None:
    """Write the rejects {id, reason} of the shard at `path` to its .rejects.jsonl, atomically."""
    lines = (json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    write_atomic(_rejects(path), "".join(lines))


def read_rejects(path: Path) -> list[dict[str, str]]:
    """The rejects of the shard at `path`. Raises FileNotFoundError where none were written."""
    # not splitlines(): it also cuts at U+2028, which JSON leaves as it is
    return [json.loads(line) for line in _rejects(path).read_text("utf-8").split("\n") if line]


def _rejects(path: Path) -> Path:
    return path.with_suffix(".rejects.jsonl")
