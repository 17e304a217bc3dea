"""The packed path: equal to the simple computation, cheaper, and out of the way where a model
cannot do it.
"""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
import transformers as hf
from tiny import assert_same, gpt2, make_trainer, naive_token_logps, ragged_rows, take_step

from common import logprobs, models, packed
from common.data import collate
from common.io.files import read_metrics
from common.io.fingerprints import versions
from common.logprobs import PairLogps, SideLogps
from common.losses import objective, scored_tokens
from common.packed import checked_path, packed_layout
from common.plots.tokens import packed_pair
from common.profiles import PROFILES, Recipe
from common.training import Session, Task, processes, reference
from common.training import train as train_stage
from common.training.task import padded_tokens, row_length
from common.training.trainer import Trainer

ROWS = ragged_rows(8)
DPO = Recipe(lr=1.0, beta=0.3, nll_weight=0.5)
ORPO = Recipe(lr=1.0, lambda_or=0.7, nll_on_prompt=True)


def naive_logps(model, rows) -> PairLogps:
    """One row at a time, no padding, log-softmax over every position."""
    parts = {
        side: [naive_token_logps(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
        for side in ("chosen", "rejected")
    }
    sums = {
        side: torch.stack([response.sum() for _, response in found])
        for side, found in parts.items()
    }
    sums["prompt"] = torch.stack([prompt.sum() for prompt, _ in parts["chosen"]])
    return PairLogps(
        **{
            name: SideLogps(value, torch.tensor([len(row[f"{name}_ids"]) for row in rows]))
            for name, value in sums.items()
        }
    )


def loss_and_gradients(
    model, method: str, recipe: Recipe, logps, known=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and all gradients in one row."""
    model.zero_grad()
    loss, _ = objective(method, recipe, logps, known, len(ROWS), scored_tokens(ROWS, recipe))
    loss.backward()
    return loss.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


def packed_logps(model, rows=ROWS, **options) -> PairLogps:
    return packed.response_logps(model, collate(rows), **options)


def sum_with_weights(logps: PairLogps) -> torch.Tensor:
    """Every row and side with a weight of its own, so that no two errors can cancel."""
    weights = torch.linspace(-1, 2, len(logps.chosen.sums), dtype=torch.float64)
    return (weights * logps.chosen.sums - weights**2 * logps.rejected.sums).sum()


# --- exactness


def test_log_probabilities_equal_the_naive_ones():
    """Ragged rows, float64: eight pairs in one row of 135 tokens give what sixteen rows, one at a
    time, give.
    """
    ours, naive = packed_logps(gpt2()), naive_logps(gpt2(), ROWS)
    assert_same(ours.chosen.sums, naive.chosen.sums)
    assert_same(ours.rejected.sums, naive.rejected.sums)
    assert ours.chosen.lengths.tolist() == [len(row["chosen_ids"]) for row in ROWS]
    assert_same(ours.rejected.means, naive.rejected.means)
    assert ours.prompt is None


@pytest.mark.parametrize(("method", "recipe"), [("dpo", DPO), ("orpo", ORPO)])
def test_losses_and_gradients_equal_the_naive_ones(method, recipe):
    """DPO against another reference, ORPO with the prompt in its NLL: float64, to 1e-12."""
    model, other, prompt = gpt2(), gpt2(seed=1), recipe.nll_on_prompt
    with torch.no_grad():
        known, naive_known = packed_logps(other), naive_logps(other, ROWS)
    naive_policy = naive_logps(model, ROWS)
    naive_policy.prompt = naive_policy.prompt if prompt else None
    expected, slow = loss_and_gradients(model, method, recipe, naive_policy, naive_known)
    loss, fast = loss_and_gradients(
        model, method, recipe, packed_logps(model, score_prompt=prompt), known
    )
    assert_same(loss, expected)
    assert_same(fast, slow)
    assert fast.abs().max() > 1e-3


def test_float32_gradients_are_off_by_rounding_only():
    """Against the gradients of the same weights in float64: the error's norm is below 2e-6 of the
    gradient's.
    """
    small = gpt2(torch.float32)
    exact = copy.deepcopy(small).double()
    sum_with_weights(packed_logps(small)).backward()
    sum_with_weights(naive_logps(exact, ROWS)).backward()
    for one, other in zip(small.parameters(), exact.parameters(), strict=True):
        assert (one.grad.double() - other.grad).norm() <= 2e-6 * other.grad.norm() + 1e-9


def test_the_prompt_is_scored_from_its_second_token_on():
    """A prompt of one token scores nothing; the responses' own sums stay."""
    ours, naive = packed_logps(gpt2(), score_prompt=True), naive_logps(gpt2(), ROWS)
    assert_same(ours.prompt.sums, naive.prompt.sums)
    assert ours.prompt.lengths.tolist() == [len(row["prompt_ids"]) - 1 for row in ROWS]
    assert_same(ours.chosen.sums, naive.chosen.sums)
    assert len(ROWS[0]["prompt_ids"]) == 1 and ours.prompt.sums[0].item() == 0.0


def test_demonstrations_are_packed_too():
    shown = [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in ROWS]
    ours = packed_logps(gpt2(), shown)
    assert ours.rejected is None
    assert_same(ours.chosen.sums, naive_logps(gpt2(), ROWS).chosen.sums)


def test_pairs_of_a_batch_do_not_see_each_other():
    """A pair alone gives what it gives among seven others."""
    model = gpt2()
    alone = torch.cat([packed_logps(model, [row]).rejected.sums for row in ROWS])
    assert_same(packed_logps(model).rejected.sums, alone)


def test_the_two_responses_of_a_pair_do_not_see_each_other():
    """Another chosen answer, also a longer one, leaves the rejected one's log-probability as it
    was.
    """
    model = gpt2()
    others = [row | {"chosen_ids": [5, 6, 7, 8, *row["chosen_ids"]]} for row in ROWS]
    assert_same(packed_logps(model, others).rejected.sums, packed_logps(model).rejected.sums)
    swapped = [
        row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in ROWS
    ]
    assert_same(packed_logps(model, swapped).chosen.sums, packed_logps(model).rejected.sums)


def test_the_adapter_switched_off_is_the_reference():
    """LoRA with weights far from fresh: policy and reference, losses and gradients, equal the naive
    ones.
    """
    model = models.add_lora(gpt2(), PROFILES["smoke"]).double().eval()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    found = {}
    for name, compute in (
        ("packed", packed_logps),
        ("naive", lambda m: replace(naive_logps(m, ROWS), prompt=None)),
    ):
        with torch.no_grad(), model.disable_adapter():
            known = compute(model)
        found[name] = loss_and_gradients(model, "dpo", DPO, compute(model), known)
        assert abs((compute(model).chosen.sums - known.chosen.sums).mean().item()) > 0.1
    assert_same(found["packed"][0], found["naive"][0])
    assert_same(found["packed"][1], found["naive"][1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same(reentrant):
    """The backward pass runs each layer's forward again, when the call is long over."""
    plain, lean = gpt2(), gpt2()
    lean.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, lean.train()):
        sum_with_weights(packed_logps(model)).backward()
    for one, other in zip(plain.parameters(), lean.parameters(), strict=True):
        assert_same(one.grad, other.grad)


def test_a_wrapped_model_is_packed_too():
    """Distributed training hides the model in `.module`."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    assert_same(packed_logps(Wrapper(gpt2())).chosen.sums, packed_logps(gpt2()).chosen.sums)


def test_under_autocast_the_sums_are_exact_and_the_rest_is_bfloat16():
    """bfloat16 keeps 8 bits: means within 0.1 nats, not within 1e-4; sums stay in float64."""
    model = gpt2(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = packed_logps(model)
    assert rough.chosen.sums.dtype == torch.float64
    apart = (rough.chosen.means - packed_logps(model).chosen.means).abs().max().item()
    assert 1e-4 < apart < 0.1


# --- what it saves


@pytest.mark.parametrize("score_prompt", [False, True])
def test_the_model_reads_each_prompt_once_and_the_head_only_what_is_scored(score_prompt):
    """Body: one row of all prompts, chosen and rejected answers. Head: the answers' tokens (and
    prompts less one).
    """
    model, seen = gpt2(), {}
    model.transformer.wte.register_forward_hook(
        lambda _, inputs, output: seen.update(body=tuple(inputs[0].shape))
    )
    model.lm_head.register_forward_hook(
        lambda _, inputs, output: seen.update(head=tuple(output.shape))
    )
    packed_logps(model, score_prompt=score_prompt)
    prompts, chosen, rejected = (
        sum(len(row[f"{part}_ids"]) for row in ROWS) for part in ("prompt", "chosen", "rejected")
    )
    assert seen["body"] == (1, prompts + chosen + rejected)
    assert seen["head"] == (chosen + rejected + (prompts - len(ROWS) if score_prompt else 0), 23)


def test_layout_of_two_pairs_by_hand():
    """Lengths (2, 2, 3) and (1, 2, 1): both answers of a pair go on from the end of its prompt, and
    the first token of each is predicted by the prompt's last, at index 1 and 7.
    """
    layout = packed_layout(torch.tensor([[2, 2, 3], [1, 2, 1]]))
    assert layout.part.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1]
    responses = ~layout.is_prompt
    assert responses.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 8, 9, 10]
    assert layout.before[responses].tolist() == [1, 2, 1, 4, 5, 7, 8, 7]


def test_the_figure_shows_the_attention_that_is_computed():
    """Attention of random states over a packed pair, and with the mask that the figure draws, spelt
    out: the same.
    """
    lengths, module = (3, 4, 2), torch.nn.Identity()
    figure = packed_pair(*(["x"] * length for length in lengths))
    mask = torch.from_numpy(figure.axes[0].images[0].get_array() > 0)
    states = torch.randn(
        3, 1, 2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    ours, _ = hf.AttentionInterface()[packed.ATTENTION](
        module, *states, torch.tensor([[[lengths]]])
    )
    scores = (states[0] @ states[1].transpose(-1, -2) / 5**0.5).masked_fill(~mask, -torch.inf)
    assert_same(ours, (scores.softmax(-1) @ states[2]).transpose(1, 2))
    labels = [label.get_text().split()[-1] for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "1", "2", "3", "4", "5", "6", "3", "4"]


# --- where it stands aside

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LAYERS = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}


def build(name: str):
    """A random model of a few thousand parameters, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {
            "gpt2": gpt2,
            "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
            "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
            "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
            "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
            "opt": lambda: hf.OPTForCausalLM(
                hf.OPTConfig(
                    vocab_size=23,
                    hidden_size=16,
                    ffn_dim=24,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    dropout=0.0,
                    max_position_embeddings=64,
                    word_embed_proj_dim=16,
                    init_std=0.2,
                )
            ),
            "gemma3": lambda: hf.Gemma3ForCausalLM(
                hf.Gemma3TextConfig(**GROUPED, **LAYERS, sliding_window=8)
            ),
            "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)),
            "mistral, long window": lambda: hf.MistralForCausalLM(
                hf.MistralConfig(**GROUPED, sliding_window=64)
            ),
            "falcon": lambda: hf.FalconForCausalLM(
                hf.FalconConfig(
                    vocab_size=23,
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    alibi=False,
                )
            ),
        }[name]()
    return model.double().eval()


def check(model, rows=ROWS[:4], longest=ROWS[4], most: int | None = None) -> tuple[str, str]:
    """The check on a first batch and the longest row; `most`: tokens of a longer held-out row."""
    most = most or row_length(longest, ("chosen", "rejected"))
    return checked_path(model, [collate(rows), collate([longest])], most)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "phi3", "gpt-neox", "opt", "mistral, long window"]
)
def test_models_that_are_packed(name):
    """Learned or rotary positions, grouped heads, heads of their own. OPT, whose library code
    builds no mask for packed rows, is right all the same: here no model is asked to build one.
    """
    model = build(name)
    path, why = check(model)
    assert path == "packed" and "on the first batch and the longest row" in why
    ours, naive = packed_logps(model, score_prompt=True), naive_logps(model, ROWS)
    for side in ("chosen", "rejected", "prompt"):
        assert_same(getattr(ours, side).sums, getattr(naive, side).sums)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_a_window_shorter_than_the_longest_row_stands_aside(name):
    """Row 4 has 15 tokens. Packed rows would be wrong, without an error: the window is known to the
    masks only.
    """
    model = build(name)
    assert check(model) == ("simple", "it looks back 8 tokens only, and the longest row has 15")
    assert (
        packed_logps(model).chosen.sums - naive_logps(model, ROWS).chosen.sums
    ).abs().max() > 0.1


def test_the_longest_row_decides_about_a_window():
    """The first batch, a row of 3 + 4 tokens, fits into the window of 8 tokens; a later row does
    not.
    """
    short = [{"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 10, 11, 1]}]
    assert check(build("mistral"), short, short[0])[0] == "packed"
    assert check(build("mistral"), short, ROWS[4])[0] == "simple"


def test_eager_attention_stands_aside_and_is_refused():
    model = gpt2()
    model.set_attn_implementation("eager")
    assert check(model) == ("simple", "its attention is 'eager', not 'sdpa'")
    with pytest.raises(ValueError, match="needs attn_implementation=\"sdpa\", not 'eager'"):
        packed_logps(model)


def test_a_model_that_fails_on_packed_rows_stands_aside():
    """Falcon calls the attention kernel itself, which refuses a table of lengths in place of a
    mask.
    """
    path, why = check(build("falcon"))
    assert path == "simple" and why.startswith(
        "packed rows fail with RuntimeError: Expected attn_mask dtype"
    )


def counts_on(from_position: int):
    """A GPT-2 that ignores position ids where one is as high as this, and counts on from one answer
    to the next.
    """
    model = gpt2(positions=256)
    forward = model.transformer.forward

    def forgetful(*args, position_ids=None, **options):
        keep = position_ids is not None and int(position_ids.max()) < from_position
        return forward(*args, position_ids=position_ids if keep else None, **options)

    model.transformer.forward = forgetful
    return model


def test_a_model_with_other_numbers_stands_aside():
    """No error, only wrong positions: 0.1 nats per token and more."""
    model = counts_on(from_position=0)
    path, why = check(model)
    assert path == "simple" and why.startswith("packed rows differ by up to ")
    assert (
        packed_logps(model).rejected.means - naive_logps(model, ROWS).rejected.means
    ).abs().max() > 0.1


def test_a_model_that_is_wrong_on_the_longest_row_only_stands_aside():
    """Right for positions up to 13. The first batch has rows of up to 9 + 5 = 14 tokens, row 2 has
    3 + 12 = 15.
    """
    model = counts_on(from_position=14)
    assert check(model, ROWS[:2], ROWS[1])[0] == "packed"
    assert check(model, ROWS[:2], ROWS[2])[0] == "simple"


def test_weights_that_are_not_finite_stand_aside():
    """NaN equals nothing, so nothing is shown to be equal."""
    model = gpt2()
    model.transformer.ln_f.weight.data.fill_(torch.nan)
    assert check(model)[0] == "simple"


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_mode_and_random_numbers_alone(training):
    """Dropout would make the two paths differ: the check switches it off, and back on."""
    model = gpt2(torch.float32).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = torch.get_rng_state()
    assert check(model)[0] == "packed"
    assert model.training == training and torch.equal(torch.get_rng_state(), before)


def test_a_packed_model_still_reads_padded_batches():
    """It keeps the packed attention, which is SDPA for every other batch: equal to eager."""
    model, batch = gpt2(), collate(ROWS)
    packed_logps(model)
    simple = logprobs.response_logps(model, batch)
    model.set_attn_implementation("eager")
    assert_same(simple.rejected.sums, logprobs.response_logps(model, batch).rejected.sums)


def test_other_models_keep_the_librarys_attention():
    """The packed attention has a name of its own: "sdpa" is what transformers registered."""
    attention = hf.AttentionInterface()
    assert attention["sdpa"].__module__ == "transformers.integrations.sdpa_attention"
    assert attention[packed.ATTENTION] is not attention["sdpa"]
    assert gpt2().config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_name_the_packed_attention(tmp_path):
    """Whoever loads it has the library's own attentions only."""
    model = gpt2()
    packed_logps(model)
    model.save_pretrained(tmp_path)
    assert packed.ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_longer_held_out_row_decides_about_a_window_too():
    """All training rows fit into the window of 8 tokens, a held-out row of 9 does not. (Before, the
    path was chosen by training rows alone, and the held-out rows were scored wrongly.)
    """
    short = [{"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 10, 11, 1]}]
    model = build("mistral")
    assert check(model, short, short[0], most=8)[0] == "packed"
    assert check(model, short, short[0], most=9)[0] == "simple"


# --- training


@pytest.fixture(scope="module")
def lab(trained_lab):
    return trained_lab


@pytest.mark.parametrize("stage", ["dpo", "orpo"])
def test_steps_on_either_path_are_the_same(lab, tmp_path, stage):
    """Three steps in float64: every metric to 1e-9. The FLOPs are counted on the run's path and on
    the simple one.
    """
    fast, slow = (
        make_trainer(lab, stage, tmp_path, torch.float64, path=path, lr=1e-3)
        for path in ("packed", "simple")
    )
    assert (fast.path, slow.path) == ("packed", "simple")
    for _ in range(3):
        one, other = take_step(fast), take_step(slow)
        for name in one:
            assert_same(one[name], other[name], 1e-9)

    def flops(trainer, path):
        return trainer.progress.flops_per_token[path] * trainer.progress.padded[path]

    assert flops(fast, "packed") < 0.8 * flops(slow, "simple")
    assert_same(flops(fast, "simple"), flops(slow, "simple"))


def test_policy_and_reference_are_both_packed(lab, tmp_path):
    """Each reads every micro-batch of a step as one row. (The first step also counts the FLOPs of
    the simple path.)
    """
    trainer, seen = make_trainer(lab, "dpo", tmp_path), {}
    take_step(trainer)
    for name, model in (("policy", trainer.model), ("reference", trainer.reference)):
        model.transformer.wte.register_forward_hook(
            lambda _, inputs, output, name=name: seen.setdefault(name, set()).add(len(inputs[0]))
        )
    take_step(trainer)
    assert seen == {"policy": {1}, "reference": {1}}


@pytest.mark.parametrize("longest", ["a training row", "a held-out row"])
def test_a_run_checks_its_longest_row_too(lab, tmp_path, longest):
    """A window of just the longest row of all will do; one token less will not, though the first
    batch fits.
    """
    task = make_trainer(lab, "dpo", tmp_path).task
    most = max(row_length(row, task.sides) for row in task.rows)
    if longest == "a held-out row":
        most = task.longest = most + 5
    paths = []
    for window in (most, most - 1):
        policy = lab.load("sft")
        policy.config.sliding_window = window
        frozen = models.freeze(lab.load("sft"))
        paths.append(Trainer(task, processes.new_accelerator(), policy, frozen).path)
    assert paths == ["packed", "simple"]


def test_train_counts_held_out_rows_and_sampled_answers(lab, monkeypatch):
    """The longest row that a run ever scores: an answer to a prompt may fill the whole context."""
    found = []
    monkeypatch.setattr(Trainer, "run", lambda self, *_: found.append(self.task) or 1 / 0)
    for stage in ("orpo", "dpo"):
        with pytest.raises(ZeroDivisionError):
            train_stage(lab, stage, sweep="longest")
    rows = [*lab.train_pairs.to_list(), *lab.test_pairs.to_list()]
    most = max(row_length(row, ("chosen", "rejected")) for row in rows)
    assert [task.longest for task in found] == [most, lab.profile.max_length]
    assert most < lab.profile.max_length


def test_the_path_is_said_in_one_line_and_recorded(lab, capsys):
    run = train_stage(lab, "orpo", sweep="said", epochs=0.4, evaluations=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "path" in line]
    assert len(lines) == 1 and lines[0].startswith("orpo: packed path, within ")
    assert run.record["path"] == "packed"


def test_a_model_that_cannot_be_packed_trains_on_the_simple_path(lab, tmp_path, capsys):
    trainer = make_trainer(lab, "dpo", tmp_path, attention="eager")
    assert trainer.path == "simple" and take_step(trainer)["loss"] > 0
    assert "dpo: simple path, its attention is 'eager', not 'sdpa'\n" in capsys.readouterr().out


def test_the_simple_path_can_be_asked_for_and_needs_no_word(lab, tmp_path, capsys):
    assert make_trainer(lab, "dpo", tmp_path, path="simple").path == "simple"
    assert "path" not in capsys.readouterr().out


def test_tokens_as_the_model_sees_them():
    """Prompts of 1 and 9, chosen 1 and 5, rejected 8 and 2 (EOS counted). Simple: four rows of 14;
    packed: 26.
    """
    batch = collate(ROWS[:2])
    assert padded_tokens(batch, ("chosen", "rejected"), "simple") == 4 * 14
    assert padded_tokens(batch, ("chosen", "rejected"), "packed") == 1 + 9 + 1 + 5 + 8 + 2


# --- the cached reference


def test_losses_with_the_cache_are_those_without(lab, tmp_path):
    """Four steps over other batches than those it was computed in, with the base as reference:
    float64, to 1e-12.
    """
    settings = {"dtype": torch.float64, "reference": "base", "lr": 1e-3}
    plain, cached = (make_trainer(lab, "dpo", tmp_path, **settings) for _ in range(2))
    cached.cache_reference()
    for _ in range(4):
        one, other = take_step(plain), take_step(cached)
        for name in one:
            assert_same(one[name], other[name])
    assert abs(one["rewards_chosen"]) > 1e-3


def test_with_the_cache_one_model_is_left(lab, tmp_path):
    """The reference's weights are gone from memory, not only from sight."""
    trainer = make_trainer(lab, "dpo", tmp_path)
    gone = weakref.ref(trainer.reference.transformer.wte)
    trainer.cache_reference()
    assert trainer.reference is None and gone() is None
    take_step(trainer)


def test_evaluations_with_the_cache_keep_all_but_kl(lab):
    """Step 0 is at ln 2 with rewards 0, and the win rate is that of a run without the cache."""
    settings = {"epochs": 0.4, "evaluations": 1}
    plain = train_stage(lab, "dpo", sweep="plain", **settings)
    cached = train_stage(lab, "dpo", sweep="cached", cache_reference=True, **settings)
    for one, other in zip(plain.metrics, cached.metrics, strict=True):
        assert one.keys() - other.keys() == ({"held_out_kl"} if "held_out_kl" in one else set())
        for name in other:
            assert_same(one[name], other[name], 1e-5)
    zero = cached.metrics[0]
    assert (
        zero["held_out_rewards_chosen"] == zero["held_out_margin"] == 0.0
        and "held_out_win_rate" in zero
    )


def test_the_adapter_switched_off_is_cached_and_kl_stays(lab):
    run = train_stage(
        lab, "dpo_lora", sweep="cached", cache_reference=True, epochs=1.0, evaluations=1, lr=5e-3
    )
    assert_same(run.metrics[1]["margin"], 0.0, 1e-6)
    assert run.metrics[0]["held_out_kl"] == 0.0 != run.metrics[-1]["held_out_kl"]
    assert (
        run.record["hyperparameters"]["cache_reference"] and abs(run.metrics[-1]["margin"]) > 1e-3
    )


def columns_of(folder, model, rows, show: bool = False) -> tuple[dict, dict]:
    recipe = PROFILES["smoke"].recipes["dpo"]
    task = Task("dpo", "dpo", recipe, rows, folder, folder, eval_batch=16)
    return reference.reference_columns(task, model, "packed", show)


def test_the_cache_is_read_where_model_and_data_are_the_same(lab, tmp_path, monkeypatch, capsys):
    """The second time nothing is computed, and the cost is the first one's."""
    rows = lab.train_pairs.to_list()
    first = columns_of(tmp_path, lab.load("sft"), rows, show=True)
    monkeypatch.setattr(reference, "logps_of", None)
    assert columns_of(tmp_path, lab.load("sft"), rows, show=True) == first
    said = capsys.readouterr().out
    assert "of 40 pairs: computed once, in" in said
    assert "of 40 pairs: read, computed before in" in said
    assert list(first[0]) == ["reference_chosen_logps", "reference_rejected_logps"]
    assert first[1]["reference_flops"] > 0 and first[1]["wall"] > 0


@pytest.mark.parametrize(
    "changed", ["a weight", "a token", "the order", "the source", "the versions"]
)
def test_the_cache_is_invalid_where_anything_changes(lab, tmp_path, monkeypatch, changed):
    """The smallest change computes anew, beside the old file, which stays valid for what it was."""
    rows, model = lab.train_pairs.to_list(), lab.load("sft")
    before = columns_of(tmp_path, model, rows)[0]
    if changed == "a weight":
        model.transformer.h[0].mlp.c_fc.bias.data[3] += 1e-3
    elif changed == "a token":
        rows[7]["chosen_ids"] = [*rows[7]["chosen_ids"][:-1], 5]
    elif changed == "the order":
        rows = rows[::-1]
    elif changed == "the source":
        monkeypatch.setattr(reference, "source_digest", lambda: "another")
    else:
        monkeypatch.setattr(reference, "versions", lambda: versions() | {"torch": "3"})
    after = columns_of(tmp_path, model, rows)[0]
    assert len(list((tmp_path / "reference").iterdir())) == 2
    assert (before == after) == (changed in ("the source", "the versions"))
    columns_of(tmp_path, lab.load("sft"), lab.train_pairs.to_list())
    assert len(list((tmp_path / "reference").iterdir())) == 2


def test_a_lora_adapter_does_not_count_to_the_references_weights(lab):
    """Off, it changes nothing: the same file serves before and after training it. A weight of the
    model does count.
    """
    model = models.add_lora(lab.load("sft"), lab.profile)
    before = reference.weights_digest(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 1.0
    assert reference.weights_digest(model) == before
    next(model.parameters()).data[0] += 1.0
    assert reference.weights_digest(model) != before


def test_the_cost_of_the_cache_is_counted_to_the_run(lab):
    """One epoch with every row once: the reference's forward passes are done before instead of
    during training, so the FLOPs of the run are the same (to 3 %: those of the steps are scaled up
    from the first batch).
    """
    settings = {"epochs": 1.0, "evaluations": 1, "nll_weight": 0.0}
    plain = train_stage(lab, "dpo", sweep="plain-cost", **settings).record
    cached = train_stage(lab, "dpo", sweep="cached-cost", cache_reference=True, **settings).record
    assert abs(cached["train_flops"] / plain["train_flops"] - 1) < 0.03
    twice = train_stage(
        lab, "dpo", sweep="cached-twice", cache_reference=True, **settings | {"epochs": 2.0}
    ).record
    assert twice["train_flops"] < 1.85 * plain["train_flops"]  # (1 + 2 · 3) / (2 · 4) of 2 is 1.75


def test_a_resumed_run_with_the_cache_is_bit_identical(lab, monkeypatch):
    """Ended before step 6 of 10, gone on from checkpoint 4: weights, metrics and counters of a run
    without a break.
    """
    settings = {"cache_reference": True, "session": Session(checkpoint_every=2)}
    whole = train_stage(lab, "dpo", sweep="whole", **settings)
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "step",
            lambda self, *batch: (
                step(self, *batch) if self.progress.step < 5 else pytest.fail("stopped")
            ),
        )
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            train_stage(lab, "dpo", sweep="broken", **settings)
    resumed = train_stage(lab, "dpo", sweep="broken", **settings)
    one, other = ((run.folder / "model.safetensors").read_bytes() for run in (whole, resumed))
    assert one == other and read_metrics(whole.folder) == read_metrics(resumed.folder)
    assert whole.record["train_flops"] == resumed.record["train_flops"]
    json.dumps(resumed.record)
