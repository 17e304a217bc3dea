"""Figures of data and evaluation. Each function returns its figure; axes are named with units."""

import numpy as np
from matplotlib.figure import Figure

from common.plots import (
    BESIDE,
    CHOSEN,
    GREY,
    MARK,
    OTHER,
    PALETTE,
    REJECTED,
    SIDES,
    subplots,
    verdict_colour,
)


def histograms(
    groups: dict[str, list[float]], xlabel: str, title: str = "", limit: float | None = None
) -> Figure:
    """Distributions over each other, with their medians. `limit`: the place of a dashed line."""
    figure, ax = subplots(figsize=(7, 3.2))
    everything = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    low, high = everything.min() - 0.5, everything.max() + 0.5
    bins = np.linspace(low, high, 40)
    if (everything == everything.round()).all():  # every bin holds equally many whole numbers
        width = np.ceil((high - low) / 40)
        bins = np.arange(low, high + width, width)
    colours = (CHOSEN, REJECTED, OTHER, GREY)
    for colour, (name, values) in zip(colours, groups.items(), strict=False):
        label = f"{name}, median {np.median(values):.0f}"
        ax.hist(values, bins=bins, alpha=0.45, color=colour, label=label)
        ax.axvline(np.median(values), color=colour, linewidth=1)
    if limit:
        ax.axvline(limit, **MARK, label=f"limit {limit:.0f}")
    ax.set(title=title, xlabel=xlabel, ylabel="number of rows")
    ax.legend()
    return figure


def _wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """How far Wilson's 95 % interval of a share of `n` reaches below it and above it."""
    middle, whole = share + z**2 / (2 * n), 1 + z**2 / n
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (middle - half) / whole, (middle + half) / whole
    return max(0.0, share - low), max(0.0, high - share)


def bars(
    values: dict[str, dict[str, float | dict]],
    ylabel: str,
    title: str = "",
    ylim=None,
    colours: tuple[str, ...] = PALETTE,
    halves: dict[str, dict[str, float]] | None = None,
    out_of: dict[str, int] | None = None,
) -> Figure | None:
    """Grouped bars, {model: {measure: value}}: one group per measure, one colour per model.

    A value {"mean", "ci95"} gets an error bar; one that a model lacks is 0. `out_of`: a model's
    values are shares of so many things: their 95 % intervals (Wilson's) are drawn. `halves`: half
    of each value's interval, where it is another one. Returns: None, with a line that says so,
    where there are no values.
    """
    measures = list(dict.fromkeys(name for row in values.values() for name in row))
    if not measures:
        print(f"not measured: {title} (nothing here can judge it)")
        return None
    figure, ax = subplots(figsize=(max(7.5, 1.5 * len(measures)), 3.4))
    width = 0.8 / len(values)
    for index, (colour, (model, row)) in enumerate(zip(colours, values.items(), strict=False)):
        places = np.arange(len(measures)) + (index - (len(values) - 1) / 2) * width
        own = [row.get(name, 0.0) for name in measures]
        ends = [value["ci95"] if isinstance(value, dict) else (value, value) for value in own]
        heights = [value["mean"] if isinstance(value, dict) else value for value in own]
        spread = np.abs(np.transpose(ends) - heights)
        if halves:
            spread = [halves[model][name] for name in measures]
        if out_of:
            spread = np.array([_wilson(share, out_of[model]) for share in heights]).T
        error = {"yerr": spread, "error_kw": {"elinewidth": 1, "ecolor": "#444444"}}
        error = error if np.any(spread) else {}
        drawn = ax.bar(places, heights, width * 0.95, color=colour, label=model, **error)
        ax.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    ax.margins(y=0.1)  # room for the labels
    ax.set(title=title, ylabel=ylabel, ylim=ylim)
    turned = {"rotation": 20, "ha": "right"} if len(measures) > 5 else {}
    ax.set_xticks(range(len(measures)), measures, **turned)
    ax.legend(**BESIDE)
    return figure


