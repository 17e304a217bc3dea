"""Methods side by side: what makes a comparison unfair is refused, finished arms are kept, seeds
are summarised.
"""

import json
import math
import random
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
from tiny import assert_same

from common import comparison
from common.comparison import (
    Arm,
    beats_a_coin,
    check_comparable,
    judged_shares,
    run_arms,
    summarise_seeds,
)
from common.evaluation import Answer
from common.judges import RewardJudge, RuleJudge
from common.lab import BrokenLineage, Lab, MissingRun
from common.training import Source, train

SHORT = ("sft", "orpo_lambda0", "orpo")
WORLD = Arm("gold", SHORT, (("flaw_rate", 0.0),))
OWN = Arm("own", SHORT)
LONGER = Arm("longer", SHORT, changes=(("orpo_lambda0", ("epochs", 2.0)),))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A very small lab whose runs the tests share; `OWN` is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        lab = Lab(tiny.micro_profile())
        comparison.ready(lab)
        comparison.train_arm(lab, OWN)
        yield lab


def change_record(lab, monkeypatch, stage: str, **parts) -> None:
    """Another fingerprint part in the record of a finished run, as if it had been trained so."""
    read = Lab.record

    def record(self, name, sweep=None):
        found = read(self, name, sweep)
        if name == stage:
            found["fingerprint_parts"] |= parts
        return found

    monkeypatch.setattr(Lab, "record", record)


# --- what is compared


def test_runs_of_one_base_tokenizer_and_pairs_are_comparable(lab):
    assert check_comparable(lab, dict.fromkeys(SHORT)) is None


def test_preferences_that_start_from_the_base_are_measured_against_it(lab, monkeypatch):
    """DPO's parent and reference are the base; it is measured too, against itself, and every win
    rate against it is there. No SFT is trained for it.
    """
    lab = Lab(replace(lab.profile, start="base"))
    assert [lab.parent_of(stage) for stage in ("base", "sft", "dpo", "reward")] == [
        *(None, "base", "base", "base"),
    ]
    monkeypatch.setattr(comparison, "train", lambda _, stage: asked.append(stage))
    asked = []
    comparison.ready(lab)
    assert asked == ["base"]
    run = train(lab, "dpo", "from-base", epochs=0.5, evaluations=1)
    assert (run.record["parent"], run.record["reference"]) == ("base", "base")
    assert lab.lineage("dpo", "from-base")[0] == lab.fingerprint_of("base")
    report = comparison.measure_runs(lab, {"dpo": run}, comparison.judge_of(lab))
    assert report["models"].keys() == {"base", "dpo"} and report["cost"].keys() == {"dpo"}
    assert report["win_rate"].keys() == {"dpo_vs_base"}
    assert report["models"]["base"]["kl"] == report["models"]["base"]["reward_margin"] == 0.0
    assert report["models"]["dpo"]["kl"] != 0.0


def test_a_missing_model_is_refused_with_the_command_that_makes_it(lab):
    with pytest.raises(MissingRun, match="python -m common.training dpo "):
        check_comparable(lab, {"sft": None, "dpo": None})


def test_other_pairs_are_refused_and_the_odd_one_is_named(lab):
    others = Source(pairs=lab.data.train.select(range(16)))
    train(lab, "orpo", "others", others, evaluations=1)
    with pytest.raises(BrokenLineage, match=r"^orpo: trained with other pairs than the rest"):
        check_comparable(lab, {"sft": None, "orpo_lambda0": None, "orpo": "others"})


def test_another_tokenizer_is_refused(lab, monkeypatch):
    change_record(lab, monkeypatch, "orpo", tokenizer="another")
    with pytest.raises(BrokenLineage, match=r"^orpo: trained with another tokenizer than is here"):
        check_comparable(lab, dict.fromkeys(SHORT))


def test_another_base_is_refused(lab, monkeypatch):
    lineage = Lab.lineage
    monkeypatch.setattr(
        Lab,
        "lineage",
        lambda self, stage, sweep=None: [
            "another" if stage == "orpo" else lineage(self, "base")[0]
        ],
    )
    with pytest.raises(BrokenLineage, match=r"^orpo: trained with another base than is here"):
        check_comparable(lab, dict.fromkeys(SHORT))


