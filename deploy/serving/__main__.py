"""Serves aligned models: `python -m deploy.serving --model DIR[=weight] [--model DIR2[=weight]]
--port N`.

API keys come from LAB_API_KEYS (a comma-separated list). Without them only this machine is served.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import fields
from itertools import cycle
from pathlib import Path

import uvicorn

from deploy.serving.app import build_app
from deploy.serving.engine import Engine
from deploy.serving.gateway import AUTO, Gateway
from deploy.serving.guard import SERVER
from deploy.serving.limits import Limits, is_loopback, read_keys
from deploy.serving.own_engine import OwnEngine
from deploy.serving.store import Store, StoreError, choose_arm

log = logging.getLogger("deploy.serving")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("python -m deploy.serving", description=about)
    add = parser.add_argument

    def setting(name: str, default, text: str) -> None:
        add(name, type=type(default), default=default, help=f"{text} (default: %(default)s)")

    share = "a model folder (with --engine: a model's name there), and its share of the A/B test"
    there = "an OpenAI-compatible engine that already runs (vLLM, SGLang, llama.cpp): its address, "
    there += "once, or once per --model. LAB_ENGINE_KEY holds its key. Default: one of our own each"
    add("--model", metavar="DIR[=WEIGHT]", action="append", required=True, help=share)
    add("--engine", metavar="URL", action="append", default=[], help=there)
    days = "texts without the user's consent are removed after so long"
    setting("--host", "127.0.0.1", "another one needs LAB_API_KEYS")
    setting("--port", 8000, "0 for a free one")
    setting("--store", Path("runs/serving.sqlite"), "SQLite file")
    setting("--store-megabytes", 2000, "its largest size")
    setting("--retention-days", 30.0, days)
    setting("--experiment", "default", "of the A/B test: a new name assigns users anew")
    setting("--temperature", 0.0, "of requests that name none; 0 is greedy")
    own = "our own engine answers one by one, at each request's temperature"
    add("--no-batching", action="store_true", help=own)
    for limit in fields(Limits):
        setting(f"--{limit.name.replace('_', '-')}", limit.default, limit.metadata["help"])
    add("--log-prompts", action="store_true", help="write prompts and answers to the log")
    add("--end-with-parent", action="store_true", help="shut down when standard input closes")
    return parser.parse_args(arguments)


def named(models: list[str]) -> dict[str, tuple[str, float]]:
    """`DIR[=WEIGHT]` → name: (DIR, weight). A name is the folder's own, with its parents' where two
    are the same.

    Raises: ValueError for a weight that is no number, or the same folder twice.
    """
    split = [model.rpartition("=") if "=" in model else (model, "=", "1") for model in models]
    try:
        weights = [float(weight) for _, _, weight in split]
    except ValueError as error:
        advice = "write --model DIR=WEIGHT, such as --model runs/cpu/dpo=0.9"
        raise ValueError(f"--model {error}: {advice}") from error
    sources = [source for source, _, _ in split]
    parts = [Path(source).resolve().parts[1:] for source in sources]
    if len(set(parts)) < len(parts):
        raise ValueError("The same --model is given twice.")
    depth = 1
    while len(set(names := ["/".join(part[-depth:]) for part in parts])) < len(parts):
        depth += 1
    if AUTO in names:
        raise ValueError(f"No model can be called {AUTO!r}: with it the A/B test chooses.")
    return dict(zip(names, zip(sources, weights, strict=True), strict=True))


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that the command line asks for. Raises: ValueError for one that makes no sense."""
    limits = Limits(**{limit.name: getattr(options, limit.name) for limit in fields(Limits)})
    if min(options.queue, options.retention_days) < 0 or not 0 <= options.temperature <= 2:
        said = "--queue and --retention-days must be 0 or larger, --temperature from 0 to 2."
        raise ValueError(said)
    if min(value for name, value in vars(limits).items() if name != "queue") <= 0:
        raise ValueError("Limits must be above 0 (--queue may be 0: then nobody waits).")
    return limits


def gateway_of(options: argparse.Namespace) -> Gateway:
    """The gateway that the command line asks for. Raises: ValueError, StoreError, with what to
    change.
    """
    keys, limits = read_keys(os.environ.get("LAB_API_KEYS", "")), limits_of(options)
    if not keys and not is_loopback(options.host):
        said = f"Without API keys the gateway does not listen on {options.host}, where others could"
        raise ValueError(f"{said} reach it. Set LAB_API_KEYS, or leave --host out.")
    if not keys:
        log.warning("no API keys (LAB_API_KEYS): everybody on this machine may ask, nobody else")
    models, urls = named(options.model), options.engine
    if len(urls) not in (0, 1, len(models)):
        raise ValueError(f"Give --engine once, or once for each of the {len(models)} models.")
    key, engines, weights = os.environ.get("LAB_ENGINE_KEY"), {}, {}
    for (name, (source, weight)), url in zip(models.items(), cycle(urls or [None]), strict=False):
        if url:  # there, a model has the name that the engine gave it
            engine = Engine(source, limits, url.rstrip("/").removesuffix("/v1"), key)
        else:
            folder, batching = Path(source).resolve(), not options.no_batching
            engine = OwnEngine(name, limits, folder, batching, options.temperature)
        engines[engine.name], weights[engine.name] = engine, weight
    choose_arm("anybody", weights)  # refuses weights that are no shares
    store = Store(options.store, options.store_megabytes * 1_000_000)
    gateway = Gateway(engines, weights, store, keys, limits, options.experiment)
    gateway.retention_days, gateway.log_prompts = options.retention_days, options.log_prompts
    return gateway


def _end_with_parent() -> None:
    """Shuts down, as on SIGTERM, once standard input is closed."""
    while os.read(sys.stdin.fileno(), 1024):  # a buffer would be locked when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; then answers that have begun are finished. Returns the exit
    status.
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        gateway = gateway_of(options)  # it refuses before any port is open
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
        # asyncio sets this only where the socket names its protocol, which this one does not.
        # Without it the second packet of an answer waits for the client's acknowledgement: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if unread := getattr(socket, "TCP_USER_TIMEOUT", None):  # Linux: a client that never reads
            listener.setsockopt(socket.IPPROTO_TCP, unread, 30_000)  # milliseconds
    except (OSError, ValueError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        build_app(gateway),
        **SERVER,
        log_config=None,
        log_level="warning",
        server_header=False,
        lifespan="on",
        backlog=2048,
        timeout_graceful_shutdown=int(options.timeout) + 1,
    )
    with suppress(ImportError, ValueError, OSError):  # Windows has no limit on open files
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # many shells begin at 1,024
    if options.end_with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    host = f"[{options.host}]" if ":" in options.host else options.host
    port = listener.getsockname()[1]
    log.info("serving %s on http://%s:%d", ", ".join(gateway.engines), host, port)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    for sign in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again, once all is answered
        signal.signal(sign, lambda *_: sys.exit(0))
    sys.exit(main())
