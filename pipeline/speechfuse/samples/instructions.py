"""Speech rows to turns: a request about an utterance, and the reply that is trained.

In: a row of shards.SPEECH whose `extra` has been read. Out: turns in the schema of
shards.CONVERSATIONS. Chosen by dotted path in a recipe's dataset entry; the keyword arguments of
each function are the keys beside `_component_`.
"""

import random
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from num2words import num2words

from speechfuse.rows.several import TURNS, alone, recordings_of
from speechfuse.tokens.prompts import spoken_answer


def _turns(segments: list[dict[str, Any]], reply: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "segments": segments},
        {"role": "assistant", "segments": [{"text": reply}]},
    ]


def _row_text(row: dict[str, Any]) -> str:
    if row["text"] is None:
        raise ValueError(f"row {row['id']} has no transcript to repeat: leave such rows out")
    return row["text"]


def answer(
    row: dict[str, Any], repeat_first: bool = False, prompt: str = ""
) -> list[dict[str, Any]]:
    """A spoken question and its answer (`extra.answer`). `repeat_first`: the reply is the
    transcript, then the answer. `prompt` is text before the speech, in which {key} stands for a key
    of `extra`: "{context} " of NeMo's manifests. Raises ValueError for a row without them."""
    reply = row["extra"].get("answer")
    if not isinstance(reply, str):
        raise ValueError(f"row {row['id']} has no answer in extra: a spoken question needs one")
    if repeat_first:
        reply = spoken_answer(_row_text(row), reply)
    try:
        before = prompt.format_map({k: v or "" for k, v in row["extra"].items()})
    except KeyError as error:
        raise ValueError(
            f"row {row['id']} has no {error} in extra, which prompt asks for"
        ) from None
    return _turns([*([{"text": before}] if before.strip() else []), {"speech": alone(row)}], reply)


def transcribe(row: dict[str, Any], requests: list[str] | None = None) -> list[dict[str, Any]]:
    """A written request to transcribe, one of `requests` (chosen by the row's id) or none, then the
    speech; the reply is the transcript. Raises ValueError for a row without one."""
    asked = [{"text": random.Random(row["id"]).choice(requests)}] if requests else []
    return _turns([*asked, {"speech": alone(row)}], _row_text(row))


def count_words(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The speech, and the number of its words, in words. Raises ValueError for a row without a
    transcript."""
    number = num2words(len(_row_text(row).split()))
    return _turns([{"speech": alone(row)}], number.replace("-", " "))


def context(
    row: dict[str, Any],
    questions: str | list[str] | None = None,
    default: str = "what does the audio mean?",
    audio_locator: str = "<audio>",
    system: str = "",
) -> list[dict[str, Any]]:
    """A row of NeMo's manifests: a prompt about the speech, and the reply, `extra.answer` or else
    the transcript. The prompt is `extra.context` or `extra.question`; in a row without, one of
    `questions` (files with one a line; a training draws a file and a line of it anew in every
    step), or `default`. The speech stands where the prompt has `audio_locator`, and before it where
    it has none; several recordings need as many places. A row of a conversation is asked as it is,
    turns of one role one after the other with a space between. `system`: the system prompt, where
    the conversation has none. Raises ValueError for an empty file and for a prompt with another
    number of places than recordings."""
    first = [{"role": "system", "segments": [{"text": system}]}] if system else []
    if TURNS in row["extra"]:
        turns = _conversation(row)
        return turns if turns[0]["role"] == "system" else [*first, *turns]
    own = row["extra"].get("context") or row["extra"].get("question")
    files = [(own,)] if own else [*map(_questions, question_files(questions))] or [(default,)]
    reply = row["extra"].get("answer") or _row_text(row)
    if not isinstance(reply, str):
        raise ValueError(f"row {row['id']}: its answer is {reply!r:.60}, not text")
    either = [[_around(row, str(text), audio_locator) for text in file] for file in files]
    return [*first, {"role": "user", "either": either}, *_turns([], reply)[1:]]


def _around(row: dict[str, Any], text: str, locator: str) -> list[dict[str, Any]]:
    recordings = recordings_of(row)
    texts = text.split(locator)
    if len(texts) == len(recordings) == 1:
        texts = ["", text]
    if len(texts) != len(recordings) + 1:
        raise ValueError(
            f"row {row['id']}: {text!r:.80} has places {locator}: {len(texts) - 1}, and its line "
            f"recordings: {len(recordings)}; they must be as many"
        )
    segments: list[dict[str, Any]] = [{"text": texts[0]}]
    for recording, after in zip(recordings, texts[1:], strict=True):
        segments += [{"speech": recording}, {"text": after}]
    return [each for each in segments if "speech" in each or each["text"].strip()]


def _conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    recordings, turns = recordings_of(row), list[dict[str, Any]]()
    if (places := [turn["type"] for turn in row["extra"][TURNS]].count("audio")) != len(recordings):
        raise ValueError(
            f"row {row['id']} has turns of audio: {places}, and recordings: {len(recordings)}; "
            "they must be as many"
        )
    for role, group in groupby(row["extra"][TURNS], lambda turn: turn["from"].lower()):
        segments = list[dict[str, Any]]()
        for turn in group:
            text = " " * bool(segments) + (turn["value"] if turn["type"] == "text" else "")
            if segments and "text" in segments[-1]:
                text = segments.pop()["text"] + text
            segments += [{"text": text}] * bool(text)
            if turn["type"] == "audio":
                segments.append({"speech": recordings.pop(0)})
        turns.append({"role": role, "segments": segments})
    return turns


def question_files(questions: str | Iterable[str] | None) -> list[str]:
    """Return the files that `questions` of a `context` names."""
    return [questions] if isinstance(questions, str) else [*(questions or ())]


@lru_cache(maxsize=64)
def _questions(file: str) -> tuple[str, ...]:
    lines = [line.strip() for line in Path(file).read_text("utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{file} has no question: write one a line, or leave questions out")
    return tuple(filter(None, lines))
