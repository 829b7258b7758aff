"""A language model that rates answers from 0 to 5, at any endpoint that speaks OpenAI's protocol.

In: items {"id", "question", "reference", "answer"}; the endpoint's URL and key come from the
environment (OPENAI_BASE_URL, OPENAI_API_KEY, also for a server of your own). Out: a rating for each
id, None where the judge gave none, and `usage`: coverage, retries, tokens, price.

A verdict that fails is missing, never 0, and is asked for again the next time. The other verdicts
are kept in a sqlite file, under a key that is a hash of all that they depend on, so that scoring
again costs nothing. verdicts.py has what a judge is asked and how its reply is read. `BlogJudge`
instead samples, reads replies and counts failures as the evaluation behind the first published
scores did.
"""

import hashlib
import inspect
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from speechfuse.scores.verdicts import BLOG_RUBRIC, RUBRIC, read_last_word, read_verdict


@dataclass
class Usage:
    """What one call of `Judge.verdicts` took; `price` (dollars) is None where unknown."""

    items: int = 0
    rated: int = 0
    cached: int = 0
    calls: int = 0
    retries: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # {reason: number of verdicts}
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float | None = None

    @property
    def coverage(self) -> float:
        """Share of items with a verdict."""
        return self.rated / self.items if self.items else 1.0

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {reason}" for reason, count in self.failures.items())
        cost = "price not known" if self.price is None else f"${self.price:.4f}"
        return (
            f"{self.rated} of {self.items} rated (coverage {self.coverage:.1%}), {self.cached} "
            f"verdicts from cache, {self.calls} calls, {self.retries} retries, {failed or 'none'} "
            f"failed, {self.prompt_tokens} + {self.completion_tokens} tokens, {cost}"
        )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Unreachable(ValueError):
    """The endpoint answers no call, or refuses the key or the model: further calls are useless."""


NO_RATING = "without a rating"


