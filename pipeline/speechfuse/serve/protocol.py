"""OpenAI's protocol, as far as a model that listens and writes can keep it.

In: the JSON of a request to /v1/chat/completions. Out: a Chat; and its answer, as it grows. What
would be ignored and changes the answer is refused, in the protocol's own error object.
"""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from speechfuse.tokens import prompts

CHARACTERS, CLIPS = 20_000, 16  # of a request
SCHEMA = json.loads((Path(__file__).parent / "chat.schema.json").read_text("utf-8"))
VALID = jsonschema.Draft202012Validator(SCHEMA)


class Refused(Exception):
    """A request that is answered with an error object. `param`: the field that is wrong; `wait`:
    seconds after which it may be sent again."""

    def __init__(
        self, message: str, param: str = "", status: int = 400, code: str = "", wait: int = 0
    ) -> None:
        self.status, self.headers = status, {"Retry-After": str(wait)} if wait else {}
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        named = {"type": kind.get(status, "invalid_request_error"), "param": param or None}
        self.body = {"error": {"message": message, **named, "code": code or None}}


@dataclass
class Clip:
    """The bytes of an audio file."""

    content: bytes


Turn = tuple[str, list[str | Clip]]  # role, what was said


@dataclass(frozen=True)
class Chat:
    """`most`: tokens of the reply; `stop`: texts that end it; a temperature of 0 is greedy."""

    model: str
    turns: list[Turn]
    most: int
    stream: bool = False
    usage: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)


def read_chat(body: bytes, most: int) -> Chat:
    """Return the request; `most` tokens where it asks for no other number. Raises Refused."""
    try:
        asked = json.loads(body, parse_constant=int)  # which refuses NaN
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if error := jsonschema.exceptions.best_match(VALID.iter_errors(asked)):
        param = error.json_path.removeprefix("$").removeprefix(".")
        raise Refused(f"{param or 'the body'} {error.schema.get('description')}", param)
    asked = {name: value for name, value in asked.items() if value is not None}
    turns = [_turn(message) for message in asked["messages"]]
    parts = [part for _, said in turns for part in said]
    texts = [part for part in parts if isinstance(part, str)]
    if turns[-1][0] != "user":
        raise Refused("the last message is to be the user's", "messages")
    if sum(map(len, texts)) > CHARACTERS or len(parts) - len(texts) > CLIPS:
        raise Refused(f"at most {CHARACTERS:,} characters and {CLIPS} clips", "messages")
    most = int(asked.get("max_completion_tokens", asked.get("max_tokens", most)))
    usage = asked.get("stream_options", {}).get("include_usage") is True
    stop, own = asked.get("stop", []), ("stream", "temperature", "top_p", "seed")
    stop = [stop] if isinstance(stop, str) else stop
    more = {name: asked[name] for name in own if name in asked}
    return Chat(asked.get("model", ""), turns, most, usage=usage, stop=stop, **more)


def _turn(message: dict[str, Any]) -> Turn:
    role, content = message["role"], message["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if role != "user" and any(part["type"] == "input_audio" for part in content):
        raise Refused("input_audio is a user's alone", "messages")
    parts = [_part(part) for part in content]
    if role == "assistant" and message.get("heard"):  # what it said first, as it was answered
        parts = [prompts.spoken_answer(message["heard"], "".join(map(str, parts)))]
    return role.replace("developer", "system"), [part for part in parts if part]


def _part(part: dict[str, Any]) -> str | Clip:
    if part["type"] == "text":
        return part["text"]
    try:
        return Clip(base64.b64decode(part["input_audio"]["data"], validate=True))
    except ValueError:
        raise Refused("input_audio.data is not base64", "messages") from None


class Answer:
    """A reply as it grows: `heard` is None until its line is whole. With `repeats` the first line
    is what was heard and the rest the answer, as in prompts.read_spoken_answer."""

    def __init__(self, repeats: bool, stop: list[str]) -> None:
        self.repeats, self.stop, self.stopped = repeats, stop, False
        self.heard: str | None = None
        self.text = ""

    def read(self, reply: str, ended: bool) -> str:
        """Return what is new in the answer, of all of the `reply` so far."""
        answer = reply = reply.strip()
        if self.repeats:
            if "\n" not in reply and not ended:
                return ""
            self.heard, answer = prompts.read_spoken_answer(reply)
        if ends := [answer.index(text) for text in self.stop if text in answer]:
            answer, self.stopped = answer[: min(ends)], True
        elif not ended:  # what may be the beginning of a stop, or of a character
            answer = answer.rstrip("\ufffd")
            held = [n for s in self.stop for n in range(len(s)) if answer.endswith(s[:n])]
            answer = answer[: len(answer) - max(held, default=0)]
        new = answer[len(self.text) :]
        self.text += new
        return new
