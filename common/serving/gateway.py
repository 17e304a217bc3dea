"""The gateway: a FastAPI app that checks, counts, assigns, relays and records. It holds no model."""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from common.serving import chat
from common.serving.engine import Engine
from common.serving.limits import Limits, RateLimit, Refusal, caller, check_host
from common.serving.store import Store, StoreError, UnknownRequest, choose_arm, pseudonym

log = logging.getLogger("common.serving")
AUTO = "auto"  # the model name that leaves the choice to the A/B test
CLIENT_GONE = 499  # the status kept for a request whose client hung up
CORRECTION_LETTERS = 20_000
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FORGET_EVERY = 3600  # seconds


class ClientGone(Exception):
    """The client hung up before its answer began."""


class Metrics:
    """What `/metrics` shows. Labels hold names of models and statuses, never a prompt or a user."""

    def __init__(self, engines: dict[str, Engine]):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("gateway_requests", "Answered requests", ["path", "model", "status"], **own)
        self.seconds = Histogram("gateway_seconds", "Seconds to a whole answer", ["model"], buckets=SECONDS, **own)
        self.first = Histogram("gateway_first_token_seconds", "To the first token", ["model"], buckets=SECONDS, **own)
        self.tokens = Counter("gateway_tokens", "Tokens", ["model", "kind"], **own)
        self.feedback = Counter("gateway_feedback", "Feedback that was kept", ["model", "rating"], **own)
        self.lost = Counter("gateway_records_lost", "Requests that the store could not keep", **own)
        self.running = Gauge("gateway_running", "Requests at the engine now", ["model"], **own)
        self.waiting = Gauge("gateway_waiting", "Requests that wait for a place", ["model"], **own)
        self.restarts = Gauge("gateway_engine_restarts", "How often the engine was started again", ["model"], **own)
        self.up = Gauge("gateway_engine_ready", "1 while the engine answers", ["model"], **own)
        for name, engine in engines.items():
            self.running.labels(name).set_function(lambda engine=engine: engine.slots.running)
            self.waiting.labels(name).set_function(lambda engine=engine: engine.slots.waiting)
            self.restarts.labels(name).set_function(lambda engine=engine: engine.restarts)
            self.up.labels(name).set_function(lambda engine=engine: engine.ready.is_set())


