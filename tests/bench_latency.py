"""How long an answer to a spoken question takes, part by part, and a cascade's beside it.

    just bench latency                               (the demo's chosen epoch, about 5 minutes)
    just bench latency checkpoint=FOLDER clients=[1,4] requests=8

Keys: every one of stages.serve, and seconds=[2,5,10] (of the questions), clients=[1,4,16] (that
ask at once), requests=16 (of each), whisper_cascade=FILE (a Whisper; the cascade's row is left out
where it is not there), base=FOLDER (what the cascade asks). Parts of the server's rows are those
that it states: decode (upload to waveform), encode (waveform to prompt, mel included), queue, first
token, rest. Medians, and in brackets 95th percentiles, in milliseconds. In the cascade the Whisper
transcribes one clip after another, then the base model answers its words on the same engine.
"""

import base64
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speechfuse import config
from speechfuse.audio import decoding, espeak_ng
from speechfuse.evals import generation
from speechfuse.quantizer import decoder
from speechfuse.serve.config import Serve
from speechfuse.serve.engine import Asked, Engine
from speechfuse.serve.protocol import Chat
from tests.test_serve import Served

PARTS = ("decode", "encode", "queue", "first_token", "rest", "whole")
WORDS = "what is three plus four and then what is the capital of france and what does a dog say "
OWN = {
    "seconds": [2, 5, 10],
    "clients": [1, 4, 16],
    "requests": 16,
    "whisper_cascade": "models/tiny.en.pt",
    "base": "recipes/demo/models/base",
}


def question(seconds: float) -> bytes:
    """A wav of speech, cut to so many seconds."""
    with espeak_ng.EspeakLibrary() as engine:
        voice = espeak_ng.EspeakVoice("en-us+Annie", 170, 50)
        waveform = espeak_ng.speak(engine, WORDS * 3, voice).waveform
    return decoding.encode(waveform[: int(seconds * decoding.SAMPLE_RATE)], "WAV")


def ask(port: int, wav: bytes) -> tuple[HTTPResponse, dict[str, Any]]:
    audio = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]})
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = json.loads(response.read())
    connection.close()
    return response, said


class Cascade:
    def __init__(self, whisper: Path, base: str, most: int) -> None:
        self.whisper, self.most = decoder.load_whisper(whisper), most
        self.engine = Engine(generation.generator(Path(base), None, "text"), 16)
        self.lock = threading.Lock()

    def __call__(self, wav: bytes) -> dict[str, float]:
        began = time.perf_counter()
        waveform = decoding.decode(wav).waveform
        decoded = time.perf_counter()
        with self.lock:
            turn = time.perf_counter()
            heard = decoder.transcribe_audio(self.whisper, waveform, "en")
        ready, ended = time.perf_counter(), threading.Event()
        turns = [{"role": "user", "segments": [{"text": heard}]}]
        chat = Chat("", [], self.most)
        ids = self.engine.generator.prompt(turns)
        asked = Asked(ids, chat, lambda event: None if isinstance(event, int) else ended.set())
        self.engine.ask(asked)
        ended.wait()
        now = time.perf_counter()
        spans = decoded - began, ready - turn, turn - decoded + asked.began - ready
        rest = asked.first - asked.began, now - asked.first, now - began
        return dict(zip(PARTS, [*spans, *rest], strict=True))


def main(arguments: list[str]) -> None:
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in OWN}
    given: dict[str, Any] = OWN | {key: yaml.safe_load(value) for key, value in own.items()}
    others = [a for a in arguments if a.partition("=")[0] not in OWN]
    job = config.load(Serve, Path("recipes/demo/serve.yaml"), [*others, "queue=1000"])
    server = Served(job)
    parameters = server.first()[0].generator.model.parameters()
    size = sum(parameter.numel() for parameter in parameters)
    kinds = {
        f"tokens ({size / 1e6:.1f} M)": lambda wav: ask(server.port, wav)[1]["speechfuse"][
            "seconds"
        ]
    }
    if (whisper := Path(given["whisper_cascade"])).is_file():
        kinds["cascade (37 M and 1.5 M)"] = Cascade(whisper, given["base"], job.max_new_tokens)
    print("| model | question | clients |", " | ".join(PARTS), "|")
    print("|" + "---|" * (3 + len(PARTS)))
    for seconds in given["seconds"]:
        wav = question(seconds)
        for name, timed in kinds.items():
            timed(wav)  # the first fills caches
            for clients in given["clients"]:
                with ThreadPoolExecutor(clients) as pool:
                    found = [*pool.map(timed, [wav] * max(clients, given["requests"]))]
                cells = []
                for part in PARTS:
                    each = 1000 * np.array([row.get(part, 0.0) for row in found])
                    cells.append(f"{np.median(each):.0f} ({np.percentile(each, 95):.0f})")
                print(f"| {name} | {seconds} s | {clients} |", " | ".join(cells), "|", flush=True)
    server.close()


if __name__ == "__main__":
    main(sys.argv[1:])
