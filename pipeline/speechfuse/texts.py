"""Instruction text: where it comes from, and its way to and from rows of conversations.

In: rows of any chat or instruction dataset (speechfuse.documents), in the layout that the chosen
class knows. Out: `Conversation`s of plain text. Named in a job's YAML:

    texts:
      - {_component_: speechfuse.texts.Alpaca, path: data/alpaca.json, licence: cc-by-nc-4.0}
      - {_component_: speechfuse.texts.Messages, path: owner/name@COMMIT, data_files: "*.parquet"}
      - {_component_: speechfuse.texts.Columns, path: faq.jsonl, prompt: question, response: reply}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speechfuse import shards
from speechfuse.corpora import Reject
from speechfuse.documents import Documents

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip


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


class Texts:
    """What all layouts share. A layout gives `required`, the columns without which there is nothing
    to read, and `turns`.

    `path`, `data_files`: see Documents. `name`: of the source, in ids (name/file/row) and on the
    card. `licence`: by default what the card of a Hub dataset states. `select`: columns and the
    value, or the list of values, that a row has to have. `extra_columns` are kept in `extra`.
    """

    required: tuple[str, ...]

    def __init__(
        self,
        path: str,
        data_files: str | list[str] | None = None,
        name: str | None = None,
        licence: str | None = None,
        select: dict[str, Any] | None = None,
        extra_columns: list[str] | None = None,
    ) -> None:
        self.documents = Documents(path, data_files)
        self.source_name = name or self.documents.name
        self._licence, self.select, self.extra = licence, select or {}, extra_columns or []

    @property
    def fingerprint(self) -> str:
        return self.documents.fingerprint

    @cached_property
    def licence(self) -> str | None:
        return self._licence or self.documents.licence()

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """Of one row; ValueError("kind: detail") where it has none."""
        raise NotImplementedError

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        """Shards of rows; ValueError for columns that a file's first row lacks."""
        plan = self.documents.plan(shard_size)
        for shard in plan:
            if shard["row"] == 0 or shard["file"] not in {
                s["file"] for s in plan[: plan.index(shard)]
            }:
                self._check_columns(shard)
        return plan

    def _check_columns(self, shard: dict[str, Any]) -> None:
        row = next((r for _, r in self.documents.rows({**shard, "count": 1})), None)
        used = dict.fromkeys([*self.required, *self.select, *self.extra])
        if isinstance(row, dict) and (lost := [name for name in used if name not in row]):
            raise ValueError(
                f"{self.documents.path}: {shard['file']} has no column {lost[0]!r}; it has "
                f"{', '.join(row)}: name another, or choose the layout that it has (Alpaca, "
                "Messages or Columns of speechfuse.texts)"
            )

    def conversations(self, shard: dict[str, Any]) -> Iterator[Conversation | Reject]:
        """Of one shard of `plan`, in order; rows that `select` leaves out are not there."""
        stem = Path(shard["file"]).with_suffix("").as_posix()
        prefix = self.source_name if stem == self.source_name else f"{self.source_name}/{stem}"
        for number, row in self.documents.rows(shard):
            id = f"{prefix}/{number}"
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if all(_among(row.get(key), wanted) for key, wanted in self.select.items()):
                    extra = {key: _plain(row.get(key)) for key in self.extra}
                    yield Conversation(
                        id, self.turns(row), self.source_name, {**extra, "licence": self.licence}
                    )
            except ValueError as error:
                yield Reject(id, str(error))


class Alpaca(Texts):
    """{instruction, input, output}: the input, where there is one, follows the instruction."""

    required = ("instruction", "output")

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        given = _text(row, "input") if row.get("input") is not None else ""
        prompt = "\n\n".join(part for part in (_text(row, "instruction"), given) if part)
        return [Turn("user", prompt), Turn("assistant", _text(row, "output"))]


class Messages(Texts):
    """A list of messages: OpenAI's {role, content} or ShareGPT's {from, value}, in `column`."""

    def __init__(self, path: str, column: str = "messages", **options: Any) -> None:
        super().__init__(path, **options)
        self.required = (column,)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        messages = row.get(self.required[0])
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"no messages: {self.required[0]} holds {messages!r:.40}")
        return [self._turn(message) for message in messages]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise ValueError(f"no messages: {message!r:.40} is no object")
        role, key = ("from", "value") if "from" in message else ("role", "content")
        named = str(message.get(role)).lower()
        if named not in ROLES:
            raise ValueError(f"unknown role: {named!r:.40}")
        content = message.get(key)
        if isinstance(content, list):  # OpenAI's parts
            kinds = {str(p.get("type")) if isinstance(p, dict) else "no object" for p in content}
            if kinds != {"text"}:
                raise ValueError(f"not text: parts of {', '.join(sorted(kinds))}")
            return Turn(ROLES[named], "\n".join(_text(part, "text") for part in content))
        return Turn(ROLES[named], _text(message, key))


class Columns(Texts):
    """A column of prompts and one of responses. Without `response` the conversations are one user
    turn each: lines to be read aloud, or questions of an evaluation."""

    def __init__(
        self, path: str, prompt: str = "prompt", response: str | None = None, **options: Any
    ) -> None:
        super().__init__(path, **options)
        self.required = (prompt, response) if response else (prompt,)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        roles = ("user", "assistant")
        return [Turn(r, _text(row, c)) for r, c in zip(roles, self.required, strict=False)]


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"no text: {column} holds {value!r:.40}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"no text: {column} holds half a character (a surrogate)")
    return value.strip()


def _among(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


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
