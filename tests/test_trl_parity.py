"""Our DPO and ORPO against TRL's trainers: same tokens, log-probabilities, losses, gradients."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from tiny import assert_same

from common.data import collate, tokenize_pairs
from common.logprobs import response_logps
from common.losses import objective, scored_tokens
from common.models import new_tiny_model
from common.profiles import Recipe

BETA = 0.3
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PAIRS = [  # prompts and responses of very different lengths
    {
        "prompt": f"{HUMAN} What is the kettle for?{ASSISTANT}",
        "chosen": " Boiling water.",
        "rejected": " No.",
    },
    {
        "prompt": f"{HUMAN} Hi{ASSISTANT}",
        "chosen": " Hello!",
        "rejected": " What a silly question, ask somebody else.",
    },
    {
        "prompt": f"{HUMAN} Hello{ASSISTANT} Yes?{HUMAN} How do I clean it?{ASSISTANT}",
        "chosen": " With warm vinegar, because it dissolves the lime. Rinse it twice afterwards.",
        "rejected": " ¿Qué? 水",
    },
    {
        "prompt": f"{HUMAN} Why is that best?{ASSISTANT}",
        "chosen": " It is.",
        "rejected": " It is not.",
    },
]
LIMIT = 128
NAMES = {  # TRL's metrics and ours
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def tokenised(tokenizer):
    rows, report = tokenize_pairs(PAIRS, tokenizer, LIMIT)
    assert report.kept == len(PAIRS) and not report.cut
    return rows.to_list()


@pytest.fixture(scope="module")
def models(tokenizer):
    """(policy, reference): two different tiny models with sharp predictions, in float32."""
    profile = tiny.micro_profile(max_length=LIMIT)
    pair = [new_tiny_model(profile, tokenizer, seed) for seed in (1, 2)]
    for model in pair:
        for parameter in model.parameters():
            parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    return pair


def arguments(config, tmp_path, **settings):
    """Every default that would change a number is set: precision, checkpoints, length, logging."""
    return config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(PAIRS),
        beta=BETA,
        max_length=LIMIT,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
        **settings,
    )


def dpo_trainer(tmp_path, tokenizer, models, loss_type):
    from trl import DPOConfig, DPOTrainer

    policy, reference = copy.deepcopy(models)  # TRL patches the models that it is given
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(DPOConfig, tmp_path, loss_type=loss_type),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def backward(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and max(g.abs().max() for g in theirs.values()) > 1e-2
    for name, gradient in theirs.items():
        assert_same(ours[name], gradient, 1e-5)


def our_dpo(models, rows, recipe):
    policy, reference = copy.deepcopy(models)
    batch = collate(rows)
    logps = response_logps(policy, batch)
    with torch.no_grad():
        reference_logps = response_logps(reference, batch)
    loss, metrics = objective(
        "dpo", recipe, logps, reference_logps, len(rows), scored_tokens(rows, recipe)
    )
    return loss, backward(policy, loss), metrics, logps, reference_logps


def test_trl_tokenises_to_the_same_ids(tmp_path, tokenizer, models, tokenised):
    """TRL appends EOS and splits by common prefix; we tokenise once and split by offsets."""
    theirs = dpo_trainer(tmp_path, tokenizer, models, ["sigmoid"]).train_dataset.to_list()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [row[name] for row in theirs] == [row[name] for row in tokenised]


def test_dpo_log_probabilities_equal_trl(tmp_path, tokenizer, models, tokenised):
    """Per pair, for both models."""
    trainer = dpo_trainer(tmp_path, tokenizer, models, ["sigmoid"])
    batch = trainer.data_collator(trainer.train_dataset.to_list())
    _, _, _, policy, reference = our_dpo(models, tokenised, Recipe(lr=1))
    for model, ours in ((trainer.model, policy), (trainer.ref_model, reference)):
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        assert_same(ours.chosen.sums, chosen, 1e-5)
        assert_same(ours.rejected.sums, rejected, 1e-5)


@pytest.mark.parametrize(
    ("loss_type", "nll_weight"),
    [(["sigmoid"], 0.0), (["sigmoid", "sft"], 1.0)],
    ids=["plain", "with NLL"],
)
def test_dpo_loss_and_gradients_equal_trl(
    tmp_path, tokenizer, models, tokenised, loss_type, nll_weight
):
    """And the metrics: rewards (beta included), margin, accuracy, log-probabilities."""
    trainer = dpo_trainer(tmp_path, tokenizer, models, loss_type)
    theirs = trainer.compute_loss(
        trainer.model, trainer.data_collator(trainer.train_dataset.to_list())
    )
    gradients = backward(trainer.model, theirs)
    loss, our_gradients, metrics, _, _ = our_dpo(
        models, tokenised, Recipe(lr=1, beta=BETA, nll_weight=nll_weight)
    )
    assert_same(loss.detach(), theirs.detach(), 1e-5)
    assert_same_gradients(our_gradients, gradients)
    logged = trainer._metrics["train"]
    for theirs_name, our_name in NAMES.items():
        assert_same(torch.as_tensor(metrics[our_name]).detach(), logged[theirs_name][-1], 1e-5)


def test_orpo_loss_and_gradients_equal_trl(tmp_path, tokenizer, models, tokenised):
    """TRL's `beta` is our lambda; its NLL covers prompt and chosen answer, averaged over the tokens
    of the batch.
    """
    orpo = pytest.importorskip(
        "trl.experimental.orpo", reason="this TRL has no experimental ORPO trainer any more"
    )
    trainer = orpo.ORPOTrainer(
        model=copy.deepcopy(models[0]),
        args=arguments(orpo.ORPOConfig, tmp_path),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    rows = trainer.train_dataset.to_list()
    for side in ("chosen", "rejected"):
        ours = [row["prompt_ids"] + row[f"{side}_ids"] for row in tokenised]
        assert [row[f"{side}_input_ids"] for row in rows] == ours
    theirs, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    gradients = backward(trainer.model, theirs)
    policy, recipe = copy.deepcopy(models[0]), Recipe(lr=1, lambda_or=BETA, nll_on_prompt=True)
    logps = response_logps(policy, collate(tokenised), score_prompt=True)
    loss, metrics = objective(
        "orpo", recipe, logps, None, len(rows), scored_tokens(tokenised, recipe)
    )
    assert_same(loss.detach(), theirs.detach(), 1e-5)
    assert_same_gradients(backward(policy, loss), gradients)
    assert_same(logps.chosen.means.detach().mean(), logged["logps/chosen"], 1e-5)
    assert_same(logps.rejected.means.detach().mean(), logged["logps/rejected"], 1e-5)
    assert_same(metrics["log_odds_margin"].detach(), logged["log_odds_chosen"], 1e-5)
