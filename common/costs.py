"""What a training step costs: FLOPs by formula, to set beside the counted ones, and memory,
measured.

Memory is measured in a process of its own, since what one method leaves behind would be counted to
the next: `python -m common.costs dpo --lora` trains a GPT-2 with random weights for a few steps and
prints what it took as JSON.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from common import losses
from common.data import collate
from common.logprobs import response_logps
from common.models import add_lora, freeze, frozen_copy, with_fused_gelu
from common.profiles import PROFILES, Recipe

# Passes through the model per pair and epoch, one per answer: (forward, backward).
PASSES = {"sft": (1, 1), "dpo": (4, 2), "dpo_cached": (2, 2), "orpo": (2, 2)}
FIRST = {"dpo_cached": 2}  # forward passes per pair before training, once: the cached reference


def pass_units(method: str, lora: bool = False) -> float:
    """Cost of a method per pair and epoch, in forward passes over one answer.

    A backward pass costs two forward passes: one for the gradients of the weights, one for those of
    the inputs. Under LoRA the frozen weights need no gradients, and almost only the second is left.
    """
    forward, backward = PASSES[method]
    return forward + backward * (1 if lora else 2)


def pass_cost(epochs: dict[str, float], lora: bool = False) -> float:
    """Forward passes per pair of some stages together, {method: epochs}, what is done once
    included.

    The usual claim, ORPO over SFT and DPO at equal epochs: `pass_cost({"orpo": 1}) /
    pass_cost({"sft": 1, "dpo": 1})`, which is 6 / (3 + 8).
    """
    return sum(
        pass_units(method, lora) * times + FIRST.get(method, 0) for method, times in epochs.items()
    )


def formula_flops(model, method: str, padded_tokens: float, scored_tokens: float) -> float:
    """Floating-point operations of training by formula: 2 per weight and token forward, 4 backward.

    Args: `padded_tokens`: as the model sees them, both answers, over all steps (`run.json`);
        `scored_tokens`: those whose prediction the output head computes. `method`: as in PASSES.
        Attention's own products are left out.
    Source: Kaplan et al. 2020 (arXiv 2001.08361), Sec. 2.1; the head counted apart, since it sees
        fewer tokens.
    """
    head = model.get_output_embeddings()
    inner = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    per_pass = (
        sum(m.weight.numel() for m in inner) * padded_tokens + head.weight.numel() * scored_tokens
    )
    answers = PASSES[method][1]  # answers per pair that the policy learns from
    return 2 * per_pass * pass_units(method) / answers


def _resident() -> int:
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The peak of memory while a block runs: of the GPU, else this process's resident set, sampled
    every 2 ms.
    """

    def __enter__(self) -> "PeakMemory":
        self.peak, self.running = 0, True
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, _resident())
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self.running = False
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.thread.join()


def give_back() -> None:
    """Returns freed memory to the system, as far as the C library can: building the model must not
    be counted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    before = 0 if device == "cuda" else _resident()
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
        command = [sys.executable, "-m", "common.costs", method, *(["--lora"] if lora else [])]
        sizes = {"pairs": pairs, "length": length, "layers": layers, "width": width, "steps": steps}
        command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        root = Path(__file__).resolve().parents[1]
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
        prog="python -m common.costs", description=__doc__.split("\n")[0]
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
