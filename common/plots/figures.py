"""Every figure of the course (training curves: `curves`). Each function returns the figure; axes
have units.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from common.plots.comparisons import (  # noqa: F401 - a notebook finds every figure here
    flaw_rates,
    frontier,
    gradient_cosines,
    measure_panels,
    memory_by_part,
    win_rate_matrix,
)
from common.plots.curves import (  # noqa: F401 - a notebook finds every figure here
    CHOSEN,
    GREY,
    OTHER,
    PALETTE,
    REJECTED,
    compare_curves,
    displacement,
    sft_curves,
    training_curves,
)
from common.plots.tokens import packed_pair, token_log_ratios  # noqa: F401


def histograms(
    groups: dict[str, list[float]], xlabel: str, title: str = "", limit: float | None = None
) -> Figure:
    """Distributions over each other, with their medians; `limit` draws a dashed line (the context,
    say).
    """
    figure, ax = plt.subplots(figsize=(7, 3.2))
    everything = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    low, high = everything.min() - 0.5, everything.max() + 0.5
    if (
        everything == everything.round()
    ).all():  # counts: every bin holds equally many whole numbers
        width = np.ceil((high - low) / 40)
        bins = np.arange(low, high + width, width)
    else:
        bins = np.linspace(low, high, 40)
    for colour, (name, values) in zip(
        (CHOSEN, REJECTED, OTHER, GREY), groups.items(), strict=False
    ):
        ax.hist(
            values,
            bins=bins,
            alpha=0.45,
            color=colour,
            label=f"{name}, median {np.median(values):.0f}",
        )
        ax.axvline(np.median(values), color=colour, linewidth=1)
    if limit:
        ax.axvline(limit, color="black", linestyle="--", label=f"limit {limit:.0f}")
    ax.set(title=title, xlabel=xlabel, ylabel="number of rows")
    ax.legend()
    return figure


def bars(
    values: dict[str, dict[str, float]],
    ylabel: str,
    title: str = "",
    errors: dict | None = None,
    ylim=None,
    colours: tuple[str, ...] = PALETTE,
) -> Figure:
    """Grouped bars: one group per measure, one colour per model. `errors`: the same shape,
    half-widths.
    """
    measures = list(next(iter(values.values())))
    figure, ax = plt.subplots(figsize=(max(7.5, 1.5 * len(measures)), 3.4))
    width = 0.8 / len(values)
    for index, (colour, (model, row)) in enumerate(zip(colours, values.items(), strict=False)):
        places = np.arange(len(measures)) + (index - (len(values) - 1) / 2) * width
        half = [errors[model][name] for name in measures] if errors else None
        heights = [row[name] for name in measures]
        drawn = ax.bar(
            places, heights, width * 0.95, color=colour, label=model, yerr=half, capsize=2
        )
        ax.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    ax.margins(y=0.1)  # room for the labels
    ax.set(title=title, ylabel=ylabel, xticks=range(len(measures)), ylim=ylim)
    ax.set_xticklabels(
        measures,
        rotation=20 if len(measures) > 5 else 0,
        ha="right" if len(measures) > 5 else "center",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def win_rates(rates: dict, title: str = "Win rate, 95 % interval over prompts") -> Figure:
    """One dot with its interval per comparison; the dashed line is a draw. `rates`: {name:
    WinRate}.
    """
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.45 * len(rates)))
    for place, rate in enumerate(reversed(rates.values())):
        low, high = rate.ci95
        colour = CHOSEN if low > 0.5 else REJECTED if high < 0.5 else GREY
        ax.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
        ax.plot(rate.rate, place, "o", color=colour)
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(f"{rate.rate:.2f}", (rate.rate, place), **above)
    ax.axvline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set(title=title, xlabel="win rate (ties half)", xlim=(0, 1), ylim=(-0.6, len(rates) - 0.3))
    ax.set_yticks(range(len(rates)), list(reversed(rates)))
    return figure


def sweep(
    values: list[float],
    measures: dict[str, list[float]],
    xlabel: str,
    log: bool = True,
    limits: dict | None = None,
) -> Figure:
    """One panel per measure against a swept setting. `limits`: {measure: value} drawn dashed."""
    figure, axes = plt.subplots(1, len(measures), figsize=(3.6 * len(measures), 3.2), squeeze=False)
    for ax, (name, points) in zip(axes.flat, measures.items(), strict=True):
        ax.plot(values, points, "o-", color=OTHER)
        if limits and name in limits:
            ax.axhline(
                limits[name],
                color=REJECTED,
                linestyle="--",
                linewidth=1,
                label=f"limit {limits[name]:g}",
            )
            ax.legend()
        if log and min(values) > 0:
            ax.set_xscale("log")
        elif log:  # a sweep that begins at 0
            ax.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.set(title=name, xlabel=xlabel)
    return figure


def heatmap(
    table, row_names: list[str], column_names: list[str], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """A small table of shares as colours, with its numbers written in."""
    table = np.asarray(table, dtype=float)
    figure, ax = plt.subplots(figsize=(1.4 + 1.1 * table.shape[1], 1.4 + 0.55 * table.shape[0]))
    image = ax.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), value in np.ndenumerate(table):
        ax.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color="black" if value > middle else "white",
        )
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(range(len(column_names)), column_names)
    ax.set_yticks(range(len(row_names)), row_names)
    ax.grid(False)
    figure.colorbar(image)
    return figure


def lines(
    x, curves: dict[str, list], xlabel: str, ylabel: str, title: str = "", marks: dict | None = None
) -> Figure:
    """Several functions of the same x. `marks`: {label: x} drawn as dashed vertical lines."""
    figure, ax = plt.subplots(figsize=(7, 3.4))
    for colour, (name, values) in zip(PALETTE, curves.items(), strict=False):
        ax.plot(x, values, color=colour, label=name)
    for style, (name, place) in zip(("--", ":", "-."), (marks or {}).items(), strict=False):
        ax.axvline(place, color="black", linestyle=style, linewidth=1, label=name)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)
    return figure


def sweep_with_rates(
    values: list[float], measures: dict[str, list], rates: list, xlabel: str, limits=None
) -> Figure:
    """The panels of `sweep`, and a last one with the win rate (a list of WinRate) and its 95 %
    interval.
    """
    name = "win rate against SFT"
    figure = sweep(values, {**measures, name: [rate.rate for rate in rates]}, xlabel, limits=limits)
    figure.set_size_inches(3.0 * len(figure.axes), 3.0)
    ax = figure.axes[-1]
    ax.vlines(
        values,
        *zip(*(rate.ci95 for rate in rates), strict=True),
        color=OTHER,
        linewidth=3,
        alpha=0.4,
    )
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set_ylim(0, 1)
    return figure


def against_win_rate(points: dict[str, dict], measures: dict[str, str], title: str = "") -> Figure:
    """One dot per run: a training metric (key: axis label) against its win rate with interval.

    Args: `points`: {run: {"win": WinRate, metric: value}}.
    """
    figure, axes = plt.subplots(
        1, len(measures), figsize=(3.8 * len(measures), 3.4), squeeze=False, sharey=True
    )
    for ax, (name, label) in zip(axes.flat, measures.items(), strict=True):
        for point in points.values():
            low, high = point["win"].ci95
            colour = CHOSEN if low > 0.5 else REJECTED if high < 0.5 else GREY
            ax.plot([point[name]] * 2, [low, high], color=colour, alpha=0.35, linewidth=2)
            ax.plot(point[name], point["win"].rate, "o", color=colour)
        ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
        ax.set(xlabel=label)
    axes.flat[0].set_ylabel("win rate against SFT")
    figure.suptitle(title)
    return figure


def interval_sizes(
    sizes: list[int], intervals: list[tuple[float, float]], rate: float, title: str = ""
) -> Figure:
    """Intervals of one and the same rate, measured on more and more prompts; the dashed line is a
    draw.
    """
    figure, ax = plt.subplots(figsize=(7, 3.2))
    low, high = np.array(intervals).T
    ax.fill_between(sizes, low, high, color=OTHER, alpha=0.2)
    ax.vlines(sizes, low, high, color=OTHER, linewidth=2)
    ax.plot(sizes, [rate] * len(sizes), "o", color=OTHER)
    for size, bottom, top in zip(sizes, low, high, strict=True):
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(f"{top:.0%}", (size, top), xytext=(0, 4), **text)
        ax.annotate(f"{bottom:.0%}", (size, bottom), xytext=(0, -12), **text)
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set(
        title=title, xlabel="number of prompts", ylabel="win rate", xscale="log", ylim=(0.25, 1.02)
    )
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    return figure


def labelled_points(
    points: dict[str, tuple[float, float]],
    others: list[tuple[float, float]],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """A scatter of named points; `others` are drawn pale, without names. The dashed line is a draw."""
    figure, ax = plt.subplots(figsize=(7, 4))
    if others:
        ax.plot(*zip(*others, strict=True), "o", color=GREY, alpha=0.5, markersize=5)
    for colour, (name, point) in zip(PALETTE * 3, points.items(), strict=False):
        ax.plot(*point, "o", color=colour, markersize=8)
        ax.annotate(name, point, xytext=(8, 5), textcoords="offset points", fontsize=9)
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
    ax.margins(x=0.15, y=0.15)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


def win_rates_by_judge(
    rates: dict[str, dict], title: str = "The same answers, other judges"
) -> Figure:
    """One row per pair of models, one dot with its interval per judge. `rates`: {judge: {pair:
    WinRate}}.
    """
    names = list(next(iter(rates.values())))
    figure, ax = plt.subplots(figsize=(8, 1 + 0.6 * len(names)))
    for index, (colour, (judge, row)) in enumerate(zip(PALETTE, rates.items(), strict=False)):
        places = np.arange(len(names))[::-1] - 0.22 * (index - (len(rates) - 1) / 2)
        low, high = np.array([row[name].ci95 for name in names]).T
        ax.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
        ax.plot(
            [row[name].rate for name in names], places, "o", color=colour, markersize=5, label=judge
        )
    ax.axvline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set(title=title, xlabel="win rate of the first model (ties half)", xlim=(0, 1))
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def strips(groups: dict[str, list[float]], xlabel: str, title: str = "") -> Figure:
    """One row of dots per group, spread a little so that they can be told apart; the bar is the
    median.
    """
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.45 * len(groups)))
    for index, (colour, values) in enumerate(zip(PALETTE * 3, groups.values(), strict=False)):
        place = len(groups) - 1 - index
        height = place + 0.25 * np.sin(np.arange(len(values)) * 2.4)
        ax.plot(values, height, "o", color=colour, alpha=0.4, markersize=4)
        ax.plot([np.median(values)] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.5)
    ax.set(title=title, xlabel=xlabel, ylim=(-0.6, len(groups) - 0.4))
    ax.set_yticks(range(len(groups)), list(reversed(groups)))
    return figure


def rise_of_both(close: list[dict], whole: list[dict], title: str = "") -> Figure:
    """Held-out log-probabilities of both answers: one run from step 0 on, another from its first
    evaluation on.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    names = "from the base on", "from the first evaluation on"
    for ax, metrics, name in zip(axes, (close, whole), names, strict=True):
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            line = f"held_out_logps_{side}"
            points = [(row["step"], row[line]) for row in metrics if line in row]
            ax.plot(
                *np.array(points[ax is axes[1] :]).T, "o-", color=colour, label=side, markersize=4
            )
        ax.set(title=name, xlabel="optimiser step", ylabel="log-probability of an answer, nats")
        ax.locator_params(axis="x", integer=True, nbins=6)
    axes[0].legend()
    figure.suptitle(title)
    return figure