@dataclass
class Judge:
    """See the module. `failures` says what an item without a verdict gets: None ("missing") or 0
    ("zero"). `price_in` and `price_out` are dollars per million tokens. `extra` goes into each
    request as it is (max_completion_tokens...).
    """

    model: str
    cache: str = "out/cache/judge.sqlite"
    base_url_env: str = "OPENAI_BASE_URL"
    key_env: str = "OPENAI_API_KEY"
    prompt: str = RUBRIC
    temperature: float | None = 0.0
    top_p: float | None = None
    max_tokens: int | None = 500
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    price_in: float | None = None
    price_out: float | None = None
    failures: str = "missing"
    read: ClassVar[Any] = staticmethod(read_verdict)
    cut_off_counts: ClassVar[bool] = False  # read a reply that ran into max_tokens

    def __post_init__(self) -> None:
        for name in ("question", "reference", "answer"):
            if f"{{{name}}}" not in self.prompt:
                raise ValueError(f"judge: prompt has no {{{name}}}: the judge would not see it")
        if self.failures not in ("missing", "zero"):
            raise ValueError(f"judge: failures={self.failures!r} must be missing or zero")
        if self.concurrency < 1:
            raise ValueError(f"judge: concurrency={self.concurrency} must be at least 1")
        self.usage = Usage()

    def check(self) -> None:
        """Raise ValueError when the environment holds no key."""
        if not os.environ.get(self.key_env):
            raise ValueError(
                f"judge {self.model}: no key in the environment variable {self.key_env}; export "
                f"it, and {self.base_url_env} for an endpoint other than OpenAI's (a server that "
                "wants no key takes any text)"
            )

    def identity(self) -> dict[str, Any]:
        """Return JSON of all that a verdict depends on besides the item; the endpoint is no part of
        it."""
        source = str(inspect.getsourcefile(type(self)))  # another's, of a judge that a recipe names
        return {
            "model": self.model,
            "prompt": digest(self.prompt),
            "parameters": self._parameters(),
            "read": type(self).read.__name__,
            "failures": self.failures,
        } | ({} if source == __file__ else {"code": digest(Path(source).read_text("utf-8"))})

    def _parameters(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens")}
        return {name: value for name, value in named.items() if value is not None} | self.extra

    def message(self, item: dict[str, str]) -> str:
        """Return the prompt with the texts of an item in it. {fence} becomes a line with a hash of
        these texts, so that no text can contain it."""
        texts = {name: item[name] for name in ("question", "reference", "answer")}
        whole = json.dumps(texts, sort_keys=True)
        texts["fence"] = f"-----{digest(whole)[:16]}-----"
        return re.sub(r"\{(question|reference|answer|fence)\}", lambda m: texts[m[1]], self.prompt)

    def verdicts(self, items: list[dict[str, str]]) -> dict[str, float | None]:
        """Return {id: rating}; an item without a verdict has None, or 0 if `failures` is "zero".

        Each verdict that the cache lacks takes one call, which the client repeats, with growing
        pauses or as Retry-After says, after 429, 5xx, time-outs and lost connections. Raises
        `Unreachable` when the key or model is refused, when max(8, `concurrency`) calls in a row
        bring no reply, and when no call brings one.
        """
        self.check()
        self.usage = usage = Usage(items=len(items))
        keys = {item["id"]: self._key(item) for item in items}
        with self._opened() as database:
            query = "select reply from verdicts where key = ?"
            rows = {key: database.execute(query, [key]).fetchone() for key in keys.values()}
            read = {key: type(self).read(row[0]) for key, row in rows.items() if row}
            ratings = {key: rating for key, rating in read.items() if rating is not None}
            usage.cached = len(ratings)
            if todo := {k: i for i in items if (k := keys[i["id"]]) not in ratings}:
                print(self.outlook(len(todo), sum(map(len, map(self.message, todo.values())))))
                ratings |= self._ask_all(todo, database)
        if not ratings and usage.failures.keys() - {NO_RATING}:
            raise Unreachable(f"judge {self.model}: no reply at all ({usage.failures})")
        usage.price = self._price(usage.prompt_tokens, usage.completion_tokens)
        usage.rated = sum(key in ratings for key in keys.values())
        print(f"judge {self.model}: {usage}")
        missing = None if self.failures == "missing" else 0.0
        return {id: ratings.get(key, missing) for id, key in keys.items()}

    def _key(self, item: dict[str, str]) -> str:
        texts = [item[name] for name in ("question", "reference", "answer")]
        identity = {key: value for key, value in self.identity().items() if key != "failures"}
        key = json.dumps([identity, *texts, 0], sort_keys=True)  # 0: existing caches have it too
        return digest(key)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        path = Path(self.cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # sqlite waits for other processes that write; threads here take turns by a lock
            with closing(sqlite3.connect(path, timeout=60, check_same_thread=False)) as database:
                database.execute(
                    "create table if not exists verdicts (key text primary key, model text, "
                    "question text, reference text, answer text, rating real, reply text)"
                )
                yield database
        except sqlite3.DatabaseError as error:
            raise ValueError(f"judge: cache={self.cache} cannot be used ({error})") from error

    def _ask_all(
        self, todo: dict[str, dict[str, str]], database: sqlite3.Connection
    ) -> dict[str, float]:
        """Return key -> rating of the calls that succeeded; each is in the cache as soon as it is
        there."""
        import openai  # here, as it takes seconds and most sweeps ask no judge

        hopeless = openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError
        requests, lock, secret = count(), threading.Lock(), os.environ[self.key_env]
        hooks = {"request": [lambda _: next(requests)]}  # the client's own retries pass here too
        client = openai.OpenAI(
            api_key=secret,
            base_url=os.environ.get(self.base_url_env) or None,
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )

        def ask(key: str, item: dict[str, str]) -> float | str:
            reply, used = self._ask(client, item)
            rating = None if reply is None else type(self).read(reply)
            with lock:
                self.usage.prompt_tokens += used[0]
                self.usage.completion_tokens += used[1]
            if rating is None:
                return NO_RATING
            texts = (item["question"], item["reference"], item["answer"])
            with lock, database:
                row = key, self.model, *texts, rating, reply
                database.execute(
                    "insert or replace into verdicts (key, model, question, reference, answer, "
                    "rating, reply) values (?, ?, ?, ?, ?, ?, ?)",  # older caches have one more
                    row,
                )
            return rating

        rated: dict[str, float] = {}
        silent = 0
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(ask, key, item): key for key, item in todo.items()}
            try:
                for done in tqdm(as_completed(asked), "judging", len(asked), unit="call"):
                    self.usage.calls += 1
                    try:
                        result = done.result()
                        silent = 0
                    except openai.OpenAIError as error:
                        result, silent = type(error).__name__, silent + 1
                        if isinstance(error, hopeless) or silent >= max(8, self.concurrency):
                            raise Unreachable(
                                f"judge {self.model} at {client.base_url}: {silent} calls in a row "
                                f"without a reply, the last with {result}: "
                                f"{str(error).replace(secret, '***'):.300}"
                            ) from None
                    if isinstance(result, str):
                        self.usage.failures[result] = self.usage.failures.get(result, 0) + 1
                    else:
                        rated[asked[done]] = result
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                self.usage.retries = max(0, next(requests) - self.usage.calls)
        return rated

    def _ask(self, client: Any, item: dict[str, str]) -> tuple[str | None, tuple[int, int]]:
        """Return (the reply's text, tokens in and out); no text where it is empty, cut off or
        malformed.

        The client builds its objects without checking them, so anything may be missing.
        """
        messages = [{"role": "user", "content": self.message(item)}]
        try:
            completion: Any = client.chat.completions.create(
                model=self.model, messages=messages, extra_body=self._parameters()
            )
            used = completion.usage
            tokens = (used.prompt_tokens, used.completion_tokens) if used else (0, 0)
            choice = completion.choices[0]
            reply = choice.message.content
        except (json.JSONDecodeError, AttributeError, IndexError, TypeError):
            return None, (0, 0)
        cut = choice.finish_reason == "length" and not self.cut_off_counts
        return reply if isinstance(reply, str) and not cut else None, tokens

    def outlook(self, calls: int, characters: int) -> str:
        """Return what `calls` calls cost, at most, whose prompts have so many characters in all."""
        price = self._price(characters // 4, calls * (self.max_tokens or 0))
        cost = "" if price is None else f", at most ${price:.4f}"
        return f"judge {self.model}: {calls:,} call{'s' * (calls != 1)} to make{cost}"

    def _price(self, tokens_in: int, tokens_out: int) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass
class BlogJudge(Judge):
    """A judge that works as the evaluation behind the first published scores: replies are sampled,
    the prompt has that evaluation's form, the last word of a reply is read as a number whatever its
    size, and every failure counts as 0. Source: the fork of AudioBench at 5029c02, with a rubric in
    our words."""

    prompt: str = BLOG_RUBRIC
    temperature: float | None = 0.7
    top_p: float | None = 0.95
    failures: str = "zero"
    read: ClassVar[Any] = staticmethod(read_last_word)
    cut_off_counts: ClassVar[bool] = True
