"""The engine that the gateway starts itself: a process of its own for one model folder, started
again when it dies.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import httpx
from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from deploy.serving.chat import ChatRequest
from deploy.serving.engine import LINE_LIMIT, Engine, log
from deploy.serving.limits import Limits, Refusal
from deploy.serving.prompts import PromptFormat, prompt_of

# Variables that hold secrets: an engine needs none of them.
SECRET = re.compile("(^|_)(KEYS?|TOKENS?|SECRETS?|PASSW(OR)?D|CREDENTIALS?)(_|$)", re.IGNORECASE)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
START_SECONDS = 600.0
UNIX = hasattr(socket, "AF_UNIX")  # Windows has no such sockets
WORKER = Path(__file__).with_name("worker.py")


class OwnEngine(Engine):
    """A model folder served by `worker` in a process of its own, behind a socket in a folder that
    only this user can enter; where the system has no such sockets, behind a key. Its prompts are
    written by another process, `prompts`.

    `temperature` is that of requests that name none. With `batching` it is the only one: the
    continuous batching of `transformers serve` keeps one sampling setting, that of its first
    request, for all.
    """

    trust_env = False  # it is on this machine

    def __init__(self, name: str, limits: Limits, folder: Path, batching=True, temperature=0.0):
        self.format = PromptFormat(folder)
        self.folder, self.batching, self.temperature = folder, batching, temperature
        self.streams_all = not batching  # then nothing else stops a generation
        self.process: asyncio.subprocess.Process | None = None
        self.last_lines = deque(maxlen=30)
        self.writing = CapacityLimiter(1)
        self.home = tempfile.TemporaryDirectory(prefix="engine-")  # of mode 0700
        (Path(self.home.name) / "model").symlink_to(folder.resolve())
        path = f"{self.home.name}/socket"
        uds = path if UNIX and len(path) < 100 else None  # a longer one cannot be bound
        self.key = None if uds else secrets.token_urlsafe(32)
        super().__init__(name, limits, "http://engine", self.key, uds)

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
                    await self._start()
                    await self._watch()
                except (OSError, httpx.HTTPError, RuntimeError) as error:
                    log.warning("engine %s: %s", self.name, error)
                await self._stop()
                self.restarts += 1
                words = "\n".join(self.last_lines) or "(none)"
                said = "engine %s ended and is started again. Its last words:\n%s"
                log.warning(said, self.name, words)
                pause = 0.0 if time.monotonic() - started > 60 else min(30.0, 2 * pause + 0.5)
                await asyncio.sleep(pause)
        finally:
            self.ready.clear()
            await self._stop()
            await self.client.aclose()
            self.home.cleanup()

    def _environment(self) -> dict[str, str]:
        """Ours, with no secrets, and with no place to import from that depends on where a process
        is, or that is the model's.
        """
        kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        entries = filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))
        model, places = self.folder.resolve(), map(Path.resolve, map(Path, entries))
        paths = [str(place) for place in places if not place.is_relative_to(model)]
        return {**kept, **_OFFLINE, "PYTHONPATH": os.pathsep.join(paths)}

    async def _start(self) -> None:
        """Starts the process and waits until it has answered once. Raises: OSError (TimeoutError
        too), RuntimeError.
        """
        options = ["--context", str(self.format.context or 1024)]
        options += ["--batching"] * self.batching + ["--key"] * bool(self.key)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(WORKER),
            *options,
            cwd=self.home.name,
            env=self._environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LINE_LIMIT,
            start_new_session=True,  # Ctrl-C reaches the gateway alone, which lets streams finish
        )
        if self.key:  # known to the two alone: no list of processes shows it
            self.process.stdin.write(f"{self.key}\n".encode())
            port = (await self.process.stdout.readline()).strip()
            self.url = f"http://127.0.0.1:{int(port) if port.isdigit() else 0}"
        self.reading = asyncio.create_task(self._read(self.process.stdout))
        async with asyncio.timeout(START_SECONDS):
            while not await self._healthy(2):
                if (status := self.process.returncode) is not None:
                    raise RuntimeError(f"it ended with status {status} before it was ready")
                await asyncio.sleep(0.1)
            # The first request settles the sampling of all that follow under continuous batching.
            messages = [{"role": "user", "content": "Hello"}]
            hello = ChatRequest(messages=messages, temperature=self.temperature)
            with suppress(Refusal):
                await self.prepare(hello)  # loads what the next one needs
            body = self._body(hello, 1) | {"generation_config": self._settings(hello.options)}
            answer = await self.client.post(f"{self.url}/v1/chat/completions", json=body)
            answer.raise_for_status()

    async def _read(self, output: asyncio.StreamReader) -> None:
        """Keeps the last lines of output, and so keeps the pipe from filling up."""
        with suppress(ValueError):
            while line := await output.readline():
                self.last_lines.append(line.decode(errors="replace").rstrip())
        while await output.read(65536):
            pass

    async def _ended(self, seconds: float) -> bool:
        """Waits so long, or until the process has ended. Has it?"""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), seconds)
        return self.process.returncode is not None

    async def _stop(self) -> None:
        """Ends the process and all it started: politely, then not."""
        if not self.process:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            if await self._ended(5):
                break
        self.process.stdin.close()
        self.reading.cancel()
        self.process = None

    # Questions.

    def check_options(self, options: dict) -> None:
        """Raises Refusal (400) for sampling options that the engine would silently ignore."""
        batching, own = self.batching, self.temperature
        one = f"This engine answers in batches, all at temperature {own:g}. Leave it out, or start "
        one += "the gateway with --no-batching, which reads it from each request."
        ignored = {
            "stop": ("stop" in options, "This engine knows no stop texts. Leave stop out."),
            "temperature": (batching and options.get("temperature", own) != own, one),
            "top_p": (batching and options.get("top_p", 1) != 1, "With batching, top_p must be 1."),
            "seed": (batching and own and "seed" in options, "With batching, no seed can be kept."),
        }
        for name, (given, said) in ignored.items():
            if given:
                raise Refusal(400, "unsupported_value", said, name)

    async def prepare(self, request: ChatRequest) -> tuple[ChatRequest, int]:
        """The request with its prompt as the template writes it, and the tokens that the answer may
        have. Raises: Refusal (400) if prompt and answer do not fit in the context.

        Without this check a prompt that is too long would end the engine, for everybody.
        """
        arguments = (self.folder.resolve(), request.messages)
        work = to_process.run_sync(prompt_of, *arguments, limiter=self.writing)
        try:  # to its end, though the client may hang up: another process would cost more
            text, length = await asyncio.shield(asyncio.ensure_future(work))
        except (ValueError, BrokenWorkerProcess) as error:
            said = str(error) or "The model's chat template takes too much time or memory for this."
            raise Refusal(400, "invalid_value", said, "messages") from error
        written = request.model_copy(update={"messages": [{"role": "user", "content": text}]})
        _, wanted = await super().prepare(request)
        context = self.format.context or length + wanted
        least, room = request.tokens or 1, context - length
        if room >= least:
            return written, min(wanted, room)
        said = f"The model reads {context} tokens. The prompt has {length}, and {least} more are "
        advice = f"Ask for at most {room} tokens." if room > 0 else "Send a shorter prompt."
        param = "max_tokens" if room > 0 else "messages"
        raise Refusal(400, "context_length_exceeded", f"{said}asked for. {advice}", param)

    def _settings(self, options: dict) -> str:
        """The model's own generation settings with these options, as the engine reads them: JSON in
        a text.
        """
        temperature = options.get("temperature", self.temperature)
        kept = self.format.generation.items()
        own = {name: value for name, value in kept if not name.startswith(("_", "transf"))}
        sampling = {"do_sample": temperature > 0, "top_k": 0, "top_p": options.get("top_p", 1.0)}
        return json.dumps(own | sampling | {"temperature": temperature or 1.0, "max_new_tokens": 1})

    def _body(self, request: ChatRequest, tokens: int) -> dict:
        """What is sent to the engine: it reads sampling from `generation_config` only."""
        body = request.model_dump(include={"messages", "seed"}, exclude_none=True)
        body["max_tokens"] = tokens
        if not self.batching:
            body["generation_config"] = self._settings(request.options)
        return body
