"""The style of every figure: colours and settings. Import a figure function from its module."""

import matplotlib.pyplot as plt

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
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
MARK = {"color": "black", "linestyle": "--", "linewidth": 1}  # a line at a draw or a limit
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend to the right of the axes


def verdict_colour(low: float, high: float) -> str:
    """Colour of a win rate by its interval: better than a draw, worse, or undecided."""
    return CHOSEN if low > 0.5 else REJECTED if high < 0.5 else GREY
