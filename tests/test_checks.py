"""The instant checks: what they print, and that a wrong function never passes."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from common import checks as exercises
from common.checks import all_checks, check, close

ROOT = Path(__file__).resolve().parent.parent
MODULES = {  # of common.checks → the notebook whose exercises it checks
    "preferences": "Lab-1.7-DPO_Alignment/01-Setup_and_Data.ipynb",
    "sft": "Lab-1.7-DPO_Alignment/02-SFT_Baseline.ipynb",
    "dpo": "Lab-1.7-DPO_Alignment/03-DPO_Training.ipynb",
    "evaluation": "Lab-1.7-DPO_Alignment/04-Evaluation_and_Compare.ipynb",
    "pairs_bias": "Lab-1.8-ORPO_Alignment/01-Setup.ipynb",
    "odds": "Lab-1.8-ORPO_Alignment/02-ORPO_Training.ipynb",
    "comparing": "Lab-1.8-ORPO_Alignment/03-Compare_with_DPO.ipynb",
    "deploying": "Lab-1.8-ORPO_Alignment/04-Production_Deploy.ipynb",
}


@pytest.fixture
def doubling(monkeypatch):
    """An exercise of our own, and only this one: double a number."""

    def double(fn):
        yield "two of 3 are 6", fn(3) == 6
        yield "two of -1 are -2", fn(-1) == -2

    monkeypatch.setattr(exercises, "all_checks", lambda: {"double": double})


def test_a_right_function_passes_and_each_property_is_printed(doubling, capsys):
    assert exercises.check("double", lambda x: 2 * x) is None
    assert capsys.readouterr().out == "ok      two of 3 are 6\nok      two of -1 are -2\n"


def test_a_wrong_function_is_told_which_property_broke(doubling, capsys):
    with pytest.raises(AssertionError, match="double: 1 of its properties broke: two of -1 are -2"):
        exercises.check("double", lambda x: 2 * abs(x))
    assert capsys.readouterr().out == "ok      two of 3 are 6\nBROKEN  two of -1 are -2\n"


def test_a_function_that_raises_is_told_what_it_raised(doubling, capsys):
    def double(x):
        return x["two"]

    with pytest.raises(AssertionError, match="double raised TypeError"):
        exercises.check("double", double)
    assert "BROKEN  double raised TypeError" in capsys.readouterr().out


def test_an_exercise_that_is_not_done_yet_says_so(doubling):
    def double(x):
        raise NotImplementedError

    with pytest.raises(AssertionError, match="double is not written yet"):
        exercises.check("double", double)


def test_an_unknown_exercise_is_refused_with_those_that_exist(doubling):
    with pytest.raises(KeyError, match="No exercise is called 'triple'. They are: double"):
        exercises.check("triple", abs)


@pytest.mark.parametrize(("module", "notebook"), MODULES.items())
def test_every_exercise_of_a_notebook_has_a_check_and_no_check_is_left_over(module, notebook):
    """A notebook and its deep dives call `check("name", name)`; its checks are in one module."""
    main = ROOT / notebook
    dives = main.parent.glob(f"deep-dives/{main.name[:3]}*.ipynb")
    cells = "".join(path.read_text(encoding="utf-8") for path in (main, *dives))
    called = set(re.findall(r'\bcheck\(\\"(\w+)', cells))
    here = vars(import_module(f"common.checks.{module}"))
    assert called and called == {name[6:] for name in here if name.startswith("check_")}


def test_every_module_of_checks_belongs_to_a_notebook():
    assert {path.stem for path in ROOT.glob("common/checks/*.py")} == {"__init__", *MODULES}


@pytest.mark.parametrize("name", sorted(all_checks()))
def test_no_check_passes_a_function_that_does_nothing(name, capsys):
    for wrong in (lambda *_, **__: None, lambda *_, **__: 0, lambda *args, **_: args[0]):
        with pytest.raises(AssertionError, match=f"{name}: "):
            check(name, wrong)
        assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected", "agree"),
    [
        (1.0, 1 + 1e-13, True),
        (1.0, 1 + 1e-11, False),
        (1e6, 1e6 + 1e-7, True),  # 1e-13 of the value
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 1.0], 1.0, False),  # another shape
        (float("nan"), float("nan"), False),
    ],
)
def test_close_compares_shapes_and_values(found, expected, agree):
    assert close(found, expected) is agree
