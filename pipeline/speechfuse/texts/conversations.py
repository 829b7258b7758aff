"""Conversations of plain text: turns, and the rows that curated texts are kept in."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechfuse.rows import shards


@dataclass(frozen=True)
class Turn:
    """`role`: user, assistant or system."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """`source`: name of the dataset. `extra`: JSON-able; `licence`, what curation did (`rewrites`,
    `original`: texts by number of turn as they were before) and what the source has besides."""

    id: str
    turns: list[Turn]
    source: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """What the user says, turn by turn: what will be spoken."""
        return [turn.text for turn in self.turns if turn.role == "user"]

    @property
    def answers(self) -> list[str]:
        return [turn.text for turn in self.turns if turn.role == "assistant"]


def row_of(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a row of shards.CONVERSATIONS."""
    turns = [{"role": t.role, "segments": [{"text": t.text}]} for t in conversation.turns]
    extra = {**conversation.extra, "source": conversation.source}
    return {
        "id": conversation.id,
        "turns": turns,
        "extra": json.dumps(extra, sort_keys=True, ensure_ascii=False),
    }


def conversation_of(row: dict[str, Any]) -> Conversation:
    """Undo `row_of`; ValueError for a row that holds speech."""
    extra = json.loads(row["extra"] or "{}")
    turns = []
    for turn in row["turns"]:
        if any(segment["text"] is None for segment in turn["segments"]):
            raise ValueError(f"row {row['id']} holds speech: it is not text to be curated")
        turns.append(Turn(turn["role"], "".join(segment["text"] for segment in turn["segments"])))
    return Conversation(row["id"], turns, extra.pop("source", ""), extra)


def read(folder: Path) -> Iterator[Conversation]:
    """The conversations of a finished artifact of text, one row group in memory at a time."""
    yield from map(conversation_of, shards.read_rows(folder))
