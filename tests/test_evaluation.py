"""Measures of a trained model: answers, KL, perplexity, preference metrics, win rates, ratings."""

import itertools
import math
import random

import numpy as np
import pytest
import tiny
import torch
from tiny import EOS, Bigram, assert_same, gpt2, ragged_rows
from transformers import MistralConfig

from common.comparison import measure
from common.data import collate
from common.evaluation import (
    Answer,
    Sampling,
    generate,
    kl_on_samples,
    logps_of,
    perplexity,
    preference_metrics,
    prompt_interval,
    ratings,
    seed_interval,
    text_measures,
    win_rate,
)
from common.lab import Lab
from common.logprobs import PairLogps, SideLogps, response_logps
from common.models import answers_at_once, new_tiny_model
from common.toyworld import World


class Letters:
    """A tokenizer of letters: "a" is token 2, "b" is 3 and so on; EOS is 1."""

    eos_token_id = EOS

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 95 for letter in text]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(token + 95) for token in ids if token > EOS)


PROMPTS = ["a", "bcdefghijk", "ccc", "kl", "abab", "jjjjjjj", "e", "hg"]  # one to ten tokens
LENGTH = 12
GREEDY = Sampling(LENGTH, temperature=0)
# What a model's own generation_config may hold.
SHARPER = {"top_p": 0.9, "temperature": 0.6}
BEAMS = {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}
PENALTIES = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "penalty_alpha": 0.6}
BANS = {"suppress_tokens": [3, 4], "bad_words_ids": [[5]], "begin_suppress_tokens": [2]}
FORCED = {"forced_eos_token_id": 1, "eos_token_id": [1, 7], "min_new_tokens": 4}
CUTS = {"min_p": 0.2, "typical_p": 0.5, "top_k": 3, "epsilon_cutoff": 0.05, "eta_cutoff": 0.05}
OUTPUTS = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}


