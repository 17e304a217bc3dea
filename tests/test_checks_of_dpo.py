"""The exercises of notebook 1.7-03 and its deep dives: the notebook's own answer passes its check,
other right ones too, and realistic wrong ones lose points.
"""

import json
from pathlib import Path

import pytest

from common.checks import check

LAB = Path(__file__).resolve().parent.parent / "Lab-1.7-DPO_Alignment"
GIVEN = """
import torch
import torch.nn.functional as F
from common.logprobs import response_logps
"""


def answers() -> dict[str, str]:
    """{exercise: the source of its cell}, as the notebooks have it."""
    found = {}
    for path in (LAB / "03-DPO_Training.ipynb", LAB / "deep-dives" / "03-Loss_and_Parity.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            grading = cell["metadata"].get("nbgrader", {})
            if grading.get("solution"):
                found[grading["grade_id"]] = "".join(cell["source"])
    return found


ANSWERS = answers()
# Of each exercise: what is put in the place of what, and so goes wrong.
WRONG = {
    "dpo_loss": [
        ("-F.logsigmoid(", "-(lambda margin: torch.log(torch.sigmoid(margin)))("),
        ("chosen_reward - rejected_reward", "rejected_reward - chosen_reward"),
        ("rejected_reward)", "rejected_reward).mean()"),
        ("(policy_rejected - reference_rejected)", "(policy_rejected - reference_chosen)"),
        ("(policy_rejected - reference_rejected)", "(policy_rejected.detach() - 0)"),
        ("-F.logsigmoid(chosen_reward - rejected_reward)", "-(chosen_reward - rejected_reward)"),
        ("beta=0.1", "beta=1.0"),
        ("    chosen_reward =", "    policy_chosen -= 0.5\n    chosen_reward ="),
    ],
    "dpo_metrics": [
        ("+ 0.5 * (won == lost).double()", ""),
        ("(won > lost)", "(won >= lost)"),
        ("won = beta * ", "won = "),
        ("lost = beta * ", "lost = "),
        ('"margin": won - lost', '"margin": (won - lost) / beta'),
        ("(won > lost)", "(policy_chosen > policy_rejected)"),
        ("values.mean()", "values.sum()"),
    ],
    "dpo_train_step": [
        ("    optimizer.zero_grad()\n", ""),
        ("    optimizer.step()\n", ""),
        ("clip_grad_norm_(policy.parameters(), 1.0)", "clip_grad_norm_([], 1.0)"),
        ("    with torch.no_grad():\n        frozen", "    if True:\n        frozen"),
        (".mean()\n", ".sum()\n"),
        ("ours.rejected.sums - frozen", "ours.rejected.sums.detach() - frozen"),
        ("ours.chosen.sums - frozen.chosen.sums", "ours.chosen.means - frozen.chosen.means"),
        ("F.logsigmoid(beta * (won - lost))", "F.logsigmoid(0.1 * (won - lost))"),
        ("return loss.item()", "return loss"),
    ],
    "accumulate": [
        (".sum() / pairs", ".mean() / len(batches)"),  # a mean of means
        (".sum() / pairs", ".mean()"),
        ("    optimizer.zero_grad()\n", ""),
        ("    optimizer.step()\n", "    optimizer.step()\n    optimizer.step()\n"),
        ("        total +=", "        optimizer.step()\n        total +="),
        ("        share.backward()\n", "        share.backward() if batch is batches[-1] else 0\n"),
        ("total += share.item()", "total = share.item()"),
    ],
    "diagnose": [
        ("> 20", ">= 20"),
        ("clean * (1 - label_noise) + (1 - clean) * label_noise", "clean"),
        ("sum(seen) / len(seen) > same_noise + 0.05", "sum(seen) / len(seen) > 0.95"),
        ("sum(seen) / len(seen)", "seen[-1]"),
        ("sum(seen) / len(seen)", "seen[0]"),
        ('[row["accuracy"] for row in metrics if "accuracy" in row][-20:]', "[0.0]"),
        ('first["held_out_logps_chosen"] - 1', 'first["held_out_logps_chosen"]'),
        ('abs(first["held_out_margin"])', 'first["held_out_margin"]'),
        ('last["held_out_kl"]', 'first["held_out_kl"]'),
        ("][-20:]", "]"),
    ],
    "choose_beta": [
        ("< kl_limit", "<= kl_limit"),
        ('(row["win_rate"], row["beta"])', 'row["margin"]'),
        ('(row["win_rate"], row["beta"])', 'row["win_rate"]'),
        ('(row["win_rate"], row["beta"])', '(row["win_rate"], -row["beta"])'),
        ('if row["kl"] < kl_limit', ""),
        (", default=None", ""),
        ("max(allowed", "min(allowed"),
    ],
    "conservative_dpo_loss": [
        ("- epsilon * F.logsigmoid(-beta * h)", ""),
        ("F.logsigmoid(-beta * h)", "torch.log(torch.sigmoid(-beta * h))"),
        ("-(1 - epsilon) * F", "-F"),
    ],
}
# Other right answers: what is put in the place of what, and changes nothing.
RIGHT = {
    "dpo_loss": [
        (
            "-F.logsigmoid(chosen_reward - rejected_reward)",
            "F.softplus(rejected_reward - chosen_reward)",
        ),
    ],
    "dpo_metrics": [("float(values.mean())", "values.mean().numpy()[()]")],
    "dpo_train_step": [
        ("return loss.item()", "return loss.detach()"),
        ("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"),
        ("    with torch.no_grad():\n", "    with torch.inference_mode():\n"),
    ],
    "accumulate": [("total += share.item()", "total += float(share.detach())")],
    "diagnose": [("metrics[0], metrics[-1]", "dict(metrics[0]), dict(metrics[-1])")],
    "choose_beta": [("best and best", "None if best is None else best")],
    "conservative_dpo_loss": [
        ("-(1 - epsilon) * F.logsigmoid(beta * h)", "(1 - epsilon) * F.softplus(-beta * h)")
    ],
}


def function(name: str, source: str):
    space: dict = {}
    exec(GIVEN + source, space)
    return space[name]


def changed(name: str, old: str, new: str) -> str:
    assert old in ANSWERS[name], f"{name} holds no {old!r}"
    return ANSWERS[name].replace(old, new)


def cases(table: dict) -> list[tuple[str, str, str]]:
    return [(name, *change) for name, changes in table.items() for change in changes]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_of_the_notebook_passes(name):
    check(name, function(name, ANSWERS[name]))


@pytest.mark.parametrize(("name", "old", "new"), cases(RIGHT))
def test_another_right_answer_passes(name, old, new):
    check(name, function(name, changed(name, old, new)))


@pytest.mark.parametrize(("name", "old", "new"), cases(WRONG))
def test_a_wrong_answer_loses_points(name, old, new):
    with pytest.raises(AssertionError, match=f"{name}: "):
        check(name, function(name, changed(name, old, new)))


def test_each_exercise_has_wrong_answers():
    assert WRONG.keys() == RIGHT.keys() == ANSWERS.keys()
    assert min(map(len, WRONG.values())) >= 3
