"""Figures that show single tokens."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from common.plots import CHOSEN, OTHER, REJECTED, SIDES, subplots


def token_log_ratios(
    sides: dict[str, list[tuple[str, float]]], title: str = "", longest: int = 40
) -> Figure:
    """One bar per scored token, log(policy / reference) in nats; one panel per side, its sum in the
    panel's title.
    """
    size = (9.5, 2.5 * len(sides))
    figure, axes = subplots(len(sides), 1, figsize=size, squeeze=False, sharey=True)
    for ax, colour, (side, tokens) in zip(axes.flat, SIDES.values(), sides.items(), strict=False):
        shown = tokens[:longest]
        ax.bar(range(len(shown)), [value for _, value in shown], color=colour)
        ax.axhline(0, color="black", linewidth=0.8)
        names = [text for text, _ in shown]
        ax.set_xticks(range(len(shown)), names, rotation=60, ha="right", fontsize=8)
        cut = f", first {longest} of {len(tokens)} tokens shown" if len(tokens) > longest else ""
        ax.set(xlabel="token", ylabel="nats", xlim=(-0.7, len(shown) - 0.3))
        ax.set_title(f"{side}: sum {sum(value for _, value in tokens):+.2f} nats{cut}", fontsize=10)
        ax.grid(axis="x", visible=False)
    figure.suptitle(title)
    return figure


def packed_pair(
    prompt: list[str], chosen: list[str], rejected: list[str], title: str = ""
) -> Figure:
    """A packed pair, token by token: row i attends to the coloured columns, and position ids go on
    from the prompt.

    Args: the tokens of each part as text, some 30 in all. A ring marks the position that predicts
        the first token of both answers: the prompt's last.
    """
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    colours = (OTHER, CHOSEN, REJECTED)
    # The layout of `common.packed`: both answers continue the position ids of the prompt.
    part = np.repeat(range(3), [len(tokens) for tokens in parts.values()])
    starts = [0, len(prompt), len(prompt)]
    place = np.concatenate(
        [start + np.arange(len(each)) for start, each in zip(starts, parts.values(), strict=True)]
    )
    # A token sees earlier positions of the prompt and of its own answer.
    sees = (place[:, None] >= place) & ((part == 0) | (part[:, None] == part))

    count = len(part)
    figure, ax = subplots(figsize=(2.6 + 0.27 * count, 2.0 + 0.27 * count))
    ax.imshow(np.where(sees, 1 + part, 0), cmap=ListedColormap(["white", *colours]), vmin=0, vmax=3)
    tokens = [repr(token)[1:-1].replace(" ", "·") for each in parts.values() for token in each]
    rows = [f"{token}  {position:2d}" for token, position in zip(tokens, place, strict=True)]
    ax.set_yticks(range(count), rows)
    ax.set_xticks(range(count), tokens, rotation=90)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        for label, number in zip(labels, part, strict=True):
            label.set(color=colours[number], family="monospace", fontsize=9)
    edges = np.flatnonzero(np.diff(part)) + 0.5
    ax.hlines(edges, -0.5, count - 0.5, color="black", linewidth=0.8)
    ax.vlines(edges, -0.5, count - 0.5, color="black", linewidth=0.8)
    ring = {"markerfacecolor": "none", "markeredgecolor": "white", "markeredgewidth": 1.6}
    ax.plot(len(prompt) - 1, len(prompt) - 1, "o", markersize=9, **ring)
    ax.set_xticks(np.arange(count) + 0.5, minor=True)
    ax.set_yticks(np.arange(count) + 0.5, minor=True)
    ax.grid(False, which="major")
    ax.grid(True, which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    ylabel = "token (query) and its position id"
    ax.set(title=title, xlabel="token that is attended to (key)", ylabel=ylabel)
    for name, colour in zip(parts, colours, strict=True):
        ax.plot([], [], "s", color=colour, label=f"attends to the {name}")
    ax.legend(loc="upper right", fontsize=9)
    return figure
