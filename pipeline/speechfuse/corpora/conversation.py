"""NeMo's multimodal conversations: turns of text and of audio in a line of a manifest.

In: the line as a JSON object {id, conversations: [{from, type, value, offset, duration}]}. Out: its
recordings; the turns stay as they are, and samples.context makes a prompt of them.
"""

from typing import Any

from speechfuse.rows.several import TURNS

ROLES = ("system", "user", "assistant")


def is_nemos(entry: dict[str, Any]) -> bool:
    """Return whether the turns of a line say their type, as NeMo's do."""
    turns = entry[TURNS]
    return isinstance(turns, list) and all(isinstance(t, dict) and "type" in t for t in turns)


def recordings(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {audio_filepath, offset, duration} of each turn of audio. The last turn, if it is an
    assistant's, is the `answer` of the line. Raises ValueError for turns that are not to be read,
    and for audio that an assistant or the system says."""
    audio = []
    for turn in entry[TURNS]:
        role, kind, value = (turn.get(name) for name in ("from", "type", "value"))
        spoken = kind == "audio"
        if (
            not isinstance(role, str)
            or role.lower() not in ROLES
            or kind not in ("text", "audio")
            or not isinstance(value, str)
            or (spoken and role.lower() != "user")
        ):
            raise ValueError(
                f"turn {turn!r:.80}: it needs from (User, Assistant or System), type (text, or of "
                "a User audio) and value"
            )
        if spoken:
            own = {"offset": turn.get("offset"), "duration": turn.get("duration")}
            audio.append({"audio_filepath": value, **own})
    if not entry[TURNS]:
        raise ValueError("the conversation has no turn")
    if role.lower() == "assistant":
        entry["answer"] = value
    return audio
