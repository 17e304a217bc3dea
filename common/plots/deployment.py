"""Figures of deployment: cost of rounding, speed of generating, latency, drift."""

import numpy as np
from matplotlib.figure import Figure

from common.plots import BESIDE, CHOSEN, GREY, MARK, OTHER, PALETTE, REJECTED, subplots

LATENCIES = ("latency_p50", "latency_p95")


def quality_size_speed(report: dict[str, dict]) -> Figure:
    """Win rate against full precision over bytes of weights; the area of a dot grows with tokens
    per second.

    `report`: as `deploy.quantize.measure_variants` gives it.
    """
    figure, ax = subplots(figsize=(8, 4.2))
    fastest = max(row["tokens_per_second"] for row in report.values())
    for colour, (name, row) in zip(PALETTE + PALETTE, report.items(), strict=False):
        size, rate = row["weight_bytes"] / 1e6, row["win_rate"]
        down, up = rate.rate - rate.ci95[0], rate.ci95[1] - rate.rate
        ax.errorbar(size, rate.rate, [[down], [up]], color=colour, capsize=3, linewidth=1, zorder=1)
        label = f"{name}: {row['tokens_per_second']:,.0f} tokens/s"
        area = 400 * row["tokens_per_second"] / fastest
        ax.scatter(size, rate.rate, area, color=colour, alpha=0.6, label=label, zorder=2)
    ax.axhline(0.5, **MARK)
    ax.set(
        xlabel="weights in memory, MB (counted)",
        ylabel="win rate against float32 (ties half)",
        title="Quality, size and speed: upper left and large is best",
    )
    ax.margins(x=0.15, y=0.2)
    legend = ax.legend(**BESIDE, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    return figure


def batch_speeds(batches: dict[int, object]) -> Figure:
    """What rows in a batch gain together and wait each, {rows: Speed}; bars reach to the 95th
    percentile.
    """
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.2))
    sizes, runs = list(batches), list(batches.values())
    left.plot(sizes, [run.tokens_per_second for run in runs], "o-", color=OTHER)
    left.set(title="All rows together", ylabel="new tokens per second", ylim=0)
    p50, p95 = (1000 * np.array([getattr(run, of) for run in runs]) for of in LATENCIES)
    bars = [np.zeros_like(p50), p95 - p50]
    right.errorbar(sizes, p50, bars, fmt="o-", color=REJECTED, capsize=3, label="whole answer")
    firsts = [1000 * run.first_token_p50 for run in runs]
    right.plot(sizes, firsts, "^:", color=GREY, label="first token")
    right.set(title="Each row", ylabel="ms, p50", ylim=0)
    right.legend()
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("rows in a batch")
    return figure


def peeking(users: list[int], looks: list[float], one: float) -> Figure:
    """Chance that one of two equal models was named the winner by each look; `one`: of a single
    look at the end. `users`: in each arm, at the looks.
    """
    figure, ax = subplots(figsize=(7, 3.2))
    ax.plot(users, looks, "o-", color=REJECTED, label="stop at the first |z| > 1.96")
    ax.plot(users[-1], one, "s", color=CHOSEN, label="one look at the end")
    ax.axhline(0.05, **MARK)
    ax.set(title="Two equal models", xlabel="users in each arm", ylabel="P(a winner is named)")
    ax.set_ylim(0)
    ax.legend()
    return figure


def latencies(groups: dict[str, list[float]], xlabel: str, title: str = "") -> Figure:
    """Share of requests answered within a time: one curve per group of latencies in seconds.

    Args: `xlabel`: names the time, in milliseconds.
    """
    figure, ax = subplots(figsize=(8.6, 3.4))
    for colour, (name, seconds) in zip(PALETTE, groups.items(), strict=False):
        ordered = 1000 * np.sort(seconds)
        shares = np.arange(1, len(ordered) + 1) / len(ordered)
        ax.step(ordered, shares, where="post", color=colour, label=name)
    for share in (0.5, 0.95):
        ax.axhline(share, color="black", linestyle=":", linewidth=1)
        text = {"xytext": (3, -3), "textcoords": "offset points", "fontsize": 8}
        place = (1, share), ("axes fraction", "data")
        ax.annotate(f"p{100 * share:.0f}", place[0], xycoords=place[1], **text)
    ax.set(xlabel=xlabel, ylabel="share of requests", title=title, ylim=(0, 1.02), xlim=0)
    ax.legend(loc="upper left", bbox_to_anchor=(1.05, 1), frameon=False)
    return figure


def drift(
    windows: dict[str, list[dict]], limits: dict[str, tuple[float, float]], names: dict[str, str]
) -> Figure:
    """One panel per signal: the mean of each window over the band of the baseline, red outside it.

    Args: `windows`: {window: rows}; `limits`: {signal: (low, high)}; `names`: {signal: panel title
        with its unit}.
    """
    figure, axes = subplots(1, len(limits), figsize=(3.1 * len(limits), 3.3))
    for ax, (signal, (low, high)) in zip(np.atleast_1d(axes), limits.items(), strict=True):
        ax.axhspan(low, high, color=GREY, alpha=0.25)
        for place, rows in enumerate(windows.values()):
            value = float(np.mean([row[signal] for row in rows]))
            ax.plot(place, value, "o", color=CHOSEN if low <= value <= high else REJECTED)
        ax.set_xticks(range(len(windows)), windows, rotation=30, ha="right")
        ax.set(title=names[signal], xlim=(-0.5, len(windows) - 0.5))
        ax.margins(y=0.2)
    return figure
