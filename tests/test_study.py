"""The study of the embedded world: its plan, its choice of rates, its tables. Little is trained."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import study, study_report
from benchmarks.study import best_rate, compared, wanted
from benchmarks.study_arms import (
    FAMILIES,
    FAMILY_TITLES,
    MAIN,
    PART_SEEDS,
    STUDY_ARMS,
    STUDY_PARTS,
    TUNED,
    TUNING_SEEDS,
    arm_ids,
    pair_of,
    rate_in,
)
from benchmarks.study_page import figure_in_words, figure_points
from benchmarks.study_report import findings, stale_figures, study_summary
from benchmarks.verdicts import LARGEST_FAMILY
from common.comparison import COSTS
from common.evaluation import Answer
from common.judges import RuleJudge, head_to_head
from common.lab import Lab
from common.profiles import get_profile
from common.toyworld import WEIGHTS

MACHINE = {"gpu": [], "cores": 2, "cpu": "made up", "memory_bytes": 8e9, "versions": {"torch": "1"}}
MEASURES = ("score", "safe_on_harmful", "over_refusal", "ended_with_eos", "length_tokens", "kl")
MEASURES += ("perplexity", "preference_accuracy", "reward_margin", "helpfulness")


def made_seed(
    number: int, strength: dict[str, float] | None = None, parts=tuple(STUDY_PARTS)
) -> dict:
    """A seed's file with made-up numbers: an arm wins .5 + its strength − the other one's.

    The noise of each number has the design's standard deviation, .02.
    """
    rng, strength = random.Random(number), strength or {}
    record = {"seed": number, "plan": "ab" * 32, "machine": MACHINE, "source": "made up"}
    record |= {"arms": {}, "rates": {}}
    for arm in [arm for part in parts for arm in arm_ids(part)]:
        name, knob = arm.split("@")
        for other in record["arms"]:
            if other.endswith(f"@{knob}"):
                lead = strength.get(name, 0.0) - strength.get(other.split("@")[0], 0.0)
                rates = {kind: 0.5 + lead + rng.gauss(0, 0.02) for kind in ("rate", "controlled")}
                if name in MAIN:
                    rates["cool"] = 0.5 + lead + rng.gauss(0, 0.02)
                record["rates"][pair_of(arm, other)] = rates
        record["arms"][arm] = {
            "settings": {"lr": STUDY_ARMS[name].rate, "steps": 374},
            "measures": {key: 0.5 + rng.gauss(0, 0.02) for key in MEASURES},
            "flaws": {flaw: 0.1 + rng.gauss(0, 0.02) for flaw in WEIGHTS},
            "cost": dict.fromkeys(COSTS, 1e9),
        }
    return record


# The design


def test_families_are_small_and_have_titles():
    assert FAMILIES.keys() == FAMILY_TITLES.keys()
    assert max(map(len, FAMILIES.values())) <= LARGEST_FAMILY


def test_every_comparison_is_of_arms_that_are_run():
    """On seeds that have all arms no comparison misses one; on the main ones only the side's do."""
    whole, main = made_seed(1), made_seed(1, parts=("main",))
    for family, comparisons in FAMILIES.items():
        for difference in comparisons.values():
            assert abs(difference(whole)) < 10.5
            if family not in ("odds", "compute", "knobs"):
                assert difference(main) == pytest.approx(difference(whole), abs=1)


def test_every_arm_is_tuned_with_the_same_effort():
    assert {len(arm.rates) for arm in STUDY_ARMS.values()} == {5}
    tuned = [name for part in TUNED.values() for names in part for name in names]
    assert sorted(tuned) == sorted(STUDY_ARMS)
    for arm in STUDY_ARMS.values():
        steps = np.divide(arm.rates[1:], arm.rates[:-1])
        assert steps == pytest.approx([2.0] * 4, rel=0.01) and arm.rate in arm.rates


