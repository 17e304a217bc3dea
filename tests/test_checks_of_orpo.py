"""The exercises of notebooks 1.8-01 and 1.8-02: the notebook's own answer passes its check, other
right ones too, and realistic wrong ones lose points.
"""

import json
import re
from pathlib import Path

import pytest

from common.checks import check

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("01-Setup", "02-ORPO_Training")
GIVEN = """
import math
import numpy as np
import torch
import torch.nn.functional as F
from common.losses import log_odds
from common.logprobs import response_logps
"""


def answers() -> dict[str, str]:
    """{exercise: the source of its cell}, as the two notebooks have it."""
    found = {}
    for notebook in NOTEBOOKS:
        text = (ROOT / f"Lab-1.8-ORPO_Alignment/{notebook}.ipynb").read_text(encoding="utf-8")
        for cell in json.loads(text)["cells"]:
            grading = cell["metadata"].get("nbgrader", {})
            if grading.get("solution"):
                found[grading["grade_id"]] = "".join(cell["source"])
    return found


ANSWERS = answers()
# Of each exercise: what is put in the place of what, and so goes wrong.
WRONG = {
    "shared_rise": [
        ("/ old.lengths.sum()", "/ len(old.lengths)"),  # per answer, not per token
        ('rise["rejected"] / rise["chosen"]', 'rise["chosen"] / rise["rejected"]'),
        ("(new.sums - old.sums).sum() / old.lengths.sum()", "(new.means - old.means).mean()"),
        ('rise["chosen"] <= 0', "False"),
        ('rise["chosen"] <= 0', 'rise["rejected"] <= 0'),
    ],
    "length_bias": [
        ("0.5 if chosen == rejected", "0.0 if chosen == rejected"),  # a tie is lost
        ("0.5 if chosen == rejected", "1.0 if chosen == rejected"),
        ("chosen > rejected", "chosen < rejected"),
        ("right / len(pairs)", "right"),
        ('row["chosen_ids"]), len', 'str(row["chosen_ids"])), len'),  # letters, not tokens
    ],
    "cohens_kappa": [
        ("(observed - chance) / (1 - chance)", "observed - chance"),
        ("(observed - chance) / (1 - chance)", "observed"),
        ("first.count(vote) * second.count(vote)", "first.count(vote) * first.count(vote)"),
        ("for vote in (1, 0, -1)", "for vote in (1, -1)"),
        ('float("nan")', "1.0"),
    ],
    "orpo_from_logits": [
        ("ids[1:, None]", "ids[:-1, None]"),  # each token from itself
        ("logps[prompt_length - 1 :]", "logps[prompt_length:]"),  # the first token is lost
        ("].mean() for logps", "].sum() for logps"),
        ("log_odds(w) - log_odds(l)", "w - l"),
        ("nll - lambda_or", "nll + lambda_or"),
        ("-tokens[0].mean() if nll_on_prompt", "-w if nll_on_prompt"),
        ("log_odds(l))", "log_odds(l.detach()))"),
    ],
    "orpo_train_step": [
        (
            "-logps.chosen.sums.sum() / logps.chosen.lengths.sum()",
            "-logps.chosen.means.mean()",
        ),
        ("log_odds(logps.rejected.means)", "log_odds(logps.rejected.means.detach())"),
        ("logps.rejected.means)\n", "logps.rejected.sums)\n"),
        ("    optimizer.zero_grad()\n", ""),
        ("    optimizer.step()\n", ""),
        (".mean()\n", ".sum()\n"),
    ],
    "safe_log_odds": [
        (
            "return torch.where(near, -torch.log(torch.expm1(-close)),"
            " far - torch.log1p(-torch.exp(far)))",
            "return x - torch.log1p(-torch.exp(x))",
        ),
        (
            "return torch.where(near, -torch.log(torch.expm1(-close)),"
            " far - torch.log1p(-torch.exp(far)))",
            "return torch.where(near, -torch.log(torch.expm1(-x)), x - torch.log1p(-torch.exp(x)))",
        ),
        ("near = x > -1", "near = x > -2000"),
        ("far - torch.log1p", "torch.log1p"),
        ("near = x > -1", "near = x > -1e-9"),
    ],
    "choose_lambda": [
        ("return value", "return best"),
        ("2 * behind", "1 * behind"),
        ("ddof=1", "ddof=0"),
        ("sorted(points)", "points"),
        (
            "2 * behind.std(ddof=1)",
            "2 * np.hypot(np.std(points[best], ddof=1), np.std(points[value], ddof=1))",
        ),
    ],
}
# Other ways that are right.
RIGHT = {
    "length_bias": [
        "def length_bias(pairs):\n"
        "    d = [len(row['chosen_ids']) - len(row['rejected_ids']) for row in pairs]\n"
        "    return np.mean((np.sign(d) + 1) / 2)\n",
    ],
    "cohens_kappa": [
        "from common.judges import cohens_kappa\n",
    ],
    "orpo_from_logits": [
        "def orpo_from_logits(chosen, rejected, n, lambda_or=0.5, nll_on_prompt=False):\n"
        "    pairs, how = (chosen, rejected), {'reduction': 'none'}\n"
        "    rows = [-F.cross_entropy(z[:-1], y[1:], **how) for z, y in pairs]\n"
        "    w, l = (row[n - 1 :].mean() for row in rows)\n"
        "    odds = [mean.exp() / (1 - mean.exp()) for mean in (w, l)]\n"
        "    nll = -rows[0].mean() if nll_on_prompt else -w\n"
        "    return nll + lambda_or * torch.log1p(odds[1] / odds[0])\n",
    ],
    "orpo_train_step": [
        # row by row, from the model's own output
        "def orpo_train_step(model, batch, optimizer, lambda_or=0.5):\n"
        "    nll, count, terms = 0.0, 0, []\n"
        "    for row in range(len(batch['prompt_ids'])):\n"
        "        start = int(batch['prompt_lengths'][row])\n"
        "        means = []\n"
        "        for side in ('chosen', 'rejected'):\n"
        "            length = int(batch[f'{side}_lengths'][row])\n"
        "            prompt = batch['prompt_ids'][row, :start]\n"
        "            ids = torch.cat([prompt, batch[f'{side}_ids'][row, :length]])\n"
        "            logits = model(ids[None])['logits'][0]\n"
        "            logps = logits.log_softmax(-1)[start - 1 : -1].gather(1, ids[start:, None])\n"
        "            means.append(logps.mean())\n"
        "            if side == 'chosen':\n"
        "                nll, count = nll - logps.sum(), count + length\n"
        "        terms.append(-F.logsigmoid(log_odds(means[0]) - log_odds(means[1])))\n"
        "    loss = nll / count + lambda_or * sum(terms) / len(terms)\n"
        "    model.zero_grad()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "    return np.float64(loss.detach())\n",
    ],
    "safe_log_odds": [
        "from common.losses import log_odds as safe_log_odds\n",
    ],
}


