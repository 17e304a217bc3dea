"""The HTTP side of the gateway: a FastAPI app of six addresses, and every failure in OpenAI's error
shape.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from deploy.serving.chat import ChatRequest, Feedback, read
from deploy.serving.gateway import AUTO, CLIENT_GONE, Exchange, Gateway
from deploy.serving.guard import Guard
from deploy.serving.limits import Refusal
from deploy.serving.store import StoreError, UnknownRequest, pseudonym

router = APIRouter()
HUNG_UP = (CLIENT_GONE, "client_gone", "The client hung up.")  # nobody reads this refusal


class EventStream(StreamingResponse):
    """A streamed response that closes its source, begun or not: a client that hangs up frees its
    place at once.

    One that stays but does not read is cut off after `seconds`: it must not hold a place for ever.
    """

    def __init__(self, events: AsyncIterator, source: AsyncIterator, headers: dict, seconds: float):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.source, self.seconds = source, seconds

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.source), aclosing(self.body_iterator):
            with suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await super().__call__(scope, receive, send)


async def while_connected(request: Request, work: Awaitable):
    """The result of `work`, which is cancelled if the client hangs up first: then a Refusal."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        time_out.reschedule(0)  # long ago

    try:
        async with asyncio.timeout(None) as time_out:
            watching = asyncio.create_task(watch())
            try:
                return await work
            finally:
                watching.cancel()
    except TimeoutError:
        raise Refusal(*HUNG_UP) from None


def _gateway(request: Request) -> Gateway:
    """The gateway that this app stands for."""
    return request.app.state.gateway


async def body_of(request: Request, kind: type):
    """The checked body of a JSON request, of which never more than the limit is read.

    Raises: Refusal 413 (too large), 408 (it does not come), 415 (no JSON), 400.
    """
    limits = _gateway(request).limits
    most, seconds = limits.body_bytes, limits.timeout
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        said = "Send JSON, with the header 'Content-Type: application/json'."
        raise Refusal(415, "unsupported_media_type", said)
    body = b""
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    said = f"The body is larger than {most} bytes. Send less."
                    raise Refusal(413, "body_too_large", said)
    except TimeoutError:
        said = f"The body did not come within {seconds:g} s. Send it again."
        raise Refusal(408, "request_timeout", said) from None
    except ClientDisconnect:
        raise Refusal(*HUNG_UP) from None
    return read(kind, body, limits)


@router.post("/v1/chat/completions")
async def post_chat(request: Request):
    """Admits, reads and assigns a request; then the answer, in one piece or streamed."""
    started, request.scope["counted_as"] = time.monotonic(), "chat"
    gateway = _gateway(request)
    name = gateway.admit(request)
    asked = await body_of(request, ChatRequest)
    user = pseudonym(gateway.experiment, asked.asker) if asked.asker else None
    model, assigned = gateway.assign(asked.model, user)
    gateway.engines[model].check_options(asked.options)
    exchange = Exchange(gateway, asked, name, model, assigned, user, started)
    request.state.exchange = exchange
    if not asked.stream:
        answer = await while_connected(request, exchange.whole())
        return JSONResponse(answer, headers=exchange.headers)
    pieces = exchange.pieces()
    # An error before the first piece has a status of its own.
    first = await while_connected(request, anext(pieces, None))
    events, seconds = exchange.events(pieces, first), gateway.limits.timeout + 5
    return EventStream(events, pieces, exchange.headers, seconds)


@router.get("/v1/models")
async def get_models(request: Request):
    """The names that a client may ask for."""
    gateway = _gateway(request)
    gateway.admit(request)
    own = {"object": "model", "created": gateway.started, "owned_by": "course"}
    return {"object": "list", "data": [{"id": name, **own} for name in [*gateway.engines, AUTO]]}


@router.post("/v1/feedback")
async def post_feedback(request: Request):
    """Keeps a thumb on an answer. It is on the disk when this returns."""
    request.scope["counted_as"] = "feedback"
    gateway = _gateway(request)
    name = gateway.admit(request)
    given = await body_of(request, Feedback)
    rating = 1 if given.rating == "up" else -1
    row = (given.request_id, name, rating, given.consent, given.correction)
    try:
        model = await asyncio.wrap_future(gateway.store.add_feedback(*row))
    except UnknownRequest as error:
        said = "No such answer was given to this key. Send the id of an answer."
        raise Refusal(404, "unknown_request", said, "request_id") from error
    except StoreError as error:
        room = "Free some space, or raise --store-megabytes."
        advice = room if error.full else "Try again later."
        status, said = 507 if error.full else 503, f"{error} {advice} Answers go on."
        raise Refusal(status, "not_kept", said, retry_after=30) from error
    gateway.metrics.feedback.labels(model, str(rating)).inc()
    gateway.metrics.requests.labels("feedback", model, "200").inc()
    return {"object": "feedback", "request_id": given.request_id, "kept": True}


@router.get("/health")
async def get_health():
    """Does the gateway run?"""
    return {"status": "ok"}


@router.get("/ready")
async def get_ready(request: Request):
    """Do all its engines answer? 503 until they do."""
    engines = _gateway(request).engines
    ready = {name: engine.ready.is_set() for name, engine in engines.items()}
    states = {name: "ready" if answers else "starting" for name, answers in ready.items()}
    fine = all(ready.values())
    return JSONResponse({"ready": fine, "engines": states}, 200 if fine else 503)


@router.get("/metrics")
async def get_metrics(request: Request):
    """Counts and times, in the format of Prometheus."""
    gateway = _gateway(request)
    gateway.admit(request, counted=False)
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def refused(request: Request, refusal: Refusal) -> JSONResponse:
    """A refusal as OpenAI's error, counted unless its exchange has counted itself."""
    if not getattr(request.state, "exchange", None):
        path = request.scope.get("counted_as", "other")
        _gateway(request).metrics.requests.labels(path, "", str(refusal.status)).inc()
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What FastAPI itself refuses: an address or a method that is not there."""
    known = "POST /v1/chat/completions, GET /v1/models, POST /v1/feedback"
    said = f"No {request.method} {request.url.path[:80]} here. See {known}."
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    return await refused(request, Refusal(error.status_code, code, said))


async def failed(request: Request, error: Exception) -> JSONResponse:
    """A fault of the gateway itself."""
    said = "The gateway failed on this request; its log says why."
    return await refused(request, Refusal(500, "internal_error", said))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts the engines, and ends them after the last answer."""
    gateway: Gateway = app.state.gateway
    tasks = [asyncio.create_task(engine.supervise()) for engine in gateway.engines.values()]
    tasks.append(asyncio.create_task(gateway.forget()))
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gateway.store.close()


def build_app(gateway: Gateway) -> FastAPI:
    """The app of one gateway."""
    app = FastAPI(
        title="Gateway",
        middleware=[Middleware(Guard, any_host=bool(gateway.keys))],
        redirect_slashes=False,  # it would redirect to whatever Host was sent
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False},
        exception_handlers={Refusal: refused, HTTPException: http_error, Exception: failed},
        **dict.fromkeys(("docs_url", "redoc_url", "openapi_url")),  # none of FastAPI's own pages
    )
    app.state.gateway = gateway
    app.include_router(router)
    return app
