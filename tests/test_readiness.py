"""The readiness list: evidence or failure, nothing between."""

import pytest

from deploy.export import readiness, require


def test_an_item_passes_with_evidence_only(capsys):
    """A text is evidence; None, True and an empty text are not."""
    found = readiness(
        {"a": lambda: "3 of 3", "b": lambda: None, "c": lambda: True, "d": lambda: " "}
    )
    assert [item.passed for item in found] == [True, False, False, False]
    assert "NOT READY: b; c; d" in capsys.readouterr().out


def test_an_item_that_raises_fails_and_the_rest_is_run(capsys):
    found = readiness({"a": lambda: 1 / 0, "b": lambda: "fine"})
    assert [item.passed for item in found] == [False, True] and "ZeroDivisionError" in found[
        0
    ].evidence


def test_all_passed_is_ready(capsys):
    readiness({"a": lambda: "fine"})
    assert capsys.readouterr().out.endswith("1 of 1 passed. Ready.\n")


def test_require():
    require(True, "never said")
    with pytest.raises(AssertionError, match="401"):
        require(False, "expected 401")
