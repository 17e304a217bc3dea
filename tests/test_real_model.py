"""SmolLM2 itself, where `make model` wrote it: SMOLLM_DIR names the folder.

Without it these tests are skipped, in one loud line. With REQUIRE_MODEL=1 that is a failure.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from openai import OpenAI

from common import models, packed
from common.data import collate, load_pairs, tokenize_pairs
from common.evaluation import Sampling, generate, logps_of
from common.io.pretrained import PACKAGED, model_folder
from common.judges import RuleJudge
from common.lab import Lab
from common.profiles import SMOLLM, get_profile
from common.toyworld import World
from common.training import train
from deploy.export import export, load_exported
from deploy.local_judge import by_language_model
from deploy.serving.start import serving

FOLDER = os.environ.get("SMOLLM_DIR", "")
WHY = "NOT TESTED: no real model. Run `make model`, and set SMOLLM_DIR to the folder that it names."
pytestmark = pytest.mark.more
FRANCE = "What is the capital of France?"
ROWS = [
    {
        "prompt": "\n\nHuman: Why do people keep bees? Answer in one sentence.\n\nAssistant:",
        "chosen": " People keep bees for honey, and to pollinate their fruit trees.",
        "rejected": " Bees. They are insects, and they are kept. Bees bees bees bees bees.",
    },
    {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello! How can I help?\n\nHuman: Name two colours."
        "\n\nAssistant:",
        "chosen": " Red and blue.",
        "rejected": " Certainly! There are many colours, 12 of them in this box, and I like all.",
    },
    {
        "prompt": "\n\nHuman: How do I boil an egg?\n\nAssistant:",
        "chosen": " Put it in boiling water for 8 minutes, then into cold water.",
        "rejected": " Eggs are boiled.",
    },
]


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A run folder of its own, in which the model lies as `make model` leaves it."""
    if not (FOLDER and (Path(FOLDER) / "README.md").exists()):
        (pytest.fail if os.environ.get("REQUIRE_MODEL") == "1" else pytest.skip)(WHY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("real")))
        model_folder(SMOLLM).parent.mkdir(parents=True)
        model_folder(SMOLLM).symlink_to(Path(FOLDER).resolve())
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(SMOLLM, "own")


