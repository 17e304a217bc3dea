"""The yardstick of short runs: a model against itself, and which prompts may choose."""

from dataclasses import replace

import pytest

from common.data import tokenize_prompt
from common.evaluation import WinRate
from common.judges import RuleJudge
from common.lab import Lab
from common.training import Run
from common.training.yardstick import Yardstick, held_back, table_of


@pytest.fixture(scope="module")
def yardstick(trained_lab):
    return Yardstick(trained_lab, RuleJudge(trained_lab.data.world), trained_lab.prompts[:6])


def run_of(model) -> Run:
    record = {"hyperparameters": {"lr": 3e-4, "beta": 0.2}, "steps": 7}
    return Run(model, record, [], None)


def test_the_start_measures_nothing_against_itself(yardstick):
    """The same weights and the same random numbers: the same answers, six ties."""
    point = yardstick.measure(run_of(yardstick.start))
    win = point.pop("win")
    assert (win.wins, win.ties, win.losses, win.rate) == (0, 6, 0, 0.5)
    assert point.pop("tokens") > 0
    same = {"rate": 3e-4, "beta": 0.2, "steps": 7, "accuracy": 0.5}
    assert point == same | dict.fromkeys(("margin", "chosen", "rejected", "kl"), 0.0)
    assert yardstick.lost(run_of(yardstick.start), 3) == []


def test_log_ratios_are_in_nats_without_beta(yardstick, trained_lab):
    """The base against SFT: the margin is beta 0.2 times the difference of both changes."""
    run = run_of(trained_lab.load("base"))
    point = yardstick.measure(run)
    assert point["margin"] == pytest.approx(0.2 * (point["chosen"] - point["rejected"]))
    assert point["chosen"] < -5
    for prompt, before, after in yardstick.lost(run, 2):
        assert prompt in yardstick.prompts and before != after


def test_prompts_to_choose_by_are_not_trained_on(trained_lab):
    prompts, rest = held_back(trained_lab, 5)
    assert len(prompts) == len(set(prompts)) == 5
    assert not set(prompts) & (set(rest["prompt"]) | set(trained_lab.prompts))
    lost = [row for row in trained_lab.data.train if row["prompt"] in prompts]
    assert len(rest) == len(trained_lab.data.train) - len(lost)


def test_no_more_than_a_fifth_is_held_back_and_only_what_leaves_room(trained_lab):
    prompts, _ = held_back(trained_lab, 10**6)
    assert len(prompts) <= len(trained_lab.data.train) // 5
    lengths = [len(tokenize_prompt(p, trained_lab.tokenizer)) for p in prompts]
    room = sorted(lengths)[len(lengths) // 2]
    profile = trained_lab.profile
    tight = Lab(replace(profile, max_new_tokens=profile.max_length - room), trained_lab.seed)
    tight.data, tight.tokenizer = trained_lab.data, trained_lab.tokenizer
    few, _ = held_back(tight, 10**6)
    assert few and all(len(tokenize_prompt(p, tight.tokenizer)) <= room for p in few)


def test_a_table_names_its_columns_and_shows_the_interval():
    win = WinRate(3, 2, 1, 2 / 3, (0.25, 0.875))
    point = {"rate": 1e-4, "beta": 0.1, "win": win, "kl": 2.345}
    table = table_of({"a run": point}, ("rate", "kl", "win"))
    assert table.loc["a run"].tolist() == ["0.0001", "2.35", "0.67 [0.25, 0.88]"]
    assert list(table.columns) == ["learning rate", "KL, nats", "win rate [95 %]"]
