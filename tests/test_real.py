"""The study of the real model: its plan, its choice of rates, its tables. No model is loaded."""

import json
import random
import subprocess

import pytest
from datasets import Dataset

from benchmarks import real, real_pages, real_report
from benchmarks.plans import PlanError, plan_digest, read_seeds, seed_record
from benchmarks.real import RATES, TRIALS, Trial, length_trials, pairs_of
from benchmarks.real_report import best_rates, families, summary
from common.instructions import CONSTRAINTS, instruction

MACHINE = {"gpu": [], "cores": 2, "cpu": "made up", "memory_bytes": 8e9, "versions": {"torch": "1"}}


def made_seed(seed: int, gain: float = 0.12) -> dict:
    """A seed's file with made-up numbers: each arm meets `gain` more constraints than the start."""
    rng = random.Random(seed)
    measures = dict.fromkeys((*real_report.COLUMNS, *real_report.MORE), 0.5) | {
        "rewards_chosen": -0.2,
        "kinds_met": {"json": 0.1},
    }
    side = dict.fromkeys(real_report.MEASURES, 0.5)
    before = measures | {"length_tokens": 60.0, "prose_perplexity": 20.0}
    arms = {"start": {"measures": before, "side": side}}
    cost = {"wall_seconds": 60.0, "peak_memory_bytes": 4e9}
    cost |= {"measuring_seconds": 120.0, "measuring_peak_bytes": 5e9}
    for arm in real_report.ARM_NAMES:
        if arm == "start":
            continue
        own = measures | {"length_tokens": 55.0, "prose_perplexity": 20.5}
        own |= {"constraints_met": 0.5 + gain + rng.gauss(0, 0.01)}
        own |= {"relevance": 0.5 + rng.gauss(0, 0.01), "ended_with_eos": 0.6 + rng.gauss(0, 0.01)}
        own |= {"safe_on_harmful": 0.9 + rng.gauss(0, 0.01)}
        own["length_tokens"] += rng.gauss(0, 1)
        own["prose_perplexity"] += rng.gauss(0, 0.1)
        arms[arm] = {"measures": own, "cost": cost, "settings": {"lr": 1e-5, "stage": arm}}
        arms[arm]["side"] = side
    return {"seed": seed, "plan": "ab" * 32, "machine": MACHINE, "arms": arms}


def test_five_seeds_give_verdicts_in_families_of_four_at_most():
    found = summary([made_seed(seed) for seed in range(5)])
    learns, contrast, harmless, refuses = found["verdicts"].values()
    assert {claim["verdict"] for claim in learns.values()} == {"holds"}
    assert {claim["verdict"] for claim in contrast.values()} <= {"equal", "undecided"}
    assert harmless["length over the start's, minus .60"]["verdict"] == "holds"
    assert harmless["length over the start's, minus .60"]["mean"] == pytest.approx(
        55 / 60 - 0.6, abs=0.02
    )
    assert len(refuses) == 4


def test_fewer_seeds_give_none():
    assert "verdicts" not in summary([made_seed(seed) for seed in range(4)])
    assert summary([])["seeds"] == []


def test_a_seed_that_is_not_finished_is_left_out():
    seeds = [made_seed(1), made_seed(2)]
    del seeds[1]["arms"]["orpo"]
    assert summary(seeds)["seeds"] == [1]


def test_a_family_takes_its_differences_within_a_seed():
    """Arm minus start, seed by seed: .55 − .50 and .70 − .40."""
    seeds = [made_seed(1), made_seed(2)]
    for seed, before, after in zip(seeds, (0.5, 0.4), (0.55, 0.7), strict=True):
        seed["arms"]["start"]["measures"]["constraints_met"] = before
        seed["arms"]["dpo"]["measures"]["constraints_met"] = after
    claims = next(iter(families(seeds).values()))
    assert claims["DPO + NLL"] == pytest.approx([0.05, 0.30])


