"""Figures of a comparison of methods: win rates, cost, memory, gradients."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from common.plots import BESIDE, GREY, MARK, PALETTE, REJECTED, subplots

METHOD_COLOURS = dict(
    zip(("SFT", "λ = 0", "DPO plain", "DPO + NLL", "ORPO"), PALETTE, strict=False)
)
MEMORY_PARTS = {  # key of `common.memory.measured.measure_method` → how it is called
    "weights_bytes": "weights",
    "reference_bytes": "reference",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser state",
    "rest_bytes": "the rest of the peak",
}


def win_rate_matrix(rates: dict[str, dict], stages: dict[str, str], title: str = "") -> Figure:
    """Win rate of each row's method against each column's, with its spread over seeds; bold where
    the interval excludes a draw.

    Args: `rates`: {"a_vs_b": {"rate", "std", "low", "high"}}; `stages`: {stage: name}, in the order
        of the axes.
    """
    size, names = len(stages), list(stages.values())
    table = np.full((size, size), np.nan)
    figure, ax = subplots(figsize=(2.4 + 1.15 * size, 1.2 + 0.75 * size))
    for row, first in enumerate(stages):
        for column, second in enumerate(stages):
            for key, sign in ((f"{first}_vs_{second}", 1), (f"{second}_vs_{first}", -1)):
                if first == second or key not in rates:
                    continue
                rate = rates[key]
                table[row, column] = value = rate["rate"] if sign == 1 else 1 - rate["rate"]
                spread = "" if rate["std"] is None else f"\n± {rate['std']:.2f}"
                weight = "bold" if rate["low"] > 0.5 or rate["high"] < 0.5 else "normal"
                style = {"ha": "center", "va": "center", "fontweight": weight, "fontsize": 10}
                ax.text(column, row, f"{value:.2f}{spread}", **style)
    image = ax.imshow(table, cmap="PiYG", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    ax.set_xticks(range(size), names)
    ax.set_yticks(range(size), names)
    ax.set(title=title, xlabel="… against", ylabel="win rate of …")
    ax.grid(False)
    figure.colorbar(image, label="win rate (ties half)")
    return figure


def measure_panels(
    models: dict[str, dict], measures: dict[str, str], names: dict[str, str], title=""
) -> Figure:
    """One panel per measure, one bar per model, with ± its standard deviation over seeds where
    there is one. What a world does not have (None for every model) has no panel.

    Args: `models`: as in a report, with "std"; `measures`: {key: panel title}; `names`: {stage:
        name on the axis}. Raises: ValueError if none of the measures is known.
    """
    shown = {key for key in measures for stage in names if models[stage].get(key) is not None}
    if not shown:
        raise ValueError(f"No model here has any of these measures: {', '.join(measures)}.")
    measures = {key: label for key, label in measures.items() if key in shown}
    columns = min(4, len(measures))
    rows = -(-len(measures) // columns)
    figure, axes = subplots(rows, columns, figsize=(2.9 * columns, 2.7 * rows), squeeze=False)
    for ax in axes.flat[len(measures) :]:
        ax.set_visible(False)
    places, labels = range(len(names)), list(names.values())
    for ax, (key, label) in zip(axes.flat, measures.items(), strict=False):
        known = [place for place, stage in enumerate(names) if models[stage].get(key) is not None]
        own = [models[list(names)[place]] for place in known]
        values, spread = [model[key] for model in own], [model["std"][key] or 0.0 for model in own]
        errors = spread if any(spread) else None
        colours = [PALETTE[place % len(PALETTE)] for place in known]
        drawn = ax.bar(known, values, yerr=errors, color=colours, capsize=3)
        digits = "%.1f" if max(map(abs, values)) >= 10 else "%.2f"
        ax.bar_label(drawn, fmt=digits, fontsize=8, padding=2)
        ax.set_xticks(places, labels, rotation=35, ha="right", fontsize=8)
        ax.set_title(label, fontsize=10)
        ax.margins(y=0.18)
        ax.grid(axis="x", visible=False)
    figure.suptitle(title)
    return figure


def _stacked(ax, names: list[str], parts: dict[str, list[float]], colours) -> np.ndarray:
    """Horizontal bars made of parts, the first name on top. Returns: the places of the bars."""
    places, left = np.arange(len(names))[::-1], np.zeros(len(names))
    for colour, (part, widths) in zip(colours, parts.items(), strict=False):
        if any(widths):
            ax.barh(places, widths, left=left, color=colour, label=part, height=0.65)
            left += widths
    ax.set_yticks(places, names)
    ax.grid(axis="y", visible=False)
    return places


def memory_by_part(rows: dict[str, dict], title: str = "") -> Figure:
    """Stacked bars of what training held at its peak, in GB (1e9 bytes).

    Args: `rows`: {name: as `common.memory.measured.measure_method` gives it}.
    """
    figure, ax = subplots(figsize=(8, 1.2 + 0.5 * len(rows)))
    parts = {name: [row[key] / 1e9 for row in rows.values()] for key, name in MEMORY_PARTS.items()}
    places = _stacked(ax, list(rows), parts, (*PALETTE[:4], GREY))
    for place, total in zip(places, np.sum(list(parts.values()), axis=0), strict=True):
        ax.text(total, place, f" {total:.2f}", va="center", fontsize=9)
    ax.margins(x=0.1)
    ax.set(title=title, xlabel="GB at the peak of a training step")
    ax.legend(**BESIDE, fontsize=8)
    return figure


def memory_forecasts(rows: dict[str, tuple[dict, dict]], gigabytes: float) -> Figure:
    """Predicted memory: a bar of parts for the training step, a mark for each other phase.

    Args: `rows`: {name: (bytes by part at the peak of a step, bytes at the peak of each phase)};
        `gigabytes`: of the GPU, drawn as a dashed line.
    """
    figure, ax = subplots(figsize=(9, 0.8 + 0.36 * len(rows)))
    names = next(iter(rows.values()))[0]
    parts = {part: [found[part] / 1e9 for found, _ in rows.values()] for part in names}
    places = _stacked(ax, list(rows), parts, plt.get_cmap("tab10").colors)
    for phase, mark in (("evaluation", "D"), ("answers", "o")):
        sizes = [phases.get(phase, np.nan) / 1e9 for _, phases in rows.values()]
        ax.plot(sizes, places, mark, color="black", markersize=5, label=f"peak of {phase}")
    ax.axvline(gigabytes, color=REJECTED, linestyle="--", label=f"{gigabytes:g} GB")
    ax.set(xlabel="predicted peak of GPU memory (GB of 1e9 bytes)", xlim=(0, gigabytes * 1.05))
    ax.legend(**BESIDE)
    return figure


def frontier(points: dict[str, dict], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Quality against cost, one labelled point each; the grey line joins the points that no cheaper
    one equals.

    Args: `points`: {name: {"cost", "rate", "low", "high"}}; `low` and `high` None: no interval.
    """
    figure, ax = subplots(figsize=(8, 4.2))
    best, stairs = -np.inf, []
    for point in sorted(points.values(), key=lambda p: (p["cost"], -p["rate"])):
        if point["rate"] > best:
            best = point["rate"]
            stairs.append((point["cost"], best))
    line = {"color": GREY, "linewidth": 6, "alpha": 0.35, "label": "the frontier", "zorder": 0}
    ax.plot(*zip(*stairs, strict=True), **line)

    width, height = (np.ptp([p[key] for p in points.values()]) or 1 for key in ("cost", "rate"))
    named: list[dict] = []
    for name, point in points.items():
        colour, cost, rate = METHOD_COLOURS.get(name, PALETTE[-1]), point["cost"], point["rate"]
        if point["low"] is not None:
            interval = [point["low"], point["high"]]
            ax.plot([cost] * 2, interval, color=colour, linewidth=3, alpha=0.5)
        ax.plot(cost, rate, "o", color=colour, markersize=8)
        # A name stands below its point where the name of another point is close above.
        near = any(
            abs(p["cost"] - cost) < 0.25 * width and abs(p["rate"] - rate) < 0.12 * height
            for p in named
        )
        text = {"xytext": (9, -16 if near else 6), "textcoords": "offset points", "fontsize": 9}
        ax.annotate(name, (cost, rate), **text)
        named.append(point)
    ax.axhline(0.5, **MARK)
    ax.margins(x=0.2, y=0.12)
    ax.set_xlim(left=0)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(loc="lower right")
    return figure


def gradient_cosines(
    steps: list[int], cosines: dict[str, list], nll: list[float], title: str = ""
) -> Figure:
    """Left: cosines of two gradients along training. Right: the NLL of held-out chosen answers
    along plain DPO.
    """
    figure, (left, right) = subplots(1, 2, figsize=(10, 3.7), width_ratios=(3, 2))
    colours = (REJECTED, PALETTE[0], PALETTE[4])
    for colour, (name, values) in zip(colours, cosines.items(), strict=False):
        left.plot(steps, values, "o-", color=colour, label=name, markersize=4)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(title="Cosine of the gradients", ylabel="cosine", ylim=(-1.05, 1.05))
    left.legend(loc="lower left", fontsize=8)
    right.plot(steps, nll, "o-", color=REJECTED, markersize=4)
    right.set(title="Chosen answers along plain DPO", ylabel="held-out NLL, nats per token")
    for ax in (left, right):
        ax.set(xlabel="optimiser step")
        ax.locator_params(axis="x", integer=True)
    figure.suptitle(title)
    return figure
