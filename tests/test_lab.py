"""The run folder: where things are, helpful errors, and files written whole or not at all."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from common import lab as runs
from common.io.files import read_metrics, write_json, write_lines, written_whole
from common.lab import STAGES, Lab, MissingRun, not_measured, open_lab, stage_of
from common.profiles import PROFILES, Recipe

PROFILE = tiny.micro_profile()


# --- written whole


def test_json_is_written_and_read_again(tmp_path):
    write_json(tmp_path / "new" / "report.json", {"rate": 0.5, "name": "Köln"})
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8")) == {
        "rate": 0.5,
        "name": "Köln",
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_refused_and_the_old_file_stays(tmp_path, value):
    write_json(tmp_path / "report.json", {"rate": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_json(tmp_path / "report.json", {"rate": value})
    assert json.loads((tmp_path / "report.json").read_text()) == {"rate": 0.5}


@pytest.mark.parametrize("failure", [RuntimeError("crash"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_old_file_and_no_scratch(tmp_path, failure):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(type(failure)), written_whole(target) as scratch:
        scratch.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_until_it_is_whole_the_target_is_the_old_one(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    with written_whole(target) as scratch:
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_folder_replaces_a_folder(tmp_path):
    """No file of the old one is left among the new ones."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    with written_whole(target) as scratch:
        scratch.mkdir()
        (scratch / "new.bin").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_explained_and_the_old_file_stays(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    full = pytest.raises(OSError, match=r"The disk is full: .*report\.json was not written.*intact")
    with full as failure, written_whole(target) as scratch:
        scratch.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failure.value.errno == errno.ENOSPC and target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def failing_replace(monkeypatch, *failing: int) -> None:
    """`os.replace` that fails at its nth calls, counted from 1, and works at the others."""
    real, calls = os.replace, iter(range(1, 100))

    def replace(source, target):
        if next(calls) in failing:
            raise OSError(errno.EIO, "Input/output error", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.fixture
def old_model(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights.bin").write_text("old")
    return target


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(old_model, monkeypatch, failing):
    """A folder is replaced in two renames: the old one out, the new one in. Each can fail."""
    failing_replace(monkeypatch, failing)
    with pytest.raises(OSError, match="Input/output"), written_whole(old_model) as scratch:
        scratch.mkdir()
        (scratch / "weights.bin").write_text("new")
    assert (old_model / "weights.bin").read_text() == "old"
    assert [path.name for path in old_model.parent.iterdir()] == ["model"]


def test_an_old_folder_that_cannot_be_put_back_is_kept_and_its_place_named(old_model, monkeypatch):
    failing_replace(monkeypatch, 2, 3)
    with pytest.raises(OSError, match="lies whole in") as failure, written_whole(old_model) as new:
        new.mkdir()
    [scratch] = old_model.parent.iterdir()
    assert (scratch / "old" / "weights.bin").read_text() == "old"
    assert f"{scratch / 'old'}. Move it back" in str(failure.value)
    assert failure.value.errno == errno.EIO


def test_lines_are_written_whole_too(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0}, {"step": 1, "loss": 0.5}])
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1, "loss": 0.5}]
    write_lines(tmp_path / "metrics.jsonl", [])
    assert read_metrics(tmp_path) == []


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]
    assert read_metrics(tmp_path / "none") == []


# --- folders


def test_runs_are_in_lab_runs_by_profile_seed_and_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    assert Lab(PROFILE).path("sft") == tmp_path / "smoke" / "sft"
    assert Lab(PROFILE).path("dpo", "beta-0.5") == tmp_path / "smoke" / "sweeps" / "beta-0.5"
    assert Lab(PROFILE, 3).path("dpo_lora") == tmp_path / "smoke" / "seed-3" / "dpo_lora"


def test_other_data_or_models_get_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    assert Lab(replace(PROFILE, overrides=("harmless",))).folder == tmp_path / "smoke@harmless"
    assert (
        Lab(replace(PROFILE, overrides=("my-gpt2", "mine")), 2).folder
        == tmp_path / "smoke@my-gpt2+mine" / "seed-2"
    )


def test_without_lab_runs_they_are_in_the_repository(monkeypatch):
    monkeypatch.delenv("LAB_RUNS")
    assert PROFILE.folder == Path(runs.__file__).parents[1] / "runs" / "smoke"


def test_a_report_is_saved_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    path = Lab(PROFILE, 1).save_report("evaluation", {"seeds": 1})
    assert path == tmp_path / "smoke" / "seed-1" / "evaluation.json" and json.loads(
        path.read_text()
    ) == {"seeds": 1}


# --- stages


def test_every_stage_of_the_design_is_known():
    assert set(STAGES) >= {
        "base",
        "sft",
        "sft_chosen",
        "dpo_plain",
        "dpo",
        "orpo",
        "orpo_lambda0",
        "reward",
    }
    for stage in STAGES.values():
        assert stage.parent is None or stage.parent in STAGES
        assert stage.notebook.endswith(".ipynb")


def test_a_lora_variant_is_the_stage_itself():
    assert stage_of("dpo_lora") is STAGES["dpo"]


