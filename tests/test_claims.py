"""Claims and their evidence: one verdict each, from the results' files and from nowhere else."""

import json
import re
import tomllib

import pytest

from benchmarks import claims as made
from benchmarks.claims import CLAIM_TEXTS, ClaimError, claims, weighed
from common.io import evidence
from common.plots.study import study_knobs, study_rates
from tools import claims_table

ALL = [f"{letter}{number}" for letter in "DO" for number in range(1, 18)]
ENTRIES = tomllib.loads(CLAIM_TEXTS.read_text(encoding="utf-8"))


def finding(verdict: str, mean: float = 0.2) -> dict:
    ci95 = [mean - 0.02, mean + 0.02]
    return {"mean": mean, "ci95": ci95, "seeds": 12, "verdict": verdict, "p": 0.001}


FIXTURE = {  # made up, for tests alone
    "study": {
        "seeds": [1, 2],
        "arms": {
            "dpo@.3": {
                "name": "DPO + NLL",
                "seeds": 12,
                "measures": {"kl": {"mean": 3.0, "ci95": [2.5, 3.5]}},
                "flaws": {"rude": {"mean": 0.1, "ci95": [0.0, 0.2]}},
                "cost": {"wall_seconds": 9.0},
            }
        },
        "win_rate": {"dpo@.3_vs_sft@.3": {"mean": 0.8, "ci95": [0.7, 0.85], "seeds": 12}},
        "verdicts": {
            "one": {"dpo above .60": finding("holds")},
            "two": {"orpo at least dpo": finding("undecided", -0.01)},
        },
    },
    "real": {"arms": {"dpo": {"kl": {"mean": 2.0, "ci95": [1.0, 3.0], "seeds": 5}}}},
    "other": {"parts": {"share": 0.545}},
}


def read(name: str) -> dict:
    return FIXTURE.get(name, {})


# --- from results to verdicts


@pytest.mark.parametrize(
    ("lines", "verdict", "evidence"),
    [
        (["decides: dpo above .60"], "holds", ["dpo above .60: +0.200 [+0.180, +0.220], 12 seeds"]),
        (["decides: two | orpo at least dpo"], "undecided", None),
        (["decides: nobody asked", "win: dpo@.3 sft@.3"], "not measured yet", None),
        (
            ["win: dpo@.3 sft@.3"],
            "described",
            [
                "win rate, DPO + NLL (flaw rate .3) against SFT (flaw rate .3): "
                "0.800 [0.700, 0.850], 12 seeds"
            ],
        ),
        (
            ["arm: dpo@.3 kl"],
            "described",
            ["KL (nats), DPO + NLL (flaw rate .3): 3.00 [2.50, 3.50]"],
        ),
        (["at: other / parts / share | a share"], "described", ["a share: 0.545"]),
        (["live: 1.7-03"], "described", ["one seed, when notebook 1.7-03 runs"]),
        (["arm: orpo@.3 kl", "at: gone / parts | x"], "not measured yet", []),
        (["none"], "not testable here", []),
    ],
)
def test_each_kind_of_evidence(lines, verdict, evidence):
    found = weighed("toy", lines, read)
    assert found["verdict"] == verdict
    assert evidence is None or found["evidence"] == evidence


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        ("kl of dpo@.3 below 10", "KL (nats), DPO + NLL (flaw rate .3) below 10"),
        (
            "orpo@tiers_vs_lambda0@tiers",
            "win rate minus .5, ORPO (tiers) against λ = 0 (tiers)",
        ),
        (
            "dpo@.3_vs_sft@.3 above .60",
            "win rate, DPO + NLL (flaw rate .3) against SFT (flaw rate .3) above .60",
        ),
    ],
)
def test_a_comparison_is_told_told_in_words(comparison, words):
    assert made.told_in_words(comparison) == words


def test_a_comparison_that_does_not_decide_keeps_its_own_verdict():
    found = weighed("toy", ["plan: two | orpo at least dpo"], read)
    assert found["verdict"] == "described" and found["evidence"][0].endswith("seeds: undecided")


def test_a_win_rate_is_read_from_both_sides():
    """.80 [.70, .85] of A over B is .20 [.15, .30] of B over A."""
    (line,) = weighed("toy", ["win: sft@.3 dpo@.3"], read)["evidence"]
    assert line.endswith("0.200 [0.150, 0.300], 12 seeds")


def test_the_real_model_has_its_own_file():
    assert weighed("real", ["arm: dpo kl"], read)["evidence"][0].startswith(
        "KL (nats), DPO + NLL: 2"
    )


@pytest.mark.parametrize("line", ["arm: nobody kl", "proves: all", "win: dpo@.3 nobody@.3"])
def test_a_line_that_nobody_can_follow_is_refused(line):
    with pytest.raises(ClaimError, match="nobody|begins with"):
        weighed("toy", [line], read)


def test_a_comparison_of_two_families_must_say_which():
    twice = {"verdicts": {"a": {"same": finding("holds")}, "b": {"same": finding("equal")}}}
    with pytest.raises(ClaimError, match="several families"):
        weighed("toy", ["decides: same"], lambda name: twice)
    assert weighed("toy", ["decides: b | same"], lambda name: twice)["verdict"] == "equal"


