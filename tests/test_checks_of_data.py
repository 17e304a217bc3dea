"""The exercises of notebooks 1.7-01 and 1.7-02: the notebook's own answer passes its check, other
right ones too, and realistic wrong ones lose points.
"""

import json
from pathlib import Path

import pytest

from common.checks import check

LAB = Path(__file__).resolve().parent.parent / "Lab-1.7-DPO_Alignment"
GIVEN = "import copy\nimport math\nfrom collections import Counter\n\nimport torch\n"


def answers() -> dict[str, str]:
    """{exercise: the source of its cell}, as the notebooks have it."""
    found = {}
    for name in ("01-Setup_and_Data.ipynb", "02-SFT_Baseline.ipynb"):
        for cell in json.loads((LAB / name).read_text(encoding="utf-8"))["cells"]:
            grading = cell["metadata"].get("nbgrader", {})
            if grading.get("solution"):
                found[grading["grade_id"]] = "".join(cell["source"])
    return found


ANSWERS = answers()
SHIFTED = 'logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]'
MEAN = "-logps[scored].sum() / scored.sum()"
CALL, PLACES = 'attention_mask=batch["attention_mask"]).logits', "torch.arange(ids.shape[1]"
# Of each exercise: what is put in the place of what, and so goes wrong.
WRONG = {
    "split_transcript": [
        ("rpartition", "partition"),  # the first assistant turn
        ("before + mark, response", "before + mark, response.strip()"),
        ("before + mark, response", "before, mark + response"),
        (r'"\n\nAssistant:"', '"Assistant:"'),
        (" if mark else None", ""),
        ("(before + mark, response) if mark", "(before + mark, response) if response"),
    ],
    "response_mask": [
        ("place >= prompt_lengths", "place > prompt_lengths"),
        ("place < ends", "place <= ends"),
        ("place < ends[:, None]", "place < ends[:, None] - 1"),  # EOS is lost
        ("(place >= prompt_lengths[:, None]) & ", ""),
        ("ends.max()", "response_lengths.max()"),
        ("    return (", "    return 1 * ("),
    ],
    "deduplicate": [
        ("(prompt, rejected, chosen) in known", "(prompt, rejected, chosen) in seen"),
        ('dropped["duplicate"] += 1', "pass"),
        ("seen.add((prompt, chosen, rejected))", "seen.add(prompt)"),
        ('row["prompt"], row["chosen"]', '"", row["chosen"]'),
        ("        if (prompt, rejected, chosen) in known", "        if False"),
        ("kept.append(row)", "kept.append(row.clear() or row)"),
    ],
    "preference_collator": [
        ("row + [pad_id] * (longest - len(row))", "[pad_id] * (longest - len(row)) + row"),
        ("[pad_id]", "[0]"),
        ("[len(row) for row in ids]", "[sum(t != pad_id for t in row) for row in ids]"),
        ("max(map(len, ids))", 'max(len(r["chosen_ids"] + r["prompt_ids"]) for r in rows)'),
        ("longest = max(map(len, ids))", "longest = min(map(len, ids))"),
        ('("prompt", "chosen", "rejected")', '("prompt", "chosen")'),
        ("row + [pad_id] *", "row.__iadd__([pad_id] * 0) + [pad_id] * 2 *"),
    ],
    "sft_labels": [
        ("[-100] * len(x) + y + ", "x + y + "),  # the prompt is scored
        ("y + [-100] * pads", "y + [pad_id] * pads"),  # the pads are
        ("y + [-100] * pads", "y[:-1] + [-100] * (pads + 1)"),  # EOS is not
        ("[-100] * len(x) + y", "[-100] * (len(x) - 1) + y + [-100]"),  # shifted twice
        ("x + y + [pad_id] * pads", "[pad_id] * pads + x + y"),
        ("[1] * len(x + y) + [0] * pads", "[1] * (len(x + y) + pads)"),
        ("[1] * len(x + y) + [0] * pads", "[int(t != pad_id) for t in x + y] + [0] * pads"),
        ("[pad_id]", "[0]"),
    ],
    "sft_loss": [
        (SHIFTED, 'logits.log_softmax(-1), batch["labels"]'),
        ("scored = target != -100", "scored = target > -200"),
        (MEAN, "-((logps * scored).sum(1) / scored.sum(1)).mean()"),  # of rows, not of tokens
        (MEAN, "-logps[scored].sum()"),
        (MEAN, f"({MEAN}).detach().requires_grad_()"),
        ("-logps[scored]", "logps[scored]"),
        (".log_softmax(-1)", ".softmax(-1)"),
        ("scored = target != -100", "scored = (target != -100) & (target != 22)"),  # EOS
    ],
    "batched_response_logps": [
        (":-1]\n    logps = logits", "1:]\n    logps = logits"),
        (".log_softmax(-1).gather", ".gather"),
        ("place >= starts[:, None]", "place > starts[:, None]"),
        ("real & (place", "(place"),  # the pads are scored
        (".sum(1)\n", ".sum(1) / lengths\n"),
        ("ids[k, : n + m] = torch.cat(", "ids[k, -n - m :] = torch.cat("),
        ("(logps * scored[:, 1:]).sum(1)", "(logps * scored[:, 1:]).sum()"),
        (".squeeze(-1).double()", ".squeeze(-1).double().detach().requires_grad_()"),
        ('batch["chosen_lengths"]\n', 'batch["chosen_lengths"].sub_(1)\n'),
    ],
    "freeze_reference": [
        ("copy.deepcopy(model).eval()", "model.eval()"),
        ("copy.deepcopy(model).eval()", "copy.copy(model).eval()"),
        (".eval()", ""),
        ("weight.requires_grad_(False)", "pass"),
        ("for weight in reference.parameters()", "for weight in model.parameters()"),
        ("    return reference", "    model.eval()\n    return reference"),
    ],
    "best_checkpoint": [
        ("loss < best", "loss <= best"),
        ("number, 0\n", "number, waited\n"),  # patience is never set back
        ("waited >= patience", "waited > patience"),
        ("if patience and", "if"),
        ("return kept, number", "return kept, len(losses) - 1"),
        ("if loss < best:", "if not loss >= best:"),  # NaN is better than all
    ],
}
RIGHT = {
    "split_transcript": [("(before + mark, response)", "[before + mark, response]")],
    "sft_labels": [("torch.tensor(values)", "torch.as_tensor(values).long()")],
    "sft_loss": [
        (CALL, CALL.replace(".logits", '["logits"]')),
        (CALL, CALL.replace(".logits", "[0]")),
        (".log_softmax(-1)", ".double().log_softmax(-1)"),
    ],
    "batched_response_logps": [
        (".logits[:, :-1]", '["logits"][:, :-1]'),
        (PLACES, f"{PLACES}, device=next(model.parameters()).device"),
    ],
    "freeze_reference": [("copy.deepcopy(model).eval()", "copy.deepcopy(model).train(False)")],
    "best_checkpoint": [("return kept, number", "return [kept, number]")],
}


def written(name: str, old: str = "", new: str = ""):
    """The function of an exercise, with some of its answer replaced."""
    source = ANSWERS[name]
    assert old in source, f"the answer of {name} has no {old!r}"
    namespace = {}
    exec(GIVEN + source.replace(old, new), namespace)
    return namespace[name]


def cases(table: dict) -> list[tuple[str, str, str]]:
    return [(name, old, new) for name, changes in table.items() for old, new in changes]


def test_every_exercise_of_the_two_notebooks_is_here():
    assert ANSWERS.keys() == WRONG.keys()


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_of_the_notebook_passes(name):
    check(name, written(name))


@pytest.mark.parametrize(("name", "old", "new"), cases(RIGHT))
def test_another_right_answer_passes(name, old, new):
    check(name, written(name, old, new))


@pytest.mark.parametrize(("name", "old", "new"), cases(WRONG))
def test_a_wrong_answer_does_not_pass(name, old, new):
    with pytest.raises(AssertionError, match=f"{name}: "):
        check(name, written(name, old, new))
