"""Samples to read, and to hear where there is audio.

In: the items of a result file. Out: page.Table. Recordings are part of the page, so they share a
budget of characters.
"""

from pathlib import Path
from typing import Any

from speechfuse.evals.page import Audio, Cell, Table, recording
from speechfuse.evals.results import Items

SAMPLES = 10
BUDGET = 3_000_000  # characters of all recordings on a page
FIELDS = ("question", "text", "heard", "answer", "expected")


class Samples:
    """Tables of items that nobody picked. `left_out` counts the recordings over the budget; paths
    of audio start at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.budget, self.left_out = folder, BUDGET, 0

    def table(self, items: Items, split: str | None) -> Table | None:
        """Items of `split` (None: of all) at equal distances. None where they hold no replies;
        ValueError for a split without items."""
        found = [item for item in items if split is None or item.get("split") == split]
        if not found and split is not None:
            known = ", ".join(sorted({str(item.get("split")) for item in items}))
            raise ValueError(
                f"samples={split}: the chosen epoch has no such items; there are: {known}"
            )
        picked = [found[i * len(found) // SAMPLES] for i in range(min(SAMPLES, len(found)))]
        fields = [f for f in FIELDS if any(isinstance(item.get(f), str) for item in picked)]
        if len(fields) < 2:
            return None
        heard = [self._audio(str(item.get("audio") or "")) for item in picked]
        rows: list[list[Cell]] = []
        for item, audio in zip(picked, heard, strict=True):
            texts: list[Cell] = [" ".join(str(item.get(name, "")).split()) for name in fields]
            rows.append([*texts, *([audio or ""] if any(heard) else []), verdict(item)])
        return Table([*fields, *(["audio"] if any(heard) else []), ""], rows)

    def _audio(self, told: str) -> Audio | None:
        audio = recording(told, self.folder) if told else None
        if audio and len(audio.uri) > self.budget:
            self.left_out += 1
            return None
        self.budget -= len(audio.uri) if audio else 0
        return audio


def verdict(item: dict[str, Any]) -> str:
    """What an item's number says."""
    if "correct" in item:
        return "right" if item["correct"] else "wrong"
    if "errors" in item:
        return f"{item['errors']} wrong of {item['words']}"
    return "" if item.get("value") is None else f"{item['value']:g}"
