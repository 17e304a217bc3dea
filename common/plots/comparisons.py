"""Figures of a comparison of methods: win rates with their spread over seeds, cost, memory,
gradients.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from common.memory.simulate import PARTS, Forecast
from common.plots.curves import GREY, PALETTE, REJECTED

COLOURS = dict(
    zip(("SFT", "λ = 0", "DPO plain", "DPO + NLL", "ORPO"), PALETTE, strict=False)
)  # the same everywhere

MEMORY_PARTS = {  # key of `costs.measure_method` → how it is called
    "weights_bytes": "weights",
    "reference_bytes": "reference",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser state",
    "rest_bytes": "the rest of the peak",
}


def flaw_rates(
    rates: list[float],
    lines: dict[str, list[dict]],
    seeds: dict[str, list[list[float]]] | None = None,
    ylabel: str = "win rate",
    title: str = "",
    ends: tuple[str, str] | None = None,
) -> Figure:
    """Win rates over the share of flaws in both answers; the shade is the 95 % interval, small dots
    single seeds.

    Args: `lines`: {name: one {"rate", "low", "high"} per flaw rate}; `seeds`: {name: the seeds'
        rates per flaw rate}; `ends`: what being below and above one half means, written into the
        figure.
    """
    figure, ax = plt.subplots(figsize=(8, 4.2))
    for index, (name, points) in enumerate(lines.items()):
        colour = COLOURS.get(name, PALETTE[-1])
        low, middle, high = ([point[key] for point in points] for key in ("low", "rate", "high"))
        ax.fill_between(rates, low, high, color=colour, alpha=0.15)
        ax.plot(rates, middle, "o-", color=colour, label=name)
        for rate, values in zip(rates, (seeds or {}).get(name, []), strict=False):
            if len(values) > 1:
                shift = 0.006 * (index + 1)
                ax.plot(
                    [rate + shift] * len(values), values, "o", color=colour, markersize=3, alpha=0.6
                )
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
    for text, place, align in zip(ends or (), (0.02, 0.98), ("bottom", "top"), strict=False):
        ax.text(
            0.985,
            place,
            text,
            transform=ax.transAxes,
            ha="right",
            va=align,
            fontsize=9,
            color="dimgrey",
        )
    ax.set(
        title=title,
        xlabel="flaw rate p: each flaw is in both answers with this probability",
        ylabel=ylabel,
    )
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.margins(y=0.16)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def win_rate_matrix(rates: dict[str, dict], stages: dict[str, str], title: str = "") -> Figure:
    """Win rate of each row's method against each column's, with its spread over seeds; bold where
    the interval says so.

    Args: `rates`: {"a_vs_b": {"rate", "std", "low", "high"}}; `stages`: {stage: name}, in the order
        of the axes.
    """
    size, names = len(stages), list(stages.values())
    table = np.full((size, size), np.nan)
    figure, ax = plt.subplots(figsize=(2.4 + 1.15 * size, 1.2 + 0.75 * size))
    for row, first in enumerate(stages):
        for column, second in enumerate(stages):
            for key, sign in ((f"{first}_vs_{second}", 1), (f"{second}_vs_{first}", -1)):
                if first != second and key in rates:
                    rate = rates[key]
                    table[row, column] = value = rate["rate"] if sign == 1 else 1 - rate["rate"]
                    spread = "" if rate["std"] is None else f"\n± {rate['std']:.2f}"
                    sure = rate["low"] > 0.5 or rate["high"] < 0.5
                    style = {"fontweight": "bold" if sure else "normal", "fontsize": 10}
                    ax.text(column, row, f"{value:.2f}{spread}", ha="center", va="center", **style)
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
    there is one.

    Args: `models`: as in a report, with "std"; `measures`: {key: panel title}; `names`: {stage:
        name on the axis}.
    """
    columns = min(4, len(measures))
    rows = -(-len(measures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns, 2.7 * rows), squeeze=False)
    for ax in axes.flat[len(measures) :]:
        ax.set_visible(False)
    for ax, (key, label) in zip(axes.flat, measures.items(), strict=False):
        values = [models[stage][key] for stage in names]
        spread = [models[stage]["std"][key] or 0.0 for stage in names]
        drawn = ax.bar(
            range(len(names)),
            values,
            yerr=spread if any(spread) else None,
            color=PALETTE,
            capsize=3,
        )
        digits = "%.1f" if max(map(abs, values)) >= 10 else "%.2f"
        ax.bar_label(drawn, fmt=digits, fontsize=8, padding=2)
        ax.set_xticks(range(len(names)), list(names.values()), rotation=35, ha="right", fontsize=8)
        ax.set_title(label, fontsize=10)
        ax.margins(y=0.18)
        ax.grid(axis="x", visible=False)
    figure.suptitle(title)
    return figure


