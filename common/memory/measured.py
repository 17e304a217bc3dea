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
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common import losses
from common.costs import PASSES
from common.data import collate
from common.logprobs import response_logps
from common.memory.meter import PeakMemory, bytes_of, give_back, resident_bytes
from common.models import add_lora, freeze, frozen_copy, with_fused_gelu
from common.profiles import PROFILES, Recipe


def _ragged_rows(pairs: int, length: int, vocabulary: int) -> list[dict]:
    """Random token ids: prompts of a third of `length`, responses of a third to two thirds."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    third = length // 3
    sizes = [
        int(torch.randint(third, length - third + 1, (1,), generator=generator))
        for _ in range(2 * pairs)
    ]
    sizes[0] = length - third  # one row fills the length
    return [
        {
            "prompt_ids": ids(third),
            "chosen_ids": ids(sizes[2 * i]),
            "rejected_ids": ids(sizes[2 * i + 1]),
        }
        for i in range(pairs)
    ]


def measure_method(
    method: str, lora: bool, pairs: int, length: int, layers: int, width: int, steps: int
) -> dict:
    """Trains a GPT-2 with random weights for a few steps on random pairs, in this process.

    Args: `method`: a key of PASSES. Returns: bytes of the weights, the frozen reference, gradients
        and optimiser state; the peak over what the process held before; `rest_bytes`, the peak less
        those parts: activations, logits and scratch memory; seconds per step (median without the
        first).
    """
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config = with_fused_gelu(config)  # as `load_model` does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = 0 if device == "cuda" else resident_bytes()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(device)
    reference = frozen_copy(model) if method == "dpo" and not lora else None
    if lora:
        model = add_lora(freeze(model), replace(PROFILES["cpu"], lora=16))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)
    kind = method.removesuffix("_cached")
    rows = _ragged_rows(pairs, length, config.vocab_size)
    if kind == "sft":
        rows = [{name: ids for name, ids in row.items() if name != "rejected_ids"} for row in rows]
    batch = collate(rows, 0, model.device, ("chosen",) if kind == "sft" else ("chosen", "rejected"))
    recipe = Recipe(lr=1e-5, lambda_or=0.5, nll_weight=1.0)
    tokens, cached, seconds = losses.scored_tokens(rows, recipe), None, []
    if method == "dpo_cached":
        with torch.no_grad():
            cached = response_logps(model, batch)
    give_back()
    with PeakMemory() as memory:
        for _ in range(steps):
            start, known = time.perf_counter(), cached
            if kind == "dpo" and known is None:
                with torch.no_grad():
                    if reference is not None:
                        known = response_logps(reference, batch)
                    else:
                        with model.disable_adapter():
                            known = response_logps(model, batch)
            loss, _ = losses.objective(
                kind, recipe, response_logps(model, batch), known, pairs, tokens
            )
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            gradients = bytes_of(p.grad for p in learned)
            optimizer.zero_grad()
    state = [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if torch.is_tensor(value)
    ]
    parts = {
        "weights_bytes": bytes_of(model.parameters()),
        "gradient_bytes": gradients,
        "optimizer_bytes": bytes_of(state),
        "reference_bytes": bytes_of(reference.parameters()) if reference is not None else 0,
    }
    peak = memory.peak - before
    return {
        "method": method,
        "lora": lora,
        "device": device,
        "pairs": pairs,
        "length": length,
        "layers": layers,
        "width": width,
        "parameters": model.num_parameters(),
        "model_copies": 1 + (reference is not None),
        **parts,
        "peak_bytes": peak,
        "rest_bytes": peak - sum(parts.values()),
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def measure_memory(
    methods: list[tuple[str, bool]],
    pairs: int = 2,
    length: int = 128,
    layers: int = 12,
    width: int = 768,
    steps: int = 3,
    progress: Callable = lambda jobs: jobs,
) -> list[dict]:
    """`measure_method` for each (method, lora), each in a process of its own, one after the other.

    Raises: RuntimeError with the child's last words if it fails, which for want of memory may be
        nothing at all.
    """
    results = []
    for method, lora in progress(methods):
        command = [
            sys.executable,
            "-m",
            "common.memory.measured",
            method,
            *(["--lora"] if lora else []),
        ]
        sizes = {"pairs": pairs, "length": length, "layers": layers, "width": width, "steps": steps}
        command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        if done.returncode:
            words = done.stderr.strip().splitlines()[-1:] or [
                "it said nothing: perhaps memory ran out"
            ]
            raise RuntimeError(
                f"Measuring {method}, LoRA {lora}, ended with {done.returncode}: {words[0]}"
            )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.memory.measured", description=__doc__.split("\n")[0]
    )
    parser.add_argument("method", choices=PASSES, help="what to train with")
    parser.add_argument(
        "--lora", action="store_true", help="train adapters of rank 16 instead of all weights"
    )
    for name, value, text in (
        ("pairs", 2, "pairs in a batch"),
        ("length", 128, "tokens of the longest row"),
        ("layers", 12, "of the model"),
        ("width", 768, "of the model, a multiple of 64"),
        ("steps", 3, "optimiser steps, at least 1"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    options = parser.parse_args(arguments)
    print(json.dumps(measure_method(**vars(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