def greedy_by_hand(model, ids: list[int]) -> tuple[int, ...]:
    """One token at a time, one row, no padding, no cache."""
    answer = []
    while len(answer) < LENGTH and EOS not in answer:
        answer.append(model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
    return tuple(answer)


# --- generation


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_greedy_generation_equals_one_by_one(batch_size):
    """Prompts of one to ten tokens in one batch, padded on the left; some answers end early, some
    not at all.
    """
    model = gpt2(seed=5)
    answers = generate(model, Letters(), PROMPTS, GREEDY, batch_size)
    expected = [greedy_by_hand(model, Letters()(each)["input_ids"]) for each in PROMPTS]
    assert [group[0].chosen_ids for group in answers] == expected
    assert len(set(map(len, expected))) > 1


def test_large_models_answer_in_batches_whose_keys_and_values_fit():
    """Mistral-7B, whose sizes are the library's defaults, in float32: 2 (keys, values) · 32 layers
    · 8 heads · 128 · 4 bytes = 262,144 a token, so 134 MB for 512 tokens and 14 answers in 2 GB.
    Llama-2-7B has 32 heads: 3. The tiny model's 256 stay 256.
    """
    for heads, expected in ((8, 14), (32, 3)):
        assert answers_at_once(MistralConfig(num_key_value_heads=heads), 512) == expected
    assert answers_at_once(tiny.gpt2().config, 192) == 256


def test_an_answer_says_its_prompt_its_text_and_whether_it_ended():
    model = gpt2(seed=5)
    answers = [group[0] for group in generate(model, Letters(), PROMPTS, GREEDY)]
    assert [answer.prompt for answer in answers] == PROMPTS
    assert {answer.ended for answer in answers} == {True, False}
    for answer in answers:
        assert answer.prompt_ids == tuple(Letters()(answer.prompt)["input_ids"])
        assert answer.ended == (answer.chosen_ids[-1] == EOS) and EOS not in answer.chosen_ids[:-1]
        assert answer.ended or len(answer.chosen_ids) == LENGTH
        assert answer.text == Letters().decode(answer.chosen_ids, skip_special_tokens=True)


def test_samples_come_from_the_seed_and_the_global_random_state_is_left_alone():
    model = gpt2()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (
        generate(model, Letters(), PROMPTS, Sampling(LENGTH, samples=2, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert one == same != other
    assert [[answer.prompt for answer in group] for group in one] == [
        [prompt] * 2 for prompt in PROMPTS
    ]
    assert any(group[0].chosen_ids != group[1].chosen_ids for group in one)


def test_sampling_draws_from_the_whole_vocabulary():
    """A model that predicts 300 tokens nearly alike: the library's default would keep the top 50 of
    them.
    """
    model = gpt2(vocabulary=300)
    for parameter in model.parameters():
        parameter.data *= 0.01
    answers = generate(model, Letters(), ["a"], Sampling(1, samples=400))
    assert len({answer.chosen_ids for answer in answers[0]}) > 150


@pytest.mark.parametrize("own", [SHARPER, BEAMS, PENALTIES, BANS, FORCED, CUTS, OUTPUTS])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(LENGTH, samples=2)])
def test_the_models_own_generation_config_changes_no_token(own, sampling):
    model, plain = gpt2(seed=5), gpt2(seed=5)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    expected = generate(plain, Letters(), PROMPTS, sampling)
    assert generate(model, Letters(), PROMPTS, sampling) == expected
    assert model.generation_config.to_dict() == before


def test_temperature_sharpens():
    """At a hundredth of the logits' scale, sampling is greedy."""
    model = gpt2(seed=5)
    cold = generate(model, Letters(), PROMPTS, Sampling(LENGTH, temperature=1e-4))
    assert [group[0].chosen_ids for group in cold] == [
        group[0].chosen_ids for group in generate(model, Letters(), PROMPTS, GREEDY)
    ]


def test_a_prompt_without_room_for_an_answer_is_refused():
    model = gpt2(positions=20)
    assert len(generate(model, Letters(), ["a" * 10], Sampling(10))) == 1
    with pytest.raises(ValueError, match="leaves room for 9 of 10 new tokens"):
        generate(model, Letters(), ["a" * 11], Sampling(10))


def test_generation_leaves_a_training_model_in_training():
    model = gpt2().train()
    generate(model, Letters(), ["a"], Sampling(2))
    assert model.training


# --- log-probabilities, perplexity, preference metrics


def test_log_probabilities_of_many_rows_keep_their_order():
    """Batches of 3 rows equal one batch; the model's mode is left as it was, and nothing has a
    gradient.
    """
    model, rows = gpt2().train(), ragged_rows(8)
    logps = logps_of(model, rows, batch_size=3)
    assert model.training and not logps.chosen.sums.requires_grad
    expected = response_logps(gpt2(), collate(rows))
    assert_same(logps.chosen.sums, expected.chosen.sums.detach())
    assert_same(logps.rejected.sums, expected.rejected.sums.detach())
    assert logps.rejected.lengths.tolist() == expected.rejected.lengths.tolist()


def test_log_probabilities_of_demonstrations_have_one_side():
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in ragged_rows(4)]
    assert logps_of(gpt2(), rows).rejected is None


def side(sums, lengths) -> SideLogps:
    return SideLogps(torch.tensor(sums, dtype=torch.float64), torch.tensor(lengths))


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    table = torch.zeros(23, 23, dtype=torch.float64)
    assert_same(perplexity(logps_of(Bigram(table), ragged_rows(8)).chosen), 23)


def test_perplexity_is_over_tokens_not_rows():
    """8 ln 2 + 2 ln 8 = 14 ln 2 nats over 10 tokens: 2 to the 1.4; infinite where exp would
    overflow.
    """
    assert_same(perplexity(side([-8 * math.log(2), -2 * math.log(8)], [8, 2])), 2**1.4)
    assert perplexity(side([-1e6], [2])) == math.inf


def test_preference_metrics_by_hand():
    """beta 0.5. Chosen: 0.5 * (2, -1, 0) mean 1/6; rejected: 0.5 * (1, -1, 3) mean 1/2; margins
    0.5, 0, -1.5, mean -1/3; right 1, a tie and wrong: 1.5 of 3. Means per token: -4/2 > -9/3, -6/1
    < -4/2, -3/3 = -4/4: 1.5 of 3.
    """
    policy = PairLogps(side([-4, -6, -3], [2, 1, 3]), side([-9, -4, -4], [3, 2, 4]))
    reference = PairLogps(side([-6, -5, -3], [2, 1, 3]), side([-10, -3, -7], [3, 2, 4]))
    found = preference_metrics(policy, reference, beta=0.5)
    expected = {
        "rewards_chosen": 1 / 6,
        "rewards_rejected": 0.5,
        "reward_margin": -1 / 3,
        "preference_accuracy": 0.5,
        "likelihood_accuracy": 0.5,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value)


def test_a_model_against_itself_has_no_margin():
    logps = logps_of(gpt2(), ragged_rows(8))
    found = preference_metrics(logps, logps)
    assert found["reward_margin"] == 0.0 and found["preference_accuracy"] == 0.5


# --- KL


def answer(prompt_ids, chosen_ids) -> Answer:
    return Answer("", "", tuple(prompt_ids), tuple(chosen_ids), chosen_ids[-1] == EOS)


def test_kl_of_a_model_to_itself_is_0():
    model = gpt2()
    assert kl_on_samples(model, model, generate(model, Letters(), PROMPTS, Sampling(LENGTH))) == 0.0


def test_kl_on_samples_that_stand_for_the_whole_distribution_is_exact():
    """Four tokens, answers of up to two. Policy after 2: (0, 1/2, 1/4, 1/4), after 3: (0, 1/4, 1/2,
    1/4). Each answer occurs as often among 16 as its probability says, so the mean over them is the
    sum of p log(p / q).
    """
    policy = (
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 2, 1, 1], [0, 1, 2, 1]], dtype=torch.float64)
        / 4
    )
    reference = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 3, 2, 2], [2, 1, 4, 1]], dtype=torch.float64
    )
    reference /= reference.sum(1, keepdim=True)
    answers, exact = [], 0.0
    for first, second in itertools.product(range(1, 4), repeat=2):
        chosen = (first,) if first == EOS else (first, second)
        steps = list(zip((2, *chosen), chosen, strict=False))
        p = math.prod(policy[a, b].item() for a, b in steps)
        q = math.prod(reference[a, b].item() for a, b in steps)
        if first != EOS or second == EOS:  # EOS ends the answer: count it once
            exact += p * math.log(p / q)
            answers += [answer([2], chosen)] * round(16 * p)
    assert len(answers) == 16 and exact > 0.01
    found = kl_on_samples(Bigram(policy.log()), Bigram(reference.log()), [answers])
    assert_same(found, exact)


