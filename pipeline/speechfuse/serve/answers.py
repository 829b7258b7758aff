"""From a request to the tokens of its reply: decoding, ears, the queue, the engine.

In: a Chat. Out: a Reply, and its tokens one by one. Checkpoints are loaded when they are first
asked for, and the one that was used least recently is put out of memory for the next.
"""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from speechfuse import config, failures
from speechfuse.audio import decoding
from speechfuse.serve import checkpoints
from speechfuse.serve.config import Serve
from speechfuse.serve.protocol import Answer, Chat, Clip, Refused
from speechfuse.serve.uploads import Decoders

Loaded = tuple[checkpoints.Listener, Any]  # a checkpoint, and the engine that it answers by
# transformers swaps a method of its classes while it loads: two threads at once leave it swapped
LOADING = Lock()
BUSY = "as many requests as are taken at once are being answered; ask again"
TWO_CHANNELS = "the model {!r} listens while it speaks and has no turns: `just duplex` talks to it"
UNUSABLE = "the model {!r} cannot be loaded: take another of /v1/models; the log says what to mend"


@dataclass
class Reply:
    """What is known of a reply. `seconds` by part, `codes` of each clip, `tokens` of the prompt and
    how many of them are `audio`; `end` is "stop" or "length" at the end."""

    answer: Answer
    seconds: dict[str, float] = field(default_factory=dict)
    codes: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    audio: int = 0
    written: list[int] = field(default_factory=list)
    end: str | None = None

    def usage(self) -> dict[str, Any]:
        written, details = len(self.written), {"audio_tokens": self.audio, "cached_tokens": 0}
        counts = {"prompt_tokens": self.tokens, "completion_tokens": written}
        return counts | {"total_tokens": sum(counts.values()), "prompt_tokens_details": details}


Replies = AsyncGenerator[tuple[Reply, str], None]


class Answers:
    """The checkpoints of a job, and the queue before them. `counts` are of /metrics."""

    def __init__(self, job: Serve) -> None:
        self.job, self.names = job, checkpoints.every_epoch(Path(job.report), job.checkpoint)
        self.first = next(iter(self.names))
        self.decoders = Decoders(2, job.seconds, 20.0)
        self.loaded: dict[str, Loaded] = {}  # the last is the one that was used last
        self.counts: dict[str, float] = defaultdict(float)
        self.open = 0
        self._loading = asyncio.Lock()
        self._ears = ThreadPoolExecutor(1)  # one clip after another, as a core has time

    async def get(self, name: str) -> Loaded:
        """Return a checkpoint, loaded if need be. Raises Refused."""
        if name not in self.names:
            raise Refused(f"there is no model {name!r}", "model", 404, "model_not_found")
        async with self._loading:
            if name not in self.loaded:
                if len(self.loaded) >= self.job.models:
                    idle = [each for each, (_, engine) in self.loaded.items() if not engine.busy]
                    if not idle:
                        raise Refused(BUSY, "model", 429, "busy", wait=1)
                    del self.loaded[idle[0]]
                try:
                    self.loaded[name] = await asyncio.to_thread(self._load, self.names[name])
                except Exception as error:  # a folder can be broken in every way
                    known = failures.sentence(error) or f"{type(error).__name__}: {error}"
                    print(f"error: {self.names[name]}: {known}", file=sys.stderr, flush=True)
                    two = isinstance(error, checkpoints.TwoChannels)
                    message = (TWO_CHANNELS if two else UNUSABLE).format(name)
                    raise Refused(message, "model", code="model_not_usable") from None
            self.loaded[name] = self.loaded.pop(name)
            return self.loaded[name]

    def _load(self, folder: Path) -> Loaded:
        job, began = self.job, time.perf_counter()
        with LOADING:
            listener = checkpoints.load(folder, job, "what is sent")
        loaded = time.perf_counter()
        said = [{"text": "a"}, *listener.speech([np.zeros(decoding.SAMPLE_RATE, np.float32)])]
        listener.generator.reply([[{"role": "user", "segments": said}]], 2)
        engine = config.instantiate(job.engine, generator=listener.generator)
        warm = time.perf_counter() - loaded
        print(f"{folder}: loaded in {loaded - began:.1f} s, warm {warm:.1f} s later", flush=True)
        return listener, engine

    async def reply(self, chat: Chat) -> Replies:
        """Yield the reply once its prompt is made, with "", then again with each new piece of its
        answer. Raises Refused."""
        began = time.perf_counter()
        clips = [part for _, said in chat.turns for part in said if isinstance(part, Clip)]
        asks_aloud = any(isinstance(part, Clip) for part in chat.turns[-1][1])
        reply = Reply(Answer(self.job.repeat_first and asks_aloud, chat.stop))
        try:
            waveforms = [await self.decoders.decode(clip.content) for clip in clips]
        except ValueError as error:
            raise Refused(f"the audio cannot be used: {error}", "messages") from None
        reply.seconds["decode"] = time.perf_counter() - began
        listener, engine = await self.get(chat.model or self.first)
        loop, heard = asyncio.get_running_loop(), time.perf_counter()
        ids = await loop.run_in_executor(self._ears, _prompt, listener, chat, waveforms, reply)
        ready = time.perf_counter()
        reply.seconds["encode"] = ready - heard
        told: asyncio.Queue[Any] = asyncio.Queue()
        from speechfuse.serve.engine import Asked  # torch with it

        asked = Asked(ids, chat, lambda x: loop.call_soon_threadsafe(told.put_nowait, x))
        engine.ask(asked)
        try:
            yield reply, ""
            while reply.end is None:
                new = _read(listener, await told.get(), reply)
                now = time.perf_counter()
                reply.seconds["queue"] = asked.began - ready
                reply.seconds["first_token"] = asked.first - asked.began
                reply.seconds["rest"], reply.seconds["whole"] = now - asked.first, now - began
                yield reply, new
        finally:
            asked.cancelled = True
        for part, seconds in reply.seconds.items():
            self.counts[f'seconds_total{{part="{part}"}}'] += seconds
        self.counts["prompt_tokens_total"] += reply.tokens
        self.counts["completion_tokens_total"] += len(reply.written)


