"""A small server that speaks OpenAI's speech and transcription protocol, for tests.

    with SpeechServer() as server:      # server.url, e.g. http://127.0.0.1:40123/v1
        server.faults = ["429", "500", "slow", "truncated"]     # what the next requests get

Its voices are espeak-ng's; a voice it lacks is a 400. What it hears is what `hears` says of the
audio's bytes, by default the text that it last spoke to those bytes.
"""

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import soundfile

from speechfuse.audio import decoding
from speechfuse.synthesis.engines.espeak import Espeak

VOICES = {"alloy": "en-us+Annie", "echo": "en-us+m3"}
KEY = "sk-of-the-test"


class SpeechServer:
    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.faults: list[str] = []
        self.slow = 1.0  # seconds
        self.retry_after = 0.05  # seconds, of a 429 or a 500
        self.keys: list[str | None] = []  # the Authorization header of every request
        self.headers: list[dict[str, str]] = []
        self.log: list[dict[str, Any]] = []  # the body of every speech request
        self.spoken: dict[str, str] = {}  # sha256 of a clip's samples: its text
        self.hears: Callable[[bytes], str | tuple[int, bytes]] = self._heard
        self._espeak, self._lock = Espeak(["Annie"]), threading.Lock()

    def __enter__(self) -> "SpeechServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def speak(self, text: str, voice: str) -> bytes:
        with self._lock:
            waveform = self._espeak.speak(text, VOICES[voice], 0).waveform
        file = io.BytesIO()
        soundfile.write(file, waveform, decoding.SAMPLE_RATE, format="WAV")
        self.spoken[_digest(file.getvalue())] = text
        return file.getvalue()

    def _heard(self, wav: bytes) -> str:
        return self.spoken.get(_digest(wav), "")


def _digest(wav: bytes) -> str:
    return hashlib.sha256(soundfile.read(io.BytesIO(wav), dtype="int16")[0].tobytes()).hexdigest()


def _handler(server: SpeechServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = server.faults.pop(0) if server.faults else ""
            server.keys.append(self.headers.get("Authorization"))
            server.headers.append({name.lower(): of for name, of in self.headers.items()})
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.answer(401, _error("Incorrect API key provided"))
            elif fault in ("429", "500"):
                self.answer(
                    int(fault), _error(f"fault {fault}"), {"Retry-After": str(server.retry_after)}
                )
            elif self.path == "/v1/audio/speech":
                self.speech(json.loads(body), fault)
            elif self.path == "/v1/audio/transcriptions":
                start = body.index(b"RIFF")
                size = 8 + int.from_bytes(body[start + 4 : start + 8], "little")
                heard = server.hears(body[start : start + size])
                if isinstance(heard, str):
                    heard = 200, json.dumps({"text": heard}).encode()
                self.answer(*heard)
            else:
                self.answer(404, _error("no such path"))

        def speech(self, request: dict[str, Any], fault: str) -> None:
            server.log.append(request)
            if request["voice"] not in VOICES:
                self.answer(400, _error(f"voice {request['voice']} is not known"))
                return
            content = server.speak(request["input"], request["voice"])
            if fault == "slow":
                time.sleep(server.slow)
            if fault == "truncated":  # of the audio: the HTTP is whole
                content = content[: len(content) // 2]
            if fault == "broken":  # of the HTTP: the connection ends before its content does
                self.answer(200, content, {"Content-Length": str(2 * len(content))})
                self.close_connection = True
                return
            self.answer(200, b"no audio" if fault == "text" else content)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()
