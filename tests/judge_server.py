"""A small server that speaks OpenAI's chat completions, for tests of judges.

    with JudgeServer({"the answer's text": ["Rating: 2"]}) as server:      # server.url
        ...

`script`: a text -> what to reply to the prompts that hold it, one step a request, the last for all
later ones. A step is the reply's text, or a `Step`. Prompts that hold no text of the script get
`default`. `server.log` has the body of every request, in order.
"""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Step:
    """`body` replaces the whole answer; `delay` is seconds before it."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None
    finish_reason: str = "stop"


LIMITED = Step("slow down", 429, {"Retry-After": "0.05"})
BROKEN = Step("oh no", 500, {"Retry-After": "0.05"})


class JudgeServer:
    def __init__(
        self,
        script: dict[str, list[str | Step]] | None = None,
        default: str | Step = '{"explanation": "fine", "rating": 3}',
        key: str = "a-key",
    ) -> None:
        self.script, self.default, self.key = script or {}, default, key
        self.log: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def step(self, body: dict[str, Any]) -> Step:
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.log.append(body)
            for text, steps in self.script.items():
                if text in prompt:
                    step = steps.pop(0) if len(steps) > 1 else steps[0]
                    break
            else:
                step = self.default
        return step if isinstance(step, Step) else Step(step)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if request.headers["Authorization"] != f"Bearer {self.key}":
            step = Step(f"no such key: {request.headers['Authorization']}", 401)
        elif request.path != "/v1/chat/completions":
            step = Step("no such path", 404)
        else:
            step = self.step(body)
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(step.delay)
        with self._lock:
            self.at_once -= 1
        data = step.body if step.body is not None else json.dumps(self.completion(step)).encode()
        try:
            request.send_response(step.status)
            for name, value in {"Content-Type": "application/json", **step.headers}.items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait

    def completion(self, step: Step) -> dict[str, Any]:
        if step.status != 200:
            return {"error": {"message": step.text, "type": "test", "code": None}}
        message = {"role": "assistant", "content": step.text}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "test",
            "choices": [{"index": 0, "message": message, "finish_reason": step.finish_reason}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
