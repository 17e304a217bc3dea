"""Training: what a run leaves, reuse, accumulation, early stop, warnings, and exact resume after
any kind of end.
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import assert_same, make_trainer, take_step

from common import lab as runs
from common import models
from common.data import tokenize_pairs
from common.evaluation import logps_of
from common.io.files import read_metrics
from common.judges import RewardJudge
from common.lab import BrokenLineage, Lab, MissingRun
from common.profiles import PROFILES
from common.training import Session, Source, checkpoints, train_from_base
from common.training import __main__ as train
from common.training import train as train_stage
from common.training import trainer as loop
from common.training.held_out import HeldOut, signs_of_over_optimisation
from common.training.trainer import Trainer, TrainingError

TESTS = Path(__file__).parent
LN2 = math.log(2)


@pytest.fixture(scope="module")
def lab(trained_lab):
    return trained_lab


def weights_file(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def interrupt(patch, before_step: int) -> None:
    """Ends the run as Ctrl-C does, before the step of this number."""
    whole = Trainer.step

    def step(self, *batch):
        if self.progress.step + 1 == before_step:
            raise KeyboardInterrupt
        return whole(self, *batch)

    patch.setattr(Trainer, "step", step)


# --- what a run leaves


def test_run_json_has_the_keys_of_the_design(lab):
    record = json.loads((lab.path("sft") / "run.json").read_text())
    assert {
        "stage",
        "profile",
        "seed",
        "parent",
        "fingerprint",
        "model",
        "dataset",
        "n_pairs",
        "hyperparameters",
        "steps",
        "train_tokens",
        "train_flops",
        "wall_seconds",
        "cpu_seconds",
        "peak_memory_bytes",
        "device",
        "versions",
        "final",
    } <= record.keys()
    assert (record["stage"], record["profile"], record["seed"], record["parent"]) == (
        "sft",
        "smoke",
        0,
        "base",
    )
    assert (record["model"], record["dataset"]) == ("tiny-gpt2", "toyworld")
    assert (
        record["n_pairs"] == 57 and record["steps"] == 7
    )  # 60 demonstrations, 3 held out, 57 // 8 = 7 steps
    counts = (
        "train_flops",
        "simple_flops",
        "padded_tokens",
        "wall_seconds",
        "cpu_seconds",
        "peak_memory_bytes",
    )
    assert all(record[name] > 0 for name in counts)
    assert record["final"]["held_out_loss"] == read_metrics(lab.path("sft"))[-1]["held_out_loss"]


def test_a_run_folder_holds_the_model_and_tokenizer_and_no_checkpoint(lab):
    names = {path.name for path in lab.path("sft").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "run.json",
    } <= names
    assert not any(path.is_dir() for path in lab.path("sft").iterdir())


def test_metrics_have_one_row_a_step_and_row_0_before_training(lab):
    metrics = lab.metrics("sft")
    assert [row["step"] for row in metrics] == list(range(8))
    assert all({"loss", "lr", "tokens", "nll", "logps_chosen"} <= row.keys() for row in metrics[1:])
    assert (
        "loss" not in metrics[0]
        and {"held_out_loss", "held_out_logps_rejected"} <= metrics[0].keys()
    )


def test_the_loss_falls(lab):
    """120 lines and 57 demonstrations are enough for a model that starts with guessing among 500
    tokens.
    """
    for stage in ("base", "sft"):
        metrics = lab.metrics(stage)
        assert metrics[-1]["held_out_loss"] < metrics[0]["held_out_loss"] - 0.1
    assert abs(lab.metrics("base")[0]["held_out_loss"] - math.log(len(lab.tokenizer))) < 0.2


def test_train_tokens_count_every_token_of_prompts_and_responses(lab):
    """One batch of all 57 rows, twice."""
    run = train_stage(lab, "sft", sweep="tokens", batch_size=57, micro_batch=19, epochs=2)
    once = sum(
        len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in lab.demonstrations.to_list()[:57]
    )
    assert (run.record["steps"], run.record["train_tokens"]) == (2, 2 * once)


def test_train_tokens_of_pairs_count_the_prompt_on_both_sides(lab):
    """One batch of all 40 pairs: the model reads the prompt twice."""
    run = train_stage(lab, "dpo_plain", sweep="tokens", batch_size=40, micro_batch=40, epochs=1)
    rows = lab.train_pairs.to_list()
    read = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )
    assert (run.record["steps"], run.record["train_tokens"]) == (1, read)


def test_steps_visit_every_row_once_an_epoch_in_a_new_order(lab, tmp_path):
    trainer = make_trainer(lab, "dpo", tmp_path)  # 40 rows, 5 steps an epoch
    epochs = [
        [row for step in range(start, start + 5) for row in trainer.row_numbers(step)]
        for start in (0, 5)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]
    other = make_trainer(lab, "dpo", tmp_path, seed=1)
    assert other.row_numbers(0) != trainer.row_numbers(0)


def test_the_learning_rate_warms_up_and_falls_to_nothing(lab, tmp_path):
    """10 steps, a tenth of warm-up: step 1 at 0, step 2 at the peak, then linear, a ninth less each
    step.
    """
    trainer = make_trainer(lab, "dpo", tmp_path, lr=0.9e-3, epochs=2)
    rates = [take_step(trainer)["lr"] for _ in range(10)]
    assert_same(torch.tensor(rates), [0.0] + [0.9e-3 - 1e-4 * step for step in range(9)], 1e-9)


# --- DPO


@pytest.fixture(scope="module")
def dpo(lab):
    return train_stage(lab, "dpo_plain", epochs=2)


def test_dpo_starts_at_ln_2(lab, dpo):
    """Before the first step policy and reference are the same: on held-out pairs, and in the first
    batch.
    """
    zero, first = dpo.metrics[0], dpo.metrics[1]
    assert_same(zero["held_out_loss"], LN2)
    assert (
        zero["held_out_rewards_chosen"]
        == zero["held_out_rewards_rejected"]
        == zero["held_out_margin"]
        == 0.0
    )
    assert zero["held_out_accuracy"] == 0.5 and zero["held_out_kl"] == 0.0
    assert_same(first["loss"], LN2)


def test_dpo_logs_rewards_and_both_log_probabilities(dpo):
    names = {
        "rewards_chosen",
        "rewards_rejected",
        "margin",
        "accuracy",
        "logps_chosen",
        "logps_rejected",
        "nll",
    }
    for row in dpo.metrics[1:]:
        assert names <= row.keys()
        assert_same(row["margin"], row["rewards_chosen"] - row["rewards_rejected"], 1e-9)
    assert {"held_out_kl", "held_out_win_rate"} <= dpo.metrics[-1].keys()


def test_dpo_raises_the_margin_of_the_pairs_it_trains_on(lab):
    """The same 8 pairs, 12 times over."""
    pairs = lab.data.train.select(range(8))
    run = train_stage(
        lab,
        "dpo_plain",
        sweep="eight",
        source=Source(pairs=pairs),
        epochs=12,
        lr=2e-3,
        evaluations=1,
    )
    assert run.metrics[-1]["margin"] > 0.2 and run.metrics[-1]["loss"] < LN2 - 0.05


def test_the_saved_model_is_the_returned_one(lab, dpo):
    loaded = lab.load("dpo_plain")
    assert_same(
        logps_of(loaded, lab.test_pairs).chosen.sums,
        logps_of(dpo.model, lab.test_pairs).chosen.sums,
    )
    assert not loaded.training and not dpo.model.training


def test_another_reference_shifts_the_start(lab):
    """With the base as reference the SFT model is not at ln 2 any more: the step-0 check finds a
    wrong reference.
    """
    run = train_stage(
        lab,
        "dpo_plain",
        sweep="base-reference",
        source=Source(reference="base"),
        epochs=0.2,
        evaluations=1,
    )
    assert run.record["reference"] == "base" and run.record["parent"] == "sft"
    assert abs(run.metrics[0]["held_out_loss"] - LN2) > 1e-4
    assert run.metrics[0]["held_out_kl"] > 0


def test_dpo_through_lora_starts_at_ln_2_without_a_second_model(lab, monkeypatch):
    """A fresh adapter switched off is the reference. The finished model has merged weights."""
    built, build = [], Trainer.__init__

    def watched(self, task, accelerator, policy, reference, evaluate):
        built.append(reference)
        build(self, task, accelerator, policy, reference, evaluate)

    monkeypatch.setattr(Trainer, "__init__", watched)
    run = train_stage(lab, "dpo_lora", nll_weight=0.0, lr=5e-3)
    assert built == [None]
    assert_same(run.metrics[0]["held_out_loss"], LN2)
    assert_same(run.metrics[1]["loss"], LN2)
    assert run.metrics[-1]["held_out_loss"] != LN2
    saved = load_file(run.folder / "model.safetensors")
    assert not [name for name in saved if "lora" in name]
    moved, parent = (
        logps_of(lab.load("dpo_lora"), lab.test_pairs),
        logps_of(lab.load("sft"), lab.test_pairs),
    )
    assert_same(moved.chosen.sums, logps_of(run.model, lab.test_pairs).chosen.sums)
    rewards = 0.1 * (moved.chosen.sums - parent.chosen.sums).mean().item()
    assert abs(rewards - run.metrics[-1]["held_out_rewards_chosen"]) < 1e-4  # merged = adapter on
    assert abs(rewards) > 1e-2


# --- the other stages


def test_orpo_needs_no_reference(lab):
    run = train_stage(lab, "orpo", epochs=0.4, evaluations=1)
    assert run.record["reference"] is None and run.record["parent"] == "base"
    assert {"odds_ratio_loss", "log_odds_margin", "nll", "accuracy"} <= run.metrics[-1].keys()


@pytest.mark.parametrize("nll_on_prompt", [True, False])
def test_the_nll_of_orpo_covers_the_prompt_where_the_recipe_says_so(lab, tmp_path, nll_on_prompt):
    """The first batch, row by row without padding, in float64: nats over tokens, the prompt from
    its second token.
    """
    trainer = make_trainer(
        lab, "orpo", tmp_path, torch.float64, nll_on_prompt=nll_on_prompt, lambda_or=0.0
    )
    parts = []
    with torch.no_grad():
        for row in (trainer.rows[number] for number in trainer.row_numbers(0)):
            prompt, chosen = tiny.naive_token_logps(
                trainer.model, row["prompt_ids"], row["chosen_ids"]
            )
            parts += [prompt, chosen] if nll_on_prompt else [chosen]
    logged = take_step(trainer)
    assert_same(logged["loss"], -torch.cat(parts).mean(), 1e-9)
    assert_same(logged["nll"], logged["loss"])


def test_a_reward_model_learns_pairs_that_are_easy_to_tell_apart(lab):
    """Kind answers against rude ones, the same two throughout: it must be right on prompts it has
    never seen.
    """

    def pairs(rows):
        return [
            {"prompt": row["prompt"], "chosen": " With pleasure.", "rejected": " Go away!"}
            for row in rows
        ]

    train_pairs = lab.data.train.from_list(pairs(lab.data.train))
    run = train_stage(
        lab,
        "reward",
        sweep="easy",
        source=Source(pairs=train_pairs),
        lr=5e-3,
        epochs=4,
        evaluations=1,
    )
    judge = RewardJudge(
        run.model, lab.tokenizer, tokenize_pairs(pairs(lab.data.test), lab.tokenizer, 160)[0]
    )
    assert judge.held_out_accuracy == 1.0
    questions = [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs(lab.data.test)]
    assert judge.prefer(questions) == [1] * len(questions)
    assert run.metrics[-1]["loss"] < 0.5 < run.metrics[1]["loss"]


def test_the_saved_reward_model_keeps_its_head(lab):
    run = train_stage(lab, "reward", sweep="head", epochs=0.4, evaluations=1)
    loaded = lab.load("reward", "head")
    assert_same(loaded.head.weight.detach(), run.model.head.weight.detach())


def test_a_stage_without_its_parent_names_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    with pytest.raises(
        MissingRun,
        match="02-SFT_Baseline.ipynb first, or: python -m common.training sft --profile smoke",
    ):
        train_stage(Lab(tiny.micro_profile()), "dpo")


def test_unknown_stages_and_fields_are_refused(lab):
    with pytest.raises(ValueError, match="Unknown stage 'ppo'"):
        train_stage(lab, "ppo")
    with pytest.raises(ValueError, match="rate"):
        train_stage(lab, "sft", rate=1.0)


def test_the_base_of_a_pre_trained_model_is_not_trained(lab):
    with pytest.raises(ValueError, match="openai-community/gpt2 itself: there is nothing to train"):
        train_stage(Lab(PROFILES["gpt2"]), "base")


# --- reuse


def test_a_finished_run_is_reused(lab, dpo, monkeypatch, capsys):
    """Not a step is trained: the trainer is gone."""
    monkeypatch.setattr("common.training.Trainer", None)
    again = train_stage(lab, "dpo_plain", epochs=2)
    assert "dpo_plain: reused" in capsys.readouterr().out

    assert again.record == json.loads(json.dumps(dpo.record)) and again.metrics == dpo.metrics


def test_a_stage_is_trained_after_what_it_starts_from(lab, monkeypatch, capsys):
    """Each stage once, its parents first. The base of a pre-trained model is there already."""
    trained = []
    monkeypatch.setattr(
        "common.training.train", lambda _, stage, figure: trained.append(stage) or stage
    )
    assert train_from_base(lab, "dpo", "sft") == {name: name for name in ("base", "sft", "dpo")}
    assert trained == ["base", "sft", "dpo"]
    trained.clear()
    train_from_base(Lab(PROFILES["gpt2"]), "orpo", "dpo")
    assert trained == ["orpo", "sft", "dpo"]
    assert "base: openai-community/gpt2 itself" in capsys.readouterr().out


def test_a_run_says_its_fingerprint_when_it_is_trained_and_when_it_is_reused(lab, capsys):
    for word in ("trained in", "reused"):
        run = train_stage(lab, "sft_chosen", sweep="said", epochs=0.2)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if word in line]
        assert line.startswith("said: ") and f"(fingerprint {run.record['fingerprint']})" in line


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        ("settings", lambda lab, patch: {"lr": 1e-5}),
        ("data", lambda lab, patch: {"source": Source(pairs=lab.data.train.select(range(30)))}),
        (
            "source",
            lambda lab, patch: patch.setattr(runs, "source_digest", lambda: "another") or {},
        ),
        (
            "versions",
            lambda lab, patch: patch.setattr(runs, "versions", lambda: {"torch": "3"}) or {},
        ),
        ("parent", lambda lab, patch: {"source": Source("base", "sft")}),
        ("reference", lambda lab, patch: {"source": Source(reference="base")}),
    ],
)
def test_a_change_makes_a_run_stale_and_is_named(lab, dpo, monkeypatch, capsys, changed, change):
    settings = {"epochs": 2, **change(lab, monkeypatch)}
    monkeypatch.setattr("common.training.Trainer", None)
    with pytest.raises(TypeError):  # it would train again
        train_stage(lab, "dpo_plain", **settings)
    assert f"dpo_plain: trained again, since it changed in: {changed}\n" in capsys.readouterr().out


def test_a_run_that_starts_is_no_longer_the_finished_one(lab, monkeypatch):
    """From the first step on, run.json is gone: its weights are about to be replaced."""
    train_stage(lab, "sft", sweep="replaced", epochs=0.2, evaluations=1)
    interrupt(monkeypatch, before_step=1)
    with pytest.raises(KeyboardInterrupt):
        train_stage(lab, "sft", sweep="replaced", epochs=0.2, evaluations=1, lr=1e-4)
    with pytest.raises(MissingRun):
        lab.record("sft", "replaced")


# --- accumulation


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {}),
        ("dpo", {"nll_weight": 1.0}),
        ("orpo", {}),
        ("reward", {}),
    ],
)
def test_accumulation_equals_one_large_batch(lab, tmp_path, stage, changes):
    """Three steps of 8 ragged rows at once, or as 3 + 3 + 2: losses to 1e-12 and weights to 1e-9,
    in float64.
    """
    large = make_trainer(lab, stage, tmp_path, torch.float64, micro_batch=8, lr=1e-3, **changes)
    small = make_trainer(lab, stage, tmp_path, torch.float64, micro_batch=3, lr=1e-3, **changes)
    assert [len(batch["prompt_ids"]) for batch in small.micro_batches(small.rows[:8])] == [3, 3, 2]
    before = [parameter.detach().clone() for parameter in large.model.parameters()]
    for _ in range(3):
        one, other = take_step(large), take_step(small)
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    for one, other in zip(large.model.parameters(), small.model.parameters(), strict=True):
        assert_same(one.detach(), other.detach(), 1e-9)
    moved = [
        (new - old).abs().max().item()
        for new, old in zip(large.model.parameters(), before, strict=True)
    ]
    assert max(moved) > 1e-4


def test_a_micro_batch_of_one_is_checked_with_two_rows(lab, tmp_path, monkeypatch):
    """How far mere batching moves a row in 16 bit is seen only where a batch has more than one."""
    seen = []
    monkeypatch.setattr(
        loop, "checked_path", lambda model, batches, _: seen.extend(batches) or ("packed", "a test")
    )
    train_stage(lab, "sft", sweep="ones", micro_batch=1, batch_size=4, epochs=0.1)
    assert [len(batch["prompt_ids"]) for batch in seen] == [2, 1]


def test_gradients_are_clipped(lab, tmp_path):
    """With a clip of 0 nothing moves but by weight decay, which is off."""
    trainer = make_trainer(lab, "sft", tmp_path, clip=0.0)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    take_step(trainer), take_step(trainer)
    assert all(
        torch.equal(new, old) for new, old in zip(trainer.model.parameters(), before, strict=True)
    )


# --- stopping, the best weights, and warnings


def test_early_stopping_stops(lab):
    """A learning rate of 0: the held-out loss never gets better than at the first evaluation, so
    the third ends it.
    """
    run = train_stage(lab, "sft", sweep="early", lr=0.0, epochs=2, evaluations=7, patience=2)
    assert run.record["stopped_early"] and (run.record["steps"], run.record["best_step"]) == (6, 2)
    assert [row["step"] for row in run.metrics] == list(range(7))


def test_a_better_loss_sets_the_patience_back(lab, monkeypatch):
    """Held-out losses 4, 5, 3, 5, 6, 7 with patience 2: one bad evaluation, a better one, then two
    bad ones.
    """
    losses = dict(enumerate((9.0, 4.0, 5.0, 3.0, 5.0, 6.0, 7.0)))
    monkeypatch.setattr(
        HeldOut, "measures", lambda self, trainer: {"held_out_loss": losses[trainer.progress.step]}
    )
    run = train_stage(lab, "sft", sweep="patience", evaluations=7, patience=2, keep_best=False)
    assert run.record["stopped_early"] and (run.record["steps"], run.record["best_step"]) == (5, 3)


def test_patience_0_never_stops(lab):
    run = train_stage(
        lab, "sft", sweep="late", lr=0.0, epochs=1, evaluations=7, patience=0, keep_best=False
    )
    assert not run.record["stopped_early"] and run.record["steps"] == 7


@pytest.mark.parametrize("keep_best", [True, False])
def test_keep_best_ends_with_the_weights_of_the_best_evaluation(lab, monkeypatch, keep_best):
    """Held-out losses 4, 2, 3 at steps 2, 4, 6 of 6: the best is step 4, the last step 6."""
    seen = {}

    def evaluate(self, trainer):
        step = trainer.progress.step
        seen[step] = trainer.model.transformer.wte.weight.detach().clone()
        return {"held_out_loss": {0: 9.0, 2: 4.0, 4: 2.0, 6: 3.0}[step]}

    monkeypatch.setattr(HeldOut, "measures", evaluate)
    sweep = f"best-{keep_best}"
    run = train_stage(
        lab, "sft", sweep=sweep, batch_size=9, epochs=1, evaluations=3, keep_best=keep_best
    )
    assert run.record["best_step"] == 4 and not torch.equal(seen[4], seen[6])
    expected = seen[4 if keep_best else 6]
    assert torch.equal(run.model.transformer.wte.weight.detach(), expected)
    assert torch.equal(lab.load("sft", run.folder.name).transformer.wte.weight.detach(), expected)


def healthy() -> list[dict]:
    """Three evaluations of a run in which all goes well."""
    ends = {0: (0.70, 3.0, 0.0, 0.5), 2: (0.65, 2.9, 1.0, 0.6), 4: (0.60, 2.8, 2.0, 0.7)}
    metrics = [{"step": step, "loss": 0.7 - 0.05 * step, "accuracy": 0.8} for step in range(5)]
    for step, (loss, nll, kl, rate) in ends.items():
        metrics[step] |= {
            "held_out_loss": loss,
            "held_out_nll": nll,
            "held_out_kl": kl,
            "held_out_win_rate": rate,
        }
    return metrics


def test_a_healthy_run_has_no_warning():
    assert signs_of_over_optimisation(healthy()) == []
    assert (
        signs_of_over_optimisation(healthy()[:3]) == signs_of_over_optimisation(healthy()[:1]) == []
    )


@pytest.mark.parametrize(
    ("sign", "where", "value"),
    [
        ("KL to the reference is 20.5 nats", slice(4, 5), {"held_out_kl": 20.5}),
        ("Training accuracy is 0.960", slice(3, 5), {"accuracy": 0.96}),
        ("The loss falls but the held-out NLL rises to 3.000", slice(4, 5), {"held_out_nll": 3.0}),
        ("The loss falls but the win rate falls to 0.50", slice(4, 5), {"held_out_win_rate": 0.5}),
    ],
)
def test_each_sign_of_over_optimisation_is_named_with_its_remedies(sign, where, value):
    """Exactly one warning: it names the number and what to do."""
    metrics = healthy()
    for row in metrics[where]:
        row |= value
    [warning] = signs_of_over_optimisation(metrics)
    assert warning.startswith(sign)
    assert warning.endswith("stop earlier, raise beta, or lower the learning rate.")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (slice(4, 5), {"held_out_kl": 20.0}),
        (slice(3, 5), {"accuracy": 0.95}),
        (slice(0, 3), {"accuracy": 1.0}),  # before the last evaluation: warned of then
        (slice(4, 5), {"held_out_nll": 2.95}),  # 2.9 + 1.7 %
        (slice(4, 5), {"held_out_win_rate": 0.56}),  # 0.6 - 0.04
    ],
)
def test_at_the_limit_there_is_no_warning(where, value):
    metrics = healthy()
    for row in metrics[where]:
        row |= value
    assert signs_of_over_optimisation(metrics) == []


def test_while_the_loss_rises_the_held_out_signs_are_silent():
    """Then training itself fails, which the loss shows."""
    metrics = healthy()
    metrics[3]["loss"] = metrics[4]["loss"] = 2.0
    metrics[4] |= {"held_out_nll": 4.0, "held_out_win_rate": 0.1}
    assert signs_of_over_optimisation(metrics) == []


def test_warnings_are_kept_in_the_record(lab, monkeypatch):
    monkeypatch.setattr(
        HeldOut, "measures", lambda self, trainer: {"held_out_loss": 1.0, "held_out_kl": 21.0}
    )
    run = train_stage(lab, "sft", sweep="warned", epochs=0.4, evaluations=1, keep_best=False)
    assert [warning.split(" nats")[0] for warning in run.record["warnings"]] == [
        "step 3: KL to the reference is 21.0"
    ]


# --- NaN


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(lab, tmp_path, monkeypatch):
    """Step 2 of 8 rows: the message names both, and the weights are still those of step 1."""
    trainer = make_trainer(lab, "dpo", tmp_path, lr=1e-3)
    take_step(trainer)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    whole = trainer.loss
    monkeypatch.setattr(
        trainer, "loss", lambda *args: (whole(*args)[0] * math.nan, whole(*args)[1])
    )
    with pytest.raises(TrainingError) as failure:
        take_step(trainer)
    rows = trainer.row_numbers(1)
    assert f"not finite at step 2 (rows {rows})" in str(failure.value) and len(rows) == 8
    assert "'loss': nan" in str(failure.value) and "weights are still those of step 1" in str(
        failure.value
    )
    assert all(
        torch.equal(new, old) for new, old in zip(trainer.model.parameters(), before, strict=True)
    )


def test_an_odds_ratio_that_is_not_finite_does_not_blame_the_text(lab, tmp_path, monkeypatch):
    """The NLL is finite, so the rows are sound: the message names the term and the remedy."""
    trainer = make_trainer(lab, "orpo", tmp_path)
    loss, metrics = trainer.loss(*trainer.micro_batches(trainer.next_batch()), 8, 100)
    broken = metrics | {"odds_ratio_loss": torch.tensor(math.inf)}
    monkeypatch.setattr(trainer, "loss", lambda *_: (loss * math.inf, broken))
    monkeypatch.setattr(trainer, "count_flops", lambda *_: {"simple": 1.0})
    monkeypatch.setattr(trainer.accelerator, "backward", lambda _: None)
    with pytest.raises(TrainingError, match="Not finite: loss, odds_ratio_loss.*lower lambda_or"):
        trainer.backward(trainer.next_batch())


def test_a_learning_rate_that_blows_up_stops_the_run(lab):
    """Nothing is saved as finished, and the checkpoint before it stays."""
    with pytest.raises(TrainingError, match=r"not finite at step \d"):
        train_stage(
            lab,
            "sft",
            sweep="nan",
            lr=1e30,
            evaluations=1,
            session=Session(checkpoint_every=1),
            warmup=0.0,
        )
    with pytest.raises(MissingRun):
        lab.record("sft", "nan")
    assert checkpoints.newest(lab.path("sft", "nan")) is not None


# --- checkpoints and resume


@pytest.fixture(scope="module")
def uninterrupted(lab):
    """Stages trained without a break, by name of the sweep."""
    done = {}

    def run(stage: str, **settings):
        if stage not in done:
            done[stage] = train_stage(lab, stage, sweep=f"whole-{stage}", **settings)
        return done[stage]

    return run


@pytest.mark.parametrize(
    ("stage", "before_step", "every"),
    [
        ("dpo", 1, 1),
        ("dpo", 10, 1),
        ("dpo", 9, 4),
        ("dpo_lora", 5, 2),
        ("sft", 6, 2),
        ("reward", 4, 1),
    ],
)
def test_a_resumed_run_is_bit_identical(lab, uninterrupted, stage, before_step, every):
    """Ended before a step, gone on from the newest checkpoint, which may be steps back: weights,
    metrics and counters are those of a run without a break. SFT keeps its best weights and
    accumulates on the way.
    """
    settings = {"micro_batch": 3} if stage == "sft" else {}
    whole, sweep = uninterrupted(stage, **settings), f"broken-{stage}-{before_step}-{every}"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, before_step)
        with pytest.raises(KeyboardInterrupt):
            train_stage(
                lab, stage, sweep=sweep, session=Session(checkpoint_every=every), **settings
            )
    saved = checkpoints.newest(lab.path(stage, sweep))
    assert (checkpoints.read_state(saved)["step"] if saved else 0) == (
        before_step - 1
    ) // every * every
    resumed = train_stage(lab, stage, sweep=sweep, session=Session(True, every), **settings)
    assert weights_file(resumed.folder) == weights_file(whole.folder)
    assert read_metrics(resumed.folder) == read_metrics(whole.folder)
    measured = {"wall_seconds", "cpu_seconds", "evaluation_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in resumed.record.items() if k not in measured} == {
        k: v for k, v in whole.record.items() if k not in measured
    }


def test_a_resumed_run_is_bit_identical_with_dropout_too(lab, monkeypatch):
    """SFT of a model with dropout draws random numbers at every step: their state is in the
    checkpoint.
    """
    load = models.load_model

    def with_dropout(*args, **options):
        model = load(*args, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return model

    monkeypatch.setattr(models, "load_model", with_dropout)
    whole = train_stage(lab, "sft", sweep="whole-dropout")
    with monkeypatch.context() as patch:
        interrupt(patch, before_step=5)
        with pytest.raises(KeyboardInterrupt):
            train_stage(lab, "sft", sweep="broken-dropout", session=Session(checkpoint_every=3))
    torch.manual_seed(99)
    resumed = train_stage(lab, "sft", sweep="broken-dropout", session=Session(checkpoint_every=3))
    assert (
        weights_file(resumed.folder) == weights_file(whole.folder) != weights_file(lab.path("sft"))
    )


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
kill_at = int(sys.argv.pop(1))
import tiny
from accelerate import Accelerator
from common.profiles import PROFILES
from common.training.__main__ import main
PROFILES["smoke"] = tiny.micro_profile()
whole = Accelerator.save_state

def save_state(self, folder, *args, **kwargs):
    whole(self, folder, *args, **kwargs)
    save_state.calls += 1
    if save_state.calls == kill_at:
        half = os.path.join(folder, "model.safetensors")
        os.truncate(half, os.path.getsize(half) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

save_state.calls = 0
Accelerator.save_state = save_state
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_in_the_middle_of_a_checkpoint_and_resume_is_bit_identical(
    lab, uninterrupted, monkeypatch, capsys
):
    """`python -m common.training dpo --checkpoint-every 1` is killed while it writes checkpoint 5,
    its weights half on disk. `--resume` goes on from checkpoint 4, and the weights are those of a
    run without a break.
    """
    whole, folder = uninterrupted("dpo"), lab.path("dpo", "killed")
    arguments = ["dpo", "--profile", "smoke", "--sweep", "killed", "--checkpoint-every", "1"]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(TESTS), "5", *arguments], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (folder / "partial-checkpoint" / "model.safetensors").exists() and not (
        folder / "run.json"
    ).exists()
    assert checkpoints.newest(folder).name == "checkpoint-00000004"
    monkeypatch.setitem(PROFILES, "smoke", lab.profile)
    assert train.main([*arguments, "--resume"]) == 0
    assert "dpo: resumed at step 4 of 10" in capsys.readouterr().out
    assert weights_file(folder) == weights_file(whole.folder)
    assert read_metrics(folder) == read_metrics(whole.folder)


def test_a_half_written_checkpoint_is_never_seen(tmp_path):
    """The newest whole one is found by number, 10 after 9, whatever else lies there."""
    assert checkpoints.newest(tmp_path / "none") is None
    for name in (
        "partial-checkpoint",
        "checkpoint-00000009",
        "checkpoint-00000010",
        "best",
        ".checkpoint-00000011-x",
    ):
        (tmp_path / name).mkdir()
    assert checkpoints.newest(tmp_path).name == "checkpoint-00000010"


def test_a_checkpoint_of_other_settings_is_not_resumed(lab, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, before_step=3)
        with pytest.raises(KeyboardInterrupt):
            train_stage(lab, "sft", sweep="other", session=Session(checkpoint_every=1))
    run = train_stage(lab, "sft", sweep="other", lr=1e-4, session=Session(checkpoint_every=1))
    said = capsys.readouterr().out
    assert "of other settings or data; starting anew" in said and "resumed" not in said
    assert [row["step"] for row in run.metrics] == list(range(8))


def test_without_resume_a_run_starts_anew(lab, uninterrupted, monkeypatch, capsys):
    whole = uninterrupted("reward")
    with monkeypatch.context() as patch:
        interrupt(patch, before_step=3)
        with pytest.raises(KeyboardInterrupt):
            train_stage(lab, "reward", sweep="anew", session=Session(checkpoint_every=1))
    run = train_stage(lab, "reward", sweep="anew", session=Session(resume=False))
    assert "resumed" not in capsys.readouterr().out
    assert weights_file(run.folder) == weights_file(whole.folder)


def fill_disk(patch, at_call: int) -> None:
    """From the given call on, half a weights file is written and then the disk is full."""
    whole, calls = Accelerator.save_state, []

    def save_state(self, folder, *args, **kwargs):
        calls.append(folder)
        if len(calls) >= at_call:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, folder, *args, **kwargs)

    patch.setattr(Accelerator, "save_state", save_state)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(lab, uninterrupted, monkeypatch):
    """The third checkpoint does not fit. The second is intact, the message says so, and a resumed
    run ends the same.
    """
    whole = uninterrupted("reward")
    with monkeypatch.context() as patch:
        fill_disk(patch, at_call=3)
        with pytest.raises(checkpoints.CheckpointError) as failure:
            train_stage(lab, "reward", sweep="full", session=Session(checkpoint_every=1))
    said = str(failure.value)
    assert "checkpoint of step 3 was not written" in said and "No space left on device" in said
    assert (
        "The one of step 2 is intact" in said and "make room or set LAB_RUNS, then resume" in said
    )
    assert re.search(r"\d GB are free", said)
    folder = lab.path("reward", "full")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "checkpoint-00000002"
    ]
    resumed = train_stage(lab, "reward", sweep="full")
    assert weights_file(resumed.folder) == weights_file(whole.folder)


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(lab, monkeypatch):
    fill_disk(monkeypatch, at_call=1)
    with pytest.raises(
        checkpoints.CheckpointError, match="step 1 was not written.*There is none before it"
    ):
        train_stage(lab, "reward", sweep="full at once", session=Session(checkpoint_every=1))


def test_a_new_checkpoint_replaces_the_old_one(lab, tmp_path):
    """Only the newest is kept, and it holds what a resumed run needs."""
    trainer = make_trainer(lab, "sft", tmp_path)
    for _ in range(2):
        take_step(trainer)
        checkpoints.save(trainer.accelerator, tmp_path, asdict(trainer.progress))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]
    names = {path.name for path in (tmp_path / "checkpoint-00000002").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer.json"} <= names


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(
    lab, tmp_path, monkeypatch, error
):
    """Root may write anywhere, so the refusal is put in os.mkdir's mouth."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "locked"))
    whole = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "locked" in str(path):
            raise error
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match=r"locked.*Set LAB_RUNS to a folder of your own"):
        train_stage(Lab(lab.profile), "base")


