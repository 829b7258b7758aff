"""Conversations of plain text, and their form as rows of a curated dataset."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Turn:
    """`role`: user, assistant or system."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """`source`: name of the dataset. `extra`: JSON-able; `licence`, the source's `extra_columns`,
    and what curation changed (`rewrites`: kinds; `original`: former texts by number of the turn).
    """

    id: str
    turns: list[Turn]
    source: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """Texts of the user's turns, which are to be spoken."""
        return [turn.text for turn in self.turns if turn.role == "user"]

    @property
    def answers(self) -> list[str]:
        return [turn.text for turn in self.turns if turn.role == "assistant"]


def row_of(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as a row of shards.CONVERSATIONS."""
    turns = [{"role": t.role, "segments": [{"text": t.text}]} for t in conversation.turns]
    extra = {**conversation.extra, "source": conversation.source}
    text = json.dumps(extra, sort_keys=True, ensure_ascii=False)
    return {"id": conversation.id, "turns": turns, "extra": text}


def conversation_of(row: dict[str, Any]) -> Conversation:
    """Return the conversation of a row (undo `row_of`). Raises ValueError for a row with speech."""
    extra = json.loads(row["extra"] or "{}")
    turns = []
    for turn in row["turns"]:
        if any(segment["text"] is None for segment in turn["segments"]):
            raise ValueError(f"row {row['id']} holds speech: it is not text to be curated")
        turns.append(Turn(turn["role"], "".join(segment["text"] for segment in turn["segments"])))
    return Conversation(row["id"], turns, extra.pop("source", ""), extra)
