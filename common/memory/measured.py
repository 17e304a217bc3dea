"""What a training step takes, measured: memory by part, and seconds.

Each measurement runs in a process of its own, since what one method leaves behind would be counted
to the next: `python -m common.memory.measured dpo --lora` trains a GPT-2 with random weights for a
few steps and prints what it took as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common import losses
from common.costs import PASSES
from common.data import collate
from common.logprobs import response_logps
from common.memory.meter import PeakMemory, bytes_of, give_back
from common.models import add_lora, freeze, frozen_copy, with_fused_gelu
from common.profiles import PROFILES, ROOT, Recipe


@dataclass(frozen=True)
class MeasuredSize:
    """Model and batch that memory is measured with. The default is GPT-2's size."""

    pairs: int = 2
    length: int = 128  # tokens of the longest row
    layers: int = 12
    width: int = 768  # a multiple of 64
    steps: int = 3


def _ragged_rows(pairs: int, length: int, vocabulary: int) -> list[dict]:
    """Random token ids: prompts of a third of `length`, responses of a third to two thirds."""
    draw, third = torch.Generator().manual_seed(0), length // 3
    sizes = torch.randint(third, length - third + 1, (2 * pairs,), generator=draw).tolist()
    sizes[0] = length - third  # one row fills the length

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    return [
        {"prompt_ids": ids(third), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
        for chosen, rejected in zip(sizes[::2], sizes[1::2], strict=True)
    ]


def measure_method(method: str, lora: bool = False, size: MeasuredSize = MeasuredSize()) -> dict:
    """Trains a GPT-2 with random weights for a few steps on random pairs, in this process.

    Args: `method`: a key of PASSES. Returns: bytes of the weights, the frozen reference, gradients
        and optimiser state; the peak over what the process held before; `rest_bytes`, the peak less
        those parts: activations, logits and scratch memory; seconds per step (median without the
        first).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with PeakMemory() as memory:
        before = memory.held

    # 1. Model, reference, optimiser and one batch.
    torch.manual_seed(0)
    sizes = {"n_layer": size.layers, "n_embd": size.width, "n_head": size.width // 64}
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(with_fused_gelu(config)).to(device)  # as `load_model` does
    reference = frozen_copy(model) if method == "dpo" and not lora else None
    if lora:
        model = add_lora(freeze(model), replace(PROFILES["cpu"], lora=16))
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)
    kind = method.removesuffix("_cached")
    rows = _ragged_rows(size.pairs, size.length, config.vocab_size)
    sides = ("chosen",) if kind == "sft" else ("chosen", "rejected")
    batch = collate(rows, device=device, sides=sides)
    recipe = Recipe(lr=1e-5, lambda_or=0.5, nll_weight=1.0)
    tokens = losses.scored_tokens(rows, recipe)

    def known_logps():
        with torch.no_grad(), nullcontext() if reference or not lora else model.disable_adapter():
            return response_logps(reference or model, batch)

    cached, seconds = known_logps() if method == "dpo_cached" else None, []

    # 2. The steps.
    give_back()
    with PeakMemory() as memory:
        for _ in range(size.steps):
            start = time.perf_counter()
            known = known_logps() if method == "dpo" else cached
            policy = response_logps(model, batch)
            loss = losses.objective(kind, recipe, policy, known, size.pairs, tokens)[0]
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            gradients = bytes_of(weight.grad for weight in learned)
            optimizer.zero_grad()

    # 3. What was held.
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    parts = {
        "weights_bytes": bytes_of(model.parameters()),
        "gradient_bytes": gradients,
        "optimizer_bytes": bytes_of(filter(torch.is_tensor, state)),
        "reference_bytes": bytes_of(reference.parameters()) if reference else 0,
    }
    peak = memory.peak - before
    return {
        "method": method,
        "lora": lora,
        "device": device,
        **asdict(size),
        "parameters": model.num_parameters(),
        "model_copies": 1 + (reference is not None),
        **parts,
        "peak_bytes": peak,
        "rest_bytes": peak - sum(parts.values()),
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def measure_memory(
    methods: list[tuple[str, bool]], progress: Callable = lambda jobs: jobs, **sizes: int
) -> list[dict]:
    """`measure_method` for each (method, lora), each in a process of its own, one after the other.

    Args: `sizes`: fields of `MeasuredSize`; `progress`: wraps the list, as `tqdm` does.
    Raises: RuntimeError with the child's last words if it fails.
    """
    return [
        json_of_process(
            "common.memory.measured",
            what=f"Measuring {method}, LoRA {lora},",
            arguments=[method, *["--lora"] * lora]
            + [f"--{name}={value}" for name, value in sizes.items()],
        )
        for method, lora in progress(methods)
    ]


def json_of_process(
    module: str,
    task: dict | None = None,
    arguments: list[str] = (),
    environment: dict[str, str] | None = None,
    what: str = "",
    timeout: float | None = None,
) -> dict:
    """What `python -m module` prints as its last line, as JSON, in a process of its own.

    Args: `task`: given to it on stdin, as JSON; `environment`: variables added to this process's;
        `timeout`: seconds after which it is ended.
    Raises: RuntimeError with its last words if it fails: for want of memory there may be none.
        subprocess.TimeoutExpired.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        timeout=timeout,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing: perhaps memory ran out"]
        raise RuntimeError(f"{what or module} ended with {done.returncode}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.memory.measured", description=__doc__.split("\n")[0]
    )
    parser.add_argument("method", choices=PASSES, help="what to train with")
    parser.add_argument(
        "--lora", action="store_true", help="train adapters of rank 16 instead of all weights"
    )
    for each in fields(MeasuredSize):
        text = f"of model and batch, see MeasuredSize (default {each.default})"
        parser.add_argument(f"--{each.name}", type=int, default=each.default, help=text)
    options = vars(parser.parse_args(arguments))
    found = measure_method(options.pop("method"), options.pop("lora"), MeasuredSize(**options))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
