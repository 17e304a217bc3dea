"""Training curves: still, side by side, and live while a run goes on."""

import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from common.plots import GREY, OTHER, PALETTE, REJECTED, SIDES, subplots


def _panel(title: str, unit: str, metric: str) -> tuple:
    """A panel with one metric: on training batches, and on held-out pairs."""
    training, held_out = ("training", GREY), ("held out", OTHER)
    return title, unit, {metric: training, f"held_out_{metric}": held_out}


# Panels of training curves: title, unit, and the metrics drawn in it with label and colour.
PANELS = {
    "loss": _panel("Loss", "nats", "loss"),
    "nll": _panel("NLL of the chosen answer", "nats per token", "nll"),
    "logps": (
        "Log-probability of an answer, held out",
        "nats",
        {f"held_out_logps_{side}": (side, colour) for side, colour in SIDES.items()},
    ),
    "rewards": (
        "Implicit reward",
        "nats, β included",
        {f"rewards_{side}": (side, colour) for side, colour in SIDES.items()},
    ),
    "margin": _panel("Reward margin", "nats", "margin"),
    "accuracy": _panel("Preference accuracy", "share of pairs", "accuracy"),
    "kl": _panel("KL to the reference, on samples", "nats per answer", "kl"),
    "win_rate": _panel("Win rate against the reference", "share", "win_rate"),
    "odds": _panel("Log-odds margin", "nats", "log_odds_margin"),
    "odds_ratio": _panel("Odds-ratio loss", "nats", "odds_ratio_loss"),
}
LIVE_PANELS = ("loss", "margin", "odds", "logps")  # of a live figure, where the method has them
LIVE_ORPO_PANELS = ("nll", "odds_ratio", "odds", "logps")  # both terms, margin, log-probabilities


def _points(metrics: list[dict], name: str) -> np.ndarray:
    """(points, 2): step and value wherever a metric was logged."""
    return np.array([(row["step"], row[name]) for row in metrics if name in row])


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A trailing mean: the first points average what there is."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return (sums[index] - sums[start]) / (index - start)