@pytest.mark.parametrize("name", ["ppo", "dpo_loraa", ""])
def test_an_unknown_stage_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=f"Unknown stage '{name}'. Choose one of: base, sft,"):
        Lab(PROFILE).path(name)


@pytest.mark.parametrize(
    ("ask", "stage", "notebook"),
    [
        ("record", "sft", "Lab-1.7-DPO_Alignment/02-SFT_Baseline.ipynb"),
        ("metrics", "dpo", "Lab-1.7-DPO_Alignment/03-DPO_Training.ipynb"),
        ("load", "reward", "Lab-1.7-DPO_Alignment/04-Evaluation_and_Compare.ipynb"),
        ("source", "orpo_lora", "Lab-1.8-ORPO_Alignment/02-ORPO_Training.ipynb"),
    ],
)
def test_a_missing_run_names_the_notebook_and_the_command(
    tmp_path, monkeypatch, ask, stage, notebook
):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    with pytest.raises(MissingRun) as failure:
        getattr(Lab(PROFILE, 2), ask)(stage)
    said = str(failure.value)
    assert (
        notebook in said and f"python -m common.training {stage} --profile smoke --seed 2" in said
    )
    assert str(tmp_path / "smoke" / "seed-2" / stage) in said


def test_the_command_of_seed_0_names_no_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    with pytest.raises(MissingRun, match="common.training sft --profile smoke$"):
        Lab(PROFILE).record("sft")


def test_a_half_finished_run_is_missing(tmp_path, monkeypatch):
    """Weights without run.json: it is written last."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    folder = Lab(PROFILE).path("sft")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    for ask in ("record", "metrics", "load"):
        with pytest.raises(MissingRun):
            getattr(Lab(PROFILE), ask)("sft")


def test_the_base_of_a_pre_trained_profile_is_the_hub_model_itself():
    assert Lab(PROFILES["gpt2"]).source("base") == "openai-community/gpt2"


# --- the lab


def test_open_lab_prints_what_is_used_and_why(capsys, monkeypatch):
    monkeypatch.setenv("LAB_SEED", "4")
    lab = open_lab()
    said = capsys.readouterr().out
    assert lab.seed == 4 and lab.profile.name == "smoke"
    assert "profile   smoke (LAB_PROFILE is set)" in said and "device    " in said
    assert "model     tiny-gpt2\ndata      toyworld\nseed      4" in said


def test_an_argument_wins_over_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("LAB_SEED", "4")
    lab = open_lab("cpu", 0)
    assert (lab.profile.name, lab.seed) == (
        "cpu",
        0,
    ) and "cpu (asked for)" in capsys.readouterr().out


def test_a_seed_has_its_own_world_and_tokenizer():
    one, other = Lab(PROFILE), Lab(PROFILE, 1)
    assert one.data.train["prompt"] != other.data.train["prompt"]
    assert one.tokenizer.get_vocab() != other.tokenizer.get_vocab()


def test_a_fingerprint_names_its_parts_and_ignores_what_decides_no_weight():
    """How many samples are drawn, or why the profile was chosen, changes no weight; the learning
    rate does.
    """
    lab, rows = Lab(PROFILE), [{"prompt_ids": [1]}]
    parts = lab.fingerprint_parts("dpo", Recipe(lr=1e-3), rows, "parent", "reference")
    same = Lab(replace(PROFILE, samples=9, reason="other", sweep_epochs=7.0, eval_batch=1))
    assert same.fingerprint_parts("dpo", Recipe(lr=1e-3), rows, "parent", "reference") == parts
    others = {
        "settings": lab.fingerprint_parts("dpo", Recipe(lr=2e-3), rows, "parent", "reference"),
        "data": lab.fingerprint_parts(
            "dpo", Recipe(lr=1e-3), [{"prompt_ids": [2]}], "parent", "reference"
        ),
        "parent": lab.fingerprint_parts("dpo", Recipe(lr=1e-3), rows, "another", "reference"),
        "reference": lab.fingerprint_parts("dpo", Recipe(lr=1e-3), rows, "parent", "another"),
        "stage": lab.fingerprint_parts("dpo_lora", Recipe(lr=1e-3), rows, "parent", "reference"),
    }
    for name, other in others.items():
        assert [key for key in parts if parts[key] != other[key]] == [name]


def test_other_weights_in_a_local_model_folder_are_another_fingerprint(tmp_path):
    """LAB_MODEL may stay the same path while its weights are replaced: runs that grew from the old
    ones are stale.
    """
    lab = Lab(replace(PROFILES["gpt2"], model=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"old")
    before = lab.pretrained_fingerprint()
    assert before == lab.pretrained_fingerprint()
    (tmp_path / "model.safetensors").write_bytes(b"newer")
    assert before != lab.pretrained_fingerprint()


def test_what_a_profile_cannot_show_is_one_line_with_its_reason(capsys):
    not_measured("flaws of answers", "these data have no rule that names them")
    line = "not measured: flaws of answers (these data have no rule that names them)\n"
    assert capsys.readouterr().out == line
