"""How fast a model answers: KV cache, batch sizes, continuous batching, streaming. All of it
measured, in seconds.
"""

import time
from dataclasses import dataclass
from statistics import mean
from types import SimpleNamespace

import numpy as np
import torch
from pandas import DataFrame, concat
from transformers import GenerationConfig

from common.data import left_padded, tokenize_prompt
from common.evaluation import Sampling, generate
from common.lab import not_measured


@dataclass(frozen=True)
class Speed:
    """One way to generate, measured. Latencies are of one whole batch; times in seconds."""

    batch: int
    tokens_per_second: float  # new tokens of all rows
    first_token_p50: float
    latency_p50: float
    latency_p95: float
    runs: int


def speed(
    model, tokenizer, prompts: list[str], new_tokens: int, batch=1, use_cache=True, runs=5
) -> Speed:
    """Measures greedy generation of exactly `new_tokens` per row (EOS is ignored): every setting
    does equal work.

    Args: `prompts`: taken in turn, `batch` to a run. A first run warms up and is not counted. With
        fewer than 20 runs the 95th percentile is close to the slowest one.
    Raises: ValueError for no run, or where prompts and new tokens exceed the context.
    """
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    ids = [tokenize_prompt(prompt, tokenizer) for prompt in prompts]
    if runs < 1 or max(map(len, ids)) + new_tokens > context:
        said = f"prompts with {new_tokens} new tokens within {context}."
        raise ValueError(f"At least one run is needed, and {said}")
    firsts, latencies, end = [], [], tokenizer.eos_token_id
    times = []  # a streamer is handed the prompts, then each new token of the batch
    watch = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    for run in range(runs + 1):
        chosen = [ids[(run * batch + i) % len(ids)] for i in range(batch)]
        inputs = left_padded(chosen, end, model.device)
        times.clear()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=end,
                streamer=watch,
            )
        if run:
            latencies.append(time.perf_counter() - start)
            firsts.append(times[1] - start)
    p50, p95 = np.quantile(latencies, (0.5, 0.95))
    rate = batch * new_tokens / mean(latencies)
    return Speed(batch, rate, float(np.median(firsts)), float(p50), float(p95), runs)


def forward_tokens(prompt: int, new: int, use_cache: bool) -> int:
    """Tokens that pass through the model for one answer: with the cache each once, without it all
    again each step.
    """
    return prompt + new - 1 if use_cache else sum(prompt + step for step in range(new))


def static_batches(
    model, tokenizer, prompts: list[str], new_tokens: int, batch: int
) -> tuple[list[list[int]], float]:
    """(greedy answers with EOS, seconds): batches of fixed rows, each as slow as its longest
    answer.
    """
    start = time.perf_counter()
    groups = generate(model, tokenizer, prompts, Sampling(new_tokens, temperature=0), batch)
    return [list(group[0].chosen_ids) for group in groups], time.perf_counter() - start


def idle_share(answers: list[list[int]], batch: int) -> float:
    """Share of a fixed batch's places that wait for its longest answer."""
    parts = [answers[at : at + batch] for at in range(0, len(answers), batch)]
    steps = sum(max(map(len, part)) * len(part) for part in parts)
    return 1 - sum(map(len, answers)) / steps


def continuous_batches(
    model, tokenizer, prompts: list[str], new_tokens: int, rows: int = 64
) -> tuple[list[list[int]], float]:
    """(greedy answers with EOS, seconds) by transformers' continuous batching: a finished row frees
    its place at once.

    Args: `rows`: at most so many at a time. On a CPU the memory of the paged cache is bounded here:
        left alone it would take most of what the machine has.
    Raises: RuntimeError where a request failed.
    """
    from transformers import ContinuousBatchingConfig

    end, ids = tokenizer.eos_token_id, [tokenize_prompt(each, tokenizer) for each in prompts]
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    pages = -(-(max(map(len, ids)) + new_tokens) // 32)
    sizes = {} if model.device.type == "cuda" else {"page_size": 32, "num_blocks": pages * rows}
    config = ContinuousBatchingConfig(max_batch_tokens=256, max_requests_per_batch=rows, **sizes)
    start = time.perf_counter()
    options = {"generation_config": settings, "continuous_batching_config": config}
    done = model.generate_batch(ids, **options, warmup=False)
    seconds = time.perf_counter() - start
    if len(done) < len(ids) or any(answer.error for answer in done.values()):
        said = f"answered {len(done)} of {len(ids)} prompts, or failed on some."
        raise RuntimeError(f"Continuous batching {said}")
    numbered = sorted(done.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
    return [list(answer.generated_tokens) for _, answer in numbered], seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 of latencies, in seconds. Raises: ValueError for none."""
    if not seconds:
        raise ValueError("No latency was measured.")
    p50, p95 = np.quantile(seconds, (0.5, 0.95))
    return {"p50": float(p50), "p95": float(p95), "requests": len(seconds)}


def at_real_size(*parts: str, profile: str = "smollm") -> DataFrame | None:
    """What notebook 1.8-04 measured on a real model: "variants", "kv_cache" or "batches".

    None, with a line that says so, where no run of that profile was recorded.
    """
    from common.io.evidence import evidence

    report = evidence("deployment").get(profile)
    if report is None:
        not_measured(" and ".join(parts), f"no run of profile {profile} was recorded")
        return None
    known = {"variants": report["variants"], **report["inference"]}
    tables = {
        part: DataFrame(known[part]).T.drop(columns="win_rate", errors="ignore") for part in parts
    }
    if len(parts) == 1:
        return tables[parts[0]].astype(float).round(3)
    return concat(tables).astype(float).round(3)
