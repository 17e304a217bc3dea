"""A/B tests: the arithmetic by hand, from the literature, or by counting every possible outcome."""

from itertools import product

import numpy as np
import pytest

from deploy.abtest import (
    ab_decision,
    chance_of_a_winner,
    sample_size,
    two_shares,
    votes_by_arm,
)


def test_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, Table II (a), method 10: 56/70 against 48/80 differ by 0.2000, 0.0524 to
    0.3339.
    """
    found = two_shares(48, 80, 56, 70)
    assert found.difference == pytest.approx(0.2)
    assert found.ci95 == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_p_value_is_of_the_pooled_z_test():
    """104/130 pooled twice: shares .7 and .8 of 100 pool to .75; z = .1 / sqrt(.75 * .25 * .02) =
    1.6330, p = .1025.
    """
    assert two_shares(70, 100, 80, 100).p_value == pytest.approx(0.1025, abs=5e-5)


def test_swapping_the_arms_turns_the_sign():
    one, other = two_shares(10, 40, 25, 50), two_shares(25, 50, 10, 40)
    assert one.difference == -other.difference and one.p_value == other.p_value
    assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]))


@pytest.mark.parametrize("counts", [(0, 0, 1, 2), (3, 2, 1, 2), (-1, 2, 1, 2)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="thumbs up"):
        two_shares(*counts)


def test_nobody_pleased_in_either_arm_is_no_difference():
    found = two_shares(0, 20, 0, 20)
    assert found.p_value == 1 and found.ci95[0] < 0 < found.ci95[1]


def test_sample_size_is_the_textbooks():
    """.5 against .6 at 5 % and 80 %: (1.95996 sqrt(2 * .55 * .45) + .84162 sqrt(.25 + .24))² / .01
    = 387.3.
    """
    assert sample_size(0.5, 0.1) == 388
    assert sample_size(0.5, -0.1) == 388


def test_half_the_lift_needs_four_times_the_users():
    assert sample_size(0.5, 0.01) / sample_size(0.5, 0.02) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("share, lift", [(0.5, 0), (0.9, 0.1), (0, 0.5)])
def test_sample_size_needs_two_different_shares(share, lift):
    with pytest.raises(ValueError, match="differ"):
        sample_size(share, lift)


def test_chance_of_a_winner_counts_every_outcome():
    """Two looks of 3 users per arm: all 2^12 outcomes, each with its probability, looked at one by
    one.
    """
    a, b, expected = 0.3, 0.6, np.zeros(2)
    for outcome in product((0, 1), repeat=12):
        first, second = np.array(outcome[:6]), np.array(outcome[6:])
        chance = np.prod(np.where(first, a, 1 - a)) * np.prod(np.where(second, b, 1 - b))
        for look in (0, 1):
            x, y, n = first[: 3 * look + 3].sum(), second[: 3 * look + 3].sum(), 3 * look + 3
            pool = (x + y) / (2 * n)
            if 0 < pool < 1 and abs(x - y) / n / (pool * (1 - pool) * 2 / n) ** 0.5 > 1.959964:
                expected[look:] += chance
                break
    np.testing.assert_allclose(chance_of_a_winner(a, b, 3, 2), expected, atol=1e-12)


def test_sample_size_has_the_power_it_promises():
    """At the planned size, one look finds .5 against .65 in 80 % of experiments, by exact
    arithmetic.
    """
    size = sample_size(0.5, 0.15)
    assert chance_of_a_winner(0.5, 0.65, size, 1)[0] == pytest.approx(0.8, abs=0.02)


def test_peeking_raises_false_alarms():
    """One look keeps the 5 %; a look after each tenth does not."""
    once, often = chance_of_a_winner(0.5, 0.5, 200, 1)[-1], chance_of_a_winner(0.5, 0.5, 20, 10)[-1]
    assert once == pytest.approx(0.05, abs=0.01) and often > 0.15


def row(user, model, rating, assigned=1, caller="key-1"):
    same = {"user": user, "model": model, "rating": rating}
    return same | {"assigned": assigned, "caller": caller}


def test_a_user_counts_once_with_the_first_vote():
    rows = [
        row("u", "a", 1),
        row("u", "a", -1),
        row("v", "a", -1),
        row("w", "b", None),
        row(None, "b", 1),
    ]
    assert votes_by_arm(rows) == {"a": (1, 2)}


def test_another_key_cannot_vote_in_a_user_s_name():
    """Its vote is another person's; the user's own first vote still counts."""
    rows = [row("u", "a", -1, caller="key-2"), row("u", "a", 1)]
    assert votes_by_arm(rows) == {"a": (1, 2)}


def test_answers_that_named_their_model_are_no_part_of_the_test():
    assert votes_by_arm([row("u", "a", 1, assigned=0)]) == {}


def test_no_decision_before_the_horizon():
    """90 of 99 against 10 of 99 is as clear as can be, and still one user short."""
    votes = {"old": (10, 99), "new": (90, 99)}
    assert ab_decision(votes, "old", "new", 100)[0] == "wait"
    assert ab_decision(votes, "old", "new", 99)[0] == "new"
    assert ab_decision({"old": (50, 99), "new": (52, 99)}, "old", "new", 99)[0] == "no winner"
    assert ab_decision({"new": (90, 99)}, "old", "new", 99) == ("wait", None)
