"""Contamination: which items of an evaluation the training data already holds, as text or codes.

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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.rows import shards
from speechfuse.texts.shared_words import SharedWords

FEWEST_WORDS = 5
CODES, DIFFERENT_CODES = 50, 10
RUN = 2 * CODES  # bytes
KINDS = ("exact", "ngram", "codes")


def training_hits(paths: list[str], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return [{"id", "kind", "training_id", "shared"}] of `items` in their order; `shared` says
    what the item and the training row share.

    `text` and `codes` of an item may be None. Time grows with the rows of the datasets at `paths`,
    about 30 us each. Raises ValueError for a folder that is no complete dataset, before any is
    read.
    """
    for path in paths:
        shards.shard_paths(Path(path))
    texts, codes = SharedWords(FEWEST_WORDS), _Codes(items)
    for i, item in enumerate(items):
        texts.add(i, item["text"] or "")
    hits: dict[str, dict[int, tuple[str, str]]] = {kind: {} for kind in KINDS}
    for path in paths:
        total = artifact.manifest_of(Path(path)).get("totals", {}).get("rows")
        for id, row_texts, recordings in tqdm(
            _rows(Path(path)), f"looking in {path}", total, unit="row", leave=False
        ):
            for text in row_texts:
                for owners, run, whole in texts.find(text):
                    kind, shared = ("exact", "") if whole else ("ngram", f"{len(run)} words: ")
                    for i in owners - hits[kind].keys():
                        hits[kind][i] = id, shared + " ".join(run)
            for recording in recordings:
                for i, shared in codes.find(recording, hits["codes"]):
                    hits["codes"].setdefault(i, (id, shared))
    return [
        {"id": item["id"], "kind": kind, "training_id": hit[0], "shared": hit[1]}
        for i, item in enumerate(items)
        for kind in sorted(KINDS)
        if (hit := hits[kind].get(i)) and not (kind == "ngram" and i in hits["exact"])
    ]


def _rows(path: Path) -> Iterator[tuple[str, list[str], list[Any]]]:
    """Yield (id, texts, recordings) of each row of a dataset in either schema."""
    names = pq.read_schema(shards.shard_paths(path)[0]).names
    if "turns" not in names:
        for row in shards.read_rows(path, ["id", "text", "codes"]):
            recordings = [row["codes"]] if row["codes"] is not None else []
            yield row["id"], [row["text"] or ""], recordings
        return
    for row in shards.read_rows(path, ["id", "turns"]):
        segments = [segment for turn in row["turns"] for segment in turn["segments"]]
        speech = [segment["speech"] for segment in segments if segment["speech"]]
        texts = [part["text"] for part in (*segments, *speech) if part["text"]]
        yield row["id"], texts, [part["codes"] for part in speech if part["codes"] is not None]


class _Codes:
    """Evaluation items, indexed by their runs of codes as bytes, two a code."""

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

    def find(self, recording: Any, done: Container[int]) -> Iterator[tuple[int, str]]:
        """Yield (item, what is shared) of items that are not `done`."""
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
    """Return how many codes `a` from `at` and `b` from `start` share; 0 where these are no run."""
    length = min(len(a) - at, len(b) - start) // 2
    unequal = np.frombuffer(a, np.uint16, length, at) != np.frombuffer(b, np.uint16, length, start)
    shared = int(unequal.argmax()) if unequal.any() else length
    return shared if shared >= CODES else 0


def contamination(hits: list[dict[str, Any]], without: float | None) -> dict[str, Any]:
    """Return the entry of a result: items by kind of hit, the headline `without` them, and the
    hits."""
    kinds = {kind: len({hit["id"] for hit in hits if hit["kind"] == kind}) for kind in KINDS}
    return {**kinds, "without_hits": without, "hits": hits}
