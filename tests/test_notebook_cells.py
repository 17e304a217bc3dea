"""Functions that notebooks define by hand, taken out of their cells and checked alone."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LOGITS = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)


def function_of(notebook: str, name: str):
    """The function `name` as a notebook defines it."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    [source] = [source for source in sources if f"def {name}(" in source]
    [node] = [node for node in ast.parse(source).body if getattr(node, "name", "") == name]
    namespace = {"torch": torch, "math": math}
    exec(ast.unparse(node), namespace)
    return namespace[name]


class TiedModel:
    """Gives LOGITS, in which several tokens of a position have the same logit."""

    device = "cpu"

    def __call__(self, ids):
        return SimpleNamespace(logits=LOGITS[None, : ids.shape[1]])


def test_dpo_by_hand_counts_tied_logits_once_each():
    """Position 0 has logits 1, 1, 0: log p(0) = 1 - ln(2e + 1). Position 1 has 2, 0, 2:
    log p(2) = 2 - ln(2e² + 1). A set of the logits would count e and e² once.
    """
    notebook = "Lab-1.7-DPO_Alignment/deep-dives/03-Loss_and_Parity.ipynb"
    logp_by_hand = function_of(notebook, "logp_by_hand")
    row = {"prompt_ids": [1], "chosen_ids": [0, 2]}
    expected = 1 - math.log(2 * math.e + 1) + 2 - math.log(2 * math.exp(2) + 1)
    assert logp_by_hand(TiedModel(), row, "chosen") == pytest.approx(expected, rel=1e-12)


def test_orpo_by_hand_counts_tied_logits_once_each():
    dive = "Lab-1.8-ORPO_Alignment/deep-dives/02-Parity.ipynb"
    logps_by_hand = function_of(dive, "logps_by_hand")
    expected = [1 - math.log(2 * math.e + 1), 2 - math.log(2 * math.exp(2) + 1)]
    assert logps_by_hand(TiedModel(), [1, 0, 2]) == pytest.approx(expected, rel=1e-12)
