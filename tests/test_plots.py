"""Every figure function, drawn with small made-up data: axes with names, and what was put in."""

import inspect
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from common.plots import (
    CHOSEN,
    GREY,
    REJECTED,
    alt_text,
    comparisons,
    curves,
    deployment,
    figures,
    tokens,
)

MODULES = (comparisons, curves, deployment, figures, tokens)


def rate(middle: float, half: float = 0.1):
    """A win rate, as `common.evaluation.win_rate` gives it."""
    return SimpleNamespace(rate=middle, ci95=(middle - half, middle + half))


def run(start: float = -20.0) -> list[dict]:
    """Metrics of a run of 4 steps, evaluated at 0, 2 and 4."""
    rows = []
    for step in range(5):
        row = {"step": step, "loss": 2.0 - 0.3 * step, "margin": 0.1 * step, "nll": 1.0}
        if step % 2 == 0:
            row |= {f"held_out_{name}": value for name, value in row.items() if name != "step"}
            row |= {
                "held_out_logps_chosen": start + step,
                "held_out_logps_rejected": start - 2 * step,
            }
        rows.append(row)
    return rows


PARTS = {key: 1e9 for key in comparisons.MEMORY_PARTS}
POINT = {"cost": 1.0, "rate": 0.6, "low": 0.5, "high": 0.7}
RATES = {"dpo_vs_sft": {"rate": 0.7, "std": 0.02, "low": 0.6, "high": 0.8}}
MODELS = {"sft": {"kl": 1.0, "std": {"kl": 0.2}}, "dpo": {"kl": 2.0, "std": {"kl": None}}}
SPEED = SimpleNamespace(
    tokens_per_second=100.0, latency_p50=0.2, latency_p95=0.3, first_token_p50=0.05
)
QUANTISED = {"weight_bytes": 1e7, "win_rate": rate(0.5), "tokens_per_second": 50.0}
BOTH = {"chosen": [0, 1], "rejected": [0, -1]}
DRAWN = {  # figure function → its arguments
    "win_rate_matrix": (RATES, {"sft": "SFT", "dpo": "DPO"}, "title"),
    "measure_panels": (MODELS, {"kl": "KL, nats"}, {"sft": "SFT", "dpo": "DPO"}, "title"),
    "memory_by_part": ({"DPO": PARTS, "ORPO": PARTS}, "title"),
    "memory_forecasts": ({"gpt2 DPO": ({"weights": 2e9}, {"step": 2e9, "answers": 3e9})}, 16),
    "frontier": ({"DPO + NLL": POINT, "SFT": POINT | {"low": None}}, "TFLOPs", "win rate", "title"),
    "gradient_cosines": ([0, 1], {"chosen": [1, 0]}, [2.0, 1.0], "title"),
    "training_curves": (run(), ("loss", "margin", "nll", "logps"), "title"),
    "compare_curves": ({"a": run(), "b": run(-5)}, ("nll", "logps"), "title"),
    "sft_curves": (run(), 4, "title"),
    "displacement": ({"a": run(), "b": run(-5)}, "title"),
    "rise_of_both": (run(), run(-5), "title"),
    "quality_size_speed": ({"float32": QUANTISED, "int8": QUANTISED},),
    "batch_speeds": ({1: SPEED, 2: SPEED},),
    "peeking": ([10, 20], [0.05, 0.08], 0.05),
    "latencies": ({"all": [0.1, 0.2, 0.3]}, "ms", "title"),
    "drift": ({"monday": [{"length": 5.0}]}, {"length": (1, 4)}, {"length": "tokens"}),
    "histograms": ({"chosen": [1, 2, 3]}, "tokens", "title", 10),
    "bars": ({"sft": {"kl": 1.0}, "dpo": {"kl": 2.0}}, "nats", "title"),
    "win_rates": ({"a vs b": rate(0.7), "a vs c": rate(0.5)}, "title"),
    "heatmap": ([[0.1, 0.2], [0.3, 0.4]], ["a", "b"], ["c", "d"], "x", "y", "title"),
    "lines": ([0, 1], {"a": [0, 1]}, "x", "y", "title", {"here": 0.5}),
    "sweep_with_rates": ([0, 1], {"KL": [1, 2]}, [rate(0.5), rate(0.7)], "β", {"KL": 1.5}),
    "against_win_rate": ({"run": {"win": rate(0.7), "kl": 1.0}}, {"kl": "KL, nats"}, "title"),
    "interval_sizes": ([10, 100], [(0.4, 0.9), (0.6, 0.8)], 0.7, "title"),
    "labelled_points": ({"dpo": (0.9, 0.7)}, [(0.5, 0.5)], "accuracy", "win rate", "title"),
    "win_rates_by_judge": ({"rule": {"a vs b": rate(0.7)}, "votes": {"a vs b": rate(0.6)}},),
    "strips": ({"dpo": [1000.0, 1010.0]}, "Elo", "title"),
    "line_panels": ([0, 1], {"a": BOTH, "b": BOTH}, "λ", "change", "title", {"here": 0.5}),
    "against_diagonal": ({"means": ([0, 1], [1, 2])}, "SFT", "DPO", "title"),
    "token_log_ratios": ({"chosen": [("a", 0.5)] * 50, "rejected": [("b", -0.5)]}, "title"),
    "packed_pair": (["a", "b"], ["c"], ["d", "e"], "title"),
}