def _draw_panel(ax, metrics: list[dict], panel: str) -> None:
    title, unit, lines = PANELS[panel]
    for name, (label, colour) in lines.items():
        points = _points(metrics, name)
        if not len(points):
            continue
        style = {"color": colour, "label": label}
        if name.startswith("held_out"):
            ax.plot(*points.T, "o-", markersize=4, **style)
        else:  # one point a step: the noise pale, its running mean on top
            ax.plot(*points.T, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(points[:, 0], _smooth(points[:, 1], max(1, len(points) // 25)), **style)
    ax.set(title=title, xlabel="optimiser step", ylabel=unit)
    ax.legend()


def training_curves(metrics: list[dict], panels: tuple[str, ...], title: str = "") -> Figure:
    """Training curves of one run, one panel each (names of PANELS), in one or two rows."""
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, metrics, panel)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(title)
    return figure


def compare_curves(runs: dict[str, list[dict]], panels: tuple[str, ...], title: str = "") -> Figure:
    """The same held-out curves of several runs side by side, one colour a run."""
    figure, axes = subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=True):
        name, unit, lines = PANELS[panel]
        drawn = [line for line in lines if line.startswith("held_out")]
        for colour, (run, metrics) in zip(PALETTE * 3, runs.items(), strict=False):
            for style, line in zip(("-", "--"), drawn, strict=False):
                points = _points(metrics, line)
                if len(points):
                    label = run if len(drawn) == 1 else f"{run}, {lines[line][0]}"
                    ax.plot(*points.T, style, marker="o", markersize=3, color=colour, label=label)
        ax.set(title=name, xlabel="optimiser step", ylabel=unit)
        ax.legend(fontsize=8)
    figure.suptitle(title)
    return figure


class LiveFigure:
    """Training curves that redraw themselves in a notebook while a run goes on; silent elsewhere.

    Args: `steps`: of the whole run, for the title; `seconds`: least time between two drawings.
        Drawing takes a tenth of the time at the most.
    """

    def __init__(self, title: str = "", steps: int | None = None, seconds: float = 3.0):
        from IPython import get_ipython

        self.title, self.steps, self.wait, self.last = title, steps, seconds, 0.0
        self.handle = None
        self.active = get_ipython() is not None and "IPKernelApp" in get_ipython().config

    def update(self, metrics: list[dict], force: bool = False) -> None:
        """Redraws if the last drawing is old enough, or if it is forced, as at the end."""
        if not self.active or (time.monotonic() - self.last < self.wait and not force):
            return
        from IPython.display import display

        start = time.monotonic()
        names = LIVE_ORPO_PANELS if "odds_ratio_loss" in metrics[-1] else LIVE_PANELS
        logged = {line for row in metrics[:2] for line in row}
        shown = tuple(name for name in names if logged & PANELS[name][2].keys())
        done = f"step {metrics[-1]['step']}" + (f" of {self.steps}" if self.steps else "")
        figure = training_curves(metrics, shown, f"{self.title}: {done}" if self.title else done)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.last = time.monotonic()
        self.wait = max(self.wait, 9 * (self.last - start))


def sft_curves(metrics: list[dict], best_step: int, title: str = "") -> Figure:
    """SFT: the loss, with the perplexity as a second scale of the same curve, and both answers of
    held-out pairs.

    The right panel begins at the first evaluation after step 0: the jump before it would hide what
    follows.
    """
    figure, (left, right) = subplots(1, 2, figsize=(9.5, 3.4))
    figure.get_layout_engine().set(wspace=0.08)
    _draw_panel(left, metrics, "loss")
    best = next(row["held_out_loss"] for row in metrics if row["step"] == best_step)
    star = {"color": REJECTED, "markersize": 13, "zorder": 5}
    left.plot(best_step, best, "*", label=f"best: step {best_step}", **star)
    left.legend()

    # A loss that falls by more than a factor of three is drawn on a logarithmic scale.
    losses = [row["loss"] for row in metrics if "loss" in row]
    wide = max(losses) > 3 * min(losses)
    scale = "log" if wide else "linear"
    left.set(title="Loss, and perplexity = exp(loss)", ylabel="nats per token", yscale=scale)

    # The right-hand scale shows the perplexity at the ticks of the loss.
    low, high = left.get_ylim()
    steps = (0.1, 0.25, 0.5, 1, 2, 4, 8) if wide else left.get_yticks()
    ticks = [step for step in steps if low <= step <= high]
    for ax, labels in ((left, ticks), (left.twinx(), np.exp(ticks))):
        ax.set(yscale=scale, ylim=(low, high))
        ax.set_yticks(ticks, [f"{each:.0f}" if each >= 10 else f"{each:.3g}" for each in labels])
        ax.set_yticks([], minor=True)
    ax.set(ylabel="perplexity")
    ax.grid(False)
    ax.spines["right"].set_visible(True)
    _draw_panel(right, [row for row in metrics if row["step"] > 0], "logps")
    figure.suptitle(title)
    return figure


def _both_answers(ax, metrics: list[dict], first: int = 0, from_start: bool = False) -> None:
    """Held-out log-probabilities of both answers, from evaluation `first` on, or their change."""
    for side, colour in SIDES.items():
        points = _points(metrics, f"held_out_logps_{side}")[first:]
        values = points[:, 1] - points[0, 1] if from_start else points[:, 1]
        ax.plot(points[:, 0], values, "o-", color=colour, label=side, markersize=4)
    ax.set(xlabel="optimiser step")
    ax.locator_params(axis="x", integer=True, nbins=6)


def displacement(runs: dict[str, list[dict]], title: str = "") -> Figure:
    """Change of the held-out log-probabilities of both answers since step 0, one panel per run."""
    size = (4.0 * len(runs), 3.2)
    figure, axes = subplots(1, len(runs), figsize=size, squeeze=False, sharey=True)
    for ax, (name, metrics) in zip(axes.flat, runs.items(), strict=True):
        _both_answers(ax, metrics, from_start=True)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name)
    axes.flat[0].set_ylabel("change of log-probability, nats")
    axes.flat[0].legend()
    figure.suptitle(title)
    return figure


def rise_of_both(close: list[dict], whole: list[dict], title: str = "") -> Figure:
    """Held-out log-probabilities of both answers: one run from step 0 on, another from its first
    evaluation after step 0 on.
    """
    figure, axes = subplots(1, 2, figsize=(9, 3.4))
    names = "from the base on", "from the first evaluation on"
    for first, (ax, metrics, name) in enumerate(zip(axes, (close, whole), names, strict=True)):
        _both_answers(ax, metrics, first)
        ax.set(title=name, ylabel="log-probability of an answer, nats")
    axes[0].legend()
    figure.suptitle(title)
    return figure
