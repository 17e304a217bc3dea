"""The HTTP side of the gateway: a FastAPI app of six addresses, and every failure in OpenAI's error
shape.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.serving import chat
from deploy.serving.gateway import AUTO, CLIENT_GONE, Exchange, Gateway
from deploy.serving.limits import Refusal
from deploy.serving.store import StoreError, UnknownRequest, pseudonym

CORRECTION_LETTERS = 20_000


class ClientGone(Exception):
    """The client hung up before its answer began."""


class EventStream(StreamingResponse):
    """A streamed response that closes its source, begun or not: a client that hangs up frees its
    place at once.

    One that stays but does not read is cut off after `seconds`: it must not hold a place for ever.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        source: AsyncIterator[str],
        headers: dict,
        seconds: float,
    ):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.source, self.seconds = source, seconds

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.source), aclosing(self.body_iterator):
            with suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
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


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a JSON request, never more than `most` bytes of it.

    Raises: Refusal (413); (408) if it has not come after `seconds`; and (415) for a form: any web
        page may post a form to this machine, but no JSON. ClientGone if the client hangs up in the
        middle.
    """
    if (
        request.headers.get("content-type", "").partition(";")[0].strip().lower()
        != "application/json"
    ):
        raise Refusal(
            415,
            "unsupported_media_type",
            "Send JSON, with the header 'Content-Type: application/json'.",
        )
    length, parts = request.headers.get("content-length", ""), []
    size = int(length) if length.isdecimal() else 0
    if size <= most:
        size = 0
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    parts.append(part)
                    if (size := size + len(part)) > most:
                        break
        except TimeoutError:
            said = f"The body did not come within {seconds:g} s. Send it again."
            raise Refusal(408, "request_timeout", said) from None
        except ClientDisconnect:
            raise ClientGone from None
    if size > most:
        raise Refusal(413, "body_too_large", f"The body is larger than {most} bytes. Send less.")
    return b"".join(parts)


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
        title="Gateway",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False},
    )

    async def body_of(request: Request) -> bytes:
        return await read_body(request, gateway.limits.body_bytes, gateway.limits.timeout)

    def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        if not getattr(request.state, "exchange", None):  # an exchange counts itself
            gateway.metrics.requests.labels(
                request.scope.get("counted_as", "other"), "", str(refusal.status)
            ).inc()
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
        }
        codes = {404: "not_found", 405: "method_not_allowed"}
        status = error.status_code
        return refuse(
            request,
            Refusal(status, codes.get(status, "error"), messages.get(status, str(error.detail))),
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return refuse(
            request,
            Refusal(500, "internal_error", "The gateway failed on this request; its log says why."),
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        started, request.scope["counted_as"] = time.monotonic(), "chat"
        name = gateway.admit(request)
        asked = chat.read_chat(await body_of(request), gateway.limits)
        user = pseudonym(gateway.experiment, asked.user) if asked.user else None
        model, assigned = gateway.assign(asked.model, user)
        gateway.engines[model].check_options(asked.options)
        exchange = Exchange(gateway, asked, name, model, assigned, user, started)
        request.state.exchange = exchange
        if not asked.stream:
            return JSONResponse(
                await while_connected(request, exchange.whole()), headers=exchange.headers
            )
        pieces = exchange.pieces()
        first = await while_connected(
            request, anext(pieces, None)
        )  # errors until here have a status of their own
        return EventStream(
            exchange.events(pieces, first), pieces, exchange.headers, gateway.limits.timeout + 5
        )

    @app.get("/v1/models")
    async def models(request: Request):
        gateway.admit(request)
        own = {"object": "model", "created": gateway.started, "owned_by": "course"}
        return {
            "object": "list",
            "data": [{"id": name, **own} for name in [*gateway.engines, AUTO]],
        }

    @app.post("/v1/feedback")
    async def feedback(request: Request):
        request.scope["counted_as"] = "feedback"
        name = gateway.admit(request)
        given = read_feedback(chat.read_object(await body_of(request)))
        try:
            model = await asyncio.wrap_future(gateway.store.add_feedback(caller=name, **given))
        except UnknownRequest as error:
            raise Refusal(
                404,
                "unknown_request",
                "No such answer was given to this key. Send the id of an answer.",
                "request_id",
            ) from error
        except StoreError as error:
            advice = (
                "Free some space, or raise --store-megabytes."
                if error.full
                else "Send it again later."
            )
            status = 507 if error.full else 503
            raise Refusal(
                status, "not_kept", f"{error} {advice} Answers go on.", retry_after=30
            ) from error
        gateway.metrics.feedback.labels(model, str(given["rating"])).inc()
        gateway.metrics.requests.labels("feedback", model, "200").inc()
        return {"object": "feedback", "request_id": given["request_id"], "kept": True}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/ready")
    async def ready():
        states = {
            name: "ready" if engine.ready.is_set() else "starting"
            for name, engine in gateway.engines.items()
        }
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
        raise Refusal(
            400, "unknown_parameter", f"Feedback has no {sorted(unknown)[0][:60]!r}. Leave it out."
        )
    if not isinstance(given.get("request_id"), str):
        raise chat.wrong("request_id", "request_id must be the id of an answer: chatcmpl-….")
    ratings = {"up": 1, "down": -1}
    if not isinstance(given.get("rating"), str) or given["rating"] not in ratings:
        raise chat.wrong("rating", 'rating must be "up" or "down".')
    if not isinstance(given.get("consent", False), bool):
        raise chat.wrong(
            "consent", "consent must be true or false: may this be used to train the next model?"
        )
    correction = given.get("correction")
    if correction is not None and not (
        isinstance(correction, str) and len(correction) <= CORRECTION_LETTERS
    ):
        raise chat.wrong(
            "correction",
            f"correction must be a better answer, at most {CORRECTION_LETTERS} letters.",
        )
    return {
        "request_id": given["request_id"],
        "rating": ratings[given["rating"]],
        "consent": given.get("consent", False),
        "correction": correction,
    }
