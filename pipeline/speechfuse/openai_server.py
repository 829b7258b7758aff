"""Servers that speak OpenAI's protocol, and the one door to them: bytes or a form in, bytes out.

Only what may pass is tried again: no connection, a time limit, 429, a 5xx, an answer that breaks
off. Such servers need not answer twice the same: a `cache` keeps what was received, which makes a
resumed or repeated job exact, and paid for once. The key is read from the environment (the
variable's name stands in the configuration) and from nowhere else.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from speechfuse.artifact import write_atomic

T = TypeVar("T")
LONGEST_WAIT = 60.0  # seconds between two tries


class Unavailable(ValueError):
    """What a job works with cannot go on, whatever it is given: the job stops, finished shards are
    kept."""


class Server:
    """`url` up to and with the version, `http://127.0.0.1:8880/v1`; `key_variable`: the environment
    variable that holds the key, None where none is needed; `timeout` in seconds, of one silence;
    `tries` of one request; `cache`: a folder for the answers, None for none."""

    def __init__(
        self, url: str, key_variable: str | None, timeout: float, tries: int, cache: str | None
    ) -> None:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.netloc or secret:
            raise ValueError(  # of which no more is said: manifests and logs are shared
                f"url={parts.scheme}://{parts.hostname or ''}...: write it as https://host/v1, "
                "without ?, # or @; a key goes into the environment variable that key_variable "
                "names"
            )
        if tries < 1 or timeout <= 0:
            raise ValueError(f"tries={tries}, timeout={timeout}: at least 1, and above 0")
        self.url, self.key_variable = url.rstrip("/"), key_variable
        self.timeout, self.tries = timeout, tries
        self.cache = Path(cache) if cache else None

    def check(self) -> None:
        """ValueError when the key is not set."""
        self._headers()

    def post(self, path: str, read: Callable[[bytes], T], key: Any, **request: Any) -> T:
        """`read` of the answer to one POST; `request` are keywords of requests.post, and `key` is
        JSON that tells it from all others.

        ValueError("refused: ...") for what the server refuses (a 4xx), and that of `read` when it
        still raises one after all tries. Unavailable when the server, the key or the path is not
        there.
        """
        headers, where = self._headers(), f"{self.url}{path}"
        name = hashlib.sha256(json.dumps([where, key], sort_keys=True).encode()).hexdigest()
        kept = self.cache / name[:2] / name if self.cache else None
        if kept and kept.is_file():
            return read(kept.read_bytes())
        wait, why, unread = 0.0, "", None
        for attempt in range(self.tries):
            sleep(min(LONGEST_WAIT, max(wait, 2.0**attempt / 2 if attempt else 0)))
            wait, unread = 0.0, None
            try:
                answer = requests.post(where, headers=headers, timeout=self.timeout, **request)
            except requests.Timeout:
                why = f"no answer in {self.timeout:g} s"
                continue
            except requests.RequestException as error:
                why = f"no connection ({_error_text(error)})"
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                why, wait = _said(answer), _seconds(answer.headers.get("Retry-After"))
                continue
            if answer.status_code in (401, 403):
                key = self.key_variable or "key_variable is null, and a key"
                raise Unavailable(f"{where}: {_said(answer)}; check {key}")
            if answer.status_code in (404, 405):
                raise Unavailable(f"{where}: {_said(answer)}; check url and model")
            if not answer.ok:
                raise ValueError(f"refused: {_said(answer)}")
            try:
                found = read(answer.content)
            except ValueError as error:
                unread = error
                continue
            if kept:
                write_atomic(kept, answer.content)
            return found
        if unread:
            raise unread
        raise Unavailable(f"{where}: {why}, {self.tries} times; see that the server runs")

    def _headers(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise Unavailable(
                f"{self.key_variable} is not set: put the key of {self.url} into the environment, "
                "or set key_variable to null where none is needed"
            )
        return {"Authorization": f"Bearer {key}"}


def _said(answer: requests.Response) -> str:
    try:
        error = json.loads(answer.text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return f"{answer.status_code} {' '.join(text.split())[:300] or answer.reason}"


def _error_text(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return str(error) or type(error).__name__


def _seconds(header: str | None) -> float:
    return float(header) if header and header.replace(".", "", 1).isdigit() else 0.0