# --- the texts


def test_every_claim_of_the_sources_is_there_in_both_languages():
    assert list(ENTRIES) == ALL
    for name, entry in ENTRIES.items():
        for key in ("claim", "note"):
            english, chinese = entry[key]
            assert english.isascii() or "—" not in english, name
            assert any("\u4e00" <= sign <= "\u9fff" for sign in chinese), name
        assert set(entry["source"].split(", ")) <= set(claims_table.SOURCES), name
        assert sum(line.startswith("decides") for line in entry["toy"]) <= 1, name
        assert sum(line.startswith("decides") for line in entry["real"]) <= 1, name


def test_every_claim_is_met_in_a_notebook_that_is_there():
    for entry in ENTRIES.values():
        assert entry["met"]
        for number in entry["met"]:
            assert (made.RESULTS_FOLDER.parents[1] / claims_table.notebook_path(number)).exists()


def test_a_page_has_a_heading_for_every_claim():
    """`claims.md#d5` leads to D5."""
    for chinese in (False, True):
        page = claims_table.claims_page(str, chinese)
        assert [line[4:] for line in page.splitlines() if line.startswith("### ")] == ALL


def test_verdicts_and_numbers_are_translated():
    """Names, commands and code stay; of the rest no English word is left."""
    known = "DPO NLL SFT ORPO KL FLOPs nats make study real GB epoch"
    for entry in claims().values():
        for world in claims_table.WORLDS:
            for line in (entry[world]["verdict"], *entry[world]["evidence"]):
                shown = re.sub("`[^`]*`", "", claims_table.in_chinese(line))
                assert set(re.findall("[A-Za-z]{2,}", shown)) <= set(known.split()), line


def test_what_is_committed_is_what_the_results_say(capsys):
    assert made.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_result_is_noticed(monkeypatch, capsys):
    changed = claims()
    changed["D3"]["toy"]["verdict"] = "proven"
    monkeypatch.setattr(made, "claims", lambda: changed)
    assert made.main(["--check"]) == 1
    assert "claims.json is not what the results say" in capsys.readouterr().err


# --- what notebooks show of them


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "EVIDENCE", tmp_path)
    for name in ("study", "real"):
        (tmp_path / f"{name}.json").write_text(json.dumps(FIXTURE[name]), encoding="utf-8")
    found = claims({"D6": ENTRIES["D6"], "D3": ENTRIES["D3"]}, read)
    (tmp_path / "claims.json").write_text(json.dumps(found), encoding="utf-8")
    return tmp_path


def test_a_notebook_shows_the_verdict_of_the_page(results, capsys):
    evidence.show_claim("D6")
    printed = capsys.readouterr().out
    assert "D6  A KL below 10" in printed and "toy world: DESCRIBED" in printed
    assert "KL (nats), DPO + NLL (flaw rate .3): 3.00 [2.50, 3.50]" in printed


def test_a_notebook_says_what_is_not_measured_yet(results, capsys):
    (results / "study.json").unlink()
    assert evidence.study_rate("dpo@.3", "sft@.3") is None
    assert evidence.study_table(["dpo@.3"], ["kl"]).empty
    assert study_rates({"DPO": ("dpo@.3", "sft@.3")}) is None
    evidence.study_verdicts()
    printed = capsys.readouterr().out
    assert printed.count("not measured yet") == 3 and "make study" in printed


def test_the_study_table_has_intervals_and_win_rates(results):
    table = evidence.study_table(["dpo@.3"], ["kl", "rude", "wall_seconds", "gone"], "sft@.3")
    row = table.loc["DPO + NLL (dpo@.3)"]
    assert row["win rate against sft@.3"] == "0.800 [0.700, 0.850]"
    assert row["kl"] == "3.000 [2.500, 3.500]" and row["rude"] == "0.100 [0.000, 0.200]"
    assert row["wall_seconds"] == "9.000" and row["gone"] == "–"


def test_the_figure_of_the_study_has_its_intervals(results):
    figure = study_rates({"DPO + NLL": ("dpo@.3", "sft@.3"), "back": ("sft@.3", "dpo@.3")})
    (ax,) = figure.axes
    ends = sorted(tuple(line.get_xdata()) for line in ax.lines[:-1] if len(line.get_xdata()) == 2)
    assert ends == [pytest.approx((0.15, 0.3)), pytest.approx((0.7, 0.85))]
    assert "12 seeds" in ax.get_xlabel()


def test_the_figure_over_flaw_rates_has_error_bars_where_there_are_results(results, capsys):
    figure = study_knobs({"DPO + NLL": ("dpo", "sft"), "back": ("sft", "dpo")})
    (ax,) = figure.axes
    assert [bars.lines[0].get_ydata().tolist() for bars in ax.containers] == [
        pytest.approx([0.8]),
        pytest.approx([0.2]),
    ]
    assert study_knobs({"ORPO": ("orpo", "lambda0")}) is None
    assert "not measured yet: ORPO" in capsys.readouterr().out


def test_verdicts_are_found_by_a_word(results, capsys):
    evidence.study_verdicts("orpo")
    printed = capsys.readouterr().out
    assert "UNDECIDED" in printed and "HOLDS" not in printed
