"""`python -m common.training`: what it understands, and how it ends."""

from types import SimpleNamespace

import pytest

from common.io.formats import DataError
from common.lab import MissingRun
from common.training import Session
from common.training import __main__ as train
from common.training.trainer import TrainingError


@pytest.fixture
def calls(monkeypatch):
    """The arguments that reach `training.train`, which trains nothing here."""
    seen = []

    def fake(lab, stage, **settings):
        seen.append((lab, stage, settings))
        return SimpleNamespace(record={"final": {"loss": 0.5}}, folder="somewhere")

    monkeypatch.setattr(train, "train", fake)
    return seen


def test_a_stage_is_trained_with_the_defaults_of_its_profile(calls, capsys):
    assert train.main(["dpo"]) == 0
    [(lab, stage, settings)] = calls
    assert (lab.profile.name, lab.seed, stage) == ("smoke", 0, "dpo")
    assert settings == {"sweep": None, "session": Session(resume=False)}
    said = capsys.readouterr().out
    assert "loss" in said and "0.5000" in said and "saved in somewhere" in said


def test_options_reach_the_run(calls):
    options = [
        "--profile",
        "cpu",
        "--seed",
        "3",
        "--resume",
        "--sweep",
        "mine",
        "--checkpoint-every",
        "7",
    ]
    train.main(["orpo_lora", *options])
    [(lab, stage, settings)] = calls
    assert (lab.profile.name, lab.seed, stage) == ("cpu", 3, "orpo_lora")
    assert settings == {"sweep": "mine", "session": Session(True, 7)}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr=1e-3", "lr", 1e-3),
        ("epochs=2", "epochs", 2.0),
        ("batch_size=4", "batch_size", 4),
        ("loss=ipo", "loss", "ipo"),
        ("betas=(0.9, 0.95)", "betas", (0.9, 0.95)),
        ("keep_best=True", "keep_best", True),
        ("beta=-0.5", "beta", -0.5),
    ],
)
def test_set_reads_a_value_of_the_field_s_type(calls, text, name, value):
    assert train.main(["dpo", "--set", text]) == 0
    found = calls[0][2][name]
    assert found == value and type(found) is type(value)


def test_set_can_be_given_several_times(calls):
    train.main(["dpo", "--set", "lr=0.1", "--set", "beta=0.2"])
    assert calls[0][2]["lr"] == 0.1 and calls[0][2]["beta"] == 0.2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rate=1", "unknown field 'rate'; choose from batch_size, beta,"),
        ("lr=fast", "lr must be of type float"),
        ("lr", "lr must be of type float"),
        ("batch_size=2.5", "batch_size must be of type int"),
        ("keep_best=1", "keep_best must be of type bool"),
        ("loss=1", "loss must be of type str"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_trained(calls, capsys, setting, said):
    with pytest.raises(SystemExit) as end:
        train.main(["dpo", "--set", setting])
    assert end.value.code == 2 and not calls
    assert said in capsys.readouterr().err


def test_an_unknown_profile_is_refused_with_those_that_exist(calls, capsys):
    with pytest.raises(SystemExit):
        train.main(["dpo", "--profile", "laptop"])
    assert "smoke" in capsys.readouterr().err and not calls


def test_an_unknown_stage_ends_with_an_error(capsys):
    assert train.main(["ppo"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: Unknown stage 'ppo'. Choose one of: base, sft,"
    )


def test_a_missing_parent_ends_with_the_notebook_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    assert train.main(["sft"]) == 1
    assert (
        "Run the notebook Lab-1.7-DPO_Alignment/02-SFT_Baseline.ipynb first"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "error",
    [
        DataError("bad row"),
        TrainingError("not finite"),
        MissingRun("no run"),
        OSError(28, "No space left"),
    ],
)
def test_an_expected_error_is_one_line_and_no_traceback(monkeypatch, capsys, error):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr(train, "train", fail)
    assert train.main(["base"]) == 1
    assert capsys.readouterr().err == f"error: {error}\n"
