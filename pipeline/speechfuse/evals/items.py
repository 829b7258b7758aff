"""The items of a speech task: rows of a dataset, of speech or of conversations, by split.

In: a folder of rows in either schema. Out: rows by id with `extra` read. A conversation becomes an
item by its last question: `text` is what was asked, `extra.answer` what should be said.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speechfuse import config, json_lines
from speechfuse.evals.tasks import take_evenly
from speechfuse.rows import shards
from speechfuse.rows.selection import matches
from speechfuse.rows.several import RECORDINGS, alone

Rows = dict[str, dict[str, Any]]
Splits = dict[str, dict[str, Any]]
Asked = dict[str, list[dict[str, Any]]]  # the turns to ask, by id
Reader = Callable[[str], tuple[str | None, str]]  # a reply -> (what was heard, the answer)
SPEECH = "{speech}"  # where the audio stands in a prompt
OWN = ("id", "text", "speaker", "language", "seconds")  # columns of a row; all else is in `extra`


def read_items(data: Path, splits: list[dict[str, Any]], cluster: str | None, read: Reader) -> Rows:
    """Return the rows that any of `splits` selects, by id. `read` reads the answers of
    conversations, unless they have several lines that do not begin with what was asked; then the
    item is `whole`, and so are replies to it. A conversation without the key `cluster` is a cluster
    of its own. Raises ValueError for a conversation that does not end in an answer."""
    rows = {}
    for row in shards.read_rows(data):
        row["extra"] = json.loads(row["extra"] or "{}")
        if any(matches(row, split) for split in splits):
            item = _of_conversation(row, data, read) if "turns" in row else row
            if "turns" in row and cluster:
                item["extra"].setdefault(cluster, row["id"])
            rows[row["id"]] = item
    return rows


def _of_conversation(row: dict[str, Any], data: Path, read: Reader) -> dict[str, Any]:
    if [turn["role"] for turn in row["turns"]][-2:] != ["user", "assistant"]:
        raise ValueError(f"{data}: row {row['id']} does not end in an answer")
    *questions, answer = map(turn_text, row["turns"])
    first, line, _ = answer.partition("\n")
    spoken = [segment["speech"] for segment in row["turns"][-2]["segments"]]
    asked = " ".join(speech["text"] or "" for speech in spoken if speech)
    whole = bool(line) and first.split() != asked.split()  # its lines are all of the answer
    return {
        **dict.fromkeys((*OWN, "codes", "source")),
        **row,
        "text": " / ".join(questions),
        "whole": whole,
        "extra": {**row["extra"], "answer": answer if whole else read(answer)[1]},
    }


def turn_text(turn: dict[str, Any]) -> str:
    """Return a turn as text; sound without words is (sound)."""
    parts = []
    for segment in turn["segments"]:
        speech = segment.get("speech")
        parts.append(segment["text"] if speech is None else speech["text"] or "(sound)")
    return " ".join(part.strip() for part in parts)


def by_prompt(
    prompt: str, value_of: Callable[[str], str], heard: dict[str, Any] | str
) -> list[dict[str, Any]]:
    """Return the turn of a user that `prompt` states: {speech} in it is the row of speech, or the
    text, that is `heard`, any other {name} what `value_of` gives. Raises ValueError for a row of
    several recordings."""
    texts = [
        re.sub(r"\{(\w+)\}", lambda match: value_of(match[1]), text)
        for text in prompt.split(SPEECH, 1)
    ]
    if isinstance(heard, str):  # one segment, so that it is tokenized as one text
        return [{"role": "user", "segments": [{"text": heard.join(texts)}]}]
    before, after = ([{"text": text}] if text else [] for text in texts)
    return [{"role": "user", "segments": [*before, {"speech": alone(heard)}, *after]}]


def as_trained(
    turns: dict[str, Any], row: dict[str, Any], audio: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the turns that the component `turns` makes of a row, up to the reply, with the speech
    of the row `audio`."""
    extra = {name: value for name, value in row["extra"].items() if name != RECORDINGS}
    extra |= {name: audio["extra"][name] for name in {RECORDINGS} & audio["extra"].keys()}
    speech = {name: audio[name] for name in ("codes", "frames", "source") if name in audio}
    return config.instantiate(turns, row={**row, **speech, "extra": extra})[:-1]


