"""Log-probabilities of responses, against one unpadded row at a time with a full log-softmax."""

import math

import pytest
import torch
from tiny import EOS, Bigram, assert_same, gpt2, naive_token_logps, ragged_rows
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common.data import collate
from common.logprobs import SideLogps, response_logps


def naive_sums(model, rows, side: str) -> torch.Tensor:
    return torch.stack(
        [naive_token_logps(model, row["prompt_ids"], row[f"{side}_ids"])[1].sum() for row in rows]
    )


def naive_prompt_sums(model, rows) -> torch.Tensor:
    return torch.stack(
        [naive_token_logps(model, row["prompt_ids"], row["chosen_ids"])[0].sum() for row in rows]
    )


def gradients(model, value) -> list[torch.Tensor]:
    model.zero_grad()
    value.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_sums_equal_the_naive_ones():
    """Ragged rows, float64: padded, masked and cut to the scored positions gives what row by row
    gives.
    """
    model, rows = gpt2(), ragged_rows(8)
    logps = response_logps(model, collate(rows))
    assert logps.chosen.sums.dtype == torch.float64
    assert_same(logps.chosen.sums, naive_sums(model, rows, "chosen"))
    assert_same(logps.rejected.sums, naive_sums(model, rows, "rejected"))


def test_sums_equal_the_naive_ones_in_float32():
    model, rows = gpt2(torch.float32), ragged_rows(8)
    logps = response_logps(model, collate(rows))
    assert_same(logps.chosen.sums, naive_sums(model, rows, "chosen"), 1e-5)
    assert_same(logps.rejected.sums, naive_sums(model, rows, "rejected"), 1e-5)


def test_gradients_equal_the_naive_ones():
    """Of a sum that weighs every row and side differently, so that no two errors can cancel."""
    model, rows = gpt2(), ragged_rows(8)
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)
    ours = response_logps(model, collate(rows))
    fast = gradients(
        model, (weights * ours.chosen.sums).sum() - (weights**2 * ours.rejected.sums).sum()
    )
    chosen, rejected = naive_sums(model, rows, "chosen"), naive_sums(model, rows, "rejected")
    naive = gradients(model, (weights * chosen).sum() - (weights**2 * rejected).sum())
    for one, other in zip(fast, naive, strict=True):
        assert_same(one, other)


def test_lengths_count_eos_and_means_divide_by_them():
    model, rows = gpt2(), ragged_rows(8)
    logps = response_logps(model, collate(rows))
    assert logps.chosen.lengths.tolist() == [len(row["chosen_ids"]) for row in rows]
    assert logps.rejected.lengths.tolist() == [len(row["rejected_ids"]) for row in rows]
    lengths = torch.tensor([len(row["rejected_ids"]) for row in rows])
    assert_same(logps.rejected.means, naive_sums(model, rows, "rejected") / lengths)


def test_padding_leaves_the_values_unchanged():
    """A row alone has no padding; between longer rows it has much."""
    model, rows = gpt2(), ragged_rows(8)
    together = response_logps(model, collate(rows)).chosen.sums
    alone = torch.cat([response_logps(model, collate([row])).chosen.sums for row in rows])
    assert_same(together, alone)


def test_order_of_the_batch_only_reorders_the_values():
    model, rows = gpt2(), ragged_rows(8)
    forward, backward = (
        response_logps(model, collate(rows)),
        response_logps(model, collate(rows[::-1])),
    )
    assert_same(forward.chosen.sums, backward.chosen.sums.flip(0))
    assert_same(forward.rejected.sums, backward.rejected.sums.flip(0))


@pytest.mark.parametrize("pad", [EOS, 7, 22])
def test_pad_id_leaves_the_values_unchanged(pad):
    """The pad may be EOS or a common word: the lengths make the masks."""
    model, rows = gpt2(), ragged_rows(8)
    assert_same(
        response_logps(model, collate(rows, pad)).chosen.sums, naive_sums(model, rows, "chosen")
    )


def test_wider_padding_leaves_the_values_unchanged():
    """Columns of garbage to the right of all rows."""
    model, rows = gpt2(), ragged_rows(8)
    batch = collate(rows)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 6), value=9)
    assert_same(response_logps(model, batch).rejected.sums, naive_sums(model, rows, "rejected"))


def test_eos_is_scored():
    """With EOS the sum is lower by exactly log p(EOS | all before), even where pad is EOS."""
    model, row = gpt2(), ragged_rows(3)[2]
    without = {**row, "chosen_ids": row["chosen_ids"][:-1]}
    whole, cut = (
        response_logps(model, collate([each], EOS)).chosen.sums for each in (row, without)
    )
    last = naive_token_logps(model, row["prompt_ids"], row["chosen_ids"])[1][-1]
    assert_same(whole - cut, last[None])
    assert last.item() < -1e-3


