"""Sources of instruction text, by the layout of their rows.

In: rows of any chat or instruction dataset (speechfuse.texts.files), in the layout that the chosen
class reads. Out: `Conversation`s of plain text. Named in a job's YAML:

    texts:
      - {_component_: speechfuse.texts.Alpaca, path: data/alpaca.json, licence: cc-by-nc-4.0}
      - {_component_: speechfuse.texts.Messages, path: owner/name@COMMIT, data_files: "*.parquet"}
      - {_component_: speechfuse.texts.Columns, path: faq.jsonl, prompt: question, response: reply}
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import json_value, matches
from speechfuse.texts.conversations import Conversation, Turn
from speechfuse.texts.files import Documents

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    "system": "system",
}
_BROKEN = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # commands, to some voices
RESERVED = ("source", "licence", "original", "rewrites")  # keys that curation writes into `extra`


@dataclass
class Texts:
    """Base of all layouts. A layout defines the columns that it reads, `required` and `optional`,
    and `turns`.

    `path`, `data_files`: see Documents. `name`: of the source, in ids (name/file/row) and on the
    card. `licence`: by default that on the card of a Hub dataset. `select`: {column: value, or a
    list of values} of the rows to read (rows.selection). `extra_columns` are kept in `extra`;
    raises ValueError for one that curation would overwrite there.
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

    def absent(self, columns: list[str]) -> list[str]:
        """Return the columns that the layout needs and a file with `columns` lacks."""
        needed = [*self.required, *self.select, *self.extra_columns]
        return [column for column in needed if column not in columns]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """Return the turns of one row. Raises ValueError("kind: detail") if it has none."""
        raise NotImplementedError

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        """Return shards of rows (see Documents) with their `licence`. Raises ValueError for a
        column that a file lacks, and for two files whose rows would have the same ids."""
        stems: dict[str, str] = {}
        for name in self.documents.files:
            if (other := stems.setdefault(_stem(name), name)) != name:
                raise ValueError(
                    f"{self.documents.path}: {other} and {name} differ in their suffix alone and "
                    "their rows would have the same ids: rename one, or leave it out of data_files"
                )
        plan = self.documents.plan(shard_size)
        for name in dict.fromkeys(shard["file"] for shard in plan):
            columns = self.documents.columns(name)
            if columns and (absent := self.absent(columns)):
                raise ValueError(
                    f"{self.documents.path}: {name} has no column {absent[0]!r}; it has "
                    f"{', '.join(columns)}: name another, or choose the layout that it has "
                    "(speechfuse.texts.Alpaca, .Messages or .Columns)"
                )
        licence = self.licence or self.documents.licence()
        return [{**shard, "licence": licence} for shard in plan]

    def conversations(self, shard: dict[str, Any]) -> Iterator[Conversation | Reject]:
        """Yield the selected rows of one shard of `plan`, in order."""
        stem = _stem(shard["file"])
        prefix = self.source_name if stem == self.source_name else f"{self.source_name}/{stem}"
        columns = [*self.required, *self.optional, *self.select, *self.extra_columns]
        for number, row in self.documents.rows(shard, list(dict.fromkeys(columns))):
            id = f"{prefix}/{number}"
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if matches({**row, "extra": None}, self.select):  # a column of that name is none
                    extra = {key: json_value(row.get(key)) for key in self.extra_columns}
                    extra["licence"] = shard["licence"]
                    turns = self.turns(row)
                    for turn in turns:
                        if turn.role == "user" and (match := _CONTROL.search(turn.text)):
                            raise ValueError(f"no text: a prompt holds the control {match[0]!r}")
                    if _BROKEN.search(json.dumps(extra, ensure_ascii=False)):
                        raise ValueError("no text: extra_columns hold half a character")
                    yield Conversation(id, turns, self.source_name, extra)
            except ValueError as error:
                yield Reject(id, str(error))


@dataclass
class Alpaca(Texts):
    """{instruction, input, output}: the input, where there is one, follows the instruction."""

    required = ("instruction", "output")
    optional = ("input",)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        columns = ["instruction"] if row.get("input") is None else ["instruction", "input"]
        prompt = "\n\n".join(text for column in columns if (text := _text(row, column)))
        return [Turn("user", prompt), Turn("assistant", _text(row, "output"))]


@dataclass
class Messages(Texts):
    """A list of messages: OpenAI's {role, content} or ShareGPT's {from, value}, in `column`, by
    default messages or, without such a column, conversations."""

    column: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.column else ("messages", "conversations")

    def absent(self, columns: list[str]) -> list[str]:
        lacks = not self.column and not {*self.optional} & {*columns}
        return ["messages"] if lacks else super().absent(columns)

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        column = self.column or next((c for c in self.optional if c in row), "messages")
        messages = row.get(column)
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"no messages: {column} holds {messages!r:.40}")
        return [self._turn(message) for message in messages]

    def _turn(self, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise ValueError(f"no messages: {message!r:.40} is no object")
        role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
        role = str(message.get(role_key)).lower()
        if role not in ROLES:
            raise ValueError(f"unknown role: {role!r:.40}")
        content = message.get(text_key)
        if isinstance(content, list):  # OpenAI's parts
            kinds = {str(p.get("type")) if isinstance(p, dict) else "no object" for p in content}
            if kinds != {"text"}:
                raise ValueError(f"not text: parts of {', '.join(sorted(kinds))}")
            return Turn(ROLES[role], "\n".join(_text(part, "text") for part in content))
        return Turn(ROLES[role], _text(message, text_key))


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
        return [Turn(r, _text(row, c)) for r, c in zip(roles, self.required, strict=False)]


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"no text: {column} holds {value!r:.40}")
    if _BROKEN.search(value):
        raise ValueError(f"no text: {column} holds half a character (a surrogate)")
    if "\0" in value:
        raise ValueError(f"no text: {column} holds U+0000, at which voices would stop")
    return value.strip()
