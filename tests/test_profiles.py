"""Hardware tiers: which one is chosen, what it holds, and what LAB_MODEL and LAB_DATA change."""

from types import SimpleNamespace

import pytest
import torch

from common import profiles
from common.lab import STAGES, open_lab
from common.profiles import (
    INSTRUCTIONS,
    PROFILES,
    SMOLLM,
    TINY,
    WORLD,
    device_and_precision,
    get_profile,
)
from common.training import processes


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("LAB_PROFILE", "LAB_MODEL", "LAB_DATA"):
        monkeypatch.delenv(name, raising=False)


def test_the_six_profiles_are_there_from_small_to_large():
    assert list(PROFILES) == ["smoke", "cpu", "smollm", "gpt2", "qwen-0.5b", "qlora-7b"]
    assert all(profile.name == name for name, profile in PROFILES.items())


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_a_recipe_for_every_stage_it_trains(name):
    """A pre-trained profile trains no base."""
    profile = PROFILES[name]
    trained = set(STAGES) - (set() if profile.model == TINY else {"base"})
    assert set(profile.recipes) == trained
    for recipe in profile.recipes.values():
        assert (
            0 < recipe.lr < 1e-1
            and recipe.epochs > 0
            and 0 < recipe.micro_batch <= recipe.batch_size
        )


@pytest.mark.parametrize("name", PROFILES)
def test_the_recipes_say_what_the_stages_are_named_after(name):
    """`dpo` has the NLL term, `dpo_plain` has not; `orpo_lambda0` is ORPO with λ = 0."""
    recipes = PROFILES[name].recipes
    assert recipes["dpo"].nll_weight > 0 == recipes["dpo_plain"].nll_weight
    assert recipes["orpo"].lambda_or > 0 == recipes["orpo_lambda0"].lambda_or
    assert recipes["orpo"].lr == recipes["orpo_lambda0"].lr
    assert recipes["dpo"].beta == recipes["dpo_plain"].beta == 0.1


def test_the_embedded_profiles_need_no_download():
    for name in ("smoke", "cpu"):
        assert (PROFILES[name].model, PROFILES[name].data) == (TINY, WORLD)


def test_the_large_profile_is_four_bit_with_lora():
    profile = PROFILES["qlora-7b"]
    assert profile.four_bit and profile.lora > 0 and profile.gradient_checkpointing
    assert not PROFILES["gpt2"].four_bit and PROFILES["gpt2"].lora == 0


def test_the_middle_profile_trains_all_weights_with_gradient_checkpointing():
    profile = PROFILES["qwen-0.5b"]
    assert profile.model == "Qwen/Qwen2.5-0.5B" and profile.data == "Anthropic/hh-rlhf"
    assert profile.gradient_checkpointing and not profile.four_bit and profile.lora == 0


@pytest.mark.parametrize("name", PROFILES)
def test_every_number_has_a_source_or_is_said_to_be_ours(name):
    """Rates of SFT, DPO and ORPO, β, λ. None of the full-size profiles was tuned here."""
    profile = PROFILES[name]
    assert profile.sources.keys() == {"sft", "dpo", "orpo"}
    for stage, source in profile.sources.items():
        assert source.startswith("rate: ") and ("β: " in source) == (stage == "dpo")
        assert ("λ: " in source) == (stage == "orpo")
        assert ("ours, tuned on seeds 0–2" if profile.model == TINY else "not tuned") in source


def test_the_rates_of_full_size_models_are_within_the_advice():
    """The lab pages: DPO 5e-7 to 5e-6, ORPO 5e-6 to 1e-5 for whole models; adapters take more."""
    for name in ("gpt2", "qwen-0.5b", "qlora-7b"):
        recipes, most = PROFILES[name].recipes, 5e-5 if PROFILES[name].lora else 1e-5
        assert 5e-7 <= recipes["dpo"].lr <= 5e-6 and 5e-6 <= recipes["orpo"].lr <= most


def test_an_unknown_profile_is_refused_with_those_that_exist(no_settings, monkeypatch):
    expected = "Unknown profile 'laptop'. Set LAB_PROFILE to one of: smoke, cpu, smollm, gpt2, "
    with pytest.raises(ValueError, match=expected):
        get_profile("laptop")
    monkeypatch.setenv("LAB_PROFILE", "laptop")
    with pytest.raises(ValueError, match=expected):
        get_profile()


@pytest.mark.parametrize(
    ("gigabytes", "chosen", "why"),
    [
        (0.0, "cpu", "no CUDA GPU"),
        (7.9, "cpu", "a 8 GB CUDA GPU"),
        (8.0, "gpt2", "a 8 GB CUDA GPU"),
        (16.0, "gpt2", "a 16 GB CUDA GPU"),
    ],
)
def test_without_a_setting_the_gpu_decides(no_settings, monkeypatch, gigabytes, chosen, why):
    monkeypatch.setattr(profiles, "gpu_gigabytes", lambda: gigabytes)
    profile = get_profile()
    assert (
        profile.name == chosen
        and "LAB_PROFILE is not set" in profile.reason
        and why in profile.reason
    )


def test_the_argument_wins_over_the_environment_and_that_over_the_hardware(
    no_settings, monkeypatch
):
    monkeypatch.setattr(profiles, "gpu_gigabytes", lambda: 80.0)
    monkeypatch.setenv("LAB_PROFILE", "smoke")
    assert (get_profile().name, get_profile().reason) == ("smoke", "LAB_PROFILE is set")
    assert (get_profile("cpu").name, get_profile("cpu").reason) == ("cpu", "asked for")