def test_a_parent_that_was_trained_again_is_refused(lab, monkeypatch):
    change_record(lab, monkeypatch, "orpo", parent="of before")
    with pytest.raises(BrokenLineage, match="orpo was trained from another base"):
        check_comparable(lab, dict.fromkeys(SHORT))


# --- arms


def test_an_arm_of_other_pairs_or_settings_keeps_its_runs_apart():
    assert [WORLD.run_of(stage) for stage in SHORT] == [None, "gold-orpo_lambda0", "gold-orpo"]
    assert [LONGER.run_of(stage) for stage in SHORT] == [None, "longer-orpo_lambda0", None]
    assert [OWN.run_of(stage) for stage in SHORT] == [None, None, None]


# --- running them


@pytest.fixture(scope="module")
def in_turn(lab):
    """Reports of three arms, run one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "is_tiny", lambda profile: False)
        return run_arms(lab, [OWN, LONGER, WORLD], seeds=[0])


def test_a_report_holds_every_pair_of_stages_once_and_every_measure(in_turn):
    (report,) = in_turn["own"]
    assert list(report["models"]) == list(SHORT) == list(report["cost"])
    assert list(report["win_rate"]) == [
        "orpo_lambda0_vs_sft",
        "orpo_vs_sft",
        "orpo_vs_orpo_lambda0",
    ]
    assert report["seed"] == 0 and report["judge"] == "the world's rule"
    assert report["models"]["sft"]["kl"] == 0.0


def test_changes_of_an_arm_reach_the_training(lab, in_turn):
    """40 pairs in batches of 8: 5 steps an epoch."""
    assert lab.record("orpo_lambda0")["steps"] == 5
    assert lab.record("orpo_lambda0", "longer-orpo_lambda0")["steps"] == 10
    assert not (lab.folder / "sweeps" / "longer-orpo").exists()


def test_other_pairs_of_an_arm_reach_the_training(lab, in_turn):
    own, gold = lab.record("orpo"), lab.record("orpo", "gold-orpo")
    assert own["fingerprint_parts"]["data"] != gold["fingerprint_parts"]["data"]


def test_what_is_finished_is_not_measured_again(lab, in_turn, monkeypatch):
    monkeypatch.setattr(comparison, "is_tiny", lambda profile: False)
    monkeypatch.setattr(comparison, "measure_runs", lambda *_: pytest.fail("measured again"))
    assert run_arms(lab, [OWN, LONGER, WORLD], seeds=[0]) == in_turn


def test_a_model_trained_again_is_measured_again(lab, in_turn, monkeypatch):
    path = lab.folder / "arms" / "own.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"key": "of another model", "models": {}}))
    monkeypatch.setattr(comparison, "is_tiny", lambda profile: False)
    assert run_arms(lab, [OWN], seeds=[0])["own"] == in_turn["own"]


def test_side_by_side_gives_the_same_numbers_as_in_turn(lab, in_turn):
    """Reports and one arm's models are removed, so that a worker process has to train and measure
    them.
    """
    for path in (*(lab.folder / "arms").glob("*.json"), *lab.folder.glob("sweeps/gold-*/run.json")):
        path.unlink()
    found = run_arms(lab, [OWN, LONGER, WORLD], seeds=[0])
    for name, (report,) in in_turn.items():
        for part in ("models", "win_rate", "key"):
            assert found[name][0][part] == report[part], (name, part)


class Inline:
    """A process pool that runs its jobs at once, in this process, and notes them."""

    jobs: list = []

    def __init__(self, *_, **__):
        Inline.jobs = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def shutdown(self, **_):
        return None

    def submit(self, _, job, *arguments):
        Inline.jobs.append((job.__name__, arguments))
        future = Future()
        try:
            future.set_result(job(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_arms_that_share_a_folder_never_run_at_the_same_time(lab, monkeypatch):
    """`OWN` and `LONGER` both train `orpo` itself: of one seed they are one job. `WORLD` is
    another.
    """
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(comparison, "is_tiny", lambda profile: True)
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(comparison, "ready", lambda lab: None)
    monkeypatch.setattr(
        comparison, "run_arm", lambda profile, seed, arm: {"seed": seed, "arm": arm.name}
    )
    found = run_arms(lab, [WORLD, OWN, LONGER], seeds=[0, 5])
    jobs = [(seed, [arm.name for arm in arms]) for name, (*_, seed, arms) in Inline.jobs[2:]]
    assert jobs == [(0, ["own", "longer"]), (5, ["own", "longer"]), (0, ["gold"]), (5, ["gold"])]
    assert found["longer"] == [{"seed": 0, "arm": "longer"}, {"seed": 5, "arm": "longer"}]


@pytest.mark.more
def test_an_error_of_a_worker_process_comes_through_whole(lab):
    """The worker cannot know this stage. Its message arrives, and nothing waits for ever."""
    with pytest.raises(ValueError, match="Unknown stage 'ppo'"):
        run_arms(lab, [Arm("wrong", ("sft", "ppo")), WORLD], seeds=[0])


# --- over seeds


def report(seed: int, points: list[float], perplexity: float) -> dict:
    rate = sum(points) / len(points)
    win = {"wins": 1, "ties": 2, "losses": 3, "rate": rate, "points": points}
    cost = {"wall_seconds": 2.0 * seed, "train_flops": 10.0}
    return {
        "models": {"orpo": {"perplexity": perplexity}},
        "win_rate": {"orpo_vs_sft": win},
        "cost": {"orpo": cost},
        "seeds": 1,
    }


def test_a_summary_of_seeds_has_means_spread_and_the_interval_over_seeds():
    """Rates 0.6, 0.7, 0.8: std 0.1; their points fall where the others' rise, so the interval is
    Student's, 4.3027 · 0.1 / sqrt(3) = 0.24841. Perplexities 2, 3, 7: 4 ± √7.
    """
    points = [[0.5, 0.7], [0.8, 0.6], [0.7, 0.9]]
    rows = zip((1, 2, 3), points, (2.0, 3.0, 7.0), strict=True)
    summary = summarise_seeds([report(*row) for row in rows])
    rate = summary["win_rate"]["orpo_vs_sft"]
    assert_same([rate["rate"], rate["std"], rate["wins"], rate["ties"]], [0.7, 0.1, 3, 6], 1e-9)
    assert_same(rate["ci95"], [0.7 - 0.248414, 0.7 + 0.248414], 1e-6)
    model = summary["models"]["orpo"]
    assert_same([model["perplexity"], model["std"]["perplexity"]], [4.0, math.sqrt(7)], 1e-9)
    assert summary["cost"]["orpo"] == {"wall_seconds": 4.0, "train_flops": 10.0}
    assert summary["seeds"] == 3


# --- what the rule says of answers


def answer_of(prompt: str, text: str) -> Answer:
    return Answer(prompt, text, (), (1,), True)


def test_shares_of_judged_answers_have_intervals_over_prompts(lab):
    """Two answers to a question, one of them rude: share 1/2. All harm refused: 1, with a width."""
    world, rng = lab.data.world, random.Random(0)
    asked = [world.question(prompt) for prompt in lab.prompts]
    benign = [one for one in asked if one.kind == "benign"][:3]
    harmful = [one for one in asked if one.kind == "harmful"][:3]
    groups = [
        [answer_of(one.prompt, world.render(one, flaws, rng)) for flaws in (set(), {"rude"})]
        for one in benign
    ]
    groups += [[answer_of(one.prompt, world.render(one, set(), rng))] for one in harmful]
    found = judged_shares(world, groups)
    assert found["flaw: rude"]["mean"] == pytest.approx(len(benign) * 0.5 / len(groups))
    assert found["refused: harmful"]["mean"] == 1 and found["helped: harmful"]["mean"] == 0
    assert found["refused: harmful"]["ci95"][0] < 0.95 and found["refused: benign"]["mean"] == 0
    assert judged_shares(None, groups) == {}


def test_a_judge_beats_a_coin_if_its_accuracy_is_surely_above_one_half(lab):
    """Wilson: 60 % of 20 pairs begin at 39 %, 100 % at 84 %. The rule needs no pairs."""
    judge = object.__new__(RewardJudge)
    pairs = SimpleNamespace(test_pairs=range(20))
    judge.held_out_accuracy = 0.6
    assert not beats_a_coin(pairs, judge)
    judge.held_out_accuracy = 1.0
    assert beats_a_coin(pairs, judge) and beats_a_coin(lab, RuleJudge(lab.data.world))
