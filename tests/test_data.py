"""Reading, cleaning, splitting, tokenising and collating preference data."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from common.data import (
    collate,
    drawn,
    load_lab_data,
    load_pairs,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_response,
    tokenize_texts,
)
from common.io.formats import DataError, as_prompt, split_transcript
from common.lab import Lab
from common.profiles import get_profile
from common.toyworld import World
from common.training import _rows_of

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HH_ROWS = (
    Path(__file__).parent / "data" / "hh_rows.jsonl"
)  # 11 rows of our own, each with a quirk of HH-RLHF
HH_SAMPLE = os.environ.get("HH_SAMPLE")


def hh(prompt: str, chosen: str, rejected: str) -> dict:
    """One row in the HH-RLHF schema: two whole transcripts."""
    start = f"{HUMAN} {prompt}{ASSISTANT}"
    return {"chosen": start + chosen, "rejected": start + rejected}


def many(count: int) -> list[dict]:
    return [
        hh(f"What is {number} and one?", f" It is {number + 1}.", " Who knows.")
        for number in range(count)
    ]


GOOD = hh("Hi", " Hello!", " What?")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- HH-RLHF transcripts


def test_hh_rows_are_counted_by_what_is_wrong_with_them():
    """11 rows: one empty side, one with prompts that differ, one with identical sides, one without
    an assistant.
    """
    pairs, report = load_pairs(HH_ROWS)
    assert dict(report.dropped) == {
        "empty side": 1,
        "prompts that differ": 1,
        "identical sides": 1,
        "no assistant turn": 1,
    }
    assert (report.rows, report.kept, len(pairs)) == (11, 7, 7)


def test_prompts_end_at_the_assistant_turn_and_responses_start_with_one_space():
    for pair in load_pairs(HH_ROWS)[0]:
        assert pair["prompt"].startswith(HUMAN) and pair["prompt"].endswith(ASSISTANT)
        for side in ("chosen", "rejected"):
            assert pair[side].startswith(" ") and pair[side] == " " + pair[side].strip()


def test_no_word_of_a_transcript_is_lost_or_added():
    """Prompt and response together are the transcript again, white space aside: nothing is cut
    where the prompt's words, 'Human:' or 'Assistant:' come again in a response.
    """
    rows = [json.loads(line) for line in HH_ROWS.read_text(encoding="utf-8").splitlines()]
    transcripts = {tuple(row["chosen"].split()): tuple(row["rejected"].split()) for row in rows}
    for pair in load_pairs(HH_ROWS)[0]:
        chosen, rejected = (
            (pair["prompt"] + pair[side]).split() for side in ("chosen", "rejected")
        )
        joined = {"".join(key): "".join(value) for key, value in transcripts.items()}
        assert joined["".join(chosen)] == "".join(rejected)


def test_the_prompt_of_a_dialogue_is_everything_before_the_last_answer():
    pairs = load_pairs(HH_ROWS)[0].to_list()
    [dialogue] = [pair for pair in pairs if "Socks" in pair["chosen"]]
    before = f"{HUMAN} I need a name for my cat.{ASSISTANT} What does she look like?"
    assert dialogue["prompt"] == f"{before}{HUMAN} Grey, with white paws.{ASSISTANT}"
    assert dialogue["chosen"] == " How about Socks? It suits the paws."


def test_a_response_may_repeat_its_prompt():
    """`text.replace(prompt, "")` would eat the repetition."""
    [pair] = [pair for pair in load_pairs(HH_ROWS)[0] if "Say:" in pair["prompt"]]
    assert pair["chosen"] == " I like tea. You asked me to say: I like tea."
    assert pair["rejected"] == " Say: I like tea."


def test_split_transcript_by_hand():
    assert split_transcript(f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT} d") == (
        f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT}",
        " d",
    )
    assert split_transcript(f"{HUMAN} a") is None


def test_plain_rows_are_wrapped_in_the_dialogue_format_once():
    bare, whole = (
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        f"{HUMAN} Hi{ASSISTANT}",
    )
    expected = {"prompt": whole, "chosen": " Hello!", "rejected": " What?"}
    assert (
        load_pairs([bare])[0].to_list()
        == load_pairs([{**bare, "prompt": whole}])[0].to_list()
        == [expected]
    )
    assert as_prompt(as_prompt(" Hi ")) == whole


# --- bad input


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_a_missing_column_is_named_with_those_that_are_there(missing):
    row = {name: text for name, text in {**GOOD, "score": "1"}.items() if name != missing}
    with pytest.raises(
        DataError, match=f"columns {next(iter(row))}, score are of no known format. Known: .*HH"
    ):
        load_pairs([GOOD, row])


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [("chosen", 5, "int"), ("rejected", ["a"], "list"), ("prompt", {"role": "user"}, "dict")],
)
def test_a_wrong_type_is_named(column, value, kind):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", column: value}
    with pytest.raises(DataError, match=f"column {column} must hold text, not {kind}"):
        load_pairs([row])


def test_a_row_that_is_no_object_is_named():
    with pytest.raises(DataError, match="must have named columns; this one is a list"):
        load_pairs([["chosen", "rejected"]])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (hh("a", "", " b"), "empty side"),
        (hh("a", " b", "  \n"), "empty side"),
        ({"chosen": "", "rejected": GOOD["rejected"]}, "empty side"),
        ({"chosen": None, "rejected": GOOD["rejected"]}, "empty side"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "empty side"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "empty prompt"),
        (hh("a", " b", " b"), "identical sides"),
        (hh("a", " b", "b \n"), "identical sides"),
        ({"chosen": "Hello", "rejected": GOOD["rejected"]}, "no assistant turn"),
        ({"chosen": GOOD["chosen"], "rejected": f"{HUMAN} Hi"}, "no assistant turn"),
        (
            {"chosen": hh("a", " b", "")["chosen"], "rejected": hh("A", " c", "")["chosen"]},
            "prompts that differ",
        ),
    ],
)
def test_an_unusable_row_is_dropped_and_counted(row, reason):
    pairs, report = load_pairs([GOOD, row])
    assert dict(report.dropped) == {reason: 1}
    assert len(pairs) == report.kept == 1
    assert f"dropped      1  {reason}" in str(report) and "2 rows read, 1 kept" in str(report)


def test_no_row_left_is_an_error_that_says_why():
    with pytest.raises(
        DataError, match=r"(?s)No row is left after cleaning.*dropped +2 +empty side"
    ):
        load_pairs([hh("a", "", " b"), hh("a", " b", "")])


def test_a_file_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path / "none.jsonl", "data/none.parquet", "none"):
        with pytest.raises(DataError, match=r"none.*: no such file or folder\. Check LAB_DATA"):
            load_pairs(source)


def test_an_unreachable_hub_says_how_to_go_on_offline():
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        DataError, match="(?s)'nobody/nothing' from the hub.*offline.*LAB_DATA.*LAB_PROFILE=cpu"
    ):
        load_pairs("nobody/nothing", "train")


# --- readers and splits


def test_without_split_every_clean_row_comes_in_order():
    pairs, report = load_pairs(many(50))
    assert [pair["chosen"] for pair in pairs] == [f" It is {number + 1}." for number in range(50)]
    assert report.rows == report.kept == 50


def test_train_and_test_share_no_prompt_and_lose_no_row():
    """Each prompt twice, with other answers: both rows stand on the same side."""
    rows = many(300) + [
        hh(f"What is {number} and one?", " More.", " Less.") for number in range(300)
    ]
    train, test = (load_pairs(rows, split)[0] for split in ("train", "test"))
    assert not set(train["prompt"]) & set(test["prompt"])
    assert len(train) + len(test) == 600
    assert len(test) == 2 * len(set(test["prompt"]))


def test_about_a_tenth_of_the_prompts_is_held_out():
    """Of these 600 prompts a fixed number: the split is a function of the text, so this cannot
    flake.
    """
    held_out = len(load_pairs(many(600), "test")[0])
    assert 40 <= held_out <= 80


def test_the_split_of_a_prompt_does_not_depend_on_the_other_rows():
    whole, reversed_half = load_pairs(many(200), "test")[0], load_pairs(many(100)[::-1], "test")[0]
    assert set(reversed_half["prompt"]) == set(whole["prompt"]) & set(
        load_pairs(many(100))[0]["prompt"]
    )


def test_the_split_is_the_same_on_every_machine():
    """The first digest of SHA-256 modulo 10, computed once and for all: another split would train
    on test prompts.
    """
    held_out = load_pairs(many(60), "test")[0]["chosen"]
    assert held_out == [f" It is {number + 1}." for number in (8, 23, 33, 41, 44, 50)]


def test_what_is_drawn_is_a_random_part_in_random_order():
    """All rows where fewer are there; never the same row twice."""
    rows = list(range(100))
    assert len(set(drawn(rows, 10))) == 10 and drawn(rows, 10) == drawn(iter(rows), 10) != rows[:10]
    assert sorted(drawn(rows, 200)) == rows != drawn(rows, 200)


def test_limit_counts_clean_rows():
    rows = [hh("bad", "", " b"), *many(5)]
    pairs, report = load_pairs(rows, limit=3)
    assert pairs.to_list() == load_pairs(many(3))[0].to_list()
    assert report.dropped["empty side"] == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_under_one_is_refused(limit):
    with pytest.raises(DataError, match="limit must be at least 1, or None for all rows"):
        load_pairs(many(3), limit=limit)


def test_duplicates_are_dropped_and_counted():
    """The first one stays in its place. The same answers to another question are no duplicate."""
    rows = many(3)
    other = hh("Another?", " It is 1.", " Who knows.")
    pairs, report = load_pairs([rows[0], rows[1], rows[0], rows[2], rows[0], other])
    assert pairs.to_list() == load_pairs([*rows, other])[0].to_list()
    assert (report.rows, report.kept) == (6, 4)
    assert report.dropped == {"duplicate of an earlier row": 2}


def test_pairs_that_contradict_each_other_are_dropped_and_counted():
    """Of two that say the opposite, neither is to be believed, however often one is repeated: four
    rows of one question go, one as a duplicate, three as contradictions.
    """
    rows, (yes, no) = many(3), (hh("Is it?", " Yes.", " No."), hh("Is it?", " No.", " Yes."))
    pairs, report = load_pairs([rows[0], yes, yes, rows[1], no, yes, rows[2]])
    assert pairs.to_list() == load_pairs(rows)[0].to_list()
    assert dict(report.dropped) == {
        "duplicate of an earlier row": 1,
        "the same answers in the opposite order": 3,
    }
    with pytest.raises(DataError, match="(?s)No row is left.*2  the same answers in the opposite"):
        load_pairs([yes, no])


def test_a_limit_counts_neither_duplicates_nor_contradictions():
    rows, yes, no = many(3), hh("Is it?", " Yes.", " No."), hh("Is it?", " No.", " Yes.")
    pairs, _ = load_pairs([yes, no, rows[0], rows[0], rows[1], rows[2]], limit=2)
    assert pairs.to_list() == load_pairs(rows[:2])[0].to_list()


def test_the_embedded_world_has_no_duplicate_and_no_contradiction():
    """Its label noise swaps the sides of a pair, and each pair has answers of its own."""
    rows = World(4, 0).pairs(600)
    pairs, report = load_pairs(rows)
    assert len(pairs) == 600 and not report.dropped


# --- tokenisation


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def metaspace():
    pairs = load_pairs(HH_ROWS)[0]
    return tiny.metaspace_tokenizer(
        [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    )


def test_separate_tokenisation_equals_joint(tokenizer):
    """Byte-level BPE: a response starts with its own space, so no token spans the boundary."""
    pairs = load_pairs(HH_ROWS)[0]
    for row in tokenize_pairs(pairs, tokenizer, 1000)[0]:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == tokenizer(row[side])["input_ids"] + [
                tokenizer.eos_token_id
            ]
            joint = tokenizer(row["prompt"] + row[side])["input_ids"]
            assert row["prompt_ids"] + row[f"{side}_ids"] == joint + [tokenizer.eos_token_id]


def test_other_tokenizers_are_split_by_offsets(metaspace):
    """Tokenised separately, a response would begin with '▁' twice. Split by offsets, prompt and
    response are the one joint text, BOS comes once, and the prompt is what generation will see.
    """
    pairs = load_pairs(HH_ROWS)[0]
    bos, eos = metaspace.bos_token_id, metaspace.eos_token_id
    differs = 0
    for row in tokenize_pairs(pairs, metaspace, 1000)[0]:
        assert row["prompt_ids"] == metaspace(row["prompt"])["input_ids"]
        assert row["prompt_ids"].count(bos) == 1 and row["prompt_ids"][0] == bos
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            joint = metaspace(row["prompt"] + row[side], add_special_tokens=False)["input_ids"]
            assert [*row["prompt_ids"], *ids] == [bos, *joint, eos]
            assert metaspace.decode(ids[:-1]).strip() == row[side].strip()
            differs += ids[:-1] != metaspace(row[side], add_special_tokens=False)["input_ids"]
    assert differs == 2 * len(pairs)


def test_bytes_of_letters_that_a_llama_tokenizer_does_not_know_are_split_by_offsets_too(metaspace):
    """Llama 2 and Mistral write newlines and emoji as bytes, several tokens at one offset. The
    bytes of a last letter of the prompt stay in it, those of a first letter of the response do not.
    """
    state = json.loads(metaspace.backend_tokenizer.to_str())
    known = state["model"]["vocab"]
    taken = {name: number for name, number in known.items() if name != "\n"}
    names = [*sorted(taken, key=taken.get), *(f"<0x{byte:02X}>" for byte in range(256))]
    state["model"] |= {
        "vocab": {name: number for number, name in enumerate(names)},
        "byte_fallback": True,
    }
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if "\n" not in "".join(pair)
    ]
    state["model"]["vocab"] = {
        name: n for name, n in state["model"]["vocab"].items() if "\n" not in name
    }
    llama = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    newline, fish = llama.convert_tokens_to_ids(["<0x0A>", "<0xF0>"])
    prompt, response, cut = tokenize_response("\n\nHuman: Hi 🐟", "🐟\n", llama, 100)
    assert (
        prompt == llama("\n\nHuman: Hi 🐟")["input_ids"] and prompt.count(newline) == 2 and not cut
    )
    assert prompt.count(llama.bos_token_id) == 1 and prompt.count(fish) == 1
    assert (
        len(response) == 6 and response[0] == fish and response[4:] == [newline, llama.eos_token_id]
    )


def test_a_response_that_fits_ends_with_eos_and_one_that_is_cut_does_not(tokenizer):
    """At a limit of prompt + chosen + EOS the chosen answer just fits; one token less cuts its EOS
    off.
    """
    pairs = load_pairs([hh("Hi", " Hello, how can I help?", " No.")])[0]
    [row] = tokenize_pairs(pairs, tokenizer, 1000)[0]
    end, limit = tokenizer.eos_token_id, len(row["prompt_ids"]) + len(row["chosen_ids"])
    [fits], report = tokenize_pairs(pairs, tokenizer, limit)
    assert (
        fits["chosen_ids"] == row["chosen_ids"] and row["chosen_ids"][-1] == end and not report.cut
    )
    [cut], report = tokenize_pairs(pairs, tokenizer, limit - 1)
    assert cut["chosen_ids"] == row["chosen_ids"][:-1] and end not in cut["chosen_ids"]
    assert cut["rejected_ids"][-1] == end
    assert dict(report.cut) == {f"chosen response, to fit {limit - 1} tokens": 1}
    assert "cut          1  chosen response" in str(report)


def test_a_prompt_as_long_as_the_context_is_dropped_and_counted(tokenizer):
    pairs = load_pairs([GOOD, hh("Tell me " * 30, " b", " c")])[0]
    limit = len(tokenizer(pairs[1]["prompt"])["input_ids"])
    rows, report = tokenize_pairs(pairs, tokenizer, limit)
    assert rows["prompt"] == [pairs[0]["prompt"]]
    assert sum(report.dropped.values()) == 1 and "prompt as long as the context" in str(report)
    rows, report = tokenize_pairs(pairs, tokenizer, limit + 1)  # room for one token
    assert len(rows) == 2 and len(rows[1]["chosen_ids"]) == 1


def test_a_row_without_a_prompt_is_dropped_and_counted(tokenizer):
    """Nothing stands before the first token of its answers, so nothing predicts it. In a padded
    batch the model would read whatever stands in the neighbours' place.
    """
    rows = [{"prompt": prompt, "chosen": " a", "rejected": " b"} for prompt in ("", as_prompt("a"))]
    found, report = tokenize_pairs(rows, tokenizer, 100)
    assert len(found) == 1 and dict(report.dropped) == {"empty prompt": 1}


def test_pairs_that_are_equal_after_the_cut_are_dropped_and_counted(tokenizer):
    """Two long answers that differ at their ends only: cut short they would teach nothing."""
    pairs = load_pairs([GOOD, hh("Hi", " Hello" * 30 + " you", " Hello" * 30 + " there")])[0]
    assert len(tokenize_pairs(pairs, tokenizer, 1000)[0]) == 2
    rows, report = tokenize_pairs(
        pairs, tokenizer, len(tokenizer(pairs[1]["prompt"])["input_ids"]) + 20
    )
    assert rows["chosen"] == [" Hello!"] and dict(report.dropped) == {
        "sides equal after the cut": 1
    }


@pytest.mark.parametrize(
    "merges", [[(":", "▁")], [(":", "▁"), (":▁", "y")]], ids=["alike", "differently"]
)
def test_a_token_across_the_end_of_the_prompt_drops_the_row(merges):
    """A tokenizer that joins the prompt's last ":" with the space after it, on both sides or
    further on one of them: the prompt in training would not be the one that generation sees.
    """
    tokens = ["</s>", *sorted(set("\n▁Human:Assistantyeo")), ":▁", ":▁y"]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    joining = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    pairs = load_pairs([hh("Hi", " yes", " no")])[0]
    with pytest.raises(DataError, match="dropped +1 +a token spans the end of the prompt"):
        tokenize_pairs(pairs, joining, 100)


def test_no_row_left_after_tokenisation_is_an_error_that_says_what_to_do(tokenizer):
    pairs = load_pairs([GOOD])[0]
    with pytest.raises(
        DataError, match=r"(?s)No row is left after tokenisation: raise max_length.*dropped +1"
    ):
        tokenize_pairs(pairs, tokenizer, 4)


def test_demonstrations_have_prompt_and_chosen_only(tokenizer):
    rows, report = tokenize_demonstrations(
        [{"prompt": as_prompt("Hi"), "chosen": " Hello!"}], tokenizer, 64
    )
    assert set(rows.column_names) == {"prompt", "chosen", "prompt_ids", "chosen_ids"}
    assert rows[0]["chosen_ids"] == tokenizer(" Hello!")["input_ids"] + [tokenizer.eos_token_id]


def test_texts_are_split_into_blocks_and_nothing_is_lost(tokenizer):
    """Blocks of at most 9 tokens after one EOS; together they are the text and its EOS."""
    texts, end = (
        ["The kettle is for boiling water, since it does that best.", "Hi"],
        tokenizer.eos_token_id,
    )
    rows = tokenize_texts(texts, tokenizer, 10)
    assert all(row["prompt_ids"] == [end] and 1 <= len(row["chosen_ids"]) <= 9 for row in rows)
    joined = [token for row in rows for token in row["chosen_ids"]]
    assert joined == [token for text in texts for token in [*tokenizer(text)["input_ids"], end]]


# --- collation


def test_collate_pads_on_the_right_and_keeps_the_lengths():
    rows = [
        {"prompt_ids": [5], "chosen_ids": [6, 7, 1], "rejected_ids": [1]},
        {"prompt_ids": [8, 9], "chosen_ids": [1], "rejected_ids": [4, 1]},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(rows, pad_id=0).items()}
    assert batch == {
        "prompt_ids": [[5, 0], [8, 9]],
        "prompt_lengths": [1, 2],
        "chosen_ids": [[6, 7, 1], [1, 0, 0]],
        "chosen_lengths": [3, 1],
        "rejected_ids": [[1, 0], [4, 1]],
        "rejected_lengths": [1, 2],
    }


def test_collate_counts_eos_even_where_it_is_the_pad():
    """Masks by comparing with the pad id would hide the EOS that must be scored."""
    batch = collate(
        [{"prompt_ids": [5], "chosen_ids": [6, 1]}, {"prompt_ids": [5], "chosen_ids": [1]}],
        pad_id=1,
    )
    assert batch["chosen_lengths"].tolist() == [2, 1]
    assert batch["chosen_ids"].tolist() == [[6, 1], [1, 1]]


def test_collate_takes_the_sides_that_are_asked_for():
    rows = tiny.ragged_rows(2)
    assert set(collate(rows, sides=("chosen",))) == {
        "prompt_ids",
        "prompt_lengths",
        "chosen_ids",
        "chosen_lengths",
    }
    assert collate(rows)["chosen_ids"].dtype == torch.int64


# --- a lab's data


def test_own_data_serve_for_every_stage(tmp_path, monkeypatch):
    """LAB_DATA: the tokenizer and base learn from its training rows, SFT from its chosen answers;
    no world, no rule.
    """
    path = write_rows(tmp_path / "mine.jsonl", many(80))
    monkeypatch.setenv("LAB_DATA", str(path))
    profile = replace(get_profile("smoke"), held_out=3)
    data = load_lab_data(profile)
    assert data.world is None and data.name == "mine.jsonl"
    assert len(data.test) == 3 and not set(data.train["prompt"]) & set(data.test["prompt"])
    assert data.texts == [pair["prompt"] + pair["chosen"] for pair in data.train]
    assert data.demonstrations["chosen"] == data.train["chosen"]
    assert data.prompts == list(dict.fromkeys(data.test["prompt"]))


def test_demonstrations_of_real_data_are_held_out_over_all_of_them(tmp_path, monkeypatch):
    """Files a and b, 60 rows each: the last twentieth would be of b alone. No more are held out
    than pairs are.
    """
    for name in ("a", "b"):
        rows = [hh(f"{name} is {number}?", " Yes.", " No.") for number in range(60)]
        write_rows(tmp_path / "both" / f"{name}.jsonl", rows)
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "both"))
    lab = Lab(replace(get_profile("smoke"), held_out=4))
    train, held_out = _rows_of(lab, "sft", None)
    asked = [row["prompt"].split()[1] for row in held_out]
    assert len(asked) == 4 and set(asked) == {"a", "b"}
    texts = [{row["prompt"] for row in part} for part in (train, held_out)]
    assert len(train) + 4 == len(lab.demonstrations) and not texts[0] & texts[1]


def test_the_world_goes_through_the_same_parser():
    data = load_lab_data(tiny.micro_profile())
    assert data.world is not None
    assert (len(data.train), len(data.test), len(data.prompts), len(data.demonstrations)) == (
        40,
        8,
        8,
        60,
    )
    assert data.reports["train"].kept == 40 and all(
        prompt.endswith(ASSISTANT) for prompt in data.train["prompt"]
    )


def test_prompts_without_room_for_an_answer_are_counted(tmp_path, monkeypatch):
    """Held-out prompts of about 60 and about 20 tokens where an answer may take 100 of 150."""
    long = [
        hh(f"Please tell me {'once more ' * 40}what {number} is", " b", " c")
        for number in range(60)
    ]
    monkeypatch.setenv("LAB_DATA", str(write_rows(tmp_path / "mine.jsonl", many(60) + long)))
    profile = replace(get_profile("smoke"), max_length=150, max_new_tokens=100)
    lab = Lab(profile)
    lab.tokenizer = tiny.tokenizer()
    lengths = [len(lab.tokenizer(prompt)["input_ids"]) for prompt in lab.data.prompts]
    fits = [
        prompt for prompt, length in zip(lab.data.prompts, lengths, strict=True) if length <= 50
    ]
    assert 0 < len(fits) < len(lengths)
    assert lab.prompts == fits
    assert lab.data.reports["prompts"].kept == len(fits)


# --- the real thing


@pytest.fixture(scope="module")
def sample() -> list[dict]:
    if not HH_SAMPLE:
        pytest.skip("HH_SAMPLE does not name a file of real HH-RLHF rows")
    with gzip.open(HH_SAMPLE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_real_rows_survive_cleaning_and_the_rest_is_counted(sample):
    """Counted here by another route: the transcripts are cut at the last mark by str.rsplit."""
    empty = differ = 0
    for row in sample:
        (prompt, chosen), (other, rejected) = (
            row[side].rsplit(ASSISTANT, 1) for side in ("chosen", "rejected")
        )
        empty += prompt == other and not (chosen.strip() and rejected.strip())
        differ += prompt != other
    pairs, report = load_pairs(HH_SAMPLE)
    assert report.rows == len(sample) == 1500 and len(pairs) >= 1490
    assert report.dropped["empty side"] == empty > 0
    assert report.dropped["prompts that differ"] == differ > 0
    assert report.kept == len(pairs) == 1500 - sum(report.dropped.values())


def test_real_prompts_end_at_the_assistant_turn(sample):
    for pair in load_pairs(HH_SAMPLE)[0]:
        assert pair["prompt"].startswith(HUMAN) and pair["prompt"].endswith(ASSISTANT)
        assert pair["chosen"].strip() != pair["rejected"].strip() != ""
        assert all(
            ASSISTANT not in pair[side] and pair[side].startswith(" ")
            for side in ("chosen", "rejected")
        )


def test_more_than_a_thousand_real_pairs_are_trained_on(sample, monkeypatch):
    """On smoke's model, whose context grows to 256: after the split and the tokenizer, with its own
    vocabulary.
    """
    monkeypatch.setenv("LAB_DATA", HH_SAMPLE)
    lab = Lab(get_profile("smoke"))
    assert lab.profile.max_length >= 256
    assert len(lab.train_pairs) >= 1000
    assert lab.data.reports["train tokens"].kept == len(lab.train_pairs)


def test_a_row_that_cannot_be_used_is_counted_on_one_side_of_the_split(tmp_path):
    """30 rows without an assistant turn and 30 good ones: train and test together count each row
    once.
    """
    good = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(30)]
    bad = [{"chosen": f"no turn {n}", "rejected": "none"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    reports = [load_pairs(tmp_path / "rows.jsonl", split)[1] for split in ("train", "test")]
    assert sum(report.rows for report in reports) == 60
    assert sum(report.dropped["no assistant turn"] for report in reports) == 30
