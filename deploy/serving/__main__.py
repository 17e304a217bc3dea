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
from pathlib import Path

import uvicorn

from deploy.serving.app import build_app
from deploy.serving.engine import Engine
from deploy.serving.gateway import AUTO, Gateway
from deploy.serving.limits import Limits, is_loopback, read_keys
from deploy.serving.store import Store, StoreError, choose_arm

log = logging.getLogger("deploy.serving")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m deploy.serving", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="DIR[=WEIGHT]",
        help="a model folder (with --engine: a model's name there), and its share of the A/B test; repeat for more",
    )
    add(
        "--engine",
        metavar="URL",
        action="append",
        default=[],
        help="an OpenAI-compatible engine that already runs (vLLM, SGLang, llama.cpp), such as http://127.0.0.1:8001; "
        "once, or once per --model. Its key, if any, is read from LAB_ENGINE_KEY. Default: one of our own per folder",
    )
    add("--host", default="127.0.0.1", help="another one needs LAB_API_KEYS (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 for a free one (default: %(default)s)")
    add(
        "--store",
        type=Path,
        default=Path("runs/serving.sqlite"),
        help="SQLite file (default: %(default)s)",
    )
    add("--store-megabytes", type=int, default=2000, help="its largest size (default: %(default)s)")
    add(
        "--retention-days",
        type=float,
        default=30.0,
        help="texts without the user's consent are removed after so long (default: %(default)g)",
    )
    add(
        "--experiment",
        default="default",
        help="the A/B test's name: another one assigns users anew",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="of requests that name none (default: %(default)g, greedy)",
    )
    add(
        "--no-batching",
        action="store_true",
        help="our own engine answers one by one, at each request's temperature",
    )
    add(
        "--max-tokens",
        type=int,
        default=default.max_tokens,
        help="of one answer (default: %(default)s)",
    )
    add(
        "--body-bytes",
        type=int,
        default=default.body_bytes,
        help="of one request (default: %(default)s)",
    )
    add(
        "--requests-per-minute",
        type=int,
        default=default.requests_per_minute,
        help="per key (default: %(default)s)",
    )
    add(
        "--concurrency",
        type=int,
        default=default.concurrency,
        help="at one engine at once (default: %(default)s)",
    )
    add(
        "--queue",
        type=int,
        default=default.queue,
        help="waiting for one engine (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=default.timeout,
        help="seconds for a request (default: %(default)g)",
    )
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
        raise ValueError(
            f"--model {error}: write --model DIR=WEIGHT, such as --model runs/cpu/dpo=0.9"
        ) from error
    sources = [source for source, _, _ in split]
    parts = [Path(source).resolve().parts[1:] for source in sources]
    if len(set(parts)) < len(parts):
        raise ValueError("The same --model is given twice.")
    names = next(
        n
        for depth in range(1, 99)
        if len(set(n := ["/".join(p[-depth:]) for p in parts])) == len(parts)
    )
    if AUTO in names:
        raise ValueError(
            f"No model can be called {AUTO!r}: that name leaves the choice to the A/B test."
        )
    return dict(zip(names, zip(sources, weights, strict=True), strict=True))


def gateway_of(options: argparse.Namespace) -> Gateway:
    """The gateway that the command line asks for. Raises: ValueError, StoreError, with what to
    change.
    """
    keys = read_keys(os.environ.get("LAB_API_KEYS", ""))
    if not keys and not is_loopback(options.host):
        raise ValueError(
            f"Without API keys the gateway does not listen on {options.host}, where others could reach it. "
            "Set LAB_API_KEYS, or leave --host out."
        )
    if not keys:
        log.warning("no API keys (LAB_API_KEYS): everybody on this machine may ask, nobody else")
    limits = Limits(
        options.body_bytes,
        options.max_tokens,
        options.requests_per_minute,
        options.concurrency,
        options.queue,
        options.timeout,
    )
    if options.queue < 0 or options.retention_days < 0:
        raise ValueError("--queue and --retention-days must be 0 or larger.")
    if min(value for name, value in vars(limits).items() if name != "queue") <= 0:
        raise ValueError("Limits must be above 0 (--queue may be 0: then nobody waits).")
    if options.temperature < 0:
        raise ValueError("--temperature must be 0 or larger.")
    models = named(options.model)
    if len(options.engine) not in (0, 1, len(models)):
        raise ValueError(f"Give --engine once, or once for each of the {len(models)} models.")
    urls = (
        options.engine
        if len(options.engine) == len(models)
        else (options.engine or [None]) * len(models)
    )
    key, engines = os.environ.get("LAB_ENGINE_KEY"), {}
    for (name, (source, _)), url in zip(models.items(), urls, strict=True):
        name, folder = (source, None) if url else (name, Path(source).resolve())
        address = url.rstrip("/").removesuffix("/v1") if url else None
        engines[name] = Engine(
            name, limits, folder, address, key, not options.no_batching, options.temperature
        )
    weights = dict(zip(engines, (weight for _, weight in models.values()), strict=True))
    choose_arm("anybody", weights)
    store = Store(options.store, options.store_megabytes * 1_000_000)
    return Gateway(
        engines,
        weights,
        store,
        keys,
        limits,
        options.experiment,
        options.retention_days,
        options.log_prompts,
    )


def end_with_parent() -> None:
    """Shuts down, as on SIGTERM, once standard input is closed."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; then answers that have begun are finished. Returns the exit
    status.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        gateway = gateway_of(options)  # it refuses before any port is open
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
        # asyncio sets this only where the socket names its protocol, which this one does not.
        # Without it the second packet of an answer waits for the client's acknowledgement: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, ValueError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    app = build_app(gateway)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        backlog=2048,
        server_header=False,
        timeout_graceful_shutdown=int(options.timeout) + 1,
        timeout_keep_alive=15,
    )
    if options.end_with_parent:
        threading.Thread(target=end_with_parent, daemon=True).start()
    address = f"[{options.host}]" if ":" in options.host else options.host
    log.info(
        "serving %s on http://%s:%d", ", ".join(gateway.engines), address, listener.getsockname()[1]
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
