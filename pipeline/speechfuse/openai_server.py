"""The client of servers that speak OpenAI's protocol for speech: `openai`'s own, made strict.

In: the fields of a request. Out: the bytes that the server answered, read by the caller. The client
repeats a request, as `Retry-After` asks or with growing pauses, when there is no connection, a time
limit, a 429 or a 5xx; an answer that cannot be read is asked for again here. Such servers need not
give the same answer twice: `cache` keeps answers, so that a resumed or repeated job is exact, and
paid for once. The key is read from the environment variable that the configuration names, and from
nowhere else.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from time import sleep
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from speechfuse.artifact import json_digest, write_atomic

T = TypeVar("T")
# arguments that change nothing of the answers
NOT_IDENTITY = ("key_variable", "parallel", "timeout", "tries", "cache")


class Unavailable(ValueError):
    """An engine or a server cannot go on, whatever text it is given: the job stops, and finished
    shards are kept."""


@dataclass(kw_only=True, eq=False)
class Server:
    """`url` up to and with the version, `http://127.0.0.1:8880/v1`; `body`: further fields of every
    request; `key_variable`: the environment variable that holds the key, None where none is needed;
    `timeout` in seconds, of one silence; `tries` of one request; `cache`: a folder for answers."""

    url: str
    model: str
    language: str = "en"
    body: dict[str, Any] = field(default_factory=dict)
    key_variable: str | None = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 6
    cache: str | None = None
    not_identity: ClassVar[tuple[str, ...]] = NOT_IDENTITY

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        secret = "@" in parts.netloc or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.netloc or secret:
            raise ValueError(  # without the rest of the url: manifests and logs are shared
                f"url={parts.scheme}://{parts.hostname or ''}...: write it as https://host/v1, "
                "without ?, # or @; a key goes into the environment variable that key_variable "
                "names"
            )
        if self.tries < 1 or self.timeout <= 0:
            raise ValueError(f"tries={self.tries}, timeout={self.timeout}: at least 1, and above 0")
        self.url = self.url.rstrip("/")

    def post(
        self,
        path: str,
        fields: dict[str, Any],
        more: dict[str, Any],
        key: Any,
        read: Callable[[bytes], T],
    ) -> T:
        """Returns `read` of the server's answer at `path` (/audio/speech) to a request of `fields`,
        which the client declares, and `more`, which it does not. `key` is JSON that tells the
        request from all others.

        Raises ValueError("refused: ...") when the server refuses the request (a 4xx), the
        ValueError of `read` when it cannot read any of `tries` answers, and Unavailable when the
        server, the key or the path is not there.
        """
        name = json_digest([f"{self.url}{path}", key])
        cached = Path(self.cache) / name[:2] / name if self.cache else None
        if cached and cached.is_file():
            return read(cached.read_bytes())
        for attempt in range(self.tries):
            content = self._content(path, fields | {"extra_body": more})
            try:
                answer = read(content)
                break
            except ValueError:
                if attempt + 1 == self.tries:
                    raise
                sleep(min(8, 2**attempt / 2))
        if cached:
            write_atomic(cached, content)
        return answer

    @cached_property
    def _client(self) -> Any:
        import openai  # here: it takes a second, and --help needs none of it

        return openai.OpenAI(
            api_key=self.key(), base_url=self.url, timeout=self.timeout, max_retries=self.tries - 1
        )

    def _content(self, path: str, request: dict[str, Any]) -> bytes:
        import openai

        where, resource = f"{self.url}{path}", attrgetter(path[1:].replace("/", "."))(self._client)
        try:
            return resource.with_raw_response.create(**request).content
        except openai.APITimeoutError:
            problem = f"no answer in {self.timeout:g} s"
        except openai.APIConnectionError as error:
            problem = f"no connection ({error.__cause__ or error})"
        except openai.APIStatusError as error:
            status, problem = error.status_code, _problem(error)
            if status in (401, 403):
                variable = self.key_variable or "key_variable is null, and a key"
                raise Unavailable(f"{where}: {problem}; check {variable}") from None
            if status in (404, 405):
                raise Unavailable(f"{where}: {problem}; check url and model") from None
            if status < 500 and status != 429:
                raise ValueError(f"refused: {problem}") from None
        raise Unavailable(
            f"{where}: {problem}, asked up to {self.tries} times; see that the server runs"
        )

    def key(self) -> str:
        """The key, from the environment. Raises Unavailable when it is not set."""
        if self.key_variable is None:
            return "none"  # the client insists on one
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise Unavailable(
                f"{self.key_variable} is not set: put the key of {self.url} into the environment, "
                "or set key_variable to null where none is needed"
            )
        return key


def _problem(error: Any) -> str:
    """The status and the server's own message of an `openai.APIStatusError`, on one line."""
    body = error.body.get("message") if isinstance(error.body, dict) else error.body
    text = body or error.response.text or error.response.reason_phrase
    return f"{error.status_code} {' '.join(str(text).split())[:300]}"
