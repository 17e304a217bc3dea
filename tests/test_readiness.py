"""The readiness list: evidence or failure, nothing between."""

from types import SimpleNamespace

import pytest
from serving_tools import FakeEngine, gateway
from tiny import micro_profile

from common.lab import Lab
from common.training import train
from deploy.abtest import two_shares
from deploy.export import export
from deploy.readiness import (
    abuse,
    abuse_is_refused,
    drift_is_noticed,
    is_better,
    is_fast_enough,
    licence_is_known,
    logs_are_private,
    readiness,
    refusals,
    require,
    same_answers,
)


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


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that `load_exported` takes."""
    lab = Lab(micro_profile(), seed=46)
    train(lab, "base")
    return export(lab, "base", tmp_path_factory.mktemp("good") / "base")


def test_what_was_tampered_with_is_refused(good, monkeypatch):
    found = refusals(good)
    assert ["pickled files" in said or "auto_map" in said for said in found.values()] == [
        True,
        True,
    ]
    assert not (good / "pytorch_model.bin").exists()
    monkeypatch.setattr("deploy.readiness.load_exported", lambda _: None)
    with pytest.raises(AssertionError, match="a pickle beside the weights: it was loaded"):
        refusals(good)


def test_a_gateway_refuses_abuse_and_answers_an_honest_request(tmp_path):
    engine = FakeEngine()
    with gateway(tmp_path, engine) as bench:
        service = SimpleNamespace(url=f"{bench.root}/v1")
        statuses = {name: status for name, (status, _) in abuse(service, "none").items()}
        assert statuses.pop("wrong key") == 200  # this gateway asks for none
        assert statuses.pop("an honest request") == 200
        assert all(400 <= status < 500 for status in statuses.values()), statuses
        with pytest.raises(AssertionError, match="'wrong key': 200"):
            abuse_is_refused(service, "none")


def test_a_prompt_or_a_key_in_a_log_is_found():
    prompts = ["\n\nHuman: What is the kettle for?\n\nAssistant:"]

    def logs(text):
        return [SimpleNamespace(said=lambda: text)]

    assert "none of 1 prompts" in logs_are_private(logs("POST /v1 200"), prompts, "secret")
    for text in ("What is the kettle for?", "Bearer secret"):
        with pytest.raises(AssertionError, match="prompts, key"):
            logs_are_private(logs(text), prompts, "secret")


def test_answers_of_a_service_are_compared_but_for_spaces_at_the_ends():
    assert same_answers([" a", "b"], ["a", "b "]).startswith("2 of 2")
    with pytest.raises(AssertionError, match="1 of 2"):
        same_answers(["a", "c"], ["a", "b"])


def test_drift_needs_quiet_windows_and_a_change_that_is_noticed():
    raised = {"refused": 1.0}
    assert "attack: refused" in drift_is_noticed({"quiet 1": {}, "attack": raised, "other": {}})
    for wrong in ({"quiet 1": raised, "attack": raised}, {"quiet 1": {}, "attack": {}}):
        with pytest.raises(AssertionError):
            drift_is_noticed(wrong)


def test_speed_licence_and_the_verdict_are_evidence_or_failures(good):
    assert is_fast_enough([0.1] * 19 + [0.2], 1.0).startswith("p95 0.1")
    with pytest.raises(AssertionError, match="the limit is 1 s"):
        is_fast_enough([0.1, 3.0], 1.0)
    assert licence_is_known(good) == "license: mit"
    shares = two_shares(10, 50, 40, 50)
    assert "+0.600" in is_better("new", shares, "new")
    with pytest.raises(AssertionError, match="says: no winner"):
        is_better("no winner", shares, "new")
