"""The instant checks: what they print, and that a wrong function never passes."""

import pytest

from common import checks as exercises
from common.checks import CHECKS, check


@pytest.fixture
def doubling(monkeypatch):
    """An exercise of our own, and only this one: double a number."""
    monkeypatch.setattr(exercises, "CHECKS", {})

    @exercises.exercise("double")
    def _double(fn):
        yield "two of 3 are 6", fn(3) == 6
        yield "two of -1 are -2", fn(-1) == -2


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


def test_every_notebook_of_lab_1_7_has_three_exercises():
    assert len(CHECKS) >= 12


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize(
    "wrong",
    [
        lambda *args, **kwargs: None,
        lambda *args, **kwargs: 0,
        lambda *args, **kwargs: args[0],
    ],
    ids=["returns None", "returns 0", "returns its first argument"],
)
def test_no_check_passes_a_function_that_does_nothing(name, wrong, capsys):
    with pytest.raises(AssertionError, match=f"{name}: "):
        check(name, wrong)
    assert "BROKEN" in capsys.readouterr().out
