"""Every figure of the course. Each function returns the figure; axes are named with units."""

import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

plt.rcParams.update({
    "figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
})  # fmt: skip

CHOSEN, REJECTED, OTHER, GREY = "#1b7f5c", "#c2452d", "#2f5d9f", "#8a8a8a"
PALETTE = (OTHER, CHOSEN, REJECTED, "#b07aa1", "#e0a12e", "#4fb3bf")

# Panels of training curves: title, unit, and the metrics drawn in it with label and colour.
PANELS = {
    "loss": ("Loss", "nats", {"loss": ("training", GREY), "held_out_loss": ("held out", OTHER)}),
    "nll": ("NLL of the chosen answer", "nats per token", {
        "nll": ("training", GREY), "held_out_nll": ("held out", OTHER)}),
    "logps": ("Log-probability of an answer, held out", "nats", {
        "held_out_logps_chosen": ("chosen", CHOSEN), "held_out_logps_rejected": ("rejected", REJECTED)}),
    "rewards": ("Implicit reward (β included)", "nats", {
        "rewards_chosen": ("chosen", CHOSEN), "rewards_rejected": ("rejected", REJECTED)}),
    "margin": ("Reward margin (β included)", "nats", {
        "margin": ("training", GREY), "held_out_margin": ("held out", OTHER)}),
    "accuracy": ("Preference accuracy", "share of pairs", {
        "accuracy": ("training", GREY), "held_out_accuracy": ("held out", OTHER)}),
    "kl": ("KL to the reference, on samples", "nats per answer", {"held_out_kl": ("held out", OTHER)}),
    "win_rate": ("Win rate against the reference", "share", {"held_out_win_rate": ("held out", OTHER)}),
    "odds": ("Log-odds margin", "nats", {
        "log_odds_margin": ("training", GREY), "held_out_log_odds_margin": ("held out", OTHER)}),
}  # fmt: skip
LIVE = ("loss", "margin", "odds", "logps")  # what a live figure shows, where the method has it


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A trailing mean: the first points average what there is."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return (sums[index] - sums[start]) / (index - start)


