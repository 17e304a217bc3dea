"""The figures of the study, as SVG: one message each, error bars over seeds, numbers in words."""

from pathlib import Path

import matplotlib.pyplot as plt

from common.io.files import written_whole
from common.plots import BESIDE, MARK, PALETTE, subplots

COLOURS = (*PALETTE, "#7a5230", "#444444")


def _errors(points: dict[str, dict]) -> list[list[float]]:
    """Lengths of the bars below and above each mean."""
    ends = [point["ci95"] for point in points.values()]
    means = [point["mean"] for point in points.values()]
    return [
        [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
        [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
    ]


def draw(name: str, title: str, series: dict[str, dict[str, dict]], path: Path) -> None:
    """Draws `study-knobs`, `study-routes` or `study-flaws` into a file."""
    from benchmarks.study_page import figure_in_words

    sideways = name.startswith("study-routes")
    figure, ax = subplots(figsize=(9.5, 4.6 if sideways else 4.2))
    places = list(dict.fromkeys(place for points in series.values() for place in points))
    step = 0.7 / max(1, len(series))
    for index, (label, points) in enumerate(series.items()):
        at = [places.index(place) + (index - (len(series) - 1) / 2) * step for place in points]
        means, style = [point["mean"] for point in points.values()], {"fmt": "o", "capsize": 3}
        style |= {"color": COLOURS[index], "label": label, "markersize": 5}
        if sideways:
            ax.errorbar(means, at, xerr=_errors(points), **style)
        else:
            ax.errorbar(at, means, yerr=_errors(points), **style)
    if sideways:
        ax.set_yticks(range(len(places)), places)
        ax.invert_yaxis()
        ax.axvline(0.5, **MARK)
        ax.set_xlabel("win rate of the first over the second (a tie is half)")
    else:
        ax.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        if name.startswith("study-knobs"):
            ax.axhline(0.5, **MARK)
            ax.set(xlabel="share of pairs whose answers share a flaw", ylabel="win rate")
        else:
            ax.set(ylabel="share of answers", ylim=(0, None))
    ax.set_title(title)
    ax.legend(**BESIDE)
    # The same numbers give the same file, and it says them in words.
    said = {"Date": None, "Description": figure_in_words(title, series)}
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), written_whole(path) as to:
        figure.savefig(to, format="svg", metadata=said)
    plt.close(figure)