def functions() -> dict:
    return {
        name: function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """Figures are drawn in memory, and closed after each test."""
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def draw(name: str) -> Figure:
    return functions()[name](*DRAWN[name])


def test_every_figure_function_is_drawn_here():
    assert functions().keys() - {"LiveFigure"} == DRAWN.keys()


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_drawn_with_named_axes(name):
    """Each visible panel says what it shows, on an axis or in its title; the title is on it too."""
    figure = draw(name)
    figure.canvas.draw()
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    assert shown and all(ax.get_xlabel() or ax.get_title() or ax.get_ylabel() for ax in shown)
    assert any(ax.lines or ax.patches or ax.images or ax.collections for ax in shown)
    if "title" in DRAWN[name]:
        assert "title" in [figure.get_suptitle(), *(ax.get_title() for ax in shown)]


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_tells_in_words_its_title_axes_and_curves(name):
    """Every word of titles, axes and legends is in the text, and Jupyter gets it."""
    figure = draw(name)
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    words = [figure.get_suptitle()]
    for ax in shown:
        words += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        words += ax.get_legend_handles_labels()[1]
    text = alt_text(figure)
    assert all(" ".join(word.replace("$", "").split()) in text for word in words)
    data, metadata = figure._repr_mimebundle_()
    assert data == {"text/plain": text} and metadata == {"image/png": {"alt": text}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lines", "a: 0 to 1; here: 0.5."),  # a curve's ends; where an upright mark stands
        ("memory_by_part", "weights: 1, 1;"),  # two bars of 1 GB each
        ("win_rates", "places: a vs c, a vs b; written: 0.50, 0.70."),
        ("win_rates_by_judge", "rule: 0.7; votes: 0.6."),  # a rate is on the horizontal axis
    ],
)
def test_the_text_of_a_figure_holds_its_values(name, words):
    assert words in alt_text(draw(name))


def test_a_notebook_page_carries_the_text_of_its_figure():
    """nbconvert's classic template writes it into the picture's `alt`; its other one does not."""
    import nbformat
    from nbconvert import HTMLExporter

    data, metadata = draw("bars")._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data | {"image/png": "AAAA"}, metadata=metadata)
    cell = nbformat.v4.new_code_cell("bars()", outputs=[output])
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(
        nbformat.v4.new_notebook(cells=[cell])
    )
    assert 'alt="Figure. title: nats; places: kl; sft: 1; dpo: 2."' in page


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("training_curves", 4),
        ("compare_curves", 2),
        ("displacement", 2),
        ("sweep_with_rates", 2),
        ("line_panels", 2),
        ("token_log_ratios", 2),
    ],
)
def test_a_figure_has_a_panel_for_each_thing(name, count):
    assert len([ax for ax in draw(name).axes if ax.get_visible()]) == count


