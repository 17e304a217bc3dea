"""Figures of judges: how far they agree and what sways them, whether one knows how sure it is."""

import numpy as np
from matplotlib.figure import Figure

from common.plots import CHOSEN, MARK, OTHER, REJECTED, subplots


def judges_side_by_side(rows: list[dict], title: str = "") -> Figure:
    """Rows of `judging.agreement.agreement`: κ, bias of order and of length, with 95 % intervals.

    What was not to be measured has no dot. The dashed lines: no better than chance; no bias of
    order; how often the longer answer is the better one by the first judge.
    """
    names = [row["judge"].split(" (")[0] for row in rows][::-1]
    figure, axes = subplots(1, 3, figsize=(11, 1.3 + 0.45 * len(rows)), sharey=True)
    right = rows[0]["longer"][0] if rows[0]["longer"] else 0.5
    panels = (
        ("kappa", "Cohen's κ with the first judge", 0.0, (-0.6, 1.05)),
        ("first", "share won by the answer shown first", 0.5, (-0.05, 1.05)),
        ("longer", "share won by the longer answer", right, (-0.05, 1.05)),
    )
    for ax, colour, panel in zip(axes, (CHOSEN, OTHER, REJECTED), panels, strict=True):
        key, xlabel, line, limits = panel
        for place, row in enumerate(reversed(rows)):
            if row[key]:
                value, (low, high) = row[key]
                ax.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
                ax.plot(value, place, "o", color=colour)
        ax.axvline(line, **MARK)
        ax.set(xlabel=xlabel, xlim=limits, ylim=(-0.6, len(rows) - 0.4))
    axes[0].set_yticks(range(len(rows)), names)
    figure.suptitle(title)
    return figure


def calibration_curve(rows: list[dict], title: str = "") -> Figure:
    """Rows of `judging.agreement.calibration`: how often a judge is right where it says how sure.

    On the dashed line it is right as often as it says; below it is too sure of itself.
    """
    figure, ax = subplots(figsize=(5.5, 4.2))
    said, right = (np.array([row[key] for row in rows]) for key in ("said", "right"))
    low, high = np.array([row["ci95"] for row in rows]).T
    ends = np.clip([right - low, high - right], 0, None)
    ax.errorbar(said, right, yerr=ends, fmt="o", color=OTHER, capsize=3, label="held-out pairs")
    ax.plot([0.5, 1], [0.5, 1], **MARK)
    ax.set(title=title, xlabel="how sure it is, σ(|margin|)", ylabel="share it is right on")
    ax.set(xlim=(0.48, 1.02), ylim=(min(0.4, low.min() - 0.03), 1.03))
    ax.legend(loc="lower right")
    return figure