def _prompt(
    listener: checkpoints.Listener, chat: Chat, waveforms: list[Any], reply: Reply
) -> list[int]:
    """Return the ids of the prompt. Raises Refused where they and the reply are too many."""
    left, turns = iter(waveforms), []
    generator = listener.generator
    for role, said in chat.turns:
        segments: list[dict[str, Any]] = []
        for part in said:
            if isinstance(part, str):
                segments.append({"text": part})
                continue
            pieces = listener.speech(listener.pieces(next(left)))
            segments += pieces
            codes = chain.from_iterable(piece["speech"].get("codes", ()) for piece in pieces)
            reply.codes.append([*map(int, codes)])
        turns.append({"role": role, "segments": segments})
    try:
        ids = generator.prompt(turns)
    except ValueError as error:
        raise Refused(f"the messages do not fit this model: {error}", "messages") from None
    layout = generator.vocabulary.layout
    sounds = layout.ids if layout else range(0)
    reply.tokens, reply.audio = len(ids), sum(id < 0 or id in sounds for id in ids)
    most = getattr(generator.model.config, "max_position_embeddings", len(ids) + chat.most)
    if len(ids) + chat.most > most:
        message = f"{len(ids)} tokens and {chat.most} of the reply are over the model's {most}"
        raise Refused(message, "messages", code="context_length_exceeded")
    return ids


def _read(listener: checkpoints.Listener, event: Any, reply: Reply) -> str:
    """Return what an event of the engine adds to the answer. Raises Refused for an error."""
    if isinstance(event, Exception):
        print(f"a reply broke off: {type(event).__name__}: {event}", flush=True)
        raise Refused("the model could not go on; ask again", status=500)
    if isinstance(event, int):
        reply.written.append(event)
    else:
        reply.end = event
    tokenizer = listener.generator.vocabulary.tokenizer
    text = tokenizer.decode(reply.written, skip_special_tokens=True)
    new = reply.answer.read(text, reply.end is not None)
    reply.end = "stop" if reply.answer.stopped else reply.end
    return new
