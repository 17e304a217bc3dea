"""Drift: has the traffic, or have the answers, changed since a quiet time?"""

from collections.abc import Callable
from math import sqrt
from statistics import mean, pstdev

from common.data import tokenize_response
from common.evaluation import logps_of
from common.io.formats import dialogue


def signals(
    rows: list[dict], refused: Callable[[str, str], bool] | None, reference, tokenizer
) -> list[dict[str, float]]:
    """Per answer: `length_tokens`, `ended_with_eos`, `surprise` (its NLL per token under
    `reference`) and `refused`.

    Args: `rows` of `deploy.serving.reports.answers` whose texts were not forgotten;
        `refused(prompt, answer)`: None where nobody can tell, and the signal is left out.
    """
    limit = getattr(reference.config, "max_position_embeddings", None) or 10**9
    texts = [(dialogue(row["messages"]), " " + row["answer"].strip()) for row in rows]
    ids = [tokenize_response(prompt, answer, tokenizer, limit)[:2] for prompt, answer in texts]
    scored = [{"prompt_ids": prompt, "chosen_ids": answer} for prompt, answer in ids]
    logps = logps_of(reference, scored).chosen.means
    found = [
        {
            "length_tokens": float(len(answer)),
            "ended_with_eos": float(row["finish_reason"] == "stop"),
            "surprise": -float(logp),
        }
        for row, (_, answer), logp in zip(rows, ids, logps, strict=True)
    ]
    if refused:
        for signal, (prompt, answer) in zip(found, texts, strict=True):
            signal["refused"] = float(refused(prompt, answer))
    return found


def drift_limits(
    baseline: list[dict[str, float]], window: int, z: float = 3.0
) -> dict[str, tuple[float, float]]:
    """Of each signal, the band in which the mean of `window` answers stays if nothing has changed.

    The baseline's mean ± z standard errors; those of the baseline's own mean are counted too. Four
    signals at z = 3 give a false alarm in about one window of a hundred.
    Raises: ValueError for a baseline of fewer than 2 answers, or an empty window.
    """
    if len(baseline) < 2 or window < 1:
        raise ValueError("A baseline needs at least 2 answers, and a window at least 1.")
    limits, size = {}, len(baseline)
    for name in baseline[0]:
        values = [row[name] for row in baseline]
        share = set(values) <= {0.0, 1.0}
        # A share that never varied in the baseline may vary later: one more answer of each kind is
        # assumed.
        spread = max(pstdev(values), sqrt(size + 1) / (size + 2) if share else 0.0)
        half = z * spread * sqrt(1 / window + 1 / size)
        low, high = mean(values) - half, mean(values) + half
        limits[name] = (max(0.0, low), min(1.0, high)) if share else (low, high)
    return limits


def alarms(
    rows: list[dict[str, float]], limits: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Signals whose mean over these answers is outside its limits, with that mean."""
    means = {name: mean(row[name] for row in rows) for name in limits}
    outside = {name: not low <= means[name] <= high for name, (low, high) in limits.items()}
    return {name: means[name] for name in limits if outside[name]}