def test_the_prompt_is_not_scored():
    """A bigram model's response depends on the prompt's last token only: other prompts before it
    change nothing.
    """
    model = Bigram(
        torch.randn(23, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    row = ragged_rows(3)[2]
    other = {**row, "prompt_ids": [2, 3, 4, 5, row["prompt_ids"][-1]]}
    assert_same(
        response_logps(model, collate([row])).chosen.sums,
        response_logps(model, collate([other])).chosen.sums,
    )


def test_bigram_log_probabilities_by_hand():
    """Table rows are log-probabilities already: 0 -> (1/2, 1/4, 1/4), 1 -> (1/4, 1/4, 1/2), 2 ->
    (1/8, 3/8, 1/2). Prompt [2, 0], chosen [1, 2]: ln 1/4 + ln 1/2 = -3 ln 2; rejected [0, 0, 1]: ln
    1/2 + ln 1/2 + ln 1/4 = -4 ln 2.
    """
    table = torch.tensor(
        [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.125, 0.375, 0.5]], dtype=torch.float64
    ).log()
    batch = collate([{"prompt_ids": [2, 0], "chosen_ids": [1, 2], "rejected_ids": [0, 0, 1]}])
    logps = response_logps(Bigram(table), batch)
    assert_same(logps.chosen.sums, [-3 * math.log(2)])
    assert_same(logps.rejected.sums, [-4 * math.log(2)])


def test_score_prompt_scores_it_from_the_second_token_on():
    """The first token has nothing before it; a prompt of one token scores nothing."""
    model, rows = gpt2(), ragged_rows(8)
    logps = response_logps(model, collate(rows), score_prompt=True)
    assert_same(logps.prompt.sums, naive_prompt_sums(model, rows))
    assert logps.prompt.lengths.tolist() == [len(row["prompt_ids"]) - 1 for row in rows]
    assert logps.prompt.sums[0].item() == 0.0 and len(rows[0]["prompt_ids"]) == 1


def test_score_prompt_leaves_the_responses_unchanged():
    model, rows = gpt2(), ragged_rows(8)
    logps = response_logps(model, collate(rows), score_prompt=True)
    assert_same(logps.chosen.sums, naive_sums(model, rows, "chosen"))
    assert_same(logps.rejected.sums, naive_sums(model, rows, "rejected"))


def test_score_prompt_has_the_gradient_of_both_parts():
    model, rows = gpt2(), ragged_rows(8)
    logps = response_logps(model, collate(rows), score_prompt=True)
    fast = gradients(model, logps.chosen.sums.sum() + 0.5 * logps.prompt.sums.sum())
    naive = naive_sums(model, rows, "chosen").sum() + 0.5 * naive_prompt_sums(model, rows).sum()
    for one, other in zip(fast, gradients(model, naive), strict=True):
        assert_same(one, other)


def test_without_score_prompt_there_is_no_prompt_side():
    assert response_logps(gpt2(), collate(ragged_rows())).prompt is None


def test_demonstrations_have_no_rejected_side():
    model, rows = gpt2(), ragged_rows()
    shown = [{"prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"]} for row in rows]
    logps = response_logps(model, collate(shown))
    assert logps.rejected is None
    assert_same(logps.chosen.sums, naive_sums(model, rows, "chosen"))


SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    ],
    ids=["llama", "qwen3"],
)
def test_other_architectures(build):
    """Rotary positions, grouped heads, a head of its own: the same code, the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
    rows = ragged_rows(8)
    logps = response_logps(model, collate(rows))
    assert_same(logps.chosen.sums, naive_sums(model, rows, "chosen"))
    assert_same(logps.rejected.sums, naive_sums(model, rows, "rejected"))


def test_bfloat16_logits_are_upcast():
    """300 tokens of a bigram model in bfloat16. From the same logits: ours is right to 1e-5 of the
    sum, log-softmax and sum in bfloat16 are off by more than a nat.
    """
    table = (4 * torch.randn(23, 23, generator=torch.Generator().manual_seed(0))).bfloat16()
    ids = torch.randint(0, 23, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = torch.log_softmax(table.double(), -1)
    steps = list(zip([5, *ids], ids, strict=False))
    expected = sum(exact[before, after].item() for before, after in steps)
    ours = response_logps(
        Bigram(table), collate([{"prompt_ids": [5], "chosen_ids": ids}])
    ).chosen.sums.item()
    assert abs(ours - expected) < 1e-5 * abs(expected)
    naive = torch.log_softmax(table, -1)
    total = torch.zeros((), dtype=torch.bfloat16)
    for before, after in steps:
        total += naive[before, after]
    assert abs(total.item() - expected) > 1


def test_hook_is_removed_even_after_an_error():
    """The next caller of the model must get logits of every position."""
    model, batch = gpt2(), collate(ragged_rows())
    response_logps(model, batch)
    with pytest.raises(IndexError):
        response_logps(model, {**batch, "prompt_ids": batch["prompt_ids"] + 1000})
    assert model(torch.tensor([[2, 3, 4]])).logits.shape == (1, 3, 23)


def test_detach_stops_gradients_and_keeps_values():
    side = SideLogps(torch.tensor([-2.0, -3.0], requires_grad=True), torch.tensor([2, 4]))
    assert side.sums.requires_grad and not side.detach().sums.requires_grad
    assert side.detach().means.tolist() == [-1.0, -0.75]
