"""Figures of deployment: cost of rounding, speed of generating, latency, drift."""

import numpy as np
from matplotlib.figure import Figure

from common.plots import BESIDE, CHOSEN, GREY, MARK, OTHER, PALETTE, REJECTED, subplots


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


def speeds(cached: dict[int, tuple[float, float]], batches: dict[int, object]) -> Figure:
    """Left: time of an answer by its length, {new tokens: (seconds with cache, without)}. Right:
    throughput and latency by batch, {rows: Speed}.
    """
    figure, (left, right) = subplots(1, 2, figsize=(10.5, 3.6))
    for index, (name, colour) in enumerate((("KV cache", CHOSEN), ("no cache", REJECTED))):
        times = [1000 * pair[index] for pair in cached.values()]
        left.plot(list(cached), times, "o-", color=colour, label=name)
    left.set(xlabel="new tokens", ylabel="ms for an answer, p50", title="One row at a time", ylim=0)
    left.legend()
    sizes = list(batches)
    throughput = [batches[size].tokens_per_second for size in sizes]
    right.plot(sizes, throughput, "o-", color=OTHER, label="tokens/s")
    right.set(xlabel="rows in a batch", ylabel="new tokens per second", ylim=0)
    right.set_title("Batches: throughput and latency")
    other = right.twinx()
    times = ("latency_p50", "whole answer", "s--"), ("first_token_p50", "first token", "^:")
    for name, label, style in times:
        values = [1000 * getattr(batches[size], name) for size in sizes]
        other.plot(sizes, values, style, color=GREY, label=label, markersize=4)
    other.set(ylabel="ms, p50", ylim=0)
    other.grid(False)
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    handles = [*right.get_lines(), *other.get_lines()]
    right.legend(handles, [handle.get_label() for handle in handles], loc="upper left", fontsize=8)
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
