"""Tokenizers and models: the chat template, deterministic weights, loading from a folder, LoRA, the
frozen copy.
"""

import json

import pytest
import tiny
import torch
from tiny import assert_same
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common import models
from common.data import load_pairs
from common.evaluation import logps_of
from common.lab import MissingRun, open_lab
from common.memory.architectures import model_config
from common.models import ModelError
from common.profiles import PROFILES, TINY, get_profile
from common.toyworld import World
from common.training import train

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROFILE = tiny.micro_profile()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def save_pretrained_gpt2(folder, tokenizer, positions: int = 512) -> None:
    """A GPT-2 in the way the hub keeps it: no pad token, no chat template."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=16, n_layer=1, n_head=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {
        name: value
        for name, value in settings.items()
        if name not in ("pad_token", "chat_template")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- tokenizer and chat template


def test_the_chat_template_writes_the_format_of_the_data(tokenizer):
    """A question, its answer with EOS, and a dialogue: character by character the text of the
    pairs.
    """
    ask, answer = {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello! "}

    def write(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert write([ask], add_generation_prompt=True) == f"{HUMAN} Hi{ASSISTANT}"
    assert write([ask, answer]) == f"{HUMAN} Hi{ASSISTANT} Hello!{tokenizer.eos_token}"
    assert (
        write([ask, answer, ask], add_generation_prompt=True)
        == f"{HUMAN} Hi{ASSISTANT} Hello!{HUMAN} Hi{ASSISTANT}"
    )


def test_the_chat_template_and_the_parser_agree(tokenizer):
    """A transcript of the world, taken apart into turns and put together by the template, is the
    pair's text again.
    """
    start = f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT}"
    [pair] = load_pairs([{"chosen": f"{start} d", "rejected": f"{start} e"}])[0]
    turns = [
        {"role": role, "content": text}
        for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    assert (
        tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
        == pair["prompt"]
    )
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == pair["prompt"] + pair["chosen"] + tokenizer.eos_token


def test_a_trained_tokenizer_writes_every_text_and_keeps_eos_and_pad_apart(tokenizer):
    """Byte level: words it has never seen, and any script, come back as they were."""
    for text in (" Grüße, 水! \n\n  Two spaces", f"{HUMAN} Hi{ASSISTANT} Hello!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.eos_token_id not in tokenizer("")["input_ids"]


def test_a_tokenizer_without_pad_gets_one_and_our_template(tmp_path, tokenizer):
    save_pretrained_gpt2(tmp_path, tokenizer)
    loaded = models.load_tokenizer(tmp_path)
    assert loaded.pad_token == loaded.eos_token == tokenizer.eos_token
    assert loaded.chat_template == models.CHAT_TEMPLATE
    assert loaded("\n\nHuman: Hi")["input_ids"] == tokenizer("\n\nHuman: Hi")["input_ids"]


# --- the tiny model


def test_the_seed_decides_the_weights_and_the_global_random_state_is_left_alone(tokenizer):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (models.new_tiny_model(PROFILE, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.transformer.wte.weight, same.transformer.wte.weight)
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)


def test_the_tiny_model_has_the_sizes_of_the_profile_and_no_dropout(tokenizer):
    config = models.new_tiny_model(PROFILE, tokenizer).config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (1, 16, 2, 160)
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0


# --- loading


def test_a_saved_model_is_loaded_as_it_was(tmp_path, tokenizer):
    model = models.new_tiny_model(PROFILE, tokenizer)
    model.save_pretrained(tmp_path)
    loaded = models.load_model(tmp_path, PROFILE)
    assert loaded.dtype == torch.float32
    for (name, one), (same, other) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == same and torch.equal(one, other)


def test_a_reward_head_is_one_number_on_the_same_body(tmp_path, tokenizer):
    model = models.new_tiny_model(PROFILE, tokenizer)
    model.save_pretrained(tmp_path)
    reward = models.load_model(tmp_path, PROFILE, reward_head=True)
    assert reward.head.weight.shape == (1, 16)
    assert torch.equal(reward.body.wte.weight, model.transformer.wte.weight)


def test_a_reward_is_read_at_the_last_token_of_each_row(tokenizer):
    """Rows of 3 and 5 tokens: the unit times the hidden state of token 3 and of token 5. Padding
    after the first row changes nothing, though it looks like EOS.
    """
    body = models.new_tiny_model(PROFILE, tokenizer).eval().transformer
    reward, ids = models.RewardModel(body), torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = reward(ids, mask)
    for row, end in ((0, 3), (1, 5)):
        hidden = body(ids[row : row + 1, :end]).last_hidden_state[0, -1]
        tiny.assert_same(found[row].detach(), (reward.head.weight[0] @ hidden).detach(), 1e-5)


@pytest.mark.parametrize(
    "load",
    [models.load_tokenizer, lambda source: models.load_model(source, PROFILE)],
    ids=["tokenizer", "model"],
)
def test_an_unreachable_hub_says_how_to_go_on_offline(load):
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        ModelError, match="nobody/nothing.*offline, point LAB_MODEL to a folder.*LAB_PROFILE=cpu"
    ):
        load("nobody/nothing")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"No model folder at .*/none\. Check LAB_MODEL"):
        models.load_model(tmp_path / "none", PROFILE)


def test_pickled_weights_are_refused(tmp_path, tokenizer):
    """A pickle can run any code when it is read."""
    model = models.new_tiny_model(PROFILE, tokenizer)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        models.load_model(tmp_path, PROFILE)


@pytest.mark.parametrize("kind", ["gpt2", "of-its-own"], ids=["known", "unknown"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_unasked(tmp_path, tokenizer, monkeypatch, kind, file):
    """`auto_map` names Python files that came with the model. transformers would ask on standard
    input whether to run them; somebody who answers yes has run them.
    """
    config = models.new_tiny_model(PROFILE, tokenizer).config.to_dict() | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((tmp_path / file).read_text())
    names = {"AutoConfig": "code.A", "AutoTokenizer": ["code.A", "code.A"]}
    settings |= {"auto_map": names, "tokenizer_class": "OfItsOwn"}
    (tmp_path / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    load = models.load_tokenizer if "tokenizer" in file else model_config
    with pytest.raises(ModelError, match="code of its own .auto_map.*never run here"):
        load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_context_that_is_too_short_is_named(tokenizer):
    model = models.new_tiny_model(PROFILE, tokenizer)
    models.check_fits(model, tokenizer, PROFILE)
    with pytest.raises(
        ModelError, match="160 positions, the profile needs 161.*Name another LAB_MODEL"
    ):
        models.check_fits(model, tokenizer, tiny.micro_profile(max_length=161))


def test_a_tokenizer_with_more_words_than_the_model_is_named(tokenizer):
    """Its ids would point past the embedding's last row. Fewer words are usual: Qwen's embedding is
    padded.
    """
    model = models.new_tiny_model(PROFILE, tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 8)
    models.check_fits(model, tokenizer, PROFILE)
    model.resize_token_embeddings(len(tokenizer) - 1)
    message = f"knows {len(tokenizer) - 1} words, its tokenizer {len(tokenizer)}: they do not"
    with pytest.raises(ModelError, match=message):
        models.check_fits(model, tokenizer, PROFILE)


def test_a_tokenizer_without_an_end_token_is_named(tmp_path):
    endless = tiny.tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no end token .EOS.: name another LAB_MODEL"):
        models.load_tokenizer(tmp_path)


def test_the_gpt2_profile_trains_from_a_local_folder(tmp_path, tokenizer, monkeypatch, capsys):
    """LAB_MODEL and LAB_DATA in place of the hub: the folder is the base, SFT and DPO start from
    it. GPT-2 comes with dropout, which DPO must switch off: noise in the policy alone would move
    its first loss off ln 2.
    """
    save_pretrained_gpt2(tmp_path / "my-gpt2", tokenizer)
    rows = World(4).pairs(80)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LAB_MODEL", str(tmp_path / "my-gpt2"))
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "mine.jsonl"))
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "runs"))
    lab = open_lab("gpt2")
    assert f"model     {tmp_path / 'my-gpt2'}" in capsys.readouterr().out
    assert lab.folder == tmp_path / "runs" / "gpt2@my-gpt2+mine"
    assert lab.profile.max_length == 512 and not lab.has_own_weights("base")
    sft = train(lab, "sft", epochs=0.3, evaluations=1)
    assert sft.record["parent"] == "base" and sft.record["model"] == str(tmp_path / "my-gpt2")
    dpo = train(lab, "dpo_plain", epochs=0.3, evaluations=1)
    assert_same(dpo.metrics[1]["loss"], 0.6931471805599453)
    with pytest.raises(MissingRun, match="--profile gpt2"):
        lab.load("orpo")


def test_the_middle_profile_trains_a_qwen_from_a_local_folder(tmp_path, tokenizer, monkeypatch):
    """Tied embeddings, grouped heads, gradient checkpointing and a frozen second model: DPO starts
    at ln 2, and both copies of the tied weights are saved as one.
    """
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
    }
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + 8, **sizes, **heads)).save_pretrained(
        tmp_path / "qwen"
    )
    tokenizer.save_pretrained(tmp_path / "qwen")
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in World(4).pairs(80))
    )
    for name, value in {"MODEL": "qwen", "DATA": "mine.jsonl", "RUNS": "runs"}.items():
        monkeypatch.setenv(f"LAB_{name}", str(tmp_path / value))
    lab = open_lab("qwen-0.5b")
    train(lab, "sft", epochs=0.3, evaluations=1)
    for stage in ("dpo_plain", "orpo"):
        run = train(lab, stage, epochs=0.3, evaluations=1, lr=1e-3)
        assert run.model.is_gradient_checkpointing and run.record["path"] == "packed"
        for (name, weight), loaded in zip(
            run.model.named_parameters(), lab.load(stage).parameters(), strict=True
        ):
            assert torch.equal(weight, loaded), name
        if stage == "dpo_plain":
            assert_same(run.metrics[1]["loss"], 0.6931471805599453)


# --- LoRA and the reference


@pytest.fixture
def adapted(tokenizer):
    """(base, the same model with an adapter that is far from zero), in float64."""
    base = models.new_tiny_model(PROFILE, tokenizer, 3).double().eval()
    model = models.add_lora(models.frozen_copy(base), PROFILE).double().eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 4
    return base, model


IDS = torch.tensor([[5, 9, 260, 31, 7]])


def test_a_fresh_adapter_changes_nothing(tokenizer):
    base = models.new_tiny_model(PROFILE, tokenizer).double().eval()
    model = models.add_lora(models.frozen_copy(base), PROFILE).eval()
    assert_same(model(IDS).logits.detach(), base(IDS).logits.detach())


def test_with_its_adapter_off_a_model_is_its_base(adapted):
    base, model = adapted
    assert (model(IDS).logits - base(IDS).logits).abs().max() > 1e-3
    with model.disable_adapter():
        assert_same(model(IDS).logits.detach(), base(IDS).logits.detach())


def test_a_merged_adapter_is_the_adapter_switched_on(adapted):
    _, model = adapted
    on = model(IDS).logits.detach()
    merged = models.merge_lora(model, "unused", PROFILE)
    assert isinstance(merged, GPT2LMHeadModel) and not [
        name for name in merged.state_dict() if "lora" in name
    ]
    assert_same(merged(IDS).logits.detach(), on)


def test_a_4_bit_model_is_merged_into_full_precision_weights(tmp_path):
    """W + (alpha / rank) * B A with alpha = 2 * rank, on W as it was saved: not on its rounding to
    four bits.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes))
    base.save_pretrained(tmp_path)
    profile = tiny.micro_profile(four_bit=True, lora=4)
    model = models.add_lora(models.load_model(tmp_path, profile), profile)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B.default.weight.data += 0.1
    update = (
        2
        * layer.lora_B.default.weight.detach().float()
        @ layer.lora_A.default.weight.detach().float()
    )
    rounded = layer.base_layer.weight
    assert rounded.dtype == torch.uint8
    merged = models.merge_lora(model, tmp_path, profile)
    before, after = (
        each.model.layers[0].self_attn.q_proj.weight.detach() for each in (base, merged)
    )
    assert after.dtype == torch.float32 and update.abs().max() > 1e-3
    assert_same(after, before + update, 1e-5)


