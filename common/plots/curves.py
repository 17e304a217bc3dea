"""Training curves: still, side by side, and live while a run goes on."""

import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.framealpha": 0.9,
        "legend.edgecolor": "none",
        "figure.constrained_layout.use": True,
    }
)

CHOSEN, REJECTED, OTHER, GREY = "#1b7f5c", "#c2452d", "#2f5d9f", "#8a8a8a"
PALETTE = (OTHER, CHOSEN, REJECTED, "#b07aa1", "#e0a12e", "#4fb3bf")

# Panels of training curves: title, unit, and the metrics drawn in it with label and colour.
PANELS = {
    "loss": ("Loss", "nats", {"loss": ("training", GREY), "held_out_loss": ("held out", OTHER)}),
    "nll": (
        "NLL of the chosen answer",
        "nats per token",
        {"nll": ("training", GREY), "held_out_nll": ("held out", OTHER)},
    ),
    "logps": (
        "Log-probability of an answer, held out",
        "nats",
        {
            "held_out_logps_chosen": ("chosen", CHOSEN),
            "held_out_logps_rejected": ("rejected", REJECTED),
        },
    ),
    "rewards": (
        "Implicit reward",
        "nats, β included",
        {"rewards_chosen": ("chosen", CHOSEN), "rewards_rejected": ("rejected", REJECTED)},
    ),
    "margin": (
        "Reward margin",
        "nats",
        {"margin": ("training", GREY), "held_out_margin": ("held out", OTHER)},
    ),
    "accuracy": (
        "Preference accuracy",
        "share of pairs",
        {"accuracy": ("training", GREY), "held_out_accuracy": ("held out", OTHER)},
    ),
    "kl": (
        "KL to the reference, on samples",
        "nats per answer",
        {"held_out_kl": ("held out", OTHER)},
    ),
    "win_rate": (
        "Win rate against the reference",
        "share",
        {"held_out_win_rate": ("held out", OTHER)},
    ),
    "odds": (
        "Log-odds margin",
        "nats",
        {"log_odds_margin": ("training", GREY), "held_out_log_odds_margin": ("held out", OTHER)},
    ),
    "odds_ratio": (
        "Odds-ratio loss",
        "nats",
        {"odds_ratio_loss": ("training", GREY), "held_out_odds_ratio_loss": ("held out", OTHER)},
    ),
}
LIVE = ("loss", "margin", "odds", "logps")  # what a live figure shows, where the method has it
LIVE_ORPO = (
    "nll",
    "odds_ratio",
    "odds",
    "logps",
)  # its two terms, its margin and both log-probabilities


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
            ax.plot(
                points[:, 0],
                _smooth(points[:, 1], max(1, len(points) // 25)),
                color=colour,
                label=label,
            )
    ax.set(title=title, xlabel="optimiser step", ylabel=unit)
    ax.legend()


def training_curves(metrics: list[dict], panels: tuple[str, ...], title: str = "") -> Figure:
    """Training curves of one run, one panel each (names of PANELS), two in a row when there are
    more than three.
    """
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, metrics, panel)
    for ax in axes.flat[len(panels) :]:
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
        names = LIVE_ORPO if "odds_ratio_loss" in metrics[-1] else LIVE
        shown = tuple(
            name
            for name in names
            if any(line in row for row in metrics[:2] for line in PANELS[name][2])
        )
        figure = training_curves(
            metrics, shown, f"{self.title}: step {metrics[-1]['step']} of {self.steps}"
        )
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)


def sft_curves(metrics: list[dict], best_step: int, title: str = "") -> Figure:
    """SFT: the loss, with the perplexity as a second scale of the same curve, and both answers of
    held-out pairs.

    The right panel begins at the first evaluation after step 0: the jump before it would hide what
    follows.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    figure.get_layout_engine().set(wspace=0.08)
    _draw_panel(left, metrics, "loss")
    best = next(row["held_out_loss"] for row in metrics if row["step"] == best_step)
    left.plot(
        best_step,
        best,
        "*",
        color=REJECTED,
        markersize=13,
        label=f"best: step {best_step}",
        zorder=5,
    )
    left.legend()
    losses = [row["loss"] for row in metrics if "loss" in row]
    wide = max(losses) > 3 * min(losses)
    left.set(
        title="Loss, and perplexity = exp(loss)",
        ylabel="nats per token",
        yscale="log" if wide else "linear",
    )
    low, high = left.get_ylim()
    steps = (0.1, 0.25, 0.5, 1, 2, 4, 8) if wide else left.get_yticks()
    ticks = [step for step in steps if low <= step <= high]
    for ax, labels in ((left, ticks), (left.twinx(), np.exp(ticks))):
        ax.set(yscale=left.get_yscale(), ylim=(low, high))
        ax.set_yticks(
            ticks, [f"{label:.0f}" if label >= 10 else f"{label:.3g}" for label in labels]
        )
        ax.set_yticks([], minor=True)
    ax.set(ylabel="perplexity")
    ax.grid(False)
    ax.spines["right"].set_visible(True)
    _draw_panel(right, [row for row in metrics if row["step"] > 0], "logps")
    figure.suptitle(title)
    return figure


def displacement(runs: dict[str, list[dict]], title: str = "") -> Figure:
    """How far the held-out log-probabilities of both sides moved since step 0, one panel per run,
    one scale.
    """
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.0 * len(runs), 3.2), squeeze=False, sharey=True
    )
    for ax, (name, metrics) in zip(axes.flat, runs.items(), strict=True):
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            line = f"held_out_logps_{side}"
            points = np.array([(row["step"], row[line]) for row in metrics if line in row])
            ax.plot(
                points[:, 0],
                points[:, 1] - points[0, 1],
                "o-",
                color=colour,
                label=side,
                markersize=4,
            )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=name, xlabel="optimiser step")
        ax.locator_params(axis="x", integer=True, nbins=6)
    axes.flat[0].set_ylabel("change of log-probability, nats")
    axes.flat[0].legend()
    figure.suptitle(title)
    return figure