def read_transcripts(path: Path) -> dict[str, str]:
    """Return transcripts by id of a file of JSON lines {id, text}. Raises ValueError, with the
    line, for any other, and for an id that comes twice."""
    texts: dict[str, str] = {}
    try:
        for number, entry in json_lines.read(path):
            id, text, where = entry.get("id"), entry.get("text"), f"{path}, line {number}"
            if not isinstance(id, str | int):
                raise ValueError(f"{where}: its id is {id!r:.40}, no name")
            if not isinstance(text, str):
                raise ValueError(f"{where}: the text of {id} is {text!r:.40}, not text")
            if str(id) in texts:
                raise ValueError(f"{where}: the id {id} comes twice")
            texts[str(id)] = text
    except ValueError as error:
        raise ValueError(f"transcripts: {error}; give JSON lines of id and text") from error
    return texts


def transcripts_of(rows: Rows, data: str, path: str | None) -> dict[str, str]:
    """Return the transcripts of rows by id, those at `path` (a file, or a folder that
    stages.recognize_speech wrote) or the rows' own. Raises ValueError for rows without one; one at
    `path` may be empty, as a recognizer may hear nothing."""
    if path and Path(path).is_dir():
        heard = shards.read_rows(Path(path), ["id", "text"])
        texts = {row["id"]: row["text"] or "" for row in heard}
    elif path:
        texts = read_transcripts(Path(path))
    else:
        texts = {id: row["text"] for id, row in rows.items() if (row["text"] or "").strip()}
    if lost := [id for id in rows if id not in texts]:
        raise ValueError(
            f"{path or data} has no transcript of {len(lost)} of {len(rows)} items, {lost[0]!r} "
            "the first of them"
        )
    if empty := sum(not texts[id].strip() for id in rows):
        print(f"{path}: {empty} of {len(rows)} transcripts are empty, and asked as they are")
    return texts


def ids_by_split(rows: Rows, splits: Splits) -> dict[str, list[str]]:
    """Return the ids of the rows of each split; a split without rows is left out."""
    pairs = splits.items()
    ids = {name: [id for id, row in rows.items() if matches(row, of)] for name, of in pairs}
    return {name: of for name, of in ids.items() if of}


def filled(rows: Rows, splits: Splits, may_be_empty: list[str], data: str) -> list[list[str]]:
    """Return the ids of the rows of each split. Raises ValueError for a split without rows that
    `may_be_empty` does not name."""
    ids = ids_by_split(rows, splits)
    if empty := sorted(splits.keys() - ids.keys() - {*may_be_empty}):
        raise ValueError(
            f"splits: no row of {data} is in {', '.join(empty)}; correct what it selects, or name "
            "it in may_be_empty"
        )
    return list(ids.values())


def subset(rows: Rows, splits: list[list[str]], limit: int | None) -> Rows:
    """Return `limit` of the rows in `splits`, at equal distances split by split: voices take turns
    in a corpus, and equal distances in all of it could meet one voice alone."""
    ids = dict.fromkeys(id for split in splits for id in split)
    taken = {*take_evenly(list(ids), limit)}
    return {id: row for id, row in rows.items() if id in taken}


def column(row: dict[str, Any], name: str) -> Any:
    """Return a column of a row or a value of its `extra`; None where it has neither."""
    return row[name] if name in OWN else row["extra"].get(name)


def text_of(row: dict[str, Any], name: str, data: str) -> str:
    """Return a column of a row as text. Raises ValueError where it is not there, or empty."""
    if (value := column(row, name)) is None:
        names = ", ".join([*OWN, *row["extra"]])
        raise ValueError(f"{data}: row {row['id']} has no {name!r}; there are {names}")
    return str(value)


def behind_another(asked: Asked, earlier: dict[str, Any], rows: list[dict[str, Any]]) -> Asked:
    """Return the turns {id: turns} of `rows`, before each those that `earlier` makes of the row
    before it, of the first those of the last."""
    before = [config.instantiate(earlier, row=row) for row in rows[-1:] + rows[:-1]]
    return {id: [*own, *turns] for (id, turns), own in zip(asked.items(), before, strict=True)}


def others(values: list[str]) -> list[int]:
    """Return for each place another one that holds another value: half the list away, or the next
    after that. Raises ValueError where all values are equal."""
    if len({*values}) == 1:
        raise ValueError(f"every item's reference is {values[0]!r:.60}: none has audio of another")
    chosen = []
    for place, value in enumerate(values):
        places = [(place + len(values) // 2 + i) % len(values) for i in range(len(values))]
        chosen.append(next(other for other in places if values[other] != value))
    return chosen