def test_an_arms_parent_is_tuned_before_it():
    done = ["base"]
    for names in TUNED["main"]:
        parents = {"orpo_lambda0": "lambda0"}
        for name in names:
            start = STUDY_ARMS[name].parent or {"dpo_plain": "sft", "dpo": "sft"}.get(name, "base")
            assert parents.get(start, start) in done
        done += names


def test_no_seed_was_used_for_tuning():
    used = {*range(14), *range(100, 104), *TUNING_SEEDS}
    assert not used.intersection(PART_SEEDS["main"])
    assert set(PART_SEEDS["side"]) < set(PART_SEEDS["main"])


# Rates


def scored(rates: dict[float, float], arm=STUDY_ARMS["dpo"]) -> tuple[float, int]:
    """Tunes an arm whose scores are known, the same on all seeds: the rate and the trials."""
    found, count = {}, 0
    while trials := wanted(arm, found):
        for rate, seed in trials:
            found.setdefault(f"{rate:g}", {})[str(seed)] = rates.get(rate, 0.0)
            count += 1
    return best_rate(found), count


def test_the_best_of_five_takes_nine_trials():
    """Five on the first seed, the two best on two more: 5 + 2 · 2."""
    assert scored(dict(zip(STUDY_ARMS["dpo"].rates, (1, 2, 5, 4, 3), strict=True))) == (3e-4, 9)


def test_a_best_rate_at_the_border_is_followed():
    """The highest of five is best, then the next one, which is 2.4e-3: 9 + 3 + 1 trials."""
    rates = dict(zip(STUDY_ARMS["dpo"].rates, (1, 2, 3, 4, 5), strict=True))
    assert scored(rates | {2.4e-3: 6.0})[0] == 2.4e-3
    assert scored(rates)[0] == 1.2e-3
    low = dict(zip(STUDY_ARMS["dpo"].rates, (5, 4, 3, 2, 1), strict=True))
    assert scored(low | {3.75e-5: 9.0})[0] == 3.75e-5


def test_a_border_is_not_followed_for_ever():
    rates = {3e-4 * 2.0**step: float(step) for step in range(-9, 20)}
    best, _ = scored({float(f"{rate:g}"): score for rate, score in rates.items()})
    assert best == pytest.approx(3e-4 * 2**5)


# A seed


def test_a_win_rate_is_the_judges():
    """From scores alone: the same as `head_to_head` with the world's rule, on real sentences."""
    lab = Lab(replace(get_profile("smoke"), held_out=8), 3)
    world, texts = lab.data.world, [row["chosen"] for row in lab.data.train]

    def said(shift: int) -> list[list[Answer]]:
        return [
            [Answer(prompt, texts[(shift + at + k) % 40], (1,), (1,) * k, True) for k in (1, 2)]
            for at, prompt in enumerate(lab.prompts)
        ]

    one, other = said(0), said(7)
    kept = [
        {"scores": study.scores(lab, group), "lengths": [[1, 2]] * len(group)}
        for group in (one, other)
    ]
    rate = compared(*kept)["rate"]
    assert rate == pytest.approx(head_to_head(RuleJudge(world), one, other).rate)
    assert compared(*kept[::-1])["rate"] == pytest.approx(1 - rate)


def test_a_rate_is_read_in_either_direction():
    seed = made_seed(1)
    a, b = "orpo@.3", "lambda0@.3"
    assert rate_in(seed, a, b) == pytest.approx(1 - rate_in(seed, b, a))
    with pytest.raises(KeyError):
        rate_in(seed, a, "lambda0@0")


# The report


