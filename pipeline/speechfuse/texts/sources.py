"""Instruction text: where it comes from, and its way to and from rows of conversations.

In: rows of any chat or instruction dataset (speechfuse.texts.files), in the layout that the chosen
class knows. Out: `Conversation`s of plain text. Named in a job's YAML:

    texts:
      - {_component_: speechfuse.texts.Alpaca, path: data/alpaca.json, licence: cc-by-nc-4.0}
      - {_component_: speechfuse.texts.Messages, path: owner/name@COMMIT, data_files: "*.parquet"}
      - {_component_: speechfuse.texts.Columns, path: faq.jsonl, prompt: question, response: reply}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import matches
from speechfuse.texts.conversations import Conversation, Turn
from speechfuse.texts.files import Documents

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
RESERVED = ("source", "licence", "original", "rewrites")  # what curation itself writes into `extra`


@dataclass
class Texts:
    """What all layouts share. A layout gives the columns that it reads, `required` and
    `optional`, and `turns`.

    `path`, `data_files`: see Documents. `name`: of the source, in ids (name/file/row) and on the
    card. `licence`: by default what the card of a Hub dataset states. `select`: columns and the
    value, or the list of values, that a row has to have. `extra_columns` are kept in `extra`.
    ValueError for a column that curation would overwrite there.
    """

    path: str
    data_files: str | list[str] | None = None
    name: str | None = None
    licence: str | None = None
    select: dict[str, Any] = field(default_factory=dict)
    extra_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.documents = Documents(self.path, self.data_files)
        self.source_name = self.name or self.documents.name
        if taken := [column for column in self.extra_columns if column in RESERVED]:
            raise ValueError(
                f"{self.path}: extra_columns holds {taken[0]!r}, where curation keeps its own "
                f"record: leave it out, or give the column another name in the data"
            )

    @property
    def required(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    @property
    def fingerprint(self) -> str:
        return self.documents.fingerprint

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """Of one row; ValueError("kind: detail") where it has none."""
        raise NotImplementedError

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        """Shards of rows (see Documents) and their `licence`; ValueError for a column that a file
        lacks, and for two files whose rows would have the same ids."""
        stems: dict[str, str] = {}
        for name in self.documents.files:
            if (other := stems.setdefault(_stem(name), name)) != name:
                raise ValueError(
                    f"{self.documents.path}: {other} and {name} differ in their suffix alone and "
                    "their rows would have the same ids: rename one, or leave it out of data_files"
                )
        plan = self.documents.plan(shard_size)
        for name in dict.fromkeys(shard["file"] for shard in plan):
            there = self.documents.columns(name)
            lost = [
                c for c in (*self.required, *self.select, *self.extra_columns) if c not in there
            ]
            if there and lost:
                raise ValueError(
                    f"{self.documents.path}: {name} has no column {lost[0]!r}; it has "
                    f"{', '.join(there)}: name another, or choose the layout that it has (Alpaca, "
                    "Messages or Columns of speechfuse.texts.sources)"
                )
        licence = self.licence or self.documents.licence()
        return [{**shard, "licence": licence} for shard in plan]

    def conversations(self, shard: dict[str, Any]) -> Iterator[Conversation | Reject]:
        """Of one shard of `plan`, in order; rows that `select` leaves out are not there."""
        stem = _stem(shard["file"])
        prefix = self.source_name if stem == self.source_name else f"{self.source_name}/{stem}"
        used = list(
            dict.fromkeys([*self.required, *self.optional, *self.select, *self.extra_columns])
        )
        for number, row in self.documents.rows(shard, used):
            id = f"{prefix}/{number}"
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if matches(row, self.select):
                    extra = {key: _json_value(row.get(key)) for key in self.extra_columns}
                    yield Conversation(
                        id,
                        self.turns(row),
                        self.source_name,
                        {**extra, "licence": shard["licence"]},
                    )
            except ValueError as error:
                yield Reject(id, str(error))


@dataclass
class Alpaca(Texts):
    """{instruction, input, output}: the input, where there is one, follows the instruction."""

    required = ("instruction", "output")
    optional = ("input",)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        given = _column_text(row, "input") if row.get("input") is not None else ""
        prompt = "\n\n".join(part for part in (_column_text(row, "instruction"), given) if part)
        return [Turn("user", prompt), Turn("assistant", _column_text(row, "output"))]


@dataclass
class Messages(Texts):
    """A list of messages: OpenAI's {role, content} or ShareGPT's {from, value}, in `column`."""

    column: str = "messages"

    @property
    def required(self) -> tuple[str, ...]:
        return (self.column,)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        messages = row.get(self.column)
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"no messages: {self.column} holds {messages!r:.40}")
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
            return Turn(ROLES[named], "\n".join(_column_text(part, "text") for part in content))
        return Turn(ROLES[named], _column_text(message, key))


@dataclass
class Columns(Texts):
    """A column of prompts and one of responses. Without `response` the conversations are one user
    turn each: lines to be read aloud, or questions of an evaluation."""

    prompt: str = "prompt"
    response: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        return (self.prompt, self.response) if self.response else (self.prompt,)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        roles = ("user", "assistant")
        return [Turn(r, _column_text(row, c)) for r, c in zip(roles, self.required, strict=False)]


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _column_text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"no text: {column} holds {value!r:.40}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"no text: {column} holds half a character (a surrogate)")
    return value.strip()


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