@pytest.fixture(scope="module")
def model():
    return models.load_model(SMOLLM, get_profile("smollm"), device="cpu").eval()


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
said = tokenizer.decode(model(ids).logits[0, -1].argmax())
assert not any(name.partition(".")[0] == "common" for name in sys.modules)
print([said, str(model.dtype), tokenizer.tokenize("a  12"), tokenizer.eos_token])
"""


def test_the_folder_loads_with_transformers_alone_and_knows_the_capital_of_france(tmp_path):
    """In a process that never imported `common`. Numbers are read digit by digit, as SmolLM2 was
    trained; the reader of GGUF files alone would split the spaces before them in another way.
    """
    command = [sys.executable, "-I", "-c", PLAIN, FOLDER]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [" Paris", "torch.float32", ["a", "ĠĠ", "1", "2"], "<|im_end|>"]
    assert done.stdout.splitlines()[-1] == str(expected)


def test_the_folder_says_where_it_comes_from():
    note = (Path(FOLDER) / "README.md").read_text(encoding="utf-8")
    packaged = PACKAGED[SMOLLM]
    for fact in (packaged.origin, "Apache-2.0", "Q4_1, dequantised", packaged.member_sha256):
        assert fact in note


def test_packed_simple_and_one_by_one_agree_within_a_thousandth_of_a_nat(model, tokenizer):
    """Summed log-probabilities of each answer, float32."""
    rows = tokenize_pairs(ROWS, tokenizer, 512)[0].to_list()
    simple = logps_of(model, rows)
    one_by_one = logps_of(model, rows, batch_size=1)
    together = logps_of(model, rows, response_logps=packed.response_logps)
    batch = [collate(rows)]
    path, why = packed.checked_path(model, [*batch, collate(rows[:1])], 512)
    assert path == "packed", why
    for side in ("chosen", "rejected"):
        found = [getattr(each, side).sums for each in (simple, one_by_one, together)]
        assert all(found[0] < -5)
        assert float((found[0] - found[1]).abs().max()) < 1e-3
        assert float((found[0] - found[2]).abs().max()) < 1e-3


def test_it_answers_in_its_own_template_and_stops(model, tokenizer):
    prompt = f"\n\nHuman: {FRANCE}\n\nAssistant:"
    [[answer]] = generate(model, tokenizer, [prompt], Sampling(40, temperature=0))
    assert "Paris" in answer.text and answer.ended
    assert answer.chosen_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_load_train_export_and_one_answer_through_the_gateway(tmp_path, monkeypatch):
    """Two steps of DPO and of ORPO from the model itself. It is DPO's reference too, so the first
    rewards are 0. What was exported answers through the gateway in the model's own template, as it
    does without it.
    """
    for split, rows in (
        ("train", [*ROWS, ROWS[0] | {"prompt": ROWS[2]["prompt"]}]),
        ("test", ROWS),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    few = {"held_out": 2, "sampled_prompts": 1, "max_new_tokens": 8}
    lab = Lab(replace(get_profile("smollm"), **few))
    assert {lab.parent_of(stage) for stage in ("sft", "dpo", "orpo", "reward")} == {"base"}
    for stage in ("dpo", "orpo"):
        run = train(lab, stage, batch_size=2, micro_batch=2, epochs=1.0, evaluations=1)
        assert (run.record["steps"], run.record["path"]) == (2, "packed")
        assert run.record["parent"] == "base" and run.record["model"] == SMOLLM
        assert 1e9 < run.record["peak_memory_bytes"] < 8e9
        if stage == "dpo":
            assert run.record["reference"] == "base"
            assert run.metrics[1]["rewards_chosen"] == run.metrics[1]["rewards_rejected"] == 0.0
        del run
    folder = export(lab, "dpo", tmp_path / "aligned")
    assert "apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    prompt = f"\n\nHuman: {FRANCE}\n\nAssistant:"
    [[own]] = generate(*load_exported(folder), [prompt], Sampling(8, temperature=0))
    options = ("--model", str(folder), "--store", str(tmp_path / "answers.sqlite"))
    with (
        serving(*options) as service,
        OpenAI(base_url=service.url, api_key="none", max_retries=0, timeout=120) as client,
    ):
        said = [{"role": "user", "content": FRANCE}]
        answer = client.chat.completions.create(model="aligned", messages=said, max_tokens=8)
    assert answer.choices[0].message.content.strip() == own.text.strip() and "Paris" in own.text


def test_it_judges_the_lab_s_answers_over_http_and_is_measured():
    """Ten pairs of the toy world in both orders, with reasons and as a bare choice, over HTTP: the
    counts add up, the second time costs nothing, and it is a poor judge: with reasons it is hardly
    ever readable, and its κ with the rule does not reach .5; the bare choice follows the place.
    """
    pairs = load_pairs(World(8).pairs(10, label_noise=0))[0].to_list()
    sides = [("chosen", "rejected")[:: 1 if at % 2 else -1] for at in range(10)]
    asked = [
        (row["prompt"], row[one], row[two]) for row, (one, two) in zip(pairs, sides, strict=True)
    ]
    rule = RuleJudge(World(8))
    rows, judges = by_language_model(rule, asked, tokens=32)
    assert [sum(judge.counts.values()) for judge in judges] == [20, 20]
    for row in rows:
        assert row["won"] + row["ties"] + row["changed"] + row["unreadable"] == 10
    assert all(reply["tokens"][1] for judge in judges for reply in judge.replies)
    assert rows[0]["won"] == 10 and all(row["kappa"][0] < 0.5 for row in rows[1:])
    assert rows[1]["unreadable"] > 5 and rows[2]["unreadable"] == 0 and rows[2]["changed"] > 5
    again, others = by_language_model(rule, asked, tokens=32)
    assert again == rows and " 0 asked now, 0 failed" in others[0].spent