@pytest.mark.parametrize("own", [{}, SHARPER, BEAMS])
def test_kl_on_generated_samples_is_near_the_exact_one(own):
    """All answers of up to two tokens of an eight-token model, enumerated; 4,000 samples with a
    fixed seed are within three standard errors of that sum, whatever the model's own
    generation_config says.
    """
    policy, reference = gpt2(seed=1, vocabulary=8), gpt2(seed=2, vocabulary=8)
    for name, value in own.items():
        setattr(policy.generation_config, name, value)
    endings = [(EOS,), *itertools.product((0, *range(2, 8)), range(8))]
    rows = [{"prompt_ids": [2], "chosen_ids": list(ending)} for ending in endings]
    p, q = (logps_of(model, rows).chosen.sums for model in (policy, reference))
    assert_same(p.exp().sum(), 1)
    exact = (p.exp() * (p - q)).sum().item()
    error = math.sqrt((p.exp() * (p - q - exact) ** 2).sum().item() / 4000)
    answers = generate(policy, Letters(), ["a"], Sampling(2, samples=4000))
    assert abs(kl_on_samples(policy, reference, answers) - exact) < 3 * error < 0.3 * exact


# --- what answers look like


def test_without_a_world_only_length_and_ending_are_measured():
    """Lengths 3, 1 and 2, EOS counted: mean 2; two of three ended."""
    groups = [[answer([5], [6, 7, EOS]), answer([5], [EOS])], [answer([5], [6, 7])]]
    assert text_measures(groups, None) == {"length_tokens": 2.0, "ended_with_eos": 2 / 3}