def line_panels(
    x, panels: dict[str, dict], xlabel: str, ylabel: str, title: str = "", marks: dict | None = None
) -> Figure:
    """One panel per entry, each with the lines "chosen" and "rejected" over the same x; 0 is drawn.

    Args: `marks`: {label: x}, drawn as a dashed vertical line in every panel.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 4 * len(panels), 3.4), squeeze=False, sharey=True
    )
    for ax, (name, curves) in zip(axes.flat, panels.items(), strict=True):
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            ax.plot(x, curves[side], color=colour, label=side)
        for label, place in (marks or {}).items():
            ax.axvline(place, color="black", linestyle="--", linewidth=1, label=label)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name, xlabel=xlabel)
    axes.flat[0].set_ylabel(ylabel)
    axes.flat[-1].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def against_diagonal(panels: dict[str, tuple], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Scatters of (x, y) against the dashed line y = x, one panel each, each with its own scale."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False)
    for ax, colour, (name, (x, y)) in zip(axes.flat, PALETTE, panels.items(), strict=False):
        x, y = np.asarray(x), np.asarray(y)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        ax.plot([low, high], [low, high], color="black", linestyle="--", linewidth=1, label="equal")
        ax.plot(x, y, "o", color=colour, alpha=0.4, markersize=4)
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    figure.suptitle(title)
    return figure
