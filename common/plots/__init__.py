"""The style of every figure: colours, settings, and the text for those who cannot see it.

Import a figure function from its module. It makes its figure with `subplots` of this one.
"""

import re

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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


def _values(drawn, sideways: bool) -> list[str]:
    """In words: the lengths of bars; of a curve its first and last value; where a mark stands."""
    if isinstance(drawn, BarContainer):
        return [f"{value:.3g}" for value in drawn.datavalues[:20]]
    line = drawn[0] if isinstance(drawn, ErrorbarContainer) else drawn
    if not isinstance(line, Line2D):
        return []
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    upright = len(x) == 2 and x[0] == x[1] and y.tolist() == [0, 1]
    values = x if sideways or upright else y
    return [f"{value:.3g}" for value in values[np.isfinite(values)]]


def _panel_in_words(ax) -> str:
    """Title, axes, places, what is written in it, and the named curves and bars of a panel."""
    axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
    parts = [": ".join(filter(None, (ax.get_title(), axes)))]
    rows, columns = (
        [name for tick in axis.get_ticklabels() if re.search("[a-z]{2}", name := tick.get_text())]
        for axis in (ax.yaxis, ax.xaxis)
    )
    written = [text.get_text().strip() for text in ax.texts if text.get_text().strip()]
    parts += [f"places: {', '.join([*rows, *columns])}"] if rows or columns else []
    labels = any(isinstance(drawn, BarContainer) for drawn in ax.get_legend_handles_labels()[0])
    parts += [f"written: {', '.join(written[:20])}"] if written and not labels else []
    for drawn, name in zip(*ax.get_legend_handles_labels(), strict=True):
        values = _values(drawn, sideways=bool(rows))
        if not isinstance(drawn, BarContainer):
            values = [" to ".join(dict.fromkeys(values[:1] + values[-1:]))]
        parts.append(": ".join(filter(None, (name, ", ".join(values)))))
    return "; ".join(filter(None, parts))


def alt_text(figure: Figure) -> str:
    """A figure in words, read from itself, so that it says what was drawn and nothing else.

    Of a curve it tells the first and the last value, of bars all heights (20 at most).
    """
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    told = [figure.get_suptitle(), *(_panel_in_words(ax) for ax in shown)]
    words = ". ".join(filter(None, told)).replace("$", "")
    return f"Figure. {' '.join(words.split())}."


class DescribedFigure(Figure):
    """A figure that hands its alt text to Jupyter, with its picture and in place of its name."""

    def _repr_mimebundle_(self, include=None, exclude=None):
        text = alt_text(self)
        return {"text/plain": text}, {"image/png": {"alt": text}}


def subplots(*args, **options):
    """`plt.subplots` with a figure that describes itself."""
    return plt.subplots(*args, FigureClass=DescribedFigure, **options)
