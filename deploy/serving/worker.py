"""The engine's own process: `transformers serve` on the model folder it is started in, for as long
as its parent lives.

Run as a file, not as a module, so that a model folder never becomes a place to import from.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

SMALL = 50e6  # bytes of weights; below, more threads only get in each other's way


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024, help="tokens that the model can read")
    parser.add_argument("--batching", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sum(path.stat().st_size for path in Path().glob("*.safetensors")) < SMALL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from transformers.cli.transformers import app  # not its `main`, which looks for updates first

    batching = (
        batching_options(options.context, torch.cuda.is_available()) if options.batching else []
    )
    app(["serve", ".", "--host", "127.0.0.1", "--port", str(options.port), *batching])


if __name__ == "__main__":
    main()