def test_a_planted_lead_gets_its_verdict_and_the_others_stay_equal():
    found = study_summary([made_seed(number, {"orpo": 0.06}) for number in range(301, 313)])
    assert found["verdicts"]["from_base"]["orpo@.3_vs_lambda0@.3"]["verdict"] == "holds"
    assert found["verdicts"]["odds"]["orpo@.3_vs_orpo_sums@.3"]["verdict"] == "holds"
    words = {one["verdict"] for one in found["verdicts"]["from_sft"].values()}
    assert words <= {"equal", "undecided"}
    rates = found["win_rate"]
    assert rates["orpo@.3_vs_lambda0@.3"]["mean"] == pytest.approx(0.56, abs=0.02)
    assert rates["lambda0@.3_vs_orpo@.3"]["mean"] == pytest.approx(0.44, abs=0.02)
    assert found["arms"]["orpo@tiers"]["seeds"] == 12


def test_verdicts_need_five_seeds_of_their_own_family():
    seeds = [made_seed(number, parts=("main",)) for number in range(301, 305)]
    assert study_summary(seeds)["verdicts"] == {}
    seeds.append(made_seed(305))
    found = findings(seeds)
    assert "from_base" in found and "odds" not in found
    assert study_summary([])["arms"] == study_summary(seeds[:1])["arms"] == {}


def test_what_stands_in_the_results_is_what_the_seeds_say():
    """`python -m benchmarks.study --check` on the committed files, in seconds."""
    assert study_report.check_study() == 0


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Five made-up seeds in a folder of their own, with their rates, figures and pages."""
    seeds = [made_seed(number) for number in range(301, 306)]
    monkeypatch.setattr(study_report, "STUDY_FOLDER", tmp_path)
    monkeypatch.setattr(study_report, "STUDY_RESULTS", tmp_path / "study.json")
    monkeypatch.setattr(study_report, "FIGURES", tmp_path / "figures")
    made_pages = {tmp_path / "page.md": ""}
    monkeypatch.setattr(
        study_report, "pages_with", lambda name, mark, said: {page: said for page in made_pages}
    )
    runs = {
        name: {f"{rate:g}": {"0": 1.0} for rate in arm.rates} for name, arm in STUDY_ARMS.items()
    }
    (tmp_path / "tuning.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    for seed in seeds:
        path = tmp_path / f"seed-{seed['seed']}.json"
        path.write_text(json.dumps(seed), encoding="utf-8")
    study_report.write_study()
    return tmp_path


def test_every_change_is_noticed(made, capsys):
    """Of a seed, of the page, and of a figure, whose file holds its numbers in words."""
    assert study_report.check_study() == 0
    figure = made / "figures" / "study-flaws.svg"
    drawn = figure.read_text(encoding="utf-8")
    figure.write_text(drawn.replace("rude 0.1", "rude 0.2"), encoding="utf-8")
    assert study_report.check_study() == 1
    assert "study-flaws.svg was drawn of other numbers" in capsys.readouterr().err
    figure.write_text(drawn, encoding="utf-8")
    path = made / "seed-303.json"
    seed = json.loads(path.read_text(encoding="utf-8"))
    seed["arms"]["orpo@.3"]["measures"]["kl"] += 0.01
    path.write_text(json.dumps(seed), encoding="utf-8")
    assert study_report.check_study() == 1
    assert "study.json does not say what the seeds say" in capsys.readouterr().err


def test_the_page_shows_every_family_arm_and_number_of_the_figures(made):
    text = (made / "page.md").read_text(encoding="utf-8")
    for part in [*FAMILY_TITLES.values(), *(name for one in FAMILIES.values() for name in one)]:
        assert part in text
    for arm in arm_ids():
        assert f"`{arm}`" in text
    found = json.loads((made / "study.json").read_text(encoding="utf-8"))
    for title, series in figure_points(found).values():
        assert f"![{figure_in_words(title, series)}]" in text
    assert stale_figures(found, made / "figures") == []
    assert "5 / 12 seeds complete" in text


def test_a_drawing_is_the_same_twice(made):
    before = {path: path.read_bytes() for path in (made / "figures").glob("*.svg")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    study_report.write_study()
    assert before == {path: path.read_bytes() for path in before}
