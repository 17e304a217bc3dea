"""Figures of the study: win rates with their intervals over its seeds, read from its results."""

from matplotlib.figure import Figure

from common.io.evidence import as_text, study_rate
from common.plots import BESIDE, MARK, PALETTE, subplots

KNOBS = ("0", ".15", ".3", ".5")  # flaw rates of the pairs


def study_rates(pairs: dict[str, tuple[str, str]], title: str = "") -> Figure | None:
    """Win rates of the study, mean and 95 % interval over its seeds; the dashed line is a draw.

    Args: `pairs`: {label: (arm, the arm it is compared with)}, such as `("orpo@.3", "lambda0@.3")`.
    Returns: None, with a line that says so, where the study has none of them yet.
    """
    found = {label: study_rate(*pair) for label, pair in pairs.items()}
    found = {label: rate for label, rate in found.items() if rate}
    if missing := [label for label in pairs if label not in found]:
        print(f"not measured yet: {', '.join(missing)} (make study)")
    if not found:
        return None
    figure, ax = subplots(figsize=(7.5, 1.2 + 0.45 * len(found)))
    for place, rate in enumerate(reversed(found.values())):
        ax.plot(rate["ci95"], [place, place], color=PALETTE[0], linewidth=3, alpha=0.5)
        ax.plot(rate["mean"], place, "o", color=PALETTE[0])
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(as_text(rate), (rate["mean"], place), **above)
    ax.axvline(0.5, **MARK)
    seeds = " or ".join(map(str, sorted({rate["seeds"] for rate in found.values()})))
    xlabel = f"win rate of the first (ties half), 95 % interval over {seeds} seeds"
    ax.set(title=title, xlabel=xlabel, ylim=(-0.6, len(found) - 0.3))
    ax.set_yticks(range(len(found)), list(reversed(found)))
    ax.margins(x=0.1)
    return figure


def study_knobs(pairs: dict[str, tuple[str, str]], title: str = "") -> Figure | None:
    """Win rates of the study over the flaw rate of the pairs, with 95 % intervals over its seeds.

    Args: `pairs`: {label: (arm, the arm it is compared with)} without a flaw rate, such as
        `("orpo", "lambda0")`.
    Returns: None, with a line that says so, where the study has none of them yet.
    """
    known = {
        label: {knob: study_rate(f"{a}@{knob}", f"{b}@{knob}") for knob in KNOBS}
        for label, (a, b) in pairs.items()
    }
    if not any(rate for row in known.values() for rate in row.values()):
        print(f"not measured yet: {', '.join(pairs)} (make study)")
        return None
    figure, ax = subplots(figsize=(7.5, 4))
    for index, (colour, (label, row)) in enumerate(zip(PALETTE, known.items(), strict=False)):
        found = {float(knob): rate for knob, rate in row.items() if rate}
        places = [knob + 0.004 * index for knob in found]
        middle = [rate["mean"] for rate in found.values()]
        low, high = zip(*(rate["ci95"] for rate in found.values()), strict=True)
        below, above = (
            [abs(m - e) for m, e in zip(middle, ends, strict=True)] for ends in (low, high)
        )
        ax.errorbar(places, middle, [below, above], fmt="o-", color=colour, capsize=3, label=label)
    ax.axhline(0.5, **MARK)
    ax.set_xticks([float(knob) for knob in KNOBS])
    ax.set(title=title, ylabel="win rate (ties half), 95 % interval over seeds")
    ax.set_xlabel("flaw rate of the pairs: each flaw is in both answers with this probability")
    ax.legend(**BESIDE)
    return figure
