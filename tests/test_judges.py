"""Who says which answer is better: order, ties, the rule, and the reward model."""

import numpy as np
import pytest
import tiny
import torch
from tiny import assert_same

from common.data import collate, load_pairs, tokenize_pairs
from common.evaluation import Answer
from common.judges import (
    RewardJudge,
    RuleJudge,
    cohens_kappa,
    compare,
    head_to_head,
    length_controlled,
    rewards,
)
from common.models import RewardModel
from common.toyworld import World

WORLD = World(4)


def answers(*groups: tuple[str, ...]) -> list[list[Answer]]:
    """Answers to prompts "0", "1", …, one group each."""
    return [
        [Answer(str(number), text, (5,), (6,), True) for text in texts]
        for number, texts in enumerate(groups)
    ]


class Longer:
    """The longer answer is better."""

    name = "the longer one"

    def prefer(self, questions):
        return [
            (len(first) > len(second)) - (len(first) < len(second))
            for _, first, second in questions
        ]


class First:
    """The answer that is shown first is better; `*` makes an exception, and is always better."""

    name = "the first one"

    def prefer(self, questions):
        return [-1 if second == "*" else 1 for _, first, second in questions]


def test_compare_has_one_verdict_per_prompt_and_sample():
    first, second = answers(("aa", "a"), ("a", "aaa")), answers(("a", "a"), ("aa", "aa"))
    assert compare(Longer(), first, second) == [[1, 0], [-1, 1]]


def test_a_judge_that_changes_its_mind_with_the_order_calls_a_tie():
    """Always the first: one win in each order, so nothing is decided. The exception is stable."""
    assert compare(First(), answers(("a",), ("a",), ("*",)), answers(("b",), ("*",), ("b",))) == [
        [0],
        [-1],
        [1],
    ]


def test_swapping_the_models_negates_every_verdict():
    first, second = answers(("aa", "a"), ("a", "aaa")), answers(("a", "a"), ("aa", "aa"))
    assert compare(Longer(), second, first) == [[-1, 0], [1, -1]]


def test_answers_to_different_prompts_are_not_compared():
    first, second = answers(("a",), ("b",)), answers(("a",), ("b",))
    with pytest.raises(ValueError, match="different prompts"):
        compare(Longer(), first, second[::-1])


@pytest.mark.parametrize("other", [answers(("a",)), answers(("a", "b"), ("c",))])
def test_more_answers_of_one_model_than_of_the_other_are_refused(other):
    with pytest.raises(ValueError):
        compare(Longer(), answers(("a",), ("b",)), other)


def test_head_to_head_counts_the_verdicts():
    """Prompt 0: a win and a tie (3/4); prompt 1: a loss and a win (1/2). Mean 0.625."""
    rate = head_to_head(
        Longer(), answers(("aa", "a"), ("a", "aaa")), answers(("a", "a"), ("aa", "aa"))
    )
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (2, 1, 1, 0.625)


def test_the_rule_prefers_the_higher_score():
    """The pairs of the world were made by the rule: chosen wins, swapped it loses, against itself
    it ties.
    """
    pairs = load_pairs(WORLD.pairs(20, label_noise=0))[0].to_list()
    for first, second, expected in (
        ("chosen", "rejected", 1),
        ("rejected", "chosen", -1),
        ("chosen", "chosen", 0),
    ):
        shown = [(pair["prompt"], pair[first], pair[second]) for pair in pairs]
        assert RuleJudge(WORLD).prefer(shown) == [expected] * 20


# --- the reward model


def reward_model(vocabulary: int = 23, positions: int = 64) -> RewardModel:
    body = tiny.gpt2(vocabulary=vocabulary, positions=positions).transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RewardModel(body).double().eval()


def naive_reward(model, ids: list[int]) -> torch.Tensor:
    """The head on the last token's hidden state, one row without padding."""
    return model.head(model.body(torch.tensor([ids])).last_hidden_state[0, -1])[0]


@pytest.mark.parametrize("pad", [tiny.EOS, 0, 9])
def test_rewards_equal_those_of_single_rows_without_padding(pad):
    """Whatever the pad is, EOS too: the last token is found by the lengths."""
    model, rows = reward_model(), tiny.ragged_rows(8)
    for side in ("chosen", "rejected"):
        expected = torch.stack(
            [naive_reward(model, row["prompt_ids"] + row[f"{side}_ids"]) for row in rows]
        )
        assert_same(rewards(model, collate(rows, pad), side).detach(), expected.detach())


def test_rewards_have_the_gradient_of_single_rows():
    model, rows = reward_model(), tiny.ragged_rows(8)
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)
    (weights * rewards(model, collate(rows), "chosen")).sum().backward()
    fast = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    naive = torch.stack(
        [naive_reward(model, row["prompt_ids"] + row["chosen_ids"]) for row in rows]
    )
    (weights * naive).sum().backward()
    for name, parameter in model.named_parameters():
        assert_same(fast[name], parameter.grad)


PROMPT = "\n\nHuman: What is the kettle for?\n\nAssistant:"
TEXTS = [PROMPT + " Boiling water.", PROMPT + " No idea, friend."]


@pytest.fixture(scope="module")
def metaspace():
    return tiny.metaspace_tokenizer(TEXTS)