def test_the_colour_of_a_win_rate_is_that_of_its_interval():
    """[.6, .8] is better than a draw, [.4, .6] undecided, [.2, .4] worse."""
    ax = figures.win_rates({"better": rate(0.7), "undecided": rate(0.5), "worse": rate(0.3)}).axes[
        0
    ]
    dots = {line.get_xdata()[0]: line.get_color() for line in ax.lines if line.get_marker() == "o"}
    assert dots == {0.7: CHOSEN, 0.5: GREY, 0.3: REJECTED}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["worse", "undecided", "better"]


def test_the_spread_over_seeds_is_an_error_bar():
    """± 0.2 around 1 for SFT; nothing around the 2 of DPO, which has one seed."""
    (ax,) = comparisons.measure_panels(*DRAWN["measure_panels"]).axes
    (bars,) = [
        line for each in ax.containers if hasattr(each, "errorbar") for line in each.errorbar[2]
    ]
    (_, low), (_, high) = bars.get_segments()[0]
    assert (low, high) == pytest.approx((0.8, 1.2))


def test_what_was_not_measured_has_no_bar_and_what_no_model_has_no_panel():
    """SFT's length is not known: one bar, that of DPO, at the second place. None is harmless."""
    spread = {"harmless": None, "length": None}
    models = {"sft": {"harmless": None, "length": None, "std": spread}}
    models["dpo"] = {"harmless": None, "length": 9.0, "std": spread}
    names = {"sft": "SFT", "dpo": "DPO"}
    figure = comparisons.measure_panels(models, {"harmless": "a", "length": "b"}, names)
    (ax,) = [ax for ax in figure.axes if ax.get_visible()]
    assert ax.get_title() == "b" and [bar.get_height() for bar in ax.patches] == [9.0]
    assert ax.patches[0].get_x() + ax.patches[0].get_width() / 2 == pytest.approx(1)
    with pytest.raises(ValueError, match="any of these measures: harmless"):
        comparisons.measure_panels(models, {"harmless": "a"}, names)


def test_the_win_rate_of_a_matrix_is_turned_round_below_the_diagonal():
    """DPO against SFT .70; SFT against DPO .30, both bold, since .5 is not in [.6, .8]."""
    ax = draw("win_rate_matrix").axes[0]
    texts = {text.get_position(): text.get_text().split()[0] for text in ax.texts}
    assert texts == {(0, 1): "0.70", (1, 0): "0.30"}
    assert {text.get_fontweight() for text in ax.texts} == {"bold"}


def test_a_bar_carries_its_interval():
    """0.5 ± 0.1 is drawn from 0.4 to 0.6."""
    values, halves = {"first": {"a": 0.5, "b": 0.2}}, {"first": {"a": 0.1, "b": 0.0}}
    ax = figures.bars(values, "share", halves=halves).axes[0]
    errors = [each.errorbar for each in ax.containers if getattr(each, "errorbar", None)]
    low, high = errors[0][2][0].get_segments()[0]
    assert (low[1], high[1]) == pytest.approx((0.4, 0.6))


def test_a_share_of_nothing_has_an_interval_too():
    """Wilson: 0 of 10 goes up to z² / (n + z²) = 3.84 / 13.84 = .2775; 7 of 10: .397 to .892."""
    ax = figures.bars({"first": {"a": 0.0, "b": 0.7}}, "share", out_of={"first": 10}).axes[0]
    (errors,) = [each.errorbar for each in ax.containers if getattr(each, "errorbar", None)]
    ends = [[y for _, y in segment] for segment in errors[2][0].get_segments()]
    assert np.array(ends) == pytest.approx(np.array([[0, 0.2775], [0.397, 0.892]]), abs=1e-3)


