"""Rejects: what could not be used, one line {id, reason} each, beside its shard."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from speechfuse.artifact import write_atomic


@dataclass(frozen=True)
class Reject:
    """A clip that could not be used. `reason` is "kind: detail"; kinds are counted in the manifest:

    not found, not a file, unreadable, not audio, truncated, empty, not finite, out of range,
    bad rate, bad offset, bad duration, too short, bad name, bad manifest line, bad transcript,
    no transcript, duplicate id, unsafe path; and those that begin with "filter ", drops that were
    asked for.
    """

    id: str
    reason: str


FILTERED = "filter "  # a reject whose reason begins so was asked for by the configuration


Rejects = list[dict[str, str]]


def faults_of(rejects: Rejects) -> Rejects:
    """Those that were not asked for."""
    return [each for each in rejects if not each["reason"].startswith(FILTERED)]


def rejects_of(paths: list[Path]) -> list[Path]:
    """The reject lists beside the shards."""
    return [path.with_suffix(".rejects.jsonl") for path in paths]


def by_reason(rejects: Rejects) -> dict[str, dict[str, int]]:
    """How many were `rejected` and how many `filtered`, by kind: what stands before the colon."""
    found: dict[str, Counter[str]] = {"rejected": Counter(), "filtered": Counter()}
    for each in rejects:
        kind = each["reason"].partition(":")[0]
        found["filtered" if kind.startswith(FILTERED) else "rejected"][kind] += 1
    return {what: dict(sorted(counts.items())) for what, counts in found.items()}


def write_rejects(path: Path, rejects: Iterable[dict[str, str]]) -> None:
    """Write {id, reason} of what the shard at `path` lacks to its .rejects.jsonl, atomically."""
    kept = [{"id": reject["id"], "reason": reject["reason"]} for reject in rejects]
    text = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in kept)
    write_atomic(_rejects(path), text)


def read_rejects(path: Path) -> list[dict[str, str]]:
    """What write_rejects wrote for the shard at `path`; FileNotFoundError if it never did."""
    # not splitlines(): it also cuts at U+2028, which JSON leaves as it is
    return [json.loads(line) for line in _rejects(path).read_text("utf-8").split("\n") if line]


def _rejects(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".parquet") + ".rejects.jsonl")
