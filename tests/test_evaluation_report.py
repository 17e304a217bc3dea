"""The report of one seed, and the averages over several."""

import json
import math

import pytest

from common.comparison import COSTS, evaluation_report, summarise_seeds
from common.evaluation import seed_interval, win_rate
from common.io.files import write_json


def report_of(value: float, verdicts: list[int], flaws: dict | None = None, **measures) -> dict:
    """A one-seed report with one model, whose perplexity is `value`, and one comparison."""
    models = {"dpo": {"perplexity": value, "flaws": flaws or {}, **measures}}
    return evaluation_report(
        models, {"dpo_vs_sft": win_rate(verdicts)}, {"dpo": dict.fromkeys(COSTS, value)}
    )


def test_report_of_one_seed_has_every_part_and_no_spread():
    """Wins 2, ties 1, losses 1: rate (2 + 1/2) / 4 = 0.625. One seed has no standard deviation:
    null, never 0.
    """
    report = report_of(3.0, [1, 1, 0, -1], {"rude": 0.25})
    assert report["models"]["dpo"] == {
        "perplexity": 3.0,
        "flaws": {"rude": 0.25},
        "std": {"perplexity": None, "flaws": {"rude": None}},
    }
    rate = report["win_rate"]["dpo_vs_sft"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"], rate["std"]) == (
        2,
        1,
        1,
        0.625,
        None,
    )
    assert report["cost"]["dpo"] == dict.fromkeys(COSTS, 3.0)
    assert report["seeds"] == 1


def test_report_keeps_the_interval_of_the_win_rate():
    """The interval of one seed is that of its prompts: it says nothing of another seed."""
    rate = win_rate([1, 1, 0, -1])
    assert report_of(3.0, [1, 1, 0, -1])["win_rate"]["dpo_vs_sft"]["ci95"] == pytest.approx(
        rate.ci95, abs=1e-12
    )


def test_report_survives_the_disk(tmp_path):
    """What is written as JSON is read back equal: no tuple, no array, no NaN."""
    report = report_of(3.0, [1, 0], helpfulness=None)
    write_json(tmp_path / "evaluation.json", report)
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == report


def test_measures_of_several_seeds_are_averaged_with_their_standard_deviation():
    """Perplexities 2, 4, 6: mean 4, sample standard deviation sqrt((4 + 0 + 4) / 2) = 2."""
    summary = summarise_seeds([report_of(value, [1]) for value in (2.0, 4.0, 6.0)])
    assert summary["models"]["dpo"]["perplexity"] == 4.0
    assert summary["models"]["dpo"]["std"]["perplexity"] == 2.0
    assert summary["cost"]["dpo"] == dict.fromkeys(COSTS, 4.0)
    assert summary["seeds"] == 3


def test_win_rates_of_several_seeds_are_averaged_and_their_counts_summed():
    """Rates 1.0 (1 win of 1) and 0.5 (1 win, 1 loss): mean 0.75, though 2 of 3 verdicts were won.

    Their sample standard deviation is |1 - 0.5| / sqrt(2).
    """
    rate = summarise_seeds([report_of(1.0, [1]), report_of(1.0, [1, -1])])["win_rate"]["dpo_vs_sft"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (2, 0, 1, 0.75)
    assert rate["std"] == pytest.approx(0.5 / math.sqrt(2), abs=1e-12)


def test_the_interval_of_several_seeds_is_that_over_seeds():
    """The points of every seed are kept in its report, and left out of the summary."""
    verdicts = [1, 1, 0, -1, 1], [1, -1, 0, -1, 1], [1, 1, 1, -1, 1]
    summary = summarise_seeds([report_of(1.0, row) for row in verdicts])["win_rate"]["dpo_vs_sft"]
    assert summary["ci95"] == list(seed_interval([win_rate(row).points for row in verdicts]))
    assert "points" not in summary


def test_a_flaw_that_one_seed_never_showed_counts_as_zero_there():
    """Shares 0.3 and none at all: mean 0.15."""
    summary = summarise_seeds([report_of(1.0, [1], {"rude": 0.3}), report_of(1.0, [1])])
    assert summary["models"]["dpo"]["flaws"] == {"rude": 0.15}


def test_a_measure_that_one_seed_could_not_take_stays_unknown():
    """Nobody asked a harmful question in one world: the mean over seeds is null, not the other
    seed's value.
    """
    measured = report_of(1.0, [1], safe_on_harmful=0.9)
    missing = report_of(1.0, [1], safe_on_harmful=None)
    assert summarise_seeds([measured, missing])["models"]["dpo"]["safe_on_harmful"] is None
    assert summarise_seeds([missing, measured])["models"]["dpo"]["safe_on_harmful"] is None


def test_a_summary_of_one_seed_is_its_report():
    """A mean over one value is that value."""
    report = report_of(3.0, [1, 1, 0, -1], {"rude": 0.25})
    summary = summarise_seeds([report])
    assert summary["models"] == report["models"]
    assert summary["win_rate"]["dpo_vs_sft"]["ci95"] == pytest.approx(
        report["win_rate"]["dpo_vs_sft"]["ci95"]
    )


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [{"models": {}, "win_rate": {}, "cost": {}, "seeds": 3}],
        [report_of(1.0, [1]), {"models": {}, "win_rate": {}, "cost": {}, "seeds": 1}],
        [report_of(1.0, [1]), report_of(1.0, [1], helpfulness=4.0)],
    ],
    ids=["no report", "already a summary", "other models", "other measures"],
)
def test_reports_that_cannot_be_averaged_are_refused(reports):
    """A mean over different things would be a number without a meaning."""
    with pytest.raises(ValueError, match="one report per seed|cannot be averaged"):
        summarise_seeds(reports)
