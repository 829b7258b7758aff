"""The client of servers that speak OpenAI's protocol for speech: the package `openai`, made strict.

In: the fields of a request. Out: the bytes that the server answered, read by the caller. A request
is repeated, after the pause that `Retry-After` asks for (at most a minute) or a growing one, when
there is no connection, a time limit, a 429 or a 5xx, or an answer that cannot be read. Such servers
need not give the same answer twice: `cache` keeps answers, so that a resumed or repeated job is
exact, and paid for once. The key is read from the environment variable that the configuration
names, and nothing else of the environment is sent.
"""

import os
import sys
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


class _Again(Exception):
    """A request that may be repeated, after `seconds` if the server said so."""

    def __init__(self, problem: str, seconds: float | None = None) -> None:
        super().__init__(problem)
        self.seconds = seconds


@dataclass(kw_only=True, eq=False)
class Server:
    """`url` up to and with the version, `http://127.0.0.1:8880/v1`; `body`: further fields of every
    request; `key_variable`: the environment variable that holds the key, None where none is needed;
    `timeout` in seconds, of one silence; `tries` of one request; `cache`: a folder for answers."""

    url: str
    model: str
    language: str = "en"
    body: dict[str, Any] | None = None
    key_variable: str | None = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 6
    cache: str | None = None
    repeated: int = field(default=0, init=False)
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
        _ = parts.port  # raises ValueError for one that is no number
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
        for attempt in range(1, self.tries + 1):
            pause = min(8.0, 2**attempt / 4)
            try:
                content = self._content(path, fields | {"extra_body": more})
            except _Again as again:
                if attempt == self.tries:
                    asked = f"{again}, asked {attempt} times; see that the server runs"
                    raise Unavailable(f"{self.url}{path}: {asked}") from None
                self._say_again(str(again))
                sleep(pause if again.seconds is None else min(60.0, again.seconds))
                continue
            try:
                answer = read(content)
                break
            except ValueError:
                if attempt == self.tries:
                    raise
            self._say_again("an answer that cannot be read")
            sleep(pause)
        if cached:
            write_atomic(cached, content)
        return answer

    def _say_again(self, problem: str) -> None:
        """Count a request that is repeated; the 1st, 2nd, 4th, 8th ... of this process is said."""
        self.repeated += 1
        if self.repeated.bit_count() == 1:
            print(
                f"{self.url}: {problem}; asked again, {self.repeated} times so far in this process",
                file=sys.stderr,
            )

    @cached_property
    def _client(self) -> Any:
        import openai  # here: it takes a second, and --help needs none of it

        key = self.key()
        client = openai.OpenAI(
            api_key=key or "none",  # the client insists on one
            base_url=self.url,
            timeout=self.timeout,
            max_retries=0,
        )
        # nothing but the key that the configuration names: not what else the environment holds
        client.organization = client.project = None
        client._custom_headers = {"Authorization": f"Bearer {key}"} if key else {}
        return client

    def _content(self, path: str, request: dict[str, Any]) -> bytes:
        import openai

        where, resource = f"{self.url}{path}", attrgetter(path[1:].replace("/", "."))(self._client)
        try:
            headers: Any = {} if self.key_variable else {"Authorization": openai.Omit()}
            return resource.with_raw_response.create(**request, extra_headers=headers).content
        except openai.APITimeoutError:
            raise _Again(f"no answer in {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Again(f"no connection ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            status, problem = error.status_code, _problem(error)
            if status in (401, 403):
                variable = self.key_variable or "key_variable is null, and a key"
                raise Unavailable(f"{where}: {problem}; check {variable}") from None
            if status in (404, 405):
                raise Unavailable(f"{where}: {problem}; check url and model") from None
            if status < 500 and status != 429:
                raise ValueError(f"refused: {problem}") from None
            wait = error.response.headers.get("retry-after", "")  # seconds, or a date
            seconds = float(wait) if wait.replace(".", "", 1).isdecimal() else None
            raise _Again(problem, seconds) from None

    def key(self) -> str:
        """The key, from the environment; "" where none is needed. Raises Unavailable when it is not
        set."""
        if self.key_variable is None:
            return ""
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