def memory_by_part(rows: dict[str, dict], title: str = "") -> Figure:
    """Stacked bars of what training held at its peak, in GB (1e9 bytes). `rows`: {name:
    `costs.measure_method`}.
    """
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)))
    left, places = np.zeros(len(rows)), np.arange(len(rows))[::-1]
    for colour, (key, part) in zip((*PALETTE[:4], GREY), MEMORY_PARTS.items(), strict=True):
        widths = np.array([row[key] for row in rows.values()]) / 1e9
        ax.barh(places, widths, left=left, color=colour, label=part, height=0.65)
        left += widths
    for place, total in zip(places, left, strict=True):
        ax.text(total, place, f" {total:.2f}", va="center", fontsize=9)
    ax.set_yticks(places, list(rows))
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.set(title=title, xlabel="GB at the peak of a training step")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def frontier(points: dict[str, dict], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Quality against cost, one labelled point each; the line joins those that nothing cheaper
    equals.

    Args: `points`: {name: {"cost", "rate", "low", "high"}}; `low` and `high` None: no interval.
    """
    figure, ax = plt.subplots(figsize=(8, 4.2))
    best, stairs = -np.inf, []
    for point in sorted(points.values(), key=lambda p: (p["cost"], -p["rate"])):
        if point["rate"] > best:
            best = point["rate"]
            stairs.append((point["cost"], best))
    ax.plot(
        *zip(*stairs, strict=True),
        color=GREY,
        linewidth=6,
        alpha=0.35,
        label="the frontier",
        zorder=0,
    )
    width, height = (
        np.ptp([p["cost"] for p in points.values()]) or 1,
        np.ptp([p["rate"] for p in points.values()]) or 1,
    )
    named: list[dict] = []
    for name, point in points.items():
        colour = COLOURS.get(name, PALETTE[-1])
        apart = [
            (abs(p["cost"] - point["cost"]) / width, abs(p["rate"] - point["rate"]) / height)
            for p in named
        ]
        near = any(x < 0.25 and y < 0.12 for x, y in apart)
        side, named = (
            (-16 if near else 6),
            [*named, point],
        )  # a name below its point where one is above
        if point["low"] is not None:
            ax.plot(
                [point["cost"]] * 2,
                [point["low"], point["high"]],
                color=colour,
                linewidth=3,
                alpha=0.5,
            )
        ax.plot(point["cost"], point["rate"], "o", color=colour, markersize=8)
        ax.annotate(
            name,
            (point["cost"], point["rate"]),
            xytext=(9, side),
            textcoords="offset points",
            fontsize=9,
        )
    ax.axhline(0.5, color="black", linestyle="--", linewidth=1)
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), width_ratios=(3, 2))
    for colour, (name, values) in zip(
        (REJECTED, PALETTE[0], PALETTE[4]), cosines.items(), strict=False
    ):
        left.plot(steps, values, "o-", color=colour, label=name, markersize=4)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(
        title="Cosine of the gradients",
        ylabel="cosine",
        xlabel="optimiser step",
        ylim=(-1.05, 1.05),
    )
    left.legend(loc="lower left", fontsize=8)
    right.plot(steps, nll, "o-", color=REJECTED, markersize=4)
    right.set(
        title="Chosen answers along plain DPO",
        ylabel="held-out NLL, nats per token",
        xlabel="optimiser step",
    )
    for ax in (left, right):
        ax.locator_params(axis="x", integer=True)
    figure.suptitle(title)
    return figure


def memory_forecasts(forecasts: list[Forecast], gigabytes: float) -> Figure:
    """Predicted memory per profile and method: a bar of parts for the training step, a mark for the
    other phases.
    """
    figure, ax = plt.subplots(figsize=(9, 0.8 + 0.36 * len(forecasts)), layout="constrained")
    names = [f"{forecast.profile}  {forecast.method.upper()}" for forecast in forecasts]
    places, left = np.arange(len(forecasts))[::-1], np.zeros(len(forecasts))
    for part, colour in zip(PARTS, plt.get_cmap("tab10").colors, strict=False):
        sizes = np.array([forecast.parts[part] / 1e9 for forecast in forecasts])
        if sizes.any():
            ax.barh(places, sizes, left=left, color=colour, label=part)
            left += sizes
    for phase, mark in (("evaluation", "D"), ("answers", "o")):
        sizes = [forecast.phases.get(phase, np.nan) / 1e9 for forecast in forecasts]
        ax.plot(sizes, places, mark, color="black", markersize=5, label=f"peak of {phase}")
    ax.axvline(gigabytes, color=REJECTED, linestyle="--", label=f"{gigabytes:g} GB")
    ax.set_yticks(places, names)
    ax.set(xlabel="predicted peak of GPU memory (GB of 1e9 bytes)", xlim=(0, gigabytes * 1.05))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
