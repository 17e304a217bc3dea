"""An OpenAI-compatible engine that already runs: watched, and asked. `own_engine` starts one."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import httpx

from deploy.serving.chat import ChatRequest
from deploy.serving.limits import Limits, Refusal, Slots

log = logging.getLogger("deploy.serving")
LINE_LIMIT = 1_000_000  # bytes of one line from the engine; a longer one is nonsense
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
WATCH_SECONDS, HANG_SECONDS = 2.0, 30.0


async def whole_lines(response: httpx.Response, deadline: float) -> AsyncIterator[bytes]:
    """The lines of a response, the last one too, to its very end, so that the connection can be
    used again.

    Raises: TimeoutError after `deadline`, in `time.monotonic()` seconds; httpx.HTTPError for a
        response that breaks off, or a line that does not end.
    """
    parts, rest = response.aiter_bytes(), b""
    while True:
        async with asyncio.timeout(deadline - time.monotonic()):
            part = await anext(parts, None)
        if part is None:
            break
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > LINE_LIMIT:
            raise httpx.RemoteProtocolError(f"A line of more than {LINE_LIMIT} bytes.")
        for line in lines:
            yield line
    yield rest


class Engine:
    """A model called `name` at an engine that runs at `url`: vLLM, SGLang, llama.cpp.

    `ready` is set while it answers, `slots` are the places there.
    """

    trust_env = True  # a proxy of the environment may lead to it
    streams_all = True  # a foreign engine may go on with a whole answer whose client hung up
    restarts = 0

    def __init__(self, name: str, limits: Limits, url: str = "", key=None, uds: str | None = None):
        self.name, self.limits, self.url = name, limits, url
        self.slots, self.ready = Slots(limits.concurrency, limits.queue), asyncio.Event()
        # Idle connections are dropped before the engine drops them (uvicorn: 5 s): no request meets
        # a closed one. Each request has its own deadline.
        kept = {"max_keepalive_connections": limits.concurrency, "keepalive_expiry": 2}
        pool = httpx.Limits(max_connections=None, **kept)
        self.client = httpx.AsyncClient(
            timeout=None,
            trust_env=self.trust_env,
            limits=pool,
            transport=httpx.AsyncHTTPTransport(uds=uds, limits=pool) if uds else None,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    # Life.

    async def supervise(self) -> None:
        """Keeps `ready` up to date until cancelled."""
        try:
            while True:
                await self._watch()
                await asyncio.sleep(WATCH_SECONDS)
        finally:
            self.ready.clear()
            await self.client.aclose()

    async def _watch(self) -> None:
        """Returns once the engine has ended, or answers no more."""
        while await self._healthy(HANG_SECONDS):
            self.ready.set()
            if await self._ended(WATCH_SECONDS):
                break
        self.ready.clear()

    async def _ended(self, seconds: float) -> bool:
        """Waits so long. Has the engine's process ended? Only of our own one this is known."""
        await asyncio.sleep(seconds)
        return False

    async def _healthy(self, seconds: float) -> bool:
        """Does the engine answer? Most have `/health`; another one has its list of models."""
        with suppress(httpx.HTTPError, OSError):
            async with asyncio.timeout(seconds):
                status = (await self.client.get(f"{self.url}/health")).status_code
                if status == 404:
                    status = (await self.client.get(f"{self.url}/v1/models")).status_code
                return status == 200
        return False

    # Questions and answers.

    def check_options(self, options: dict) -> None:
        """Raises Refusal (400) for sampling options that the engine would silently ignore."""

    async def prepare(self, request: ChatRequest) -> tuple[ChatRequest, int]:
        """The request as the engine is to get it, and the tokens that the answer may have. Raises:
        Refusal (400) where there is no room for it.
        """
        return request, request.tokens or self.limits.max_tokens

    def _body(self, request: ChatRequest, tokens: int) -> dict:
        """What is sent to the engine."""
        usage = {"stream_options": {"include_usage": True}}
        own = {"model": self.name, "messages": request.messages, "max_tokens": tokens}
        return {**own, **request.options, **usage}

    async def answer(
        self, request: ChatRequest, deadline: float, caller: str
    ) -> AsyncIterator[dict]:
        """Pieces of the answer: {"text"} each, then {"reason", "usage"}.

        Closing the iterator cancels the work at the engine: a stream's everywhere, so that is what
        a foreign engine is asked for; our own one's also where the answer comes whole, which saves
        an event per token. `deadline` is in `time.monotonic()` seconds.
        Raises: Refusal 429 (line full), 400 (the engine refused), 502 (it failed), 503 (not
            running), 504 (too slow).
        """
        end, streams = {"reason": None, "usage": None}, self.streams_all or bool(request.stream)
        again = f"The engine of {self.name} stopped in the middle of this answer. "
        again += "It is being started again: send the request once more."
        broken = Refusal(502, "engine_failed", again, retry_after=1)
        try:
            async with self.slots.place(caller):
                body = self._body(*await self.prepare(request)) | {"stream": streams}
                async with (
                    self._connected(body, deadline) as response,
                    aclosing(whole_lines(response, deadline)) as lines,
                ):
                    async for line in lines:
                        found = self._read_line(line)
                        if text := found.pop("text", None):
                            yield {"text": text}
                        end |= found
        except TimeoutError as error:
            said = f"No whole answer within {self.limits.timeout:g} s. Ask for less, or try later."
            raise Refusal(504, "timeout", said) from error
        except httpx.HTTPError as error:
            raise broken from error
        if end["reason"] is None:
            raise broken
        yield end

    @asynccontextmanager
    async def _connected(self, body: dict, deadline: float) -> AsyncIterator[httpx.Response]:
        """The engine's answer, whose body is still to come. Raises: Refusal for an error."""
        response = await self._send(body, deadline)
        try:
            if response.status_code == 200:
                yield response
                return
            said = b""
            async with asyncio.timeout(deadline - time.monotonic()):
                async for part in response.aiter_bytes():
                    said += part
                    if len(said) > 300:  # the rest is not waited for
                        break
        finally:
            await response.aclose()
        engine = f"The engine of {self.name}"
        if response.status_code in (400, 413, 422):
            said = f"{engine} refused the request: {said[:300].decode(errors='replace')}"
            raise Refusal(400, "engine_refused", said)
        if response.status_code == 429:
            raise Refusal(429, "engine_busy", f"{engine} is busy. Try again.", retry_after=1)
        raise Refusal(502, "engine_failed", f"{engine} failed (status {response.status_code}).")

    async def _send(self, body: dict, deadline: float) -> httpx.Response:
        """The engine's answer up to its headers. While the engine is being started again, the
        request waits.
        """
        patience, again = min(deadline, time.monotonic() + self.limits.engine_wait), True
        while True:
            try:
                async with asyncio.timeout(patience - time.monotonic()):
                    await self.ready.wait()
            except TimeoutError as error:
                said = f"The engine of {self.name} is not running. It is being started again: "
                said += "try later. GET /ready says more."
                raise Refusal(503, "engine_unavailable", said, retry_after=10) from error
            address = f"{self.url}/v1/chat/completions"
            request = self.client.build_request("POST", address, json=body)
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self.client.send(request, stream=True)
            except httpx.ConnectError:  # it has just died, and nobody has noticed yet
                self.ready.clear()
                await asyncio.sleep(0.05)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if not again:
                    raise
                # It was a kept connection that the engine had just dropped: once more, on another.
                again = False

    def _read_line(self, line: bytes) -> dict:
        """What a line of the engine says: "text", "reason", "usage", those that are there.

        Raises: Refusal (502) for an error, or for what is no chat answer.
        """
        text = line.removeprefix(b"data:").strip()
        if not line.startswith((b"data:", b"{")) or text == b"[DONE]":
            return {}
        engine = f"The engine of {self.name}"
        try:
            found = json.loads(text)
            if "error" in found:
                said = f"{engine} failed: {str(found['error'])[:300]}"
                raise Refusal(502, "engine_failed", said)
            choice, usage = (found.get("choices") or [{}])[0], found.get("usage")
            words = choice.get("delta") or choice.get("message") or {}
            said = {
                "text": words.get("content"),
                "reason": choice.get("finish_reason"),
                "usage": usage and {name: int(usage.get(name) or 0) for name in USAGE},
            }
            if not all(isinstance(said[name] or "", str) for name in ("text", "reason")):
                raise TypeError
            json.dumps(said, ensure_ascii=False).encode()  # half a character can go nowhere
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Refusal(502, "engine_failed", f"{engine} sent what is no chat answer.") from error
        return {name: value for name, value in said.items() if value}