def test_a_file_where_the_run_folder_should_be_is_named_with_what_to_do(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "taken"))
    monkeypatch.setitem(PROFILES, "smoke", tiny.micro_profile())
    assert train.main(["base"]) == 1
    assert (
        "taken" in (said := capsys.readouterr().err)
        and "Set LAB_RUNS to a folder of your own" in said
    )


def test_weights_that_blow_up_in_the_last_step_stop_the_run(lab, monkeypatch):
    """The loss of a step is of the weights before it: only the held-out loss sees the last one."""
    monkeypatch.setattr(
        HeldOut,
        "measures",
        lambda self, trainer: {"held_out_loss": math.nan if trainer.progress.step else 1.0},
    )
    with pytest.raises(TrainingError, match="held-out loss is not finite after step"):
        train_stage(lab, "sft", sweep="nan-at-the-end", evaluations=1, keep_best=False)


def test_orpo_without_its_odds_ratio_term_is_sft_on_the_chosen_answers(lab):
    """lambda 0 leaves the NLL of the chosen answer alone: with the same scope, rate and epochs, the
    same weights.
    """
    same = {"lr": 1e-3, "epochs": 1.0, "evaluations": 1}
    control = train_stage(lab, "orpo_lambda0", sweep="lambda0", **same)
    imitation = train_stage(lab, "sft_chosen", sweep="imitation", **same)
    assert weights_file(control.folder) == weights_file(imitation.folder)
    other = train_stage(lab, "orpo", sweep="with-odds", **same)
    assert weights_file(control.folder) != weights_file(other.folder)


def test_a_model_whose_parent_was_trained_again_is_not_loaded(lab, tmp_path):
    """The weights of `dpo` belong to one `sft`; beside another one every KL and margin would be
    wrong.
    """
    own = Lab(lab.profile)
    shutil.copytree(lab.folder, tmp_path / lab.profile.run_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path))
        train_stage(own, "dpo", evaluations=1)
        base, sft, dpo = own.lineage("dpo")
        assert (base, sft) == (own.record("base")["fingerprint"], own.record("sft")["fingerprint"])
        assert dpo == own.record("dpo")["fingerprint"]
        train_stage(own, "sft", lr=2e-3, evaluations=1)
        with pytest.raises(
            BrokenLineage,
            match="dpo was trained from another sft .*03-DPO_Training.*common.training dpo",
        ):
            own.load("dpo")
        assert own.load("sft")