def win_rates(rates: dict, title: str = "Win rate, 95 % interval over prompts") -> Figure:
    """One dot with its interval per comparison, {name: WinRate}; the dashed line is a draw."""
    figure, ax = subplots(figsize=(7, 0.9 + 0.45 * len(rates)))
    for place, rate in enumerate(reversed(rates.values())):
        low, high = rate.ci95
        colour = verdict_colour(low, high)
        ax.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
        ax.plot(rate.rate, place, "o", color=colour)
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(f"{rate.rate:.2f}", (rate.rate, place), **above)
    ax.axvline(0.5, **MARK)
    ax.set(title=title, xlabel="win rate (ties half)", xlim=(0, 1), ylim=(-0.6, len(rates) - 0.3))
    ax.set_yticks(range(len(rates)), list(reversed(rates)))
    return figure


def heatmap(
    table, row_names: list[str], column_names: list[str], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """A small table of shares as colours, with its numbers written in."""
    table = np.asarray(table, dtype=float)
    figure, ax = subplots(figsize=(1.4 + 1.1 * table.shape[1], 1.4 + 0.55 * table.shape[0]))
    image = ax.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), value in np.ndenumerate(table):
        style = {"ha": "center", "va": "center", "color": "black" if value > middle else "white"}
        ax.text(column, row, f"{value:.2f}", **style)
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
    figure, ax = subplots(figsize=(7, 3.4))
    for colour, (name, values) in zip(PALETTE, curves.items(), strict=False):
        ax.plot(x, values, color=colour, label=name)
    for style, (name, place) in zip(("--", ":", "-."), (marks or {}).items(), strict=False):
        ax.axvline(place, color="black", linestyle=style, linewidth=1, label=name)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)
    return figure


def sweep_with_rates(
    values: list[float],
    measures: dict[str, list],
    rates: list,
    xlabel: str,
    limits=None,
    against: str = "the start",
) -> Figure:
    """One panel per measure against a swept setting, and a last one with the win rate and its 95 %
    interval.

    Args: `rates`: a WinRate per value; `limits`: {measure: value}, drawn dashed; `against`: whom
        the win rates are against.
    """
    panels = {**measures, f"win rate against {against}": [rate.rate for rate in rates]}
    size = (3.0 * len(panels), 3.0)
    figure, axes = subplots(1, len(panels), figsize=size, squeeze=False)
    for ax, (name, points) in zip(axes.flat, panels.items(), strict=True):
        ax.plot(values, points, "o-", color=OTHER)
        if limits and name in limits:
            ax.axhline(limits[name], **MARK, label=f"limit {limits[name]:g}")
            ax.legend()
        if min(values) > 0:
            ax.set_xscale("log")
        else:  # a sweep that begins at 0
            ax.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.set(title=name, xlabel=xlabel)
    low, high = zip(*(rate.ci95 for rate in rates), strict=True)
    ax.vlines(values, low, high, color=OTHER, linewidth=3, alpha=0.4)
    ax.axhline(0.5, **MARK)
    ax.set_ylim(0, 1)
    return figure


def against_win_rate(points: dict[str, dict], measures: dict[str, str], title: str = "") -> Figure:
    """One dot per run: a training metric (key: axis label) against its win rate with interval.

    Args: `points`: {run: {"win": WinRate, metric: value}}.
    """
    size = (3.8 * len(measures), 3.4)
    figure, axes = subplots(1, len(measures), figsize=size, squeeze=False, sharey=True)
    for ax, (name, label) in zip(axes.flat, measures.items(), strict=True):
        for point in points.values():
            low, high = point["win"].ci95
            colour = verdict_colour(low, high)
            ax.plot([point[name]] * 2, [low, high], color=colour, alpha=0.35, linewidth=2)
            ax.plot(point[name], point["win"].rate, "o", color=colour)
        ax.axhline(0.5, **MARK)
        ax.set(xlabel=label)
    axes.flat[0].set_ylabel("win rate against the start")
    figure.suptitle(title)
    return figure


