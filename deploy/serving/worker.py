"""The engine's own process: `transformers serve` on the folder `model`, for as long as its parent
lives.

Run as a file, not in the model's folder, so that this never becomes a place to import from.
"""

import argparse
import asyncio
import hmac
import os
import socket
import sys
import threading
from functools import partialmethod
from pathlib import Path

from starlette.responses import PlainTextResponse, StreamingResponse

SMALL = 50e6  # bytes of weights; below, more threads only get in each other's way
# The gateway has rendered the model's own template: the engine runs no program of its folder.
AS_IT_IS = '{"chat_template": "{{ messages[0].content }}"}'


def end_with_parent() -> None:
    """Ends this process once the other end of standard input is closed: also when the gateway was
    killed.
    """
    sys.stdin.buffer.read()
    os._exit(0)


def batching_options(context: int, cuda: bool) -> list[str]:
    """Options of continuous batching. On a GPU the engine measures its memory; on a CPU it would
    take all of it.
    """
    blocks = max(64, context // 8)
    sizes = f"--cb-block-size 32 --cb-num-blocks {blocks} --cb-max-batch-tokens 256".split()
    return ["--continuous-batching", *([] if cuda else sizes)]


def guarded(app, key: str):
    """The engine's app, for those who know its key."""

    async def guard(scope, receive, send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        known = scope["type"] == "lifespan" or hmac.compare_digest(given, f"Bearer {key}".encode())
        await (app if known else PlainTextResponse("Not for you.", 401))(scope, receive, send)

    return guard


async def whole_answer(self, request_id: str, *inputs, gen_manager, written, **more):
    """The answer that `written` gives, as a stream of one piece: `serve` stops no work but that of
    a stream when its client hangs up.
    """

    async def pieces():
        try:
            answer = written(self, request_id, *inputs, gen_manager=gen_manager, **more)
            yield (await answer).body
        except asyncio.CancelledError:
            gen_manager._cb.cancel_request(request_id)
            raise

    return StreamingResponse(pieces(), media_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--key", action="store_true", help="no Unix socket; the key comes on stdin")
    parser.add_argument("--context", type=int, help="tokens that the model can read")
    parser.add_argument("--batching", action="store_true")
    options = parser.parse_args()
    # Bound from the start: no other process can take the place.
    listener, key = socket.socket(socket.AF_INET if options.key else socket.AF_UNIX), ""
    Path("socket").unlink(missing_ok=True)
    listener.bind(("127.0.0.1", 0) if options.key else "socket")
    if options.key:
        key = sys.stdin.buffer.readline().decode().strip()
        print(listener.getsockname()[1], flush=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sum(path.stat().st_size for path in Path("model").glob("*.safetensors")) < SMALL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler as Chat
    from transformers.cli.transformers import app  # not its `main`, which looks for updates first

    # `serve` makes its own server, and has no options for these.
    batching, config = [], uvicorn.Config
    if options.batching:
        batching = batching_options(options.context, torch.cuda.is_available())
        Chat._non_streaming = partialmethod(whole_answer, written=Chat._non_streaming)
    if key:
        uvicorn.Config = lambda app, **others: config(guarded(app, key), **others)
    uvicorn.Server.run = partialmethod(uvicorn.Server.run, sockets=[listener])
    app(["serve", "model", "--chat-template-kwargs", AS_IT_IS, *batching])


if __name__ == "__main__":
    main()
