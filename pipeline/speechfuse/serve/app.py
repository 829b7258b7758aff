"""The server: routes, who may ask, and what a reply looks like.

In: a Serve job. Out: OpenAI's /v1/chat/completions, /v1/audio/transcriptions and /v1/models,
/health, /metrics, and at / a page to talk to it. It ends at SIGTERM, once open requests are
answered. Any web page can send to a local port: names of hosts that it was not told of are refused,
and requests that a page of another origin makes.
"""

import asyncio
import base64
import hmac
import json
import os
import ssl
import sys
import time
import uuid
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from speechfuse.audio import decoding, espeak_ng
from speechfuse.serve.answers import BUSY, Answers, Replies, Reply
from speechfuse.serve.config import Serve
from speechfuse.serve.protocol import Chat, Clip, Refused, read_chat

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", **{f"/{name}": name for name in ("talk.js", "recorder.js", "talk.css")}}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; media-src blob:; "
POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
HEADERS |= {"Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}
DRAIN = 15.0  # seconds that open requests have at the end, and once more when they are broken off
LOCAL = {"localhost", "127.0.0.1", "::1"}
ANSWERS: web.AppKey[Answers] = web.AppKey("answers", Answers)


def application(job: Serve) -> web.Application:
    """Return the server of a job. Raises ValueError and FileNotFoundError for a checkpoint or a
    report that is not there."""
    app = web.Application(middlewares=[_guarded], client_max_size=job.megabytes << 20)
    app[ANSWERS] = Answers(job)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_post("/v1/audio/transcriptions", transcribe)
    shown = {"/v1/models": models, "/health": health, "/metrics": metrics, "/examples": examples}
    for path, handler in {**shown, **dict.fromkeys(FILES, page)}.items():
        app.router.add_get(path, handler)
    app.cleanup_ctx.append(_running)
    return app


def run(job: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError for what is no certificate."""
    tls = None
    if job.tls_cert or job.tls_key:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(job.tls_cert or "", job.tls_key)
        except OSError as error:
            given = f"tls_cert={job.tls_cert} and tls_key={job.tls_key}"
            raise ValueError(f"{given} are no certificate and its key, PEM: {error}") from None
    url = f"http{'s' if tls else ''}://{job.host}:{job.port}"

    def said(_: str) -> None:
        print(f"talk to it at {url}; clients of OpenAI's protocol take {url}/v1", flush=True)
        if job.open:
            webbrowser.open(url)

    more: dict[str, Any] = {"handler_cancellation": True, "access_log": None, "print": said}
    more["shutdown_timeout"] = DRAIN
    web.run_app(application(job), host=job.host, port=job.port, ssl_context=tls, **more)
    sys.stdout.flush()
    os._exit(0)  # without waiting for a checkpoint that is being loaded


async def _running(app: web.Application) -> AsyncIterator[None]:
    answers = app[ANSWERS]
    await answers.decoders.start()

    async def load() -> None:
        try:
            await answers.get(answers.first)
        except Refused:  # it is said why
            sys.exit(2)

    task = asyncio.create_task(load())
    yield
    task.cancel()
    await answers.decoders.close()


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse who may not ask; answer errors with the protocol's own object."""
    answers, posts, refused = request.app[ANSWERS], request.method == "POST", None
    answers.open += posts
    try:
        _check(answers.job, request)
        if posts and answers.open > answers.job.queue:
            raise Refused(BUSY, status=429, code="busy", wait=1)
        response = await handler(request)
    except Refused as error:
        refused = error
    except web.HTTPRequestEntityTooLarge:
        refused = Refused(f"more than {answers.job.megabytes} MB", status=413)
    except web.HTTPException as error:
        refused = Refused(f"{error.reason}: {request.method}", status=error.status)
    except Exception as error:
        print(f"{request.path}: {type(error).__name__}: {error}", flush=True)
        refused = Refused("the server made a mistake; its log says which", status=500)
    finally:
        answers.open -= posts
    if refused:
        headers = refused.headers
        response = web.json_response(refused.body, status=refused.status, headers=headers)
    answers.counts[f'requests_total{{status="{response.status}"}}'] += 1
    if not response.prepared:
        response.headers.update(HEADERS)
    return response


def _check(job: Serve, request: web.Request) -> None:
    host = urlsplit(f"//{request.headers.get('Host', '')}")
    if host.hostname not in {*LOCAL, job.host, *job.hosts}:
        raise Refused("a host that it was not told of: start it with hosts=[NAME]", status=403)
    origin = request.headers.get("Origin")
    foreign = origin is not None and urlsplit(origin).netloc != host.netloc
    if foreign or request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        raise Refused("a page of another origin may not ask", status=403)
    key = os.environ.get(job.key_variable, "").strip()
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    asks = request.path.startswith("/v1/") or request.path == "/metrics"
    if key and asks and not hmac.compare_digest(given.encode(), key.encode()):
        raise Refused("the key is missing or wrong", status=401, code="invalid_api_key")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused("a compressed body is not taken", status=415)


async def complete(request: web.Request) -> web.StreamResponse:
    if request.content_type != "application/json":
        raise Refused("Content-Type is to be application/json", status=415)
    answers = request.app[ANSWERS]
    asked = read_chat(await request.read(), answers.job.max_new_tokens)
    stamp = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    stamp["model"] = asked.model or answers.first
    if asked.stream:
        async with aclosing(answers.reply(asked)) as replies:
            return await _stream(request, asked.usage, stamp, replies)
    reply = await _whole(answers.reply(asked))
    message = {"role": "assistant", "content": reply.answer.text, "heard": reply.answer.heard}
    choice = {"index": 0, "message": message, "finish_reason": reply.end, "logprobs": None}
    whole = {"object": "chat.completion", "choices": [choice], "usage": reply.usage()}
    return web.json_response(stamp | whole | {"speechfuse": _more(reply)})


async def _stream(
    request: web.Request, usage: bool, stamp: dict[str, Any], replies: Replies
) -> web.StreamResponse:
    """Send server-sent events: with the first the codes, with the last the seconds. What is wrong
    before the first is an error object of its own status, later an event."""
    response = web.StreamResponse(headers=HEADERS | {"Content-Type": "text/event-stream"})

    async def send(delta: dict[str, Any], end: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}
        event = stamp | {"object": "chat.completion.chunk", "choices": [choice]} | more
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    reply, _ = await anext(replies)
    await response.prepare(request)
    await send({"role": "assistant", "content": ""}, speechfuse=_more(reply))
    heard = None
    try:
        async for reply, new in replies:
            delta = {"content": new} if new else {}
            if heard != reply.answer.heard:
                delta["heard"] = heard = reply.answer.heard or ""
            if delta:
                await send(delta)
        await send({}, reply.end, speechfuse=_more(reply))
        if usage:
            await send({}, choices=[], usage=reply.usage())
        await response.write(b"data: [DONE]\n\n")
    except Refused as refused:
        await response.write(f"data: {json.dumps(refused.body)}\n\n".encode())
    except ConnectionError:
        pass  # the client has gone
    return response


def _more(reply: Reply) -> dict[str, Any]:
    seconds = {part: round(value, 6) for part, value in reply.seconds.items()}
    return {"codes": reply.codes, "seconds": seconds}


async def transcribe(request: web.Request) -> web.Response:
    if request.content_type != "multipart/form-data":
        raise Refused("Content-Type is to be multipart/form-data", status=415)
    answers = request.app[ANSWERS]
    try:
        fields = await request.post()
    except (ValueError, AssertionError):
        raise Refused("this form cannot be read") from None
    if not isinstance(file := fields.get("file"), web.FileField):
        raise Refused("file is missing", "file")
    if fields.get("response_format", "json") != "json" or fields.get("stream", "false") != "false":
        raise Refused("response_format is json, and not streamed", "response_format")
    said: list[str | Clip] = [answers.job.transcribe, Clip(file.file.read())]
    most = 8 * answers.job.max_new_tokens
    chat = Chat(str(fields.get("model", "")), [("user", [x for x in said if x])], most)
    reply = await _whole(answers.reply(chat))
    text = reply.answer.heard or reply.answer.text
    return web.json_response({"text": text, "usage": {"type": "tokens"} | reply.usage()})


async def _whole(replies: Replies) -> Reply:
    return [reply async for reply, _ in replies][-1]


async def models(request: web.Request) -> web.Response:
    names = request.app[ANSWERS].names
    every = [{"id": n, "object": "model", "created": 0, "owned_by": "speechfuse"} for n in names]
    return web.json_response({"object": "list", "data": every})


async def health(request: web.Request) -> web.Response:
    ready = request.app[ANSWERS].first in request.app[ANSWERS].loaded
    said = {"status": "ok" if ready else "loading"}
    return web.json_response(said, status=200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """What Prometheus reads: counters, and what is open now."""
    answers = request.app[ANSWERS]
    gauges = {"requests_open": answers.open, "checkpoints_loaded": len(answers.loaded)}
    lines = [f"speechfuse_{name} {value:g}" for name, value in gauges.items()]
    lines += [f"speechfuse_{name} {value:g}" for name, value in sorted(answers.counts.items())]
    return web.Response(text="\n".join(lines) + "\n")


async def page(request: web.Request) -> web.FileResponse:
    return web.FileResponse(PAGE / FILES[request.path])


async def examples(request: web.Request) -> web.Response:
    """Return {text: base64 of its wav}."""
    job = request.app[ANSWERS].job
    return web.json_response(await asyncio.to_thread(_spoken, tuple(job.examples), job.voice))


@cache
def _spoken(texts: tuple[str, ...], voice: str) -> dict[str, str]:
    with espeak_ng.EspeakLibrary() as engine:
        sounds = [espeak_ng.speak(engine, x, espeak_ng.EspeakVoice(voice, 170, 50)) for x in texts]
    wavs = [base64.b64encode(decoding.encode(sound.waveform, "WAV")).decode() for sound in sounds]
    return dict(zip(texts, wavs, strict=True))
