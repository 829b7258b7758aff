"""What of an evaluation the training data holds already: its texts, and its audio as codes.

In: training datasets (folders of rows: speech or conversations) and evaluation items {"id", "text",
"codes"}. Out: hits, at most one of each kind for an item:

    exact   a training text is the item's, but for case, punctuation and spaces
    ngram   a training text holds 13 words of the item in a row; of an item of 5 to 12 words, all;
            shorter ones only by `exact`. Where `exact` found the item this is not looked for
    codes   a training recording holds 50 codes of the item in a row (2 s at 25 a second), 10 of
            them different, so that silence is no hit; of a shorter item, all its codes and no more

The evaluation is indexed and the training data streamed past it, so memory does not grow with the
latter; "training_id" is the first training row found.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.artifact import manifest_of
from speechfuse.rows import shards
from speechfuse.texts.shared_words import SharedWords

FEWEST_WORDS = 5
CODES, DIFFERENT_CODES = 50, 10
RUN = 2 * CODES  # bytes
KINDS = ("exact", "ngram", "codes")


@dataclass(frozen=True)
class Training:
    """Training datasets, read when items are looked for."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: list[str]) -> "Training":
        """ValueError for a folder that is no complete dataset."""
        for path in paths:
            shards.shard_paths(Path(path))
        return cls(tuple(Path(path) for path in paths))

    def hits(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """[{"id", "kind", "training_id", "shared"}] in the order of `items`; `shared` says what.

        `codes` of an item may be None. Time grows with the training rows, about 40 us each.
        """
        texts, codes = SharedWords(FEWEST_WORDS), _Codes(items)
        for i, item in enumerate(items):
            texts.add(i, item["text"] or "")
        hits: dict[str, dict[int, tuple[str, str]]] = {kind: {} for kind in KINDS}
        for path in self.paths:
            rows = tqdm(
                _rows(path), f"looking in {path.name}", _count(path), unit="row", leave=False
            )
            for id, row_texts, recordings in rows:
                for text in row_texts:
                    for owners, shared, whole in texts.find(text):
                        kind = "exact" if whole else "ngram"
                        what = (
                            " ".join(shared)
                            if whole
                            else f"{len(shared)} words: {' '.join(shared)}"
                        )
                        for i in owners - hits[kind].keys():
                            hits[kind][i] = id, what
                for recording in recordings:
                    for i, what in codes.find(recording, hits["codes"]):
                        hits["codes"].setdefault(i, (id, what))
        return [
            {
                "id": item["id"],
                "kind": kind,
                "training_id": hits[kind][i][0],
                "shared": hits[kind][i][1],
            }
            for i, item in enumerate(items)
            for kind in sorted(KINDS)
            if i in hits[kind] and not (kind == "ngram" and i in hits["exact"])
        ]


def _rows(path: Path) -> Iterator[tuple[str, list[str], list[np.ndarray]]]:
    """(id, texts, recordings) of each row of a dataset in either schema."""
    names = pq.read_schema(shards.shard_paths(path)[0]).names
    if "turns" not in names:
        for row in shards.read_rows(path, ["id", "text", "codes"]):
            recordings = [row["codes"]] if row["codes"] is not None else []
            yield row["id"], [row["text"] or ""], recordings
        return
    for row in shards.read_rows(path, ["id", "turns"]):
        segments = [segment for turn in row["turns"] for segment in turn["segments"]]
        speech = [segment["speech"] for segment in segments if segment["speech"]]
        said = [segment["text"] for segment in segments if segment["text"]]
        said += [spoken["text"] for spoken in speech if spoken["text"]]
        codes = [np.asarray(s["codes"], np.uint16) for s in speech if s["codes"] is not None]
        yield row["id"], said, codes


def _count(path: Path) -> int | None:
    return manifest_of(path).get("totals", {}).get("rows")


class _Codes:
    """Items by their runs of codes, as bytes: two a code."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.codes = [_bytes(item["codes"] if item["codes"] is not None else []) for item in items]
        self.whole: dict[bytes, list[int]] = {}
        self.runs: dict[int, list[tuple[int, int]]] = {}  # hash of a run: items, and where in them
        for i, codes in enumerate(self.codes):
            if 0 < len(codes) < RUN:
                self.whole.setdefault(codes, []).append(i)
            for start in range(0, len(codes) - RUN + 1, 2):
                run = codes[start : start + RUN]
                if len({*memoryview(run).cast("H")}) >= DIFFERENT_CODES:
                    self.runs.setdefault(hash(run), []).append((i, start))

    def find(self, recording: np.ndarray, done: Container[int]) -> Iterator[tuple[int, str]]:
        """(item, what is shared) of items that are not `done`."""
        codes = _bytes(recording)
        if len(codes) < RUN:
            yield from ((i, f"all {len(codes) // 2} codes") for i in self.whole.get(codes, []))
            return
        for start in range(0, len(codes) - RUN + 1, 2):
            for i, at in self.runs.get(hash(codes[start : start + RUN]), ()):
                if i not in done and (shared := _shared(self.codes[i], at, codes, start)):
                    yield i, f"{shared} codes"


def _bytes(codes: Any) -> bytes:
    return np.asarray(codes, np.uint16).tobytes()


def _shared(a: bytes, at: int, b: bytes, start: int) -> int:
    """How many codes `a` from `at` and `b` from `start` share; 0 where they are no run."""
    length = min(len(a) - at, len(b) - start)
    x, y = (
        np.frombuffer(each, np.uint16, length // 2, first) for each, first in ((a, at), (b, start))
    )
    unequal = np.flatnonzero(x != y)
    shared = int(unequal[0]) if len(unequal) else length // 2
    return shared if shared >= CODES else 0


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
