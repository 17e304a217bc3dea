"""Who may ask, how often and how much; and refusals that say what to do next."""

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

SHORTEST_KEY = 16  # characters
ERROR_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request answered with an error. `body` is OpenAI's error JSON, `param` names the parameter,
    `retry_after` is in whole seconds.
    """

    def __init__(self, status: int, code: str, message: str, param=None, retry_after=None):
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        kind = ERROR_KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {"retry-after": str(retry_after)} if retry_after is not None else {}


def _option(default, about: str):
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Limits:
    """What one gateway takes on, each an option of its command. Times in seconds."""

    body_bytes: int = _option(64_000, "of one request")
    max_tokens: int = _option(1024, "of one answer; also where a request names none")
    requests_per_minute: int = _option(600, "per key; a minute's worth may come at once")
    concurrency: int = _option(64, "requests at one engine at once")
    queue: int = _option(256, "requests that wait for one engine; the next is refused with 429")
    timeout: float = _option(120.0, "seconds for a request, waiting included")
    engine_wait: float = _option(60.0, "seconds for an engine that is being started again")


def read_keys(text: str) -> dict[bytes, str]:
    """API keys from a comma-separated list: digest → name. The name, `key-` and 8 hex digits, is
    safe to log.

    Raises: ValueError for a key that is too short to be a secret.
    """
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if (short := min(map(len, keys), default=SHORTEST_KEY)) < SHORTEST_KEY:
        said = f"LAB_API_KEYS holds a key of {short} characters; it needs at least {SHORTEST_KEY}."
        make = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        raise ValueError(f"{said} Make one: {make}")
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    return {digest: f"key-{digest.hex()[:8]}" for digest in digests}


def caller(keys: dict[bytes, str], authorization: str | None) -> str:
    """The name of the key in an `Authorization` header; "local" where no keys are set.

    The digest is compared with every key, each in constant time, so that the time taken tells
    nothing about a key. Raises: Refusal (401).
    """
    if not keys:
        return "local"
    scheme, _, secret = (authorization or "").partition(" ")
    digest = hashlib.sha256(secret.strip().encode()).digest()
    matches = [name for known, name in keys.items() if hmac.compare_digest(known, digest)]
    if scheme.lower() != "bearer" or not matches:
        said = "No valid API key. Send one of the gateway's keys: 'Authorization: Bearer KEY'."
        raise Refusal(401, "invalid_api_key", said)
    return matches[0]


def is_loopback(host: str) -> bool:
    """Is this address reachable from this machine only?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RateLimit:
    """A bucket of requests per key: it holds a minute's worth and fills up evenly. `clock` gives
    seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.clock = per_minute, clock
        self.buckets: dict[str, tuple[float, float]] = {}  # key → (requests left, at time)

    def take(self, key: str) -> None:
        """Counts one request. Raises: Refusal (429) with the seconds until the next one is free."""
        now = self.clock()
        left, then = self.buckets.get(key, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        self.buckets[key] = (left - 1 if left >= 1 else left), now
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            said = f"More than {self.per_minute} requests in a minute with this key. Wait {wait} s."
            raise Refusal(429, "rate_limit_exceeded", said, retry_after=wait)


class Slots:
    """Places at one engine, and a waiting line of bounded length: first come, first served.

    Where it is `shared`, a caller has at most half of the places and half of the line.
    """

    def __init__(self, running: int, waiting: int):
        self.free, self.places, self.longest = asyncio.Semaphore(running), running, waiting
        self.running = self.waiting = 0
        self.seconds = 1.0  # a request's usual time at the engine: a moving mean, for Retry-After
        self.shared = False
        self.shares = defaultdict(lambda: Slots(max(1, running // 2), waiting // 2))  # by caller

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        """Holds a place, after waiting for one. Raises: Refusal (429) if the line is full."""
        # Its own place comes first: who waits for that stands in nobody else's way.
        lines = [self.shares[caller], self] if self.shared else [self]
        for line in lines:
            if line.free.locked() and line.waiting >= line.longest:
                wait = max(1, math.ceil((line.waiting + 1) / line.places * line.seconds))
                whose = " of this key, which has half of the places," if line is not self else ""
                said = f"{line.running} requests{whose} are running and {line.waiting} are waiting."
                raise Refusal(429, "queue_full", f"{said} Retry in {wait} s.", retry_after=wait)
        async with AsyncExitStack() as held:
            for line in lines:
                line.waiting += 1
            try:
                for line in lines:
                    await held.enter_async_context(line.free)
            finally:
                for line in lines:
                    line.waiting -= 1
            start = time.monotonic()
            for line in lines:
                line.running += 1
            try:
                yield
            finally:
                for line in lines:
                    line.running -= 1
                    line.seconds += 0.1 * (time.monotonic() - start - line.seconds)
