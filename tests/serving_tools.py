"""A gateway in this process with a fake engine behind it, and a tiny model to serve; nothing here
is under test.
"""

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import iter_route_contexts

from deploy.serving.app import build_app
from deploy.serving.engine import Engine
from deploy.serving.gateway import Gateway
from deploy.serving.guard import SERVER
from deploy.serving.limits import Limits, read_keys
from deploy.serving.start import wait_for
from deploy.serving.store import Store

ASK = {"model": "auto", "messages": [{"role": "user", "content": "What is the kettle for?"}]}
WORDS = [" Boil", " water", " with", " it", "."]

CLIENT = httpx.Client(trust_env=False, timeout=20)
FOREIGN = {  # what a browser sends for a page of another site, or of another port
    "a form": {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
    "an older browser": {"origin": "http://evil.example"},
    "a sandboxed frame": {"origin": "null"},
    "an image": {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"},
    "another port": {"origin": "http://127.0.0.1:1", "sec-fetch-site": "same-site"},
}


def addresses(app) -> list[tuple[str, str]]:
    """(method, path) of every address, also those of mounted apps; and some that are not there."""
    found = [
        ("GET", "/"),
        ("GET", "/nothing"),
        ("POST", "/v1/feedback/"),
        ("OPTIONS", "/v1/models"),
    ]
    for route in iter_route_contexts(app.routes):
        if methods := getattr(route, "methods", None):
            path = re.sub(r"[{}]", "", route.path)
            found += [(method, path) for method in methods]
        elif hasattr(route, "app"):
            found += addresses(route.app)
    return found


def status(root: str, method: str, path: str, headers: dict) -> int:
    """Of a request without a body. Redirects are not followed."""
    return CLIENT.request(method, root + path, headers=headers).status_code


@contextmanager
def running(app, **settings):
    """The app on a free port, in a thread, with the settings of the real servers unless others are
    given; gives its address.
    """
    ours = SERVER | {"log_config": None, "timeout_graceful_shutdown": 10}
    config = uvicorn.Config(app, port=0, **ours | settings)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive(), 20, "server")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def text_event(text: str) -> str:
    """A piece of an answer as the engine streams it."""
    piece = {"choices": [{"delta": {"content": text}, "index": 0}]}
    return f"data: {json.dumps(piece)}\n\n"


@dataclass
class FakeEngine:
    """An engine that answers `WORDS`. What it does wrong, how slowly, and what it saw, is set and
    read by a test.
    """

    seconds: float = 0.0  # before each word
    fault: str | None = (
        None  # "cut", "error event", "nonsense", "endless line", "flood", "status 500", …
    )
    started: int = 0
    finished: int = 0
    cancelled: int = 0
    most: int = 0  # at the same time
    sent: int = 0  # bytes of a "flood"
    bodies: list = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI(telemetry={"tracing": False})

        @app.get("/v1/models")
        async def models():
            return {"data": []}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            self.bodies.append(await request.json())
            if (self.fault or "").startswith("status"):
                return JSONResponse({"detail": "no"}, int(self.fault.split()[1]))
            return StreamingResponse(self.words(), media_type="text/event-stream")

        return app

    async def words(self):
        self.started += 1
        self.most = max(self.most, self.started - self.finished - self.cancelled)
        try:
            for at, word in enumerate(WORDS):
                await asyncio.sleep(self.seconds)
                if at == 2 and self.fault == "cut":
                    break
                if at == 2 and self.fault == "error event":
                    yield 'data: {"error": "out of memory"}\n\n'
                if at == 2 and self.fault == "nonsense":
                    yield "data: <html>\n\n"
                if at == 2 and self.fault == "endless line":
                    yield "x" * 1_100_000
                while at == 2 and self.fault == "flood":  # words without an end
                    yield text_event("x" * 100_000)
                    self.sent += 100_000
                    await asyncio.sleep(0)
                yield text_event(word)
            else:
                usage = {
                    "prompt_tokens": 7,
                    "completion_tokens": len(WORDS),
                    "total_tokens": 7 + len(WORDS),
                }
                end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}
                yield f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n"
            self.finished += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


@dataclass
class Bench:
    """A gateway under test."""

    root: str
    gateway: Gateway
    store: Path

    @property
    def slots(self):
        return next(iter(self.gateway.engines.values())).slots

    def post(self, path: str = "chat/completions", **settings) -> httpx.Response:
        settings = {"timeout": 30, **settings}
        return httpx.post(f"{self.root}/v1/{path}", trust_env=False, **settings)


@contextmanager
def gateway(
    folder: Path,
    *fakes: FakeEngine,
    keys: str = "",
    weights=None,
    max_bytes: int = 10**8,
    names="abc",
    server: dict | None = None,
    **limits,
):
    """A gateway in this process before these fake engines, called a, b, …; gives a Bench. `server`:
    settings of its uvicorn.
    """
    names = names[: len(fakes)]
    settings = replace(Limits(requests_per_minute=10**6, timeout=20), **limits)
    with ExitStack() as stack:
        urls = [stack.enter_context(running(fake.app())) for fake in fakes]
        engines = {
            name: Engine(name, settings, url=url) for name, url in zip(names, urls, strict=True)
        }
        store = folder / "store.sqlite"
        shares = weights or dict.fromkeys(names, 1.0)
        bench = Gateway(engines, shares, Store(store, max_bytes), read_keys(keys), settings)
        root = stack.enter_context(running(build_app(bench), **(server or {})))
        wait_for(
            lambda: all(engine.ready.is_set() for engine in engines.values()), 20, "fake engine"
        )
        yield Bench(root, bench, store)


def open_stream(bench, receive: int = 0, **more) -> socket.socket:
    """A streaming request on a bare socket, which a test can hang up. `receive`: the size of its
    buffer.
    """
    body = json.dumps({**ASK, "stream": True, **more}).encode()
    host, port = bench.root.removeprefix("http://").split(":")
    line = socket.socket()
    if receive:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    line.settimeout(20)
    line.connect((host, int(port)))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return line


CONTEXT = 512  # tokens: long enough that an answer without an end takes a while


def save_chat_model(folder: Path) -> None:
    """A small GPT-2 with random weights, large enough that its greedy answers differ by prompt;
    some of them end.

    Bytes that are no ASCII letter have no embedding, so that it never says half a letter.
    """
    import torch
    from tiny import gpt2, tokenizer

    words = tokenizer()
    model = gpt2(torch.float32, vocabulary=len(words), positions=CONTEXT, width=64)
    broken = [at for at in range(len(words)) if not words.decode([at]).isascii()]
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = 0
        model.get_input_embeddings().weight[words.eos_token_id] *= 1.4
    end, pad = words.eos_token_id, words.pad_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.bos_token_id, config.pad_token_id = end, end, pad
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def until(found, what: str, seconds: float = 20):
    """`wait_for` under a shorter name."""
    return wait_for(found, seconds, what)


def now() -> float:
    return time.monotonic()
