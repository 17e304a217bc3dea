"""One model behind an OpenAI-compatible address. The gateway's own engine is started, watched and
restarted here.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx

from deploy.serving.chat import ChatRequest
from deploy.serving.limits import Limits, Refusal, Slots
from deploy.serving.prompts import PromptFormat

log = logging.getLogger("deploy.serving")
LINE_LIMIT = 1_000_000  # bytes of one line from the engine; a longer one is nonsense
SECRETS = ("LAB_API_KEYS", "LAB_ENGINE_KEY")  # of the gateway alone: its engine needs neither
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WATCH_SECONDS, START_SECONDS, HANG_SECONDS = 2.0, 600.0, 30.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Engine:
    """A model called `name`: a folder served by a process of our own, or an engine that already
    runs at `url`.

    `temperature` is that of requests that name none. With `batching` it is the only one: the
    continuous batching of `transformers serve` keeps one sampling setting, that of its first
    request, for all.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        folder: Path | None = None,
        url: str | None = None,
        key: str | None = None,
        batching: bool = True,
        temperature: float = 0.0,
    ):
        self.name, self.limits, self.folder, self.url = name, limits, folder, url
        self.batching, self.temperature = batching, temperature
        self.format = PromptFormat(folder) if folder else None
        self.slots, self.ready = Slots(limits.concurrency, limits.queue), asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self.restarts, self.last_lines = 0, deque(maxlen=30)
        # Idle connections are dropped before the engine drops them (uvicorn: 5 s): no request meets
        # a closed one.
        self.client = httpx.AsyncClient(
            timeout=None,
            trust_env=folder is None,  # each request has its own deadline
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=limits.concurrency,
                keepalive_expiry=2,
            ),
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    # Life: started, watched, started again.

    async def supervise(self) -> None:
        """Keeps the engine running until cancelled. The pauses grow where a process dies soon after
        its start.
        """
        pause = 0.0
        try:
            while True:
                started = time.monotonic()
                try:
                    if self.folder:
                        await self._start()
                    await self._watch()
                except (OSError, httpx.HTTPError, RuntimeError, TimeoutError) as error:
                    log.warning("engine %s: %s", self.name, error)
                self.ready.clear()
                if self.folder:
                    await self._stop()
                    self.restarts += 1
                    words = "\n".join(self.last_lines) or "(none)"
                    log.warning(
                        "engine %s ended and is started again. Its last words:\n%s",
                        self.name,
                        words,
                    )
                pause = 0.0 if time.monotonic() - started > 60 else min(30.0, 2 * pause + 0.5)
                await asyncio.sleep(pause if self.folder else WATCH_SECONDS)
        finally:
            self.ready.clear()
            await self._stop()
            await self.client.aclose()

    async def _start(self) -> None:
        """Starts the process and waits until it has answered once. Raises: RuntimeError,
        TimeoutError.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), *(["--batching"] if self.batching else [])]
        if self.format.context:
            options += ["--context", str(self.format.context)]
        worker = Path(__file__).with_name("worker.py")
        kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(worker),
            *options,
            cwd=self.folder,
            env={**kept, **OFFLINE},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LINE_LIMIT,
            start_new_session=True,  # Ctrl-C reaches the gateway alone, which lets streams finish
        )
        self.reading = asyncio.create_task(self._read(self.process.stdout))
        async with asyncio.timeout(START_SECONDS):
            while not await self._healthy(2):
                if self.process.returncode is not None:
                    raise RuntimeError(
                        f"the process ended with status {self.process.returncode} before it was ready"
                    )
                await asyncio.sleep(0.1)
            # The first request settles the sampling of all that follow under continuous batching.
            hello = ChatRequest(
                [{"role": "user", "content": "Hello"}], options={"temperature": self.temperature}
            )
            body = self._body(hello, 1) | {
                "generation_config": self._generation_config(hello.options)
            }
            (
                await self.client.post(f"{self.url}/v1/chat/completions", json=body)
            ).raise_for_status()

    async def _read(self, output: asyncio.StreamReader) -> None:
        """Keeps the last lines of output, and so keeps the pipe from filling up."""
        with suppress(ValueError):
            while line := await output.readline():
                self.last_lines.append(line.decode(errors="replace").rstrip())
        while await output.read(65536):
            pass

    async def _healthy(self, seconds: float) -> bool:
        """Does the engine answer? All that are named in the help have `/health`; another one has
        its list of models.
        """
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(seconds):
                status = (await self.client.get(f"{self.url}/health")).status_code
                if status == 404:
                    status = (await self.client.get(f"{self.url}/v1/models")).status_code
                return status == 200
        return False

    async def _watch(self) -> None:
        """Returns once the engine has ended, or answers no more."""
        while await self._healthy(HANG_SECONDS):
            self.ready.set()
            if self.process:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.process.wait(), WATCH_SECONDS)
                    return
            else:
                await asyncio.sleep(WATCH_SECONDS)

    async def _stop(self) -> None:
        """Ends the process and all it started: politely, then not."""
        if not self.process:
            return
        for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), patience)
                break
        self.process.stdin.close()
        self.reading.cancel()
        self.process = None

    # Questions and answers.

    def room(self, request: ChatRequest) -> int:
        """Tokens that the answer may have. Raises: Refusal (400) if prompt and answer do not fit in
        the context.

        Without this check a prompt that is too long would end the engine, for everybody.
        """
        wanted = request.max_tokens or self.limits.max_tokens
        if not self.format or not self.format.context:
            return wanted
        try:
            length = self.format.count(request.messages)
        except ValueError as error:
            raise Refusal(400, "invalid_value", str(error), "messages") from error
        room = self.format.context - length
        if room < 1 or room < (request.max_tokens or 1):
            advice = f"Ask for at most {room} tokens." if room > 0 else "Send a shorter prompt."
            raise Refusal(
                400,
                "context_length_exceeded",
                f"The model reads {self.format.context} tokens. The prompt has {length}, and {request.max_tokens or 1} "
                f"more are asked for. {advice}",
                "messages" if room < 1 else "max_tokens",
            )
        return min(wanted, room)

    def check_options(self, options: dict) -> None:
        """Raises Refusal (400) for what our own engine would silently ignore."""
        if not self.folder:
            return
        if "stop" in options:
            raise Refusal(
                400,
                "unsupported_parameter",
                "This engine knows no stop texts. Leave stop out.",
                "stop",
            )
        if not self.batching:
            return
        if options.get("temperature", self.temperature) != self.temperature:
            raise Refusal(
                400,
                "unsupported_value",
                f"This engine answers in batches, all at temperature {self.temperature:g}. Leave temperature out, "
                "or start the gateway with --no-batching, which reads it from each request.",
                "temperature",
            )
        if options.get("top_p", 1.0) != 1.0:
            raise Refusal(
                400, "unsupported_value", "With batching, top_p must be 1. Leave it out.", "top_p"
            )
        if "seed" in options and self.temperature:
            raise Refusal(
                400,
                "unsupported_value",
                "With batching, no seed can be kept. Leave it out.",
                "seed",
            )

    def _generation_config(self, options: dict) -> str:
        """The model's own generation settings with these options, as the engine reads them: JSON in
        a text.
        """
        own = {
            name: value
            for name, value in self.format.generation.items()
            if not name.startswith(("_", "transf"))
        }
        temperature = options.get("temperature", self.temperature)
        sampling = {"do_sample": temperature > 0, "top_k": 0, "top_p": options.get("top_p", 1.0)}
        return json.dumps(own | sampling | {"temperature": temperature or 1.0, "max_new_tokens": 1})

    def _body(self, request: ChatRequest, tokens: int) -> dict:
        """What is sent to the engine."""
        body = {"messages": request.messages, "max_tokens": tokens, **request.options}
        if not self.folder:
            return body | {
                "model": self.name,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        if not self.batching:
            body["generation_config"] = self._generation_config(request.options)
        return {name: value for name, value in body.items() if name not in ("temperature", "top_p")}

    async def _connect(self, body: dict, deadline: float) -> httpx.Response:
        """The engine's answer up to its headers. While the engine is being started again, the
        request waits.
        """
        patience, again = min(deadline, time.monotonic() + self.limits.engine_wait), True
        while True:
            try:
                async with asyncio.timeout(patience - time.monotonic()):
                    await self.ready.wait()
            except TimeoutError as error:
                raise Refusal(
                    503,
                    "engine_unavailable",
                    f"The engine of {self.name} is not running. It is being started again: "
                    "try later. GET /ready says more.",
                    retry_after=10,
                ) from error
            try:
                request = self.client.build_request(
                    "POST", f"{self.url}/v1/chat/completions", json=body
                )
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await self.client.send(request, stream=True)
            except httpx.ConnectError:  # it has just died, and nobody has noticed yet
                self.ready.clear()
                await asyncio.sleep(0.05)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if not again:
                    raise
                # it was a kept connection that the engine had just dropped: once more, on another
                again = False

    async def answer(
        self, request: ChatRequest, tokens: int, deadline: float
    ) -> AsyncIterator[dict]:
        """Pieces of the answer: {"text"} each, then {"reason", "usage"}. `deadline` is in
        `time.monotonic()` seconds.

        It always streams from the engine, so that closing the iterator cancels the work there.
        Raises: Refusal 429 (line full), 400 (the engine refused), 502 (it failed), 503 (not
            running), 504 (too slow).
        """
        end = {"reason": None, "usage": None}
        try:
            async with self.slots.place():
                response = await self._connect(
                    self._body(request, tokens) | {"stream": True}, deadline
                )
                try:
                    await self._check_status(response)
                    parts, rest = response.aiter_bytes(), b""
                    while True:  # to the very end, so that the connection can be used again
                        async with asyncio.timeout(deadline - time.monotonic()):
                            part = await anext(parts, None)
                        if part is None:
                            break
                        *lines, rest = (rest + part).split(b"\n")
                        if len(rest) > LINE_LIMIT:
                            raise self._broken()
                        text, refusal = "", None
                        for line in lines:
                            try:
                                found = self._read_line(line)
                            except Refusal as error:  # what came before it is passed on first
                                refusal = error
                                break
                            text += found.pop("text", "")
                            end |= found
                        if text:
                            yield {"text": text}
                        if refusal:
                            raise refusal
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise Refusal(
                504,
                "timeout",
                f"No whole answer within {self.limits.timeout:g} s. Ask for fewer tokens, or try later.",
            ) from error
        except httpx.HTTPError as error:
            raise self._broken() from error
        if end["reason"] is None:
            raise self._broken()
        yield end

    def _broken(self) -> Refusal:
        return Refusal(
            502,
            "engine_failed",
            f"The engine of {self.name} stopped in the middle of this answer. "
            "It is being started again: send the request once more.",
            retry_after=1,
        )

    async def _check_status(self, response: httpx.Response) -> None:
        """Raises: Refusal for an answer that is an error."""
        if response.status_code == 200:
            return
        said = (await response.aread()).decode(errors="replace")[:300]
        if response.status_code in (400, 413, 422):
            raise Refusal(
                400, "engine_refused", f"The engine of {self.name} refused the request: {said}"
            )
        if response.status_code == 429:
            raise Refusal(
                429, "engine_busy", f"The engine of {self.name} is busy. Try again.", retry_after=1
            )
        raise Refusal(
            502,
            "engine_failed",
            f"The engine of {self.name} failed (status {response.status_code}).",
        )

    def _read_line(self, line: bytes) -> dict:
        """What a line of the engine says: "text", "reason", "usage". Raises: Refusal (502) for an
        error or nonsense.
        """
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            return {}
        try:
            found = json.loads(line[5:])
            if "error" in found:
                raise Refusal(
                    502,
                    "engine_failed",
                    f"The engine of {self.name} failed: {str(found['error'])[:300]}",
                )
            choice = (found.get("choices") or [{}])[0]
            said = {
                "text": choice.get("delta", {}).get("content"),
                "reason": choice.get("finish_reason"),
            }
            return {
                name: value
                for name, value in (said | {"usage": found.get("usage")}).items()
                if value
            }
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Refusal(
                502, "engine_failed", f"The engine of {self.name} sent what is no chat answer."
            ) from error