def test_stacked_parts_add_up_to_what_is_written():
    """Five parts of 1 GB each."""
    ax = draw("memory_by_part").axes[0]
    assert [text.get_text().strip() for text in ax.texts] == ["5.00", "5.00"]
    assert max(patch.get_x() + patch.get_width() for patch in ax.patches) == pytest.approx(5.0)


def test_the_frontier_leaves_out_what_is_dearer_and_no_better():
    points = {
        "cheap": POINT,
        "dear": POINT | {"cost": 3.0},
        "best": POINT | {"cost": 2, "rate": 0.9},
    }
    stairs = comparisons.frontier(points, "cost", "rate").axes[0].lines[0]
    assert stairs.get_xydata().tolist() == [[1.0, 0.6], [2.0, 0.9]]


def test_displacement_starts_at_zero_and_the_second_rise_after_it():
    """Chosen −20, −18, −16 is drawn as 0, 2, 4; the rise of both leaves out step 0 on the right."""
    first = draw("displacement").axes[0].lines[0]
    assert first.get_ydata().tolist() == [0, 2, 4]
    right = draw("rise_of_both").axes[1].lines[0]
    assert right.get_xdata().tolist() == [2, 4]


def test_the_perplexity_stands_beside_the_loss_that_it_belongs_to():
    """Where the left scale says 1 nat, the right one says e = 2.72."""
    left, _, right = draw("sft_curves").axes
    losses, labels = left.get_yticks(), [label.get_text() for label in right.get_yticklabels()]
    assert labels == [f"{np.exp(loss):.3g}" for loss in losses]


def test_a_swept_setting_that_begins_at_zero_can_be_drawn():
    ax = draw("sweep_with_rates").axes[0]
    assert ax.get_xscale() == "symlog"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]


def test_a_window_outside_its_band_is_red():
    """A mean length of 5 where the baseline says 1 to 4."""
    assert draw("drift").axes[0].lines[0].get_color() == REJECTED


def test_long_answers_are_cut_with_a_note_and_the_sum_is_of_all_tokens():
    """50 tokens of half a nat: 40 shown, 25 nats in the title."""
    ax = draw("token_log_ratios").axes[0]
    assert len(ax.patches) == 40
    assert ax.get_title() == "chosen: sum +25.00 nats, first 40 of 50 tokens shown"


def test_a_live_figure_is_silent_outside_a_notebook_and_redraws_in_one(monkeypatch):
    """The second update within the time is left out, unless it is forced."""
    import IPython
    import IPython.display

    curves.LiveFigure("dpo").update(run())
    assert not plt.get_fignums()
    drawn = []

    class Handle:
        def update(self, figure):
            drawn.append(figure.get_suptitle())

    def display(figure, display_id):
        drawn.append(figure.get_suptitle())
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(config=["IPKernelApp"]))
    monkeypatch.setattr(IPython.display, "display", display)
    live = curves.LiveFigure("dpo", steps=4, seconds=1000.0)
    for force in (False, False, True):
        live.update(run(), force)
    assert drawn == ["dpo: step 4 of 4"] * 2 and not plt.get_fignums()


def test_a_sweep_says_whom_its_win_rates_are_against():
    figure = figures.sweep_with_rates([0, 1], {}, [rate(0.5), rate(0.7)], "λ", against="λ = 0")
    assert figure.axes[-1].get_title() == "win rate against λ = 0"


def test_a_live_figure_takes_a_tenth_of_the_time_at_the_most(monkeypatch):
    """A drawing of 5 s is followed by 45 s without one."""
    import IPython
    import IPython.display

    clock = iter(range(1000, 2000, 5))
    monkeypatch.setattr(curves.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(config=["IPKernelApp"]))
    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: SimpleNamespace())
    live = curves.LiveFigure("dpo", seconds=3.0)
    live.update(run())
    assert live.wait == 45