def judge_of(tokenizer, positions: int = 200) -> RewardJudge:
    pairs = [{"chosen": TEXTS[0], "rejected": TEXTS[1]}]
    held_out = tokenize_pairs(load_pairs(pairs)[0], tokenizer, 200)[0]
    return RewardJudge(reward_model(len(tokenizer), positions), tokenizer, held_out)


@pytest.mark.parametrize("name", ["byte level", "with BOS"])
def test_the_judge_reads_an_answer_as_the_training_data_are_read(metaspace, name):
    """One BOS, then prompt and answer tokenised jointly, then EOS; the higher reward wins, in
    float64.
    """
    tokenizer = metaspace if name == "with BOS" else tiny.tokenizer()
    judge = judge_of(tokenizer)
    first = " Boiling water."
    others = [" No idea, friend.", " What is the kettle?", " water Boiling idea."]
    start = [tokenizer.bos_token_id] if name == "with BOS" else []

    def reward(answer):
        ids = tokenizer(PROMPT + answer, add_special_tokens=False)["input_ids"]
        return naive_reward(judge.model, start + ids + [tokenizer.eos_token_id]).item()

    expected = [1 if reward(first) > reward(other) else -1 for other in others]
    assert judge.prefer([(PROMPT, first, other) for other in others]) == expected
    assert judge.prefer([(PROMPT, other, first) for other in others]) == [
        -verdict for verdict in expected
    ]
    assert judge.prefer([(PROMPT, first, first)]) == [0]


def test_an_answer_that_fills_the_context_is_judged_all_the_same():
    """An answer that did not end within the limit has no room for EOS."""
    tokenizer = tiny.tokenizer()
    answer = " Boiling water." * 9
    judge = judge_of(tokenizer, positions=len(tokenizer(PROMPT + answer)["input_ids"]))
    assert judge.prefer([(PROMPT, answer, " Boiling.")]) in ([1], [-1])


def test_the_judge_says_how_often_it_is_right(monkeypatch):
    """Rewards that grow with the length of the answer, on three pairs: longer, shorter and equally
    long: 1.5 of 3.
    """
    lengths = (3, 2), (1, 4), (2, 2)
    rows = [
        {"prompt_ids": [5], "chosen_ids": [6] * one, "rejected_ids": [6] * other}
        for one, other in lengths
    ]
    monkeypatch.setattr(
        "common.judges.rewards", lambda model, batch, side: batch[f"{side}_lengths"].double()
    )
    judge = RewardJudge(reward_model(), tiny.tokenizer(), rows)
    assert judge.held_out_accuracy == 0.5
    assert judge.name == "a reward model (right on 50% of 3 held-out pairs)"


def length_lover(padding: int, seed: int = 0):
    """Verdicts of a judge who likes A a little, and length much; tokens of A's and of B's answers.

    `padding`: so many tokens at the most are added to each of A's answers, of no worth.
    """
    generator = np.random.default_rng(seed)
    lengths, others = generator.normal(30, 8, (2, 4000)).round()
    lengths += generator.integers(0, padding + 1, 4000)
    likes = 1 / (1 + np.exp(-(0.3 + 1.5 * np.tanh((lengths - others) / 12))))
    return np.where(generator.random(4000) < likes, 1, -1), lengths, others


def test_padding_moves_the_plain_rate_and_not_the_length_controlled_one():
    """At equal lengths the judge takes A with sigma(.3) = .574, however much A is padded."""
    plain, controlled = [], []
    for padding in (0, 12):
        verdicts, lengths, others = length_lover(padding)
        plain.append((verdicts == 1).mean())
        controlled.append(length_controlled(verdicts, lengths, others))
    assert plain[1] - plain[0] > 0.10
    assert abs(controlled[1] - controlled[0]) < 0.03
    assert controlled == pytest.approx([1 / (1 + np.exp(-0.3))] * 2, abs=0.03)


def test_swapping_the_models_mirrors_the_length_controlled_rate():
    verdicts, lengths, others = length_lover(12)
    one, other = (
        length_controlled(verdicts, lengths, others),
        length_controlled(-verdicts, others, lengths),
    )
    assert one + other == pytest.approx(1.0, abs=1e-4)


def test_at_equal_lengths_it_is_the_plain_rate():
    """Two wins, a tie and a loss: (1 + 1 + 1/2 + 0) / 4 = .625. All won stays a number below 1."""
    assert length_controlled([[1, 1], [0, -1]], [[5, 5], [7, 7]], [[5, 5], [7, 7]]) == (
        pytest.approx(0.625, abs=1e-3)
    )
    assert 0.95 < length_controlled([1] * 8, range(8), [3] * 8) < 1
    with pytest.raises(ValueError, match="two lengths"):
        length_controlled([1, 0], [3], [4])


def test_cohens_kappa_takes_chance_out():
    """Cohen 1960: 20 + 15 of 50 agree, .5 by chance: (.7 - .5) / .5 = .4. With ties: p_o = 4/6 and
    p_e = (2·3 + 2·1 + 2·2) / 36 = 1/3.
    """
    first, second = [1] * 25 + [-1] * 25, [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    assert cohens_kappa(first, second) == cohens_kappa(second, first) == pytest.approx(0.4)
    assert cohens_kappa([1, 1, -1, -1, 0, 0], [1, 1, -1, 0, 0, 1]) == pytest.approx(0.5)
    assert np.isnan(cohens_kappa([1, 1], [1, 1]))
