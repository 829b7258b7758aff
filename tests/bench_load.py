"""Many clients at once: errors, requests a second, memory, and what the engine gains by batches.

    just bench load                     (the demo's chosen epoch; 3 minutes are its load)
    just bench load seconds=30

16 clients ask a spoken question again and again for `seconds` (180); every reply must be the one
that a client alone gets. RSS is of the server and its children, after a third of the time and at
the end. Then 64 ask at once a server that takes 48: who gets a 429 asks again after Retry-After, as
OpenAI's client does, and all must be answered. Last, the engine alone in this process: tokens a
second of replies of 64 tokens, for one client and for 16.
"""

import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch

from speechfuse.audio import decoding
from speechfuse.serve import checkpoints
from speechfuse.serve.config import Serve
from speechfuse.serve.engine import Asked, Engine
from speechfuse.serve.protocol import Chat
from tests.bench_latency import ask, question
from tests.prove_talk import Server

QUANTIZER, REPORT = "recipes/demo/models/quantizer", Path("out/demo/report.json")


def answer(port: int, wav: bytes) -> tuple[str, int]:
    """Return the answer, or what was wrong; and how often it was told to come again."""
    for again in count():
        response, said = ask(port, wav)
        if response.status == 200:
            return said["choices"][0]["message"]["content"], again
        if response.status != 429:
            return f"{response.status}: {said}", again
        time.sleep(float(response.headers["Retry-After"]))
    raise AssertionError


def memory(server: Server) -> float:
    """Return the MB of a server and its children."""
    first = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in [first, *first.children(True)]) / 1e6


def load(server: Server, wav: bytes, clients: int, seconds: float) -> None:
    alone, _ = answer(server.port, wav)
    found, end = Counter[str](), time.monotonic() + seconds

    def one(_: int) -> None:
        while time.monotonic() < end:
            found[answer(server.port, wav)[0]] += 1

    with ThreadPoolExecutor(clients) as pool:
        asking = pool.map(one, range(clients))
        time.sleep(seconds / 3)
        third = memory(server)
        list(asking)
    last, every = memory(server), found.total()
    print(f"{clients} clients, {seconds:g} s: {every} requests, {every / seconds:.1f} a second,")
    print(f"  {every - found[alone]} other than {alone!r}; RSS {third:.0f} MB after a third,")
    print(f"  {last:.0f} MB at the end: {last / third - 1:+.1%}", flush=True)
    with ThreadPoolExecutor(64) as pool:
        replies = [*pool.map(lambda _: answer(server.port, wav), range(64))]
    told = sum(again for _, again in replies)
    right = sum(said == alone for said, _ in replies)
    print(f"64 clients at once: {right} answered, {told} times a 429 with Retry-After", flush=True)


def generation(wav: bytes, clients: int) -> None:
    chosen = checkpoints.chosen_checkpoint(REPORT)
    listener = checkpoints.load(chosen, Serve(str(REPORT), QUANTIZER), "the question")
    segments = listener.speech(listener.pieces(decoding.decode(wav).waveform))
    ids = listener.generator.prompt([{"role": "user", "segments": segments}])
    engine = Engine(listener.generator, clients)
    engine._ends = ()  # so that all replies are of one length
    chat = Chat("", [], 64)

    def one(_: int) -> None:
        for _ in range(8):
            ended = threading.Event()

            def told(event: Any, ended: threading.Event = ended) -> None:
                if not isinstance(event, int):
                    ended.set()

            engine.ask(Asked(ids, chat, told))
            ended.wait()

    rates = []
    for number in (1, clients):
        began = time.perf_counter()
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(one, range(number)))
        rates.append(number * 8 * chat.most / (time.perf_counter() - began))
    print(f"generation alone, {torch.get_num_threads()} threads: {rates[0]:.0f} tokens a second")
    print(f"  for one client, {rates[1]:.0f} for {clients}: {rates[1] / rates[0]:.1f} times")


def main(arguments: list[str]) -> None:
    seconds = float(dict(each.split("=", 1) for each in arguments).get("seconds", 180))
    wav, server = question(1.3), Server("queue=48")
    server.start()
    load(server, wav, 16, seconds)
    server.end()
    generation(wav, 16)


if __name__ == "__main__":
    main(sys.argv[1:])
