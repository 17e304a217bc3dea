"""Export: the folder is the trained model, whole or not at all, and nothing in it is run."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import micro_profile

from common.lab import Lab
from common.training import train
from deploy import export as exporting
from deploy.export import ExportError, export, load_exported, model_card, verify_export
from deploy.serving.folders import FolderError, check_folder


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = Lab(micro_profile(), seed=41)
    train(lab, "base")
    train(lab, "orpo")
    return lab


@pytest.fixture(scope="module")
def folder(lab, tmp_path_factory):
    return export(lab, "orpo", tmp_path_factory.mktemp("export") / "orpo")


def test_an_export_is_the_trained_model(lab, folder):
    """float32 written and read back is the same to the last bit; so are greedy answers."""
    found = verify_export(lab, "orpo", folder, rows=8)
    assert found["max_logit_difference"] == 0 and found["greedy_equal"] == found["prompts"] == 8


def test_a_changed_weight_is_noticed(lab, folder, tmp_path):
    """One bias moved by 1e-3: more than 1e-5 in the logits."""
    model, tokenizer = load_exported(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="is not the trained orpo"):
        verify_export(lab, "orpo", tmp_path, rows=8)


def test_the_tokenizer_comes_along_with_its_chat_template(folder):
    _, tokenizer = load_exported(folder)
    said = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "\n\nHuman: Hi\n\nAssistant:"


def test_generation_is_greedy_and_ends_at_eos(lab, folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == lab.tokenizer.eos_token_id
    assert settings["max_new_tokens"] == lab.profile.max_new_tokens and not settings["do_sample"]


def test_pickled_weights_are_refused(folder, tmp_path):
    """A pickle runs code when it is read: this one would leave a file behind."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was-here"), "w")

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((folder / "config.json").read_text())
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FolderError, match="pickled"):
        load_exported(model)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(folder, tmp_path, name):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    asked = json.loads((tmp_path / name).read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "code.Model"}
    }
    (tmp_path / name).write_text(json.dumps(asked))
    with pytest.raises(FolderError, match="remote code"):
        check_folder(tmp_path)


def test_a_failed_export_leaves_the_old_one(lab, tmp_path, monkeypatch):
    """The card is written last; where that fails, the folder of before is intact."""
    target = export(lab, "orpo", tmp_path / "orpo")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(exporting, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(lab, "orpo", target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["orpo"]


def test_an_export_does_not_overwrite_what_it_did_not_make(lab, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="no export made"):
        export(lab, "orpo", tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_card_says_what_was_not_measured(lab):
    card = model_card(lab, "orpo")
    assert card.count("not measured") == len(exporting.SCORES)
    assert f"fingerprint {lab.record('orpo')['fingerprint']}" in card


def test_the_card_shows_only_scores_of_this_very_run(lab):
    """A report counts where the run in it took as long as the run that is here; another run's is
    left out.
    """
    seconds = lab.record("orpo")["wall_seconds"]
    scores = {"perplexity": 12.3456, "helpfulness": None}
    for took, expected in ((seconds, True), (seconds + 0.001, False)):
        report = {"models": {"orpo": scores}, "cost": {"orpo": {"wall_seconds": took}}, "seeds": 1}
        path = lab.save_report("evaluation", report)
        assert ("| 12.346 | evaluation.json |" in model_card(lab, "orpo")) is expected
    path.unlink()


def test_the_card_of_one_model_shows_no_mean_over_seeds(lab):
    """Of the seeds' reports the one of this run counts; a mean that none explains does not."""
    took = {"orpo": {"wall_seconds": lab.record("orpo")["wall_seconds"]}}
    reports = [
        {"models": {"orpo": {"perplexity": 2.5}}, "cost": {"orpo": {"wall_seconds": -1.0}}},
        {"models": {"orpo": {"perplexity": 1.5}}, "cost": took},
    ]
    mean = {"models": {"orpo": {"perplexity": 2.0}}, "cost": took, "seeds": 2}
    path = lab.save_report("comparison", mean | {"reports": reports})
    assert "| 1.500 | comparison.json |" in model_card(lab, "orpo")
    lab.save_report("comparison", mean)
    assert model_card(lab, "orpo").count("not measured") == len(exporting.SCORES)
    path.unlink()


def test_lora_is_exported_merged(lab, tmp_path):
    """Adapters do not appear in the export: plain weights, and the same logits as the run."""
    train(lab, "orpo_lora")
    target = export(lab, "orpo_lora", tmp_path / "merged")
    assert not list(target.glob("adapter*"))
    assert verify_export(lab, "orpo_lora", target, rows=4)["max_logit_difference"] == 0


def test_the_card_holds_no_path_of_this_machine(lab, tmp_path):
    """Data from a local file are named by the file; their licence is unknown, and said to be."""
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"A number {n}.", "rejected": "No."}
        for n in range(80)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = Lab(replace(lab.profile, data=str(file)), seed=lab.seed)
    card = model_card(other, "orpo")
    assert "- Data: mine.jsonl (unknown)" in card and str(tmp_path) not in card