def interval_sizes(
    sizes: list[int], intervals: list[tuple[float, float]], rate: float, title: str = ""
) -> Figure:
    """Intervals of one and the same rate, measured on more and more prompts."""
    figure, ax = subplots(figsize=(7, 3.2))
    low, high = np.array(intervals).T
    ax.fill_between(sizes, low, high, color=OTHER, alpha=0.2)
    ax.vlines(sizes, low, high, color=OTHER, linewidth=2)
    ax.plot(sizes, [rate] * len(sizes), "o", color=OTHER)
    for size, bottom, top in zip(sizes, low, high, strict=True):
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(f"{top:.0%}", (size, top), xytext=(0, 4), **text)
        ax.annotate(f"{bottom:.0%}", (size, bottom), xytext=(0, -12), **text)
    ax.axhline(0.5, **MARK)
    ax.set(title=title, xlabel="number of prompts", ylabel="win rate", xscale="log")
    ax.set_ylim(0.25, 1.02)
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
    """A scatter of named points over pale `others`; the dashed line is a draw."""
    figure, ax = subplots(figsize=(7, 4))
    if others:
        ax.plot(*zip(*others, strict=True), "o", color=GREY, alpha=0.5, markersize=5)
    for colour, (name, point) in zip(PALETTE * 3, points.items(), strict=False):
        ax.plot(*point, "o", color=colour, markersize=8)
        ax.annotate(name, point, xytext=(8, 5), textcoords="offset points", fontsize=9)
    ax.axhline(0.5, **MARK)
    ax.margins(x=0.15, y=0.15)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


def win_rates_by_judge(
    rates: dict[str, dict], title: str = "The same answers, other judges"
) -> Figure:
    """One row per pair of models, one dot with its interval per judge: {judge: {pair: WinRate}}."""
    names = list(next(iter(rates.values())))
    figure, ax = subplots(figsize=(8, 1 + 0.6 * len(names)))
    for index, (colour, (judge, row)) in enumerate(zip(PALETTE, rates.items(), strict=False)):
        places = np.arange(len(names))[::-1] - 0.22 * (index - (len(rates) - 1) / 2)
        low, high = np.array([row[name].ci95 for name in names]).T
        ax.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
        middle = [row[name].rate for name in names]
        ax.plot(middle, places, "o", color=colour, markersize=5, label=judge)
    ax.axvline(0.5, **MARK)
    ax.set(title=title, xlabel="win rate of the first model (ties half)", xlim=(0, 1))
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.legend(**BESIDE)
    return figure


def strips(groups: dict[str, list[float]], xlabel: str, title: str = "") -> Figure:
    """One row of dots per group, spread a little apart; the bar is the median."""
    figure, ax = subplots(figsize=(7, 0.9 + 0.45 * len(groups)))
    for index, (colour, values) in enumerate(zip(PALETTE * 3, groups.values(), strict=False)):
        place = len(groups) - 1 - index
        height = place + 0.25 * np.sin(np.arange(len(values)) * 2.4)
        ax.plot(values, height, "o", color=colour, alpha=0.4, markersize=4)
        ax.plot([np.median(values)] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.5)
    ax.set(title=title, xlabel=xlabel, ylim=(-0.6, len(groups) - 0.4))
    ax.set_yticks(range(len(groups)), list(reversed(groups)))
    return figure


def line_panels(
    x, panels: dict[str, dict], xlabel: str, ylabel: str, title: str = "", marks: dict | None = None
) -> Figure:
    """One panel per entry, each with the lines "chosen" and "rejected" over the same x; 0 is drawn.

    Args: `marks`: {label: x}, drawn as a dashed vertical line in every panel.
    """
    size = (1 + 4 * len(panels), 3.4)
    figure, axes = subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for ax, (name, curves) in zip(axes.flat, panels.items(), strict=True):
        for side, colour in SIDES.items():
            ax.plot(x, curves[side], color=colour, label=side)
        for label, place in (marks or {}).items():
            ax.axvline(place, **MARK, label=label)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name, xlabel=xlabel)
    axes.flat[0].set_ylabel(ylabel)
    axes.flat[-1].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def against_diagonal(panels: dict[str, tuple], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Scatters of (x, y) against the dashed line y = x, one panel each, each with its own scale."""
    figure, axes = subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False)
    for ax, colour, (name, (x, y)) in zip(axes.flat, PALETTE, panels.items(), strict=False):
        x, y = np.asarray(x), np.asarray(y)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        ax.plot([low, high], [low, high], **MARK, label="equal")
        ax.plot(x, y, "o", color=colour, alpha=0.4, markersize=4)
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    figure.suptitle(title)
    return figure
