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

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.artifact import manifest_of
from speechfuse.rows import shards

WORDS, FEWEST_WORDS = 13, 5
CODES, DIFFERENT_CODES = 50, 10
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, Japanese, Chinese: a word a character
_WORD = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


def words(text: str) -> list[str]:
    """The words of `text`, for comparing: NFKC, case folded, letters and digits only."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


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
        texts, codes = _Texts(items), _Codes(items)
        found = []
        for path in self.paths:
            rows = tqdm(
                _rows(path), f"looking in {path.name}", _count(path), unit="row", leave=False
            )
            for id, said, recordings in rows:
                for text in said:
                    found += [(i, kind, id, what) for i, kind, what in texts.find(text)]
                for recording in recordings:
                    found += [(i, "codes", id, what) for i, what in codes.find(recording)]
        first = {(i, kind): (id, what) for i, kind, id, what in reversed(found)}
        return [
            {"id": items[i]["id"], "kind": kind, "training_id": id, "shared": what}
            for (i, kind), (id, what) in sorted(first.items())
            if not (kind == "ngram" and (i, "exact") in first)
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


class _Texts:
    """Items by their words. What was found is forgotten, so that it costs no more time."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.whole: dict[tuple[str, ...], list[int]] = {}
        # every run that is looked for, by its first words: a text needs one look-up a word
        self.runs: dict[tuple[str, ...], dict[tuple[str, ...], set[int]]] = {}
        for i, item in enumerate(items):
            said = words(item["text"] or "")
            if said:
                self.whole.setdefault(tuple(said), []).append(i)
            length = min(WORDS, len(said))
            for start in range(len(said) - length + 1 if length >= FEWEST_WORDS else 0):
                run = tuple(said[start : start + length])
                self.runs.setdefault(run[:FEWEST_WORDS], {}).setdefault(run, set()).add(i)
        self.done: set[int] = set()

    def find(self, text: str) -> Iterator[tuple[int, str, str]]:
        """(item, kind, what is shared) of items not found before."""
        said = words(text)
        for i in self.whole.pop(tuple(said), []):
            self.done.add(i)
            yield i, "exact", " ".join(said)
        for start in range(len(said) - FEWEST_WORDS + 1):
            for run, owners in self.runs.get(tuple(said[start : start + FEWEST_WORDS]), {}).items():
                if owners - self.done and tuple(said[start : start + len(run)]) == run:
                    for i in sorted(owners - self.done):
                        self.done.add(i)
                        yield i, "ngram", f"{len(run)} words: {' '.join(run)}"


class _Codes:
    """Items by the hashes of their runs of codes; every match is compared code by code."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.codes = [
            np.asarray(item["codes"] if item["codes"] is not None else [], np.uint16)
            for item in items
        ]
        self.whole: dict[bytes, list[int]] = {}
        self.powers: np.ndarray = np.ones(0, np.uint64)
        self.inverses = self.powers
        hashes, starts, owners = [], [], []
        for i, codes in enumerate(self.codes):
            if 0 < len(codes) < CODES:
                self.whole.setdefault(codes.tobytes(), []).append(i)
            elif len(codes):
                runs = np.lib.stride_tricks.sliding_window_view(codes, CODES)
                ordered = np.sort(runs, axis=1)
                different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
                kept = np.flatnonzero(different >= DIFFERENT_CODES)
                hashes.append(self._hashes(codes)[kept])
                starts.append(kept)
                owners.append(np.full(len(kept), i))
        empty = np.zeros(0, np.int64)  # so that there is something to join
        self.hashes: np.ndarray = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(self.hashes)
        self.hashes = self.hashes[order]
        self.starts = np.concatenate([empty, *starts])[order]
        self.owners = np.concatenate([empty, *owners])[order]

    def _hashes(self, codes: np.ndarray) -> np.ndarray:
        """A polynomial hash modulo 2**64 of each run of CODES codes, all at once: differences of
        running sums, shifted back."""
        if len(self.powers) <= len(codes):
            length = 2 * len(codes)
            inverse = pow(_BASE, -1, 2**64)
            self.powers, self.inverses = (
                np.cumprod(np.full(length, base, np.uint64)) for base in (_BASE, inverse)
            )
        sums = np.cumsum((codes + np.uint64(1)) * self.powers[: len(codes)], dtype=np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), sums])
        return (sums[CODES:] - sums[:-CODES]) * self.inverses[: len(codes) - CODES + 1]

    def find(self, codes: np.ndarray) -> Iterator[tuple[int, str]]:
        """(item, what is shared) of items not found before."""
        if len(codes) < CODES:
            for i in self.whole.pop(codes.tobytes(), []):
                yield i, f"all {len(codes)} codes"
            return
        if not len(self.hashes):
            return
        hashes = self._hashes(codes)
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        found: dict[int, str] = {}
        for start in np.flatnonzero(self.hashes[places] == hashes):
            place = places[start]
            while place < len(self.hashes) and self.hashes[place] == hashes[start]:
                i, at = int(self.owners[place]), int(self.starts[place])
                if i not in found and (shared := _run(self.codes[i], at, codes, int(start))):
                    found[i] = f"{shared} codes"
                place += 1
        if found:
            left = ~np.isin(self.owners, list(found))
            self.hashes, self.starts = self.hashes[left], self.starts[left]
            self.owners = self.owners[left]
        yield from found.items()


def _run(a: np.ndarray, at: int, b: np.ndarray, start: int) -> int:
    """Length of the run that `a` from `at` and `b` from `start` share; 0 when it is no CODES."""
    length = min(len(a) - at, len(b) - start)
    unequal = np.flatnonzero(a[at : at + length] != b[start : start + length])
    shared = int(unequal[0]) if len(unequal) else length
    return shared if shared >= CODES else 0


KINDS = ("exact", "ngram", "codes")


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
