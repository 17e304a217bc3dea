"""What one gateway knows and does: who may ask, which model answers, what is counted and kept. It
holds no model.
"""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import quote

from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from deploy.serving import chat
from deploy.serving.engine import Engine
from deploy.serving.limits import Limits, RateLimit, Refusal, caller
from deploy.serving.store import Store, StoreError, choose_arm

log = logging.getLogger("deploy.serving")
disable_created_metrics()
AUTO = "auto"  # the model name that leaves the choice to the A/B test
CLIENT_GONE = 499  # the status kept for a request whose client hung up
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FORGET_EVERY = 3600  # seconds


class Metrics:
    """What `/metrics` shows. Labels hold names of models and statuses, never a prompt or a user."""

    def __init__(self, engines: dict[str, Engine]):
        self.registry = CollectorRegistry()

        def new(kind, name: str, what: str, *labels: str, **options):
            return kind(f"gateway_{name}", what, labels, registry=self.registry, **options)

        times = {"buckets": SECONDS}
        self.requests = new(Counter, "requests", "Answered requests", "path", "model", "status")
        self.seconds = new(Histogram, "seconds", "Seconds to a whole answer", "model", **times)
        self.first = new(Histogram, "first_token_seconds", "To the first token", "model", **times)
        self.tokens = new(Counter, "tokens", "Tokens", "model", "kind")
        self.feedback = new(Counter, "feedback", "Feedback that was kept", "model", "rating")
        self.lost = new(Counter, "records_lost", "Requests that the store could not keep")
        self.dropped = new(Gauge, "texts_dropped", "Requests whose texts left a nearly full store")
        watched = (
            ("running", "Requests at the engine now", lambda engine: engine.slots.running),
            ("waiting", "Requests that wait for a place", lambda engine: engine.slots.waiting),
            ("engine_restarts", "Times the engine was restarted", lambda engine: engine.restarts),
            ("engine_ready", "1 while the engine answers", lambda engine: engine.ready.is_set()),
        )
        for name, what, value in watched:
            gauge = new(Gauge, name, what, "model")
            for model, engine in engines.items():
                gauge.labels(model).set_function(lambda engine=engine, value=value: value(engine))


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
        self.metrics.dropped.set_function(lambda: self.store.dropped)
        self.started = int(time.time())
        for engine in self.engines.values():
            engine.slots.shared = len(self.keys) > 1

    def admit(self, request: Request, counted: bool = True) -> str:
        """The caller's name. Raises: Refusal 401 (key), 429 (rate)."""
        name = caller(self.keys, request.headers.get("authorization"))
        if counted:
            self.rate.take(name)
        return name

    def assign(self, wanted: str | None, user: str | None) -> tuple[str, bool]:
        """(model, by the A/B test?). A user always gets the same one; without a user id chance
        decides each time.

        Raises: Refusal (404) for an unknown model.
        """
        if wanted in (None, AUTO):
            return choose_arm(user or random.randbytes(16).hex(), self.weights), True
        if wanted not in self.engines:
            names = ", ".join([*self.engines, AUTO])
            said = f"No model {wanted[:80]!r} here. Choose one of: {names}."
            raise Refusal(404, "model_not_found", said, "model")
        return wanted, False

    async def forget(self) -> None:
        """Removes old texts now and every hour, until cancelled."""
        while True:
            try:
                await asyncio.wrap_future(self.store.forget(self.retention_days))
            except StoreError as error:
                log.warning("old texts may still be readable: %s", error)
            await asyncio.sleep(FORGET_EVERY)


@dataclass
class Exchange:
    """One chat request on its way: what came, what was decided, what was answered so far."""

    gateway: Gateway
    request: chat.ChatRequest
    caller: str
    model: str
    assigned: bool
    user: str | None  # a pseudonym
    started: float  # time.monotonic()

    def __post_init__(self):
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", time.time()
        self.status, self.text, self.reason = 200, [], None
        self.first_token_seconds: float | None = None
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        self.head = {"id": self.id, "created": int(self.created), "model": self.model}
        self.headers = {
            "x-request-id": self.id,
            "x-lab-model": quote(self.model, safe="/:@"),  # a header is Latin-1 only
            "x-lab-assigned": str(self.assigned).lower(),
        }

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece. The exchange is recorded before this ends, however it
        ends.
        """
        engine = self.gateway.engines[self.model]
        deadline = self.started + self.gateway.limits.timeout
        try:
            async with aclosing(engine.answer(self.request, deadline, self.caller)) as answer:
                async for piece in answer:
                    if "text" in piece:
                        if self.first_token_seconds is None:
                            self.first_token_seconds = time.monotonic() - self.started
                        self.text.append(piece["text"])
                        yield piece["text"]
                    else:
                        self.reason, self.usage = piece["reason"], piece["usage"] or self.usage
        except Refusal as refusal:
            self.status = refusal.status
            raise
        except BaseException as error:  # what is no Exception cancels or closes this
            self.status = 500 if isinstance(error, Exception) else CLIENT_GONE
            raise
        finally:
            written = self.record()
        # Feedback on this answer may come at once: the store must know it by then. A store that
        # fails loses the record, never the answer.
        await asyncio.wait([written])

    def record(self) -> asyncio.Future | None:
        """Counts the exchange and hands it to the store."""
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
        if self.status == 429:  # keeps the store from growing under a flood
            return None
        answered = self.status == 200  # the texts of others could only fill the store
        own = ("id", "created", "caller", "user", "model", "status", "first_token_seconds")
        written = self.gateway.store.add_request(
            **{column: getattr(self, column) for column in own},
            experiment=self.gateway.experiment,
            assigned=int(self.assigned),
            messages=self.request.messages if answered else None,
            answer="".join(self.text) if answered else None,
            finish_reason=self.reason,
            prompt_tokens=self.usage.get("prompt_tokens"),
            completion_tokens=self.usage.get("completion_tokens"),
            seconds=seconds,
        )
        kept = asyncio.wrap_future(written)
        kept.add_done_callback(self._kept)
        return kept

    def _kept(self, kept: asyncio.Future) -> None:
        if not kept.cancelled() and (error := kept.exception()):
            self.gateway.metrics.lost.inc()
            log.error("%s was answered but not recorded: %s", self.id, error)

    async def whole(self) -> dict:
        """The answer in one piece."""
        async with aclosing(self.pieces()) as pieces:
            text = "".join([piece async for piece in pieces])
        return chat.completion(self.head, text, self.reason, self.usage)

    async def events(self, pieces: AsyncIterator[str], first: str | None) -> AsyncIterator[bytes]:
        """The answer as server-sent events, from its first piece on. A failure on the way is an
        event too.
        """
        try:
            yield chat.chunk(self.head, {"role": "assistant", "content": first or ""})
            async for piece in pieces:
                yield chat.chunk(self.head, {"content": piece})
            end = chat.chunk(self.head, {}, self.reason)
            if self.request.include_usage:
                end += chat.event({**self.head, **chat.CHUNK, "choices": [], "usage": self.usage})
            yield end + b"data: [DONE]\n\n"
        except Refusal as refusal:
            yield chat.event(refusal.body)