@dataclass
class Gateway:
    """All that one gateway knows. `weights` are the shares of the A/B test, by model."""

    engines: dict[str, Engine]
    weights: dict[str, float]
    store: Store
    keys: dict[bytes, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    experiment: str = "default"
    retention_days: float = 30.0
    log_prompts: bool = False

    def __post_init__(self):
        self.rate, self.metrics = RateLimit(self.limits.requests_per_minute), Metrics(self.engines)
        self.started = int(time.time())

    def admit(self, request: Request, counted: bool = True) -> str:
        """The caller's name. Raises: Refusal 401 (key), 403 (host), 429 (rate)."""
        if not self.keys:
            check_host(request.headers.get("host"))
        name = caller(self.keys, request.headers.get("authorization"))
        if counted:
            self.rate.take(name)
        return name

    def assign(self, wanted: str | None, user: str | None) -> tuple[str, bool]:
        """(model, by the A/B test?). A user always gets the same one; without a user id chance decides each time.

        Raises: Refusal (404) for an unknown model.
        """
        if wanted in (None, AUTO):
            return choose_arm(user or random.randbytes(16).hex(), self.weights), True
        if wanted not in self.engines:
            names = ", ".join([*self.engines, AUTO])
            raise Refusal(404, "model_not_found", f"No model {wanted[:80]!r} here. Choose one of: {names}.", "model")
        return wanted, False

    async def forget(self) -> None:
        """Removes old texts now and every hour, until cancelled."""
        while True:
            try:
                await asyncio.wrap_future(self.store.forget(self.retention_days))
            except StoreError as error:
                log.warning("old texts were not removed: %s", error)
            await asyncio.sleep(FORGET_EVERY)


@dataclass
class Exchange:
    """One chat request on its way: what came, what was decided, what was answered so far."""

    gateway: Gateway
    request: chat.ChatRequest
    caller: str
    model: str
    assigned: bool
    user: str | None
    started: float  # time.monotonic()
    status: int = 200
    text: list[str] = field(default_factory=list)
    reason: str | None = None
    usage: dict = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    first_token_seconds: float | None = None

    def __post_init__(self):
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", time.time()
        assigned = str(self.assigned).lower()
        self.headers = {"x-request-id": self.id, "x-lab-model": self.model, "x-lab-assigned": assigned}

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece. The exchange is recorded before this ends, however it ends."""
        engine, deadline = self.gateway.engines[self.model], self.started + self.gateway.limits.timeout
        written = None
        try:
            tokens = engine.room(self.request)
            async with aclosing(engine.answer(self.request, tokens, deadline)) as answer:
                async for piece in answer:
                    if "text" in piece:
                        if self.first_token_seconds is None:
                            self.first_token_seconds = time.monotonic() - self.started
                        self.text.append(piece["text"])
                        yield piece["text"]
                    else:
                        self.reason, self.usage = piece["reason"], piece["usage"] or self.usage
            written = self.record()
        except Refusal as refusal:
            self.status = refusal.status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.status = CLIENT_GONE
            raise
        except Exception:
            self.status = 500
            raise
        finally:
            if written is None:
                self.record()
        await written  # feedback on this answer may come at once: the store must know it by then

    def record(self) -> asyncio.Future:
        """Counts the exchange and hands it to the store. A store that fails loses the record, never the answer."""
        metrics, seconds = self.gateway.metrics, time.monotonic() - self.started
        metrics.requests.labels("chat", self.model, str(self.status)).inc()
        if self.status == 200:
            metrics.seconds.labels(self.model).observe(seconds)
            metrics.first.labels(self.model).observe(self.first_token_seconds or seconds)
        for kind in ("prompt", "completion"):
            metrics.tokens.labels(self.model, kind).inc(self.usage.get(f"{kind}_tokens") or 0)
        log.info("%s %s %s %d %.3f s", self.id, self.caller, self.model, self.status, seconds)
        if self.gateway.log_prompts:
            log.info("%s %r -> %r", self.id, self.request.messages, "".join(self.text))
        done = asyncio.get_running_loop().create_future()
        if self.status == 429:  # keeps the store from growing under a flood
            done.set_result(None)
            return done
        future = self.gateway.store.add_request(
            id=self.id, created=self.created, caller=self.caller, user=self.user, model=self.model,
            experiment=self.gateway.experiment, assigned=int(self.assigned), status=self.status,
            messages=self.request.messages, answer="".join(self.text), finish_reason=self.reason,
            prompt_tokens=self.usage.get("prompt_tokens"), completion_tokens=self.usage.get("completion_tokens"),
            seconds=seconds, first_token_seconds=self.first_token_seconds,
        )  # fmt: skip
        wrapped = asyncio.wrap_future(future)
        wrapped.add_done_callback(lambda kept: self._kept(kept, done))
        return done

    def _kept(self, kept: asyncio.Future, done: asyncio.Future) -> None:
        if not kept.cancelled() and (error := kept.exception()):
            self.gateway.metrics.lost.inc()
            log.error("%s was answered but not recorded: %s", self.id, error)
        if not done.done():
            done.set_result(None)

    async def whole(self) -> dict:
        """The answer in one piece."""
        async with aclosing(self.pieces()) as pieces:
            text = "".join([piece async for piece in pieces])
        return chat.completion(self.id, self.model, text, self.reason, self.usage)

    async def events(self, pieces: AsyncIterator[str], first: str | None) -> AsyncIterator[bytes]:
        """The answer as server-sent events, from its first piece on. A failure on the way is an event too."""
        head = self.id, self.model, int(self.created)
        try:
            yield chat.chunk(*head, {"role": "assistant", "content": ""})
            if first is not None:
                yield chat.chunk(*head, {"content": first})
            async for piece in pieces:
                yield chat.chunk(*head, {"content": piece})
            yield chat.chunk(*head, {}, self.reason)
            if self.request.include_usage:
                yield chat.usage_chunk(*head, self.usage)
            yield b"data: [DONE]\n\n"
        except Refusal as refusal:
            yield chat.event(refusal.body)


class EventStream(StreamingResponse):
    """A streamed response that closes its source, begun or not: a client that hangs up frees its place at once."""

    def __init__(self, events: AsyncIterator[bytes], source: AsyncIterator[str], headers: dict):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.source = source

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.source), aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Coroutine):
    """The result of `work`, which is cancelled if the client hangs up first. Raises: ClientGone."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def read_body(request: Request) -> bytes:
    """The body of a JSON request. Raises: Refusal (415): a form, which any web page may send, is not read."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "unsupported_media_type", "Send JSON, with the header 'Content-Type: application/json'.")
    return await request.body()


def build_app(gateway: Gateway) -> FastAPI:
    """The app. Its lifespan starts the engines and ends them after the last answer."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        tasks = [asyncio.create_task(engine.supervise()) for engine in gateway.engines.values()]
        tasks.append(asyncio.create_task(gateway.forget()))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gateway.store.close()

    app = FastAPI(
        title="Gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        max_body_size=gateway.limits.body_bytes, telemetry={"tracing": False, "metrics": False},
    )  # fmt: skip

    def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        if not getattr(request.state, "exchange", None):  # an exchange counts itself
            gateway.metrics.requests.labels(request.scope.get("counted_as", "other"), "", str(refusal.status)).inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal):
        return refuse(request, refusal)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, gone: ClientGone):
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        messages = {
            404: f"No {request.url.path[:80]} here. See POST /v1/chat/completions, GET /v1/models, POST /v1/feedback.",
            405: f"{request.url.path[:80]} does not take {request.method}.",
            413: f"The body is larger than {gateway.limits.body_bytes} bytes. Send less.",
        }
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        status = error.status_code
        return refuse(request, Refusal(status, codes.get(status, "error"), messages.get(status, str(error.detail))))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return refuse(request, Refusal(500, "internal_error", "The gateway failed on this request; its log says why."))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        started, request.scope["counted_as"] = time.monotonic(), "chat"
        name = gateway.admit(request)
        asked = chat.read_chat(await read_body(request), gateway.limits)
        user = pseudonym(gateway.experiment, asked.user) if asked.user else None
        model, assigned = gateway.assign(asked.model, user)
        gateway.engines[model].check_options(asked.options)
        exchange = Exchange(gateway, asked, name, model, assigned, user, started)
        request.state.exchange = exchange
        if not asked.stream:
            return JSONResponse(await while_connected(request, exchange.whole()), headers=exchange.headers)
        pieces = exchange.pieces()
        first = await while_connected(request, anext(pieces, None))  # errors until here have a status of their own
        return EventStream(exchange.events(pieces, first), pieces, exchange.headers)

    @app.get("/v1/models")
    async def models(request: Request):
        gateway.admit(request)
        own = {"object": "model", "created": gateway.started, "owned_by": "course"}
        return {"object": "list", "data": [{"id": name, **own} for name in [*gateway.engines, AUTO]]}

    @app.post("/v1/feedback")
    async def feedback(request: Request):
        request.scope["counted_as"] = "feedback"
        name = gateway.admit(request)
        given = read_feedback(chat.read_object(await read_body(request)))
        try:
            model = await asyncio.wrap_future(gateway.store.add_feedback(caller=name, **given))
        except UnknownRequest as error:
            raise Refusal(
                404, "unknown_request", "No such answer was given to this key. Send the id of an answer.", "request_id"
            ) from error
        except StoreError as error:
            advice = "Free some space, or raise --store-megabytes." if error.full else "Send it again later."
            status = 507 if error.full else 503
            raise Refusal(status, "not_kept", f"{error} {advice} Answers go on.", retry_after=30) from error
        gateway.metrics.feedback.labels(model, str(given["rating"])).inc()
        gateway.metrics.requests.labels("feedback", model, "200").inc()
        return {"object": "feedback", "request_id": given["request_id"], "kept": True}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/ready")
    async def ready():
        states = {name: "ready" if engine.ready.is_set() else "starting" for name, engine in gateway.engines.items()}
        fine = all(state == "ready" for state in states.values())
        return JSONResponse({"ready": fine, "engines": states}, 200 if fine else 503)

    @app.get("/metrics")
    async def metrics(request: Request):
        gateway.admit(request, counted=False)
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def read_feedback(given: dict) -> dict:
    """The checked feedback of a request's body. Raises: Refusal (400)."""
    if unknown := set(given) - {"request_id", "rating", "consent", "correction"}:
        raise Refusal(400, "unknown_parameter", f"Feedback has no {sorted(unknown)[0][:60]!r}. Leave it out.")
    if not isinstance(given.get("request_id"), str):
        raise chat.wrong("request_id", "request_id must be the id of an answer: chatcmpl-….")
    ratings = {"up": 1, "down": -1}
    if given.get("rating") not in ratings:
        raise chat.wrong("rating", "rating must be \"up\" or \"down\".")
    if not isinstance(given.get("consent", False), bool):
        raise chat.wrong("consent", "consent must be true or false: may this be used to train the next model?")
    correction = given.get("correction")
    if correction is not None and not (isinstance(correction, str) and len(correction) <= CORRECTION_LETTERS):
        raise chat.wrong("correction", f"correction must be a better answer, at most {CORRECTION_LETTERS} letters.")
    return {
        "request_id": given["request_id"], "rating": ratings[given["rating"]],
        "consent": given.get("consent", False), "correction": correction,
    }  # fmt: skip
