"""Speech rows to turns: a request about an utterance, and the reply that is trained.

In: a row of shards.SPEECH whose `extra` has been read. Out: turns in the schema of
shards.CONVERSATIONS. Chosen by dotted path in a recipe's dataset entry; the keyword arguments of
each function are the keys beside `_component_`.
"""

import random
from typing import Any

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
    return _turns([*([{"text": before}] if before.strip() else []), {"speech": row}], reply)


def transcribe(row: dict[str, Any], requests: list[str]) -> list[dict[str, Any]]:
    """A written request to transcribe, one of `requests` (chosen by the row's id), then the
    speech; the reply is the transcript. Raises ValueError for a row without one."""
    request = random.Random(row["id"]).choice(requests)
    return _turns([{"text": request}, {"speech": row}], _row_text(row))