def test_lab_data_replaces_the_data_and_widens_the_context(no_settings, monkeypatch, tmp_path):
    """Room for real prompts and answers, more words, and all of the pairs; runs in a folder of
    their own.
    """
    path = tmp_path / "my data.jsonl.gz"
    path.write_bytes(b"")
    monkeypatch.setenv("LAB_DATA", str(path))
    profile = get_profile("smoke")
    assert profile.data == str(path) and profile.model == TINY
    assert profile.max_length >= 256 and profile.max_length - profile.max_new_tokens >= 128
    assert profile.vocabulary > PROFILES["smoke"].vocabulary and profile.pairs is None
    assert profile.run_name == "smoke@my-data"


def test_lab_model_replaces_the_model_and_brings_gentle_recipes(no_settings, monkeypatch, tmp_path):
    (tmp_path / "my-gpt2").mkdir()
    monkeypatch.setenv("LAB_MODEL", str(tmp_path / "my-gpt2"))
    profile = get_profile("cpu")
    assert profile.model == str(tmp_path / "my-gpt2") and profile.data == WORLD
    assert profile.recipes == PROFILES["gpt2"].recipes and profile.max_length >= 256
    assert profile.run_name == "cpu@my-gpt2"


def test_both_can_be_replaced_by_hub_names(no_settings, monkeypatch):
    monkeypatch.setenv("LAB_MODEL", "owner/some-model")
    monkeypatch.setenv("LAB_DATA", "owner/some-data")
    profile = get_profile("gpt2")
    assert (profile.model, profile.data) == ("owner/some-model", "owner/some-data")
    assert profile.run_name == "gpt2@some-model+some-data"
    assert (
        profile.max_length == PROFILES["gpt2"].max_length
        and profile.recipes == PROFILES["gpt2"].recipes
    )


def test_a_relative_path_means_the_same_from_a_notebook(no_settings, monkeypatch, tmp_path):
    """Notebooks run in their own folder: what is not there is looked for in the root of the
    repository.
    """
    monkeypatch.setenv("LAB_DATA", "tests/data/hh_rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert get_profile("smoke").data == str(profiles.ROOT / "tests" / "data" / "hh_rows.jsonl")


def test_nothing_set_means_the_profile_as_it_is_written(no_settings):
    profile = get_profile("smoke")
    assert profile.overrides == () and profile.run_name == "smoke"
    assert (
        profile.recipes == PROFILES["smoke"].recipes
        and profile.max_length == PROFILES["smoke"].max_length
    )


@pytest.mark.parametrize(
    ("capability", "precision"), [((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((7, 5), "float16")]
)
def test_a_gpu_runs_in_the_precision_it_is_good_at(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    device, dtype, why = device_and_precision()
    assert (device, dtype) == ("cuda", precision) and f"{capability[0]}.{capability[1]}" in why


def test_a_cpu_runs_in_float32(monkeypatch):
    """Whatever its instructions, where the profile does not ask for bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for profile in (None, PROFILES["smoke"], PROFILES["cpu"], PROFILES["gpt2"]):
        assert device_and_precision(profile) == ("cpu", "float32", "no CUDA GPU")


@pytest.mark.parametrize(
    ("has", "precision", "why"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16", "this CPU has amx_bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bfloat16", "this CPU has avx512_bf16"),
        ({"avx2": True}, "float32", "this CPU has no instructions for bfloat16"),
    ],
)
def test_the_real_model_takes_bfloat16_where_the_cpu_has_it(monkeypatch, has, precision, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    found = device_and_precision(PROFILES["smollm"])
    assert found == ("cpu", precision, f"no CUDA GPU; {why}")


def test_one_setting_brings_float32_back_on_any_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LAB_PRECISION", "float32")
    asked = "float32", "LAB_PRECISION is set"
    assert device_and_precision(PROFILES["smollm"]) == ("cpu", *asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert device_and_precision() == ("cuda", *asked)
    monkeypatch.setenv("LAB_PRECISION", "float64")
    with pytest.raises(ValueError, match="'float64': set it to float32, or unset it"):
        device_and_precision()


def test_the_real_model_reads_its_own_template_and_starts_from_itself():
    profile = PROFILES["smollm"]
    assert (profile.model, profile.data) == (SMOLLM, INSTRUCTIONS)
    assert (profile.template, profile.start, profile.max_length) == ("own", "base", 512)
    others = [each for name, each in PROFILES.items() if name != "smollm"]
    assert {(each.template, each.start, each.cpu_bfloat16) for each in others} == {
        ("hh", "sft", False)
    }


def test_the_loop_and_the_first_cell_take_that_precision(monkeypatch, capsys):
    """Accelerate's autocast in bfloat16; what is printed says why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    asked, one = {}, SimpleNamespace(num_processes=1, distributed_type="NO")
    monkeypatch.setattr(processes, "Accelerator", lambda **settings: asked.update(settings) or one)
    for setting, mixed, line in (
        ("", "bf16", "cpu, bfloat16 (no CUDA GPU; this CPU has amx_bf16)"),
        ("float32", "no", "cpu, float32 (LAB_PRECISION is set)"),
    ):
        monkeypatch.setenv("LAB_PRECISION", setting)
        assert processes.new_accelerator(PROFILES["smollm"]) is one
        assert asked == {"mixed_precision": mixed, "cpu": True}
        open_lab("smollm")
        assert f"device    {line}\nmodel     smollm2" in capsys.readouterr().out
