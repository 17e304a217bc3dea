"""Starts the gateway as a process of its own, from a notebook, a test or a benchmark, and ends it
with its engines.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"on (http://\S+)")  # in the log


@dataclass
class RunningGateway:
    """A running gateway. `url` ends in `/v1`, as OpenAI's client wants its `base_url`."""

    url: str
    process: subprocess.Popen
    log: Path

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def wait_for(found, seconds: float, what: str, service: RunningGateway | None = None):
    """The first true result of `found()`, asked again and again.

    Raises: TimeoutError; RuntimeError with the log where `service` has ended.
    """
    end = time.monotonic() + seconds
    while not (result := found()):
        said = f"\n{service.said()[-3000:]}" if service else ""
        if service and (status := service.process.poll()) is not None:
            raise RuntimeError(f"The gateway ended with status {status}:{said}")
        if time.monotonic() > end:
            raise TimeoutError(f"No {what} within {seconds:g} s.{said}")
        time.sleep(0.02)
    return result


def is_ready(root: str) -> bool:
    """Do all engines behind this gateway answer?"""
    try:
        return httpx.get(f"{root}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serving(
    *options: str, seconds: float = 180, ready: bool = True, **environment: str
) -> Iterator[RunningGateway]:
    """A gateway started with these options of `python -m deploy.serving`, on a free port unless
    they name one.

    It is ready when the block begins (unless `ready` is False), and is ended with its engines when
    the block is left; also when this process is killed.
    Raises: RuntimeError with its log if it ends early, TimeoutError after `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        log = Path(folder) / "gateway.log"
        # Of an option that is given twice, the last one counts.
        ours = ["--port", "0", "--store", f"{folder}/serving.sqlite", "--end-with-parent"]
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.serving", *ours, *options],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": paths, **environment},
            )
        try:
            service = RunningGateway("", process, log)
            found = wait_for(lambda: ADDRESS.search(service.said()), seconds, "address", service)
            service.url = f"{found[1]}/v1"
            if ready:
                wait_for(lambda: is_ready(service.root), seconds, "ready engine", service)
            yield service
        finally:
            process.stdin.close()  # asks for an end; answers that have begun are finished
            try:
                process.wait(timeout=seconds)
            finally:
                process.kill()
                process.wait()