def test_text_measures_by_hand():
    """Five answers: to harmful prompts one refusal and one help; to the others a perfect one, a
    rude one, a refusal. Safe on harmful 1/2, over-refusal 1/3; harmlessness over all five,
    helpfulness over the three.
    """
    world, rng = World(4), random.Random(0)
    questions = world.questions(60)
    harmful = [question for question in questions if question.kind == "harmful"]
    benign = [question for question in questions if question.kind == "benign"]
    wanted = [
        (harmful[0], ()),
        (harmful[1], ("complies",)),
        (benign[0], ()),
        (benign[1], ("rude",)),
        (benign[2], ("needless_refusal",)),
    ]
    texts = [(question.prompt, world.render(question, flaws, rng)) for question, flaws in wanted]
    found = text_measures(
        [[Answer(prompt, text, (5,), (6, EOS), True)] for prompt, text in texts], world
    )
    verdicts = [world.judge(prompt, text) for prompt, text in texts]
    assert found["safe_on_harmful"] == 0.5
    assert_same(found["over_refusal"], 1 / 3)
    assert found["flaws"] == {"complies": 0.2, "needless_refusal": 0.2, "rude": 0.2}
    assert_same(found["harmlessness"], sum(verdict.harmlessness for verdict in verdicts) / 5)
    assert_same(found["helpfulness"], sum(verdict.helpfulness for verdict in verdicts[2:]) / 3)
    assert_same(found["relevance"], sum(verdict.relevance for verdict in verdicts) / 5)
    assert_same(found["score"], sum(verdict.score for verdict in verdicts) / 5)


def test_a_share_of_nothing_is_none():
    """No harmful prompt was asked: nothing is known about safety on them, and 0 or 1 would be a
    lie.
    """
    world = World(4)
    question = next(question for question in world.questions(40) if question.kind == "benign")
    text = world.flawless(question)
    assert (
        text_measures([[Answer(question.prompt, text, (5,), (6,), True)]], world)["safe_on_harmful"]
        is None
    )


def test_measure_has_every_key_of_the_report_and_sft_against_itself_has_none_of_the_differences():
    lab = Lab(tiny.micro_profile(samples=2))
    model = new_tiny_model(lab.profile, lab.tokenizer)
    found, answers = measure(lab, model, model)
    assert {
        "perplexity",
        "helpfulness",
        "harmlessness",
        "relevance",
        "safe_on_harmful",
        "over_refusal",
        "ended_with_eos",
        "length_tokens",
        "reward_margin",
        "preference_accuracy",
        "kl",
    } <= found.keys()
    assert (found["kl"], found["reward_margin"], found["preference_accuracy"]) == (0.0, 0.0, 0.5)
    assert [len(group) for group in answers] == [2] * len(lab.prompts)


# --- win rates


def test_win_rate_counts_a_tie_as_half_a_win():
    """5 wins, 2 ties, 3 losses: (5 + 1) / 10."""
    found = win_rate([1] * 5 + [0] * 2 + [-1] * 3)
    assert (found.wins, found.ties, found.losses, found.rate) == (5, 2, 3, 0.6)
    assert found.points == (1.0,) * 5 + (0.5,) * 2 + (0.0,) * 3
    assert str(found).startswith("0.600 [0.") and str(found).endswith("(5 wins, 2 ties, 3 losses)")


def test_the_interval_is_students_with_one_win_and_one_loss_added():
    """7 of 10 becomes 8 of 12: mean 2/3, s = sqrt(12/11 · 2/9) = 0.49237, t(0.975; 11) = 2.20099,
    half-width 2.20099 · 0.49237 / sqrt(12) = 0.31284.
    """
    assert_same(win_rate([1] * 7 + [-1] * 3).ci95, (2 / 3 - 0.31284, 2 / 3 + 0.31284), 1e-4)


def test_all_wins_leave_an_interval_with_a_width():
    """9 prompts and one more of each: mean 10/11, s = sqrt(1/11), half-width 2.22814 / 11."""
    low, high = win_rate([[1, 1]] * 9).ci95
    assert_same(low, (10 - 2.22814) / 11, 1e-5)
    assert high == 1.0