def test_only_the_adapter_is_trained(adapted):
    _, model = adapted
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_head_of_a_reward_model_is_trained_beside_its_adapter(tmp_path, tokenizer):
    models.new_tiny_model(PROFILE, tokenizer).save_pretrained(tmp_path)
    reward = models.load_model(tmp_path, PROFILE, reward_head=True)
    model = models.prepared_policy(reward, PROFILE, "reward", lora=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "head.weight" in trained and [name for name in trained if "lora_" in name]


def test_a_frozen_copy_does_not_follow_the_model(tokenizer):
    model = models.new_tiny_model(PROFILE, tokenizer).train()
    copy = models.frozen_copy(model)
    assert not copy.training and not any(parameter.requires_grad for parameter in copy.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    rows = tiny.ragged_rows(vocabulary=len(tokenizer))
    before = logps_of(copy, rows).chosen.sums
    for parameter in model.parameters():
        parameter.data += 0.1
    assert torch.equal(logps_of(copy, rows).chosen.sums, before)


def test_freeze_returns_the_model_itself(tokenizer):
    model = models.new_tiny_model(PROFILE, tokenizer).train()
    assert models.freeze(model) is model and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_the_embedded_profiles_build_their_own_model(monkeypatch):
    tiny_ones = [name for name in PROFILES if models.is_tiny(get_profile(name))]
    assert tiny_ones == ["smoke", "cpu"]
    monkeypatch.setenv("LAB_MODEL", "some/model")
    assert not models.is_tiny(get_profile("smoke")) and get_profile("smoke").model != TINY
