"""The exercises of notebooks 1.7-04 and 1.8-03: the notebook's own answer passes its check, other
right ones too, and realistic wrong ones lose points.
"""

import json
from pathlib import Path

import pytest

from common.checks import check

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [
    "Lab-1.7-DPO_Alignment/04-Evaluation_and_Compare.ipynb",
    "Lab-1.8-ORPO_Alignment/03-Compare_with_DPO.ipynb",
]
GIVEN = "import math\nimport numpy as np\nimport torch\n"


def answers() -> dict[str, str]:
    """{exercise: the source of its cell}, as the notebooks have it."""
    found = {}
    for name in NOTEBOOKS:
        for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]:
            grading = cell["metadata"].get("nbgrader", {})
            if grading.get("solution"):
                found[grading["grade_id"]] = "".join(cell["source"])
    return found


ANSWERS = answers()
# Of each exercise: what is put in the place of what, and so goes wrong.
WRONG = {
    "sample_until_eos": [
        ("list(prompt_ids) + answer", "(list(prompt_ids) + answer)[-1:]"),
        ("list(prompt_ids) + answer", "list(prompt_ids)"),
        ("torch.multinomial(chances, 1, generator=generator)", "chances.argmax()"),
        ("generator=generator", "generator=None"),
        ("    return answer\n", "    return [token for token in answer if token != eos_id]\n"),
        ("(not answer or answer[-1] != eos_id)", "True"),
        ("(not answer or answer[-1] != eos_id)", "eos_id not in [*prompt_ids, *answer]"),
        (".logits[0, -1]", ".logits[0, 0]"),
        ("len(answer) < max_new_tokens", "len(answer) <= max_new_tokens"),
    ],
    "win_rate": [
        ("(verdict + 1) / 2", "(verdict == 1)"),
        ("(verdict + 1) / 2", "(verdict + 1)"),
        ("sum(points) / len(points)", "sum(map(sum, verdicts)) / sum(map(len, verdicts))"),
        ("(verdict + 1) / 2", "(1 - verdict) / 2"),
        ("/ len(row)", ""),
    ],
    "bootstrap_interval": [
        (
            "points.mean(axis=1)[rows].mean(axis=1)",
            "np.random.default_rng(seed).choice(points.ravel(), (draws, points.size)).mean(axis=1)",
        ),
        ("(0.025, 0.975)", "(0, 1)"),
        ("(0.025, 0.975)", "(0.05, 0.95)"),
        ("(draws, len(points))", "(draws, 10)"),
        (
            "np.quantile(means, (0.025, 0.975))",
            "means.mean() - 2 * means.std(), means.mean() + 2 * means.std()",
        ),
    ],
    "swap_consistent": [
        ("shown if shown == -swapped else 0", "shown"),
        ("shown if shown == -swapped else 0", "shown if shown == swapped else 0"),
        ("judge(prompt, b, a)", "-judge(prompt, a, b)"),
        ("shown if shown == -swapped else 0", "(shown > swapped) - (shown < swapped)"),
    ],
    "wilson_interval": [
        ("4 * n**2", "2 * n**2"),
        ("/ shrink\n    half", "\n    half"),
        ("z * math.sqrt", "1.96 * math.sqrt"),
        (
            "middle - half, middle + half",
            "share - z * math.sqrt(share * (1 - share) / n), share + half",
        ),
    ],
    "bradley_terry": [
        ("range(10_000)", "range(20)"),
        ("        strength = strength / strength.sum()\n", ""),
        ("wins.sum(axis=1) /", "wins.sum(axis=0) /"),
        ("met / (before", "wins / (before"),
        ("    return strength", "    return wins.sum(axis=1) / wins.sum()"),
    ],
    "interval_over_seeds": [
        ("(n - 1))", "n)"),
        ("student.ppf(0.975, n - 1)", "1.96"),
        ("student.ppf(0.975, n - 1)", "student.ppf(0.95, n - 1)"),
        ("/ math.sqrt(n)", ""),
        ("n < 2", "n < 1"),
        ("mean - half, mean + half", "min(rates), max(rates)"),
    ],
    "worth_contrast": [
        ("if gap > half", "if gap > 0"),
        ("else -1 if gap < -half", "else -1 if gap < 0"),
        ('else float("inf")', "else 0.0"),
        ("            break\n        costs_up_to", "            continue\n        costs_up_to"),
        ("            break\n        pays_from", "            continue\n        pays_from"),
        ("return costs_up_to, pays_from", "return pays_from, costs_up_to"),
    ],
    "cost_ratio": [
        ("2 * answer * orpo_epochs /", "answer * orpo_epochs /"),
        ("2 * dpo_epochs\n", "2\n"),
        ("2 if cached else 2 * dpo_epochs", "0 if cached else 2 * dpo_epochs"),
        ("(1 if lora else 2)", "2"),
        ("* orpo_epochs", ""),
        ("answer * sft_epochs + ", ""),
    ],
}
RIGHT = {
    "sample_until_eos": [
        (".logits[0, -1]", "[0][0, -1]"),
        ("model(ids).logits[0, -1]", 'model(input_ids=ids)["logits"][0, -1].double()'),
    ],
    "win_rate": [
        ("return sum(points) / len(points)", "return np.mean(points)"),
        ("(verdict + 1) / 2", "0.5 * verdict + 0.5"),
    ],
    "bootstrap_interval": [("return float(low), float(high)", "return low, high")],
    "wilson_interval": [("math.sqrt", "np.sqrt")],
    "bradley_terry": [("np.full(len(wins), 1 / len(wins))", "np.ones(len(wins))")],
    "interval_over_seeds": [
        ("return mean - half, mean + half", "return [mean - half, mean + half]")
    ],
    "cost_ratio": [("1 if lora else 2", "2 - int(lora)")],
}


def changed(name: str, old: str, new: str):
    source = ANSWERS[name]
    assert old in source, f"{name}: {old!r} is not in the answer"
    space = {}
    exec(GIVEN + source.replace(old, new), space)
    return space[name]


def cases(table: dict) -> list:
    return [
        pytest.param(name, *change, id=f"{name}-{k}")
        for name, changes in table.items()
        for k, change in enumerate(changes)
    ]


def test_every_exercise_has_wrong_answers():
    assert WRONG.keys() == ANSWERS.keys() and all(len(own) >= 3 for own in WRONG.values())


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_of_the_notebook_passes(name):
    check(name, changed(name, "", ""))


@pytest.mark.parametrize(("name", "old", "new"), cases(RIGHT))
def test_another_right_answer_passes(name, old, new):
    check(name, changed(name, old, new))


@pytest.mark.parametrize(("name", "old", "new"), cases(WRONG))
def test_a_wrong_answer_loses_points(name, old, new, capsys):
    with pytest.raises(AssertionError, match="properties broke"):
        check(name, changed(name, old, new))