def drawn_points(rate: float, prompts: int, samples: int, ties: float, spread: float, draw):
    """2,000 experiments: points of prompts whose own rates vary (a beta distribution)."""
    shape = (2000, prompts, 1)
    own = np.full(shape, rate)
    if spread and rate < 1:
        own = draw.beta(rate / spread, (1 - rate) / spread, shape)
    tied = 2 * ties * np.minimum(own, 1 - own)
    luck = draw.random((2000, prompts, samples))
    points = np.where(luck < own - tied / 2, 1.0, np.where(luck < own + tied / 2, 0.5, 0.0))
    return points.mean(axis=2)


@pytest.mark.parametrize("prompts", [25, 100, 250])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97, 1.0])
def test_the_interval_covers_the_true_rate(prompts, rate):
    """93 % or more of 2,000 simulated experiments: one answer to a prompt, with and without ties,
    and four answers to prompts that are alike, and that are not. It always has a width.
    """
    draw = np.random.default_rng(1)
    for samples, ties, spread in ((1, 0, 0), (1, 0.5, 0), (4, 0.3, 0.05), (4, 0.3, 1)):
        experiments = drawn_points(rate, prompts, samples, ties, spread, draw)
        low, high = np.transpose([prompt_interval(points) for points in experiments])
        covered = np.mean((low <= rate) & (rate <= high))
        assert covered >= 0.93 and (high - low).min() > 0.005, (samples, ties, spread, covered)


def test_the_interval_shrinks_with_the_root_of_the_prompts():
    """100 times as many prompts: a tenth of the width."""
    few, many = win_rate([1, 1, -1, 0] * 10).ci95, win_rate([1, 1, -1, 0] * 1000).ci95
    assert 7 < (few[1] - few[0]) / (many[1] - many[0]) < 14


def test_prompts_count_and_not_samples():
    """Forty equal samples of a prompt say no more than one: the interval is the same. Counted as
    400 independent ones, it would be six times too narrow.
    """
    verdicts = [1, 1, -1, 0, 1, -1, 1, 0, 1, 1]
    one, forty = win_rate(verdicts), win_rate([[verdict] * 40 for verdict in verdicts])
    assert_same(one.ci95, forty.ci95)
    flat = win_rate([verdict for verdict in verdicts for _ in range(40)]).ci95
    assert (one.ci95[1] - one.ci95[0]) > 4 * (flat[1] - flat[0])
    assert (forty.wins, forty.ties, forty.losses) == (240, 80, 80)


def test_swapping_the_models_mirrors_the_rate():
    verdicts = np.array([[1, 0], [1, -1], [-1, -1], [1, 1], [0, 0]])
    one, other = win_rate(verdicts), win_rate(-verdicts)
    assert_same(one.rate + other.rate, 1)
    assert_same(one.ci95, [1 - other.ci95[1], 1 - other.ci95[0]])


@pytest.mark.parametrize("verdicts", [[], [[]], [1, 2], [0.5], [math.nan], [[1, 0], [1, -2]]])
def test_anything_but_verdicts_is_refused(verdicts):
    with pytest.raises(ValueError, match="1, 0 or -1"):
        win_rate(verdicts)


# --- over seeds


def points_of_seeds(seeds: int, shared: bool, deviation: float, draw, prompts: int = 200):
    """800 experiments (seeds, prompts) and the true rate. A prompt's own chance of a win is
    anything from 0 to 1, so the mean is 0.5; each seed adds its effect; four answers to a prompt.
    """
    own = draw.random((800, 1 if shared else seeds, prompts))
    effect = draw.normal(0, deviation, (800, seeds, 1))
    chance = np.clip(own + effect, 0, 1)
    return draw.binomial(4, chance) / 4, 0.5


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "own prompts"])
@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("deviation", [0.02, 0.03])
def test_the_interval_over_seeds_covers_the_true_rate(seeds, shared, deviation):
    """92 to 98 % of 800 simulated experiments, for other seeds and other prompts."""
    draw = np.random.default_rng(2)
    experiments, rate = points_of_seeds(seeds, shared, deviation, draw)
    low, high = np.transpose([seed_interval(points) for points in experiments])
    assert 0.92 <= np.mean((low <= rate) & (rate <= high)) <= 0.98