def _draw_panel(ax, metrics: list[dict], panel: str) -> None:
    title, unit, lines = PANELS[panel]
    for name, (label, colour) in lines.items():
        points = np.array([(row["step"], row[name]) for row in metrics if name in row])
        if not len(points):
            continue
        if name.startswith("held_out"):
            ax.plot(*points.T, "o-", color=colour, label=label, markersize=4)
        else:  # one point a step: the noise pale, its running mean on top
            ax.plot(*points.T, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(points[:, 0], _smooth(points[:, 1], max(1, len(points) // 25)), color=colour, label=label)
    ax.set(title=title, xlabel="optimiser step", ylabel=unit)
    ax.legend()


def training_curves(metrics: list[dict], panels: tuple[str, ...], title: str = "") -> Figure:
    """Training curves of one run, one panel each (names of PANELS), two in a row when there are more than three."""
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, metrics, panel)
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    figure.suptitle(title)
    return figure


def compare_curves(runs: dict[str, list[dict]], panels: tuple[str, ...], title: str = "") -> Figure:
    """The same held-out curves of several runs side by side, one colour a run."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=True):
        name, unit, lines = PANELS[panel]
        styles = ("-", "--")
        drawn = [line for line in lines if line.startswith("held_out")]
        for colour, (run, metrics) in zip(PALETTE * 3, runs.items(), strict=False):
            for style, line in zip(styles, drawn, strict=False):
                points = np.array([(row["step"], row[line]) for row in metrics if line in row])
                if len(points):
                    label = run if len(drawn) == 1 else f"{run}, {lines[line][0]}"
                    ax.plot(*points.T, style, marker="o", markersize=3, color=colour, label=label)
        ax.set(title=name, xlabel="optimiser step", ylabel=unit)
        ax.legend(fontsize=8)
    figure.suptitle(title)
    return figure


class LiveFigure:
    """Training curves that redraw themselves in a notebook while a run goes on; silent elsewhere."""

    def __init__(self, title: str, steps: int, seconds: float = 3.0):
        from IPython import get_ipython

        self.title, self.steps, self.seconds, self.last = title, steps, seconds, 0.0
        self.handle = None
        self.active = get_ipython() is not None and "IPKernelApp" in get_ipython().config

    def update(self, metrics: list[dict], force: bool = False) -> None:
        """Redraws if the last drawing is old enough, or at the end."""
        if not self.active or (time.monotonic() - self.last < self.seconds and not force):
            return
        from IPython.display import display

        self.last = time.monotonic()
        shown = tuple(name for name in LIVE if any(line in row for row in metrics[:2] for line in PANELS[name][2]))
        figure = training_curves(metrics, shown, f"{self.title}: step {metrics[-1]['step']} of {self.steps}")
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)


def histograms(groups: dict[str, list[float]], xlabel: str, title: str = "", limit: float | None = None) -> Figure:
    """Distributions over each other, with their medians; `limit` draws a dashed line (the context, say)."""
    figure, ax = plt.subplots(figsize=(7, 3.2))
    everything = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    low, high = everything.min() - 0.5, everything.max() + 0.5
    if (everything == everything.round()).all():  # counts: every bin holds equally many whole numbers
        width = np.ceil((high - low) / 40)
        bins = np.arange(low, high + width, width)
    else:
        bins = np.linspace(low, high, 40)
    for colour, (name, values) in zip((CHOSEN, REJECTED, OTHER, GREY), groups.items(), strict=False):
        ax.hist(values, bins=bins, alpha=0.45, color=colour, label=f"{name}, median {np.median(values):.0f}")
        ax.axvline(np.median(values), color=colour, linewidth=1)
    if limit:
        ax.axvline(limit, color="black", linestyle="--", label=f"limit {limit:.0f}")
    ax.set(title=title, xlabel=xlabel, ylabel="number of rows")
    ax.legend(frameon=True, edgecolor="none", framealpha=0.9)
    return figure


def bars(
    values: dict[str, dict[str, float]], ylabel: str, title: str = "", errors: dict | None = None, ylim=None,
    colours: tuple[str, ...] = PALETTE,
) -> Figure:  # fmt: skip
    """Grouped bars: one group per measure, one colour per model. `errors`: the same shape, half-widths."""
    measures = list(next(iter(values.values())))
    figure, ax = plt.subplots(figsize=(max(7.5, 1.5 * len(measures)), 3.4))
    width = 0.8 / len(values)
    for index, (colour, (model, row)) in enumerate(zip(colours, values.items(), strict=False)):
        places = np.arange(len(measures)) + (index - (len(values) - 1) / 2) * width
        half = [errors[model][name] for name in measures] if errors else None
        heights = [row[name] for name in measures]
        drawn = ax.bar(places, heights, width * 0.95, color=colour, label=model, yerr=half, capsize=2)
        ax.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    ax.margins(y=0.1)  # room for the labels
    ax.set(title=title, ylabel=ylabel, xticks=range(len(measures)), ylim=ylim)
    ax.set_xticklabels(measures, rotation=20 if len(measures) > 5 else 0, ha="right" if len(measures) > 5 else "center")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def win_rates(rates: dict, title: str = "Win rate, 95 % interval over prompts") -> Figure:
    """One dot with its interval per comparison; the dashed line is a draw. `rates`: {name: WinRate}."""
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
    values: list[float], measures: dict[str, list[float]], xlabel: str, log: bool = True, limits: dict | None = None
) -> Figure:
    """One panel per measure against a swept setting. `limits`: {measure: value} drawn dashed."""
    figure, axes = plt.subplots(1, len(measures), figsize=(3.6 * len(measures), 3.2), squeeze=False)
    for ax, (name, points) in zip(axes.flat, measures.items(), strict=True):
        ax.plot(values, points, "o-", color=OTHER)
        if limits and name in limits:
            ax.axhline(limits[name], color=REJECTED, linestyle="--", linewidth=1, label=f"limit {limits[name]:g}")
            ax.legend()
        if log:
            ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.set(title=name, xlabel=xlabel)
    return figure


def heatmap(table, row_names: list[str], column_names: list[str], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """A small table of shares as colours, with its numbers written in."""
    table = np.asarray(table, dtype=float)
    figure, ax = plt.subplots(figsize=(1.4 + 1.1 * table.shape[1], 1.4 + 0.55 * table.shape[0]))
    image = ax.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), value in np.ndenumerate(table):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(range(len(column_names)), column_names)
    ax.set_yticks(range(len(row_names)), row_names)
    ax.grid(False)
    figure.colorbar(image)
    return figure


def lines(x, curves: dict[str, list], xlabel: str, ylabel: str, title: str = "", marks: dict | None = None) -> Figure:
    """Several functions of the same x. `marks`: {label: x} drawn as dashed vertical lines."""
    figure, ax = plt.subplots(figsize=(7, 3.4))
    for colour, (name, values) in zip(PALETTE, curves.items(), strict=False):
        ax.plot(x, values, color=colour, label=name)
    for style, (name, place) in zip(("--", ":", "-."), (marks or {}).items(), strict=False):
        ax.axvline(place, color="black", linestyle=style, linewidth=1, label=name)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)
    return figure


def token_log_ratios(sides: dict[str, list[tuple[str, float]]], title: str = "", longest: int = 40) -> Figure:
    """One bar per scored token, log(policy / reference) in nats; one panel per side, its sum in the panel's title."""
    figure, axes = plt.subplots(len(sides), 1, figsize=(9.5, 2.5 * len(sides)), squeeze=False, sharey=True)
    for ax, colour, (side, tokens) in zip(axes.flat, (CHOSEN, REJECTED), sides.items(), strict=False):
        shown = tokens[:longest]
        ax.bar(range(len(shown)), [value for _, value in shown], color=colour)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(shown)), [text for text, _ in shown], rotation=60, ha="right", fontsize=8)
        cut = f", first {longest} of {len(tokens)} tokens shown" if len(tokens) > longest else ""
        ax.set(ylabel="nats", xlim=(-0.7, len(shown) - 0.3))
        ax.set_title(f"{side}: sum {sum(value for _, value in tokens):+.2f} nats{cut}", fontsize=10)
        ax.grid(axis="x", visible=False)
    figure.suptitle(title)
    return figure


def displacement(runs: dict[str, list[dict]], title: str = "") -> Figure:
    """How far the held-out log-probabilities of both sides moved since step 0, one panel per run, one scale."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.0 * len(runs), 3.2), squeeze=False, sharey=True)
    for ax, (name, metrics) in zip(axes.flat, runs.items(), strict=True):
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            line = f"held_out_logps_{side}"
            points = np.array([(row["step"], row[line]) for row in metrics if line in row])
            ax.plot(points[:, 0], points[:, 1] - points[0, 1], "o-", color=colour, label=side, markersize=4)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name, xlabel="optimiser step")
        ax.locator_params(axis="x", integer=True, nbins=6)
    axes.flat[0].set_ylabel("change of log-probability, nats")
    axes.flat[0].legend()
    figure.suptitle(title)
    return figure


def sweep_with_rates(values: list[float], measures: dict[str, list], rates: list, xlabel: str, limits=None) -> Figure:
    """The panels of `sweep`, and a last one with the win rate (a list of WinRate) and its 95 % interval."""
    name = "win rate against SFT"
    figure = sweep(values, {**measures, name: [rate.rate for rate in rates]}, xlabel, limits=limits)
    figure.set_size_inches(3.0 * len(figure.axes), 3.0)
    ax = figure.axes[-1]
    ax.vlines(values, *zip(*(rate.ci95 for rate in rates), strict=True), color=OTHER, linewidth=3, alpha=0.4)
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set_ylim(0, 1)
    return figure


def against_win_rate(points: dict[str, dict], measures: dict[str, str], title: str = "") -> Figure:
    """One dot per run: a training metric (key: axis label) against its win rate with interval.

    Args: `points`: {run: {"win": WinRate, metric: value}}.
    """
    figure, axes = plt.subplots(1, len(measures), figsize=(3.8 * len(measures), 3.4), squeeze=False, sharey=True)
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


def sft_curves(metrics: list[dict], best_step: int, title: str = "") -> Figure:
    """SFT: the loss, with the perplexity as a second scale of the same curve, and both answers of held-out pairs.

    The right panel begins at the first evaluation after step 0: the jump before it would hide what follows.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    figure.get_layout_engine().set(wspace=0.08)
    _draw_panel(left, metrics, "loss")
    best = next(row["held_out_loss"] for row in metrics if row["step"] == best_step)
    left.plot(best_step, best, "*", color=REJECTED, markersize=13, label=f"best: step {best_step}", zorder=5)
    left.legend()
    losses = [row["loss"] for row in metrics if "loss" in row]
    wide = max(losses) > 3 * min(losses)
    left.set(title="Loss, and perplexity = exp(loss)", ylabel="nats per token", yscale="log" if wide else "linear")
    low, high = left.get_ylim()
    steps = (0.1, 0.25, 0.5, 1, 2, 4, 8) if wide else left.get_yticks()
    ticks = [step for step in steps if low <= step <= high]
    for ax, labels in ((left, ticks), (left.twinx(), np.exp(ticks))):
        ax.set(yscale=left.get_yscale(), ylim=(low, high))
        ax.set_yticks(ticks, [f"{label:.0f}" if label >= 10 else f"{label:.3g}" for label in labels])
        ax.set_yticks([], minor=True)
    ax.set(ylabel="perplexity")
    ax.grid(False)
    ax.spines["right"].set_visible(True)
    _draw_panel(right, [row for row in metrics if row["step"] > 0], "logps")
    figure.suptitle(title)
    return figure


def interval_sizes(sizes: list[int], intervals: list[tuple[float, float]], rate: float, title: str = "") -> Figure:
    """Intervals of one and the same rate, measured on more and more prompts; the dashed line is a draw."""
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
    ax.set(title=title, xlabel="number of prompts", ylabel="win rate", xscale="log", ylim=(0.25, 1.02))
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    return figure


def labelled_points(
    points: dict[str, tuple[float, float]], others: list[tuple[float, float]], xlabel: str, ylabel: str, title: str = ""
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


def win_rates_by_judge(rates: dict[str, dict], title: str = "The same answers, other judges") -> Figure:
    """One row per pair of models, one dot with its interval per judge. `rates`: {judge: {pair: WinRate}}."""
    names = list(next(iter(rates.values())))
    figure, ax = plt.subplots(figsize=(8, 1 + 0.6 * len(names)))
    for index, (colour, (judge, row)) in enumerate(zip(PALETTE, rates.items(), strict=False)):
        places = np.arange(len(names))[::-1] - 0.22 * (index - (len(rates) - 1) / 2)
        low, high = np.array([row[name].ci95 for name in names]).T
        ax.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
        ax.plot([row[name].rate for name in names], places, "o", color=colour, markersize=5, label=judge)
    ax.axvline(0.5, color="black", linestyle="--", linewidth=1)
    ax.set(title=title, xlabel="win rate of the first model (ties half)", xlim=(0, 1))
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def strips(groups: dict[str, list[float]], xlabel: str, title: str = "") -> Figure:
    """One row of dots per group, spread a little so that they can be told apart; the bar is the median."""
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.45 * len(groups)))
    for index, (colour, values) in enumerate(zip(PALETTE * 3, groups.values(), strict=False)):
        place = len(groups) - 1 - index
        height = place + 0.25 * np.sin(np.arange(len(values)) * 2.4)
        ax.plot(values, height, "o", color=colour, alpha=0.4, markersize=4)
        ax.plot([np.median(values)] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.5)
    ax.set(title=title, xlabel=xlabel, ylim=(-0.6, len(groups) - 0.4))
    ax.set_yticks(range(len(groups)), list(reversed(groups)))
    return figure