def test_seeds_of_two_plans_are_no_study(tmp_path):
    for seed, plan in ((1, "a"), (2, "b")):
        text = json.dumps(made_seed(seed) | {"plan": plan})
        (tmp_path / f"seed-{seed}.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="several plans"):
        read_seeds(tmp_path)


def test_the_best_rate_keeps_length_and_language():
    """The highest score of all is too short, the next one babbles; the third is taken."""
    runs = {"start": {"measures": {"length_tokens": 60, "prose_perplexity": 20, "score": 1}}}
    tried = ((1e-5, 9, 30, 20), (2e-5, 8, 60, 23), (4e-5, 7, 50, 21), (8e-5, 6, 60, 20))
    for rate, score, length, prose in tried:
        measures = {"score": score, "length_tokens": length, "prose_perplexity": prose}
        runs[str(rate)] = {"settings": {"stage": "dpo", "lr": rate}, "measures": measures}
    assert best_rates(runs) == {"dpo": 4e-5}
    for run in list(runs.values())[1:]:
        run["measures"]["length_tokens"] = 1
    with pytest.raises(ValueError, match="every rate loses"):
        best_rates(runs)


def test_every_method_gets_the_same_effort():
    assert {len(rates) for rates in RATES.values()} == {5}
    assert {trial.stage for trial in TRIALS.values()} == set(RATES)
    assert len({trial.pairs for trial in TRIALS.values()}) == 1


def test_what_stands_in_the_results_is_what_the_seeds_say():
    """`python -m benchmarks.real --check` on the committed files, in seconds."""
    assert real_pages.check_results() == 0


def test_a_changed_number_is_noticed(monkeypatch, tmp_path, capsys):
    seeds = [made_seed(seed) for seed in range(5)]
    monkeypatch.setattr(real_pages, "RESULTS", tmp_path / "real.json")
    monkeypatch.setattr(real_pages, "read_seeds", lambda folder: seeds)
    (tmp_path / "real.json").write_text(json.dumps(summary(seeds)), encoding="utf-8")
    monkeypatch.setattr(real_pages, "pages", lambda found: {})
    assert real_pages.check_results() == 0
    seeds[0]["arms"]["orpo"]["measures"]["kl"] += 0.001
    assert real_pages.check_results() == 1
    assert "does not say what the seeds say" in capsys.readouterr().err


def test_the_page_shows_every_family_and_arm():
    found = summary([made_seed(seed) for seed in range(5)])
    english, chinese = real_pages.pages(found).values()
    for claim in [*found["verdicts"], "λ = 0, knob 0", "`json`", "Temperature .7"]:
        assert claim in english
    assert "| 1.0 + 2.0 | 4.0 · 5.0 |" in english
    assert "make real" in english and chinese != english


def test_two_precisions_are_compared_within_a_seed():
    """Differences .02 and .04: mean .03, standard error .01, t(1 degree, .975) = 12.706. The third
    seed was run in one precision only. 80 and 40 seconds for 8 steps.
    """
    runs = {}
    for seed, gap in ((21, 0.02), (22, 0.04), (23, None)):
        for name, extra, seconds in (("float32", 0.0, 80), ("bfloat16", gap, 40)):
            if extra is not None:
                values = dict.fromkeys(real_report.TOLD_APART, 0.5 + extra)
                cost = {"wall_seconds": seconds}
                runs[f"{name}-{seed}"] = {
                    "measures": values,
                    "cost": cost,
                    "settings": {"steps": 8},
                }
    found = real_report.precision_summary(runs)
    assert (found["seeds"], found["step_seconds"]) == (2, [10, 5])
    before, after, gap = found["relevance"]
    assert (before, after, gap["mean"]) == pytest.approx((0.5, 0.53, 0.03))
    assert gap["ci95"] == pytest.approx((0.03 - 0.12706, 0.03 + 0.12706), abs=1e-4)
    assert "| × 0.50 |" in real_pages.block(summary([], runs))
    assert real_pages.block(summary([])) == "Not measured yet: `make real`."


def test_a_plan_that_is_not_committed_is_refused(tmp_path):
    plan = tmp_path / "plan.md"
    plan.write_text("the plan", encoding="utf-8")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    with pytest.raises(PlanError, match="not committed"):
        plan_digest(plan)
    subprocess.run([*git, "commit", "-qm", "plan"], cwd=tmp_path, check=True)
    assert len(plan_digest(plan)) == 64
    plan.write_text("another plan", encoding="utf-8")
    with pytest.raises(PlanError, match="not committed"):
        plan_digest(plan)


def test_a_seed_of_another_plan_is_refused(tmp_path):
    path = tmp_path / "seed-1.json"
    assert seed_record(path, "a", made_seed(1) | {"plan": "a"})["seed"] == 1
    path.write_text(json.dumps(made_seed(1) | {"plan": "b"}), encoding="utf-8")
    with pytest.raises(PlanError, match="another plan"):
        seed_record(path, "a", {})


def rows(*answers: tuple[str, str, str]) -> Dataset:
    start = "\n\nHuman: How do I start with baking bread?"
    return Dataset.from_list(
        [
            {"prompt": f"{start} {said}\n\nAssistant:", "chosen": chosen, "rejected": rejected}
            for said, chosen, rejected in answers
        ]
    )


def test_the_side_study_takes_its_pairs_by_length():
    """Brevity: chosen over rejected 1/4, 1/2, 2; the pair that asks for substance is left out."""
    few, many = "Use at most 15 words.", "Use at least 30 words."
    assert CONSTRAINTS["min_words"]["asks_for"] == "substance"
    pairs = rows(
        (few, " a b", " a"), (few, " a", " a b c d"), (many, " a", " b"), (few, " a", " b c")
    )
    assert real.shorter_chosen(pairs)["rejected"] == [" a b c d", " b c", " a"]
    assert real.of_similar_length(pairs)["rejected"][0] in (" a", " b c")
    assert set(real.of_substance(pairs)["chosen"]) == {" a", " a b"}


def test_each_remedy_changes_one_thing():
    trials = length_trials(1e-5)
    hacked = trials.pop("hacked")
    for name, trial in trials.items():
        pairs = zip(vars(hacked).items(), vars(trial).items(), strict=True)
        changed = [key for (key, before), (_, after) in pairs if before != after]
        assert len(changed) == 1, name


def test_an_arm_gets_as_many_pairs_as_the_plan_says(monkeypatch):
    class World:
        def pairs(self, count, flaw_rate):
            assert flaw_rate == 0.3
            asked = [instruction(p).prompt for p in _prompts(count)]
            return [{"prompt": p, "chosen": f" yes {p}", "rejected": " no"} for p in asked]

    def _prompts(count):
        from itertools import islice

        from common.instructions import Instructions

        return list(islice(Instructions(0).prompts("train", "test"), count))

    lab = type("Lab", (), {"data": type("Data", (), {"world": World()})})
    assert len(pairs_of(lab, Trial("dpo", pairs=20))) == 20