def function_of(source: str, name: str):
    namespace = {}
    exec(GIVEN + source, namespace)
    return namespace[name]


def variants(table) -> list[tuple]:
    return [(name, change) for name, changes in table.items() for change in changes]


def test_each_exercise_of_these_notebooks_is_tested():
    assert ANSWERS.keys() == WRONG.keys()


@pytest.mark.parametrize("name", sorted(WRONG))
def test_the_answer_of_the_notebook_passes(name, capsys):
    check(name, function_of(ANSWERS[name], name))
    assert "BROKEN" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "source"), variants(RIGHT))
def test_another_right_answer_passes(name, source, capsys):
    check(name, function_of(source, name))
    assert "BROKEN" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "change"), variants(WRONG))
def test_a_wrong_answer_loses_points(name, change):
    old, new = change
    assert old in ANSWERS[name], "the notebook's answer has changed: change this test with it"
    with pytest.raises(AssertionError, match=f"{name}: "):
        check(name, function_of(ANSWERS[name].replace(old, new, 1), name))


@pytest.mark.parametrize("name", sorted(WRONG))
def test_an_answer_stands_in_one_cell_and_uses_nothing_of_common_that_is_the_answer(name):
    source = ANSWERS[name]
    assert source.count("### BEGIN SOLUTION") == source.count("### END SOLUTION") == 1
    taken = set(re.findall(r"from common\S* import (.+)", source))
    assert taken <= {"response_logps"}