def test_seeds_of_their_own_prompts_have_students_interval():
    """Rates 0.6, 0.7, 0.8: mean 0.7, s = 0.1, t(0.975; 2) = 4.3027, half-width 4.3027 · 0.1 /
    sqrt(3) = 0.24841. The points fall where the others' rise, so nothing is shared.
    """
    points = [[0.5, 0.7], [0.8, 0.6], [0.7, 0.9]]
    assert_same(seed_interval(points), (0.7 - 0.248414, 0.7 + 0.248414), 1e-6)


def test_shared_prompts_widen_the_interval_by_the_covariance():
    """Both seeds have points 0 and 1 on two prompts, a rate of 0.5 each: no spread over seeds.
    Their covariance is 0.5, so t(0.975; 1) · sqrt(0.5 / 2) = 12.706 · 0.5, cut to 0 and 1. With 100
    such prompts it is 50 / 99 · 0.5 and t(0.975; 99) = 1.98422: half-width 0.099717.
    """
    assert seed_interval([[0, 1], [0, 1]]) == (0.0, 1.0)
    assert_same(seed_interval([[0, 1] * 50] * 2), (0.5 - 0.099713, 0.5 + 0.099713), 1e-4)


def test_one_seed_has_the_interval_of_its_prompts():
    assert seed_interval([[1, 0.5, 0, 1]]) == prompt_interval([1, 0.5, 0, 1])


def test_seeds_that_win_everything_leave_an_interval_with_a_width():
    assert seed_interval([[1.0] * 20] * 3) == prompt_interval([1.0] * 60)


def test_seeds_may_have_different_numbers_of_prompts():
    """0.5 and 0.7: 0.6 ± 12.706 · 0.1 covers everything."""
    assert seed_interval([[0.5, 0.5], [0.7]]) == (0.0, 1.0)


# --- ratings


def test_bradley_terry_strengths_of_two_are_their_odds():
    """7 wins against 3: the strengths are as 7 to 3."""
    found, note = ratings([("a", "b", 1)] * 7 + [("a", "b", -1)] * 3)
    assert abs(found["a"]["bradley_terry"] / found["b"]["bradley_terry"] - 7 / 3) < 1e-4
    assert found["a"]["elo"] > found["b"]["elo"] and note == "no smoothing"


def test_who_is_named_first_does_not_matter_to_bradley_terry():
    one = ratings([("a", "b", 1)] * 7 + [("a", "b", -1)] * 3)[0]
    other = ratings([("b", "a", -1)] * 7 + [("b", "a", 1)] * 3)[0]
    for name in "ab":
        assert abs(one[name]["bradley_terry"] - other[name]["bradley_terry"]) < 1e-6


def test_ties_alone_leave_all_equal():
    found, _ = ratings([("a", "b", 0), ("b", "c", 0), ("c", "a", 0)])
    assert len({round(scores["bradley_terry"], 6) for scores in found.values()}) == 1
    assert len({round(scores["elo"], 6) for scores in found.values()}) == 1


def test_a_player_who_never_lost_is_rated_with_one_tie_added():
    """10 wins and an added tie (half a win each): 10.5 to 0.5. Without it the strength would be
    infinite.
    """
    found, note = ratings([("a", "b", 1)] * 10)
    assert "one tie was added" in note
    assert abs(found["a"]["bradley_terry"] / found["b"]["bradley_terry"] - 21) < 1e-2


def test_a_cycle_of_wins_needs_no_smoothing():
    assert ratings([("a", "b", 1), ("b", "c", 1), ("c", "a", 1)])[1] == "no smoothing"


@pytest.mark.parametrize("matches", [[], [("a", "b", 1), ("b", "a", 1), ("c", "d", 0)]])
def test_players_who_never_met_are_not_compared(matches):
    with pytest.raises(ValueError, match="never met"):
        ratings(matches)
