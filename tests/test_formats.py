"""Every known format, on rows of our own in the exact upstream schema, with the quirks that its
rows really have.
"""

import json
import math

import pytest
import tiny
from datasets import Features, Value

from common.data import load_demonstrations, load_lab_data, load_pairs, tokenize_pairs
from common.io.formats import (
    DEMONSTRATIONS,
    PAIRS,
    DataError,
    as_prompt,
    dialogue,
    format_of,
    messages_of,
)
from common.models import CHAT_TEMPLATE
from common.profiles import get_profile

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def shp(label: int = 0, ratio: float = 3.0, **changes) -> dict:
    """stanfordnlp/SHP: 15 columns. `domain` names the split too; A is the earlier comment whatever
    the label.
    """
    return {
        "post_id": "q1",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": "How do I keep bread fresh?",
        "c_root_id_A": "c1",
        "c_root_id_B": "c2",
        "created_at_utc_A": 1636107561,
        "created_at_utc_B": 1636161533,
        "score_A": 4,
        "score_B": 12,
        "human_ref_A": "Eat it.",
        "human_ref_B": "In a paper bag.\n\n&gt; never cold",
        "labels": label,
        "seconds_difference": 53972.0,
        "score_ratio": ratio,
        **changes,
    }


def comparison(choice: int = 1, **info) -> dict:
    """openai/summarize_from_feedback, comparisons: summaries start with a space; most fields may be
    null.
    """
    return {
        "info": {
            "id": "t3_1",
            "post": "My cat sleeps all day.\nShould I wake her?",
            "title": "My sleepy cat",
            "subreddit": "AskReddit",
            "site": None,
            "article": None,
            **info,
        },
        "summaries": [
            {"text": " Cat sleeps.", "policy": "sup1", "note": None},
            {"text": " My cat sleeps a lot; should I wake her?", "policy": "ref", "note": "fine"},
        ],
        "choice": choice,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def says(*texts: str) -> list[dict]:
    """Messages, the user first."""
    return [
        {"content": text, "role": ("user", "assistant")[number % 2]}
        for number, text in enumerate(texts)
    ]


def ultra(
    better: str = "Draw a little each day.",
    worse: str = "I am a model.",
    scores=(8.5, 6.0),
    **changes,
) -> dict:
    """HuggingFaceH4/ultrafeedback_binarized: 7 columns; `prompt` repeats the user's message,
    `messages` is `chosen`.
    """
    ask = "how can i learn to draw"
    return {
        "prompt": ask,
        "prompt_id": "086b",
        "chosen": says(ask, better),
        "rejected": says(ask, worse),
        "messages": says(ask, better),
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        **changes,
    }


def trl(**changes) -> dict:
    """trl-lib/ultrafeedback_binarized: the same without a prompt."""
    return {
        name: ultra(**changes)[name]
        for name in ("chosen", "rejected", "score_chosen", "score_rejected")
    }


def alpaca(given: str = "", output: str = "Red, blue, yellow.") -> dict:
    """tatsu-lab/alpaca: `text` repeats all in Alpaca's own template; most inputs are empty."""
    ask = "Name the primary colours."
    return {
        "instruction": ask,
        "input": given,
        "output": output,
        "text": f"Below is … {ask} … {output}",
    }


# --- each format


def test_shp_takes_the_side_that_the_label_names():
    """labels: 1 if A is preferred, 0 if B is. (The order of the comments says nothing: A is only
    the earlier one.)
    """
    [b], [a] = (load_pairs([shp(label)])[0].to_list() for label in (0, 1))
    assert b["prompt"] == f"{HUMAN} How do I keep bread fresh?{ASSISTANT}" == a["prompt"]
    assert b["chosen"] == a["rejected"] == " In a paper bag.\n\n&gt; never cold"
    assert b["rejected"] == a["chosen"] == " Eat it."


def test_shp_rows_of_a_low_score_ratio_are_dropped_and_counted():
    """NaN is no ratio, and nothing is under it or over it."""
    ratios = (1.04, 1.9999, 2.0, 3.5, math.nan, "nan", None)
    rows = [shp(ratio=ratio, history=f"Why {ratio}?") for ratio in ratios]
    pairs, report = load_pairs(rows)
    assert len(pairs) == 2 and dict(report.dropped) == {"score ratio under 2": 5}


def test_comparisons_take_the_summary_that_was_chosen():
    [first], [second] = (load_pairs([comparison(choice)])[0].to_list() for choice in (0, 1))
    prompt = (
        f"{HUMAN} SUBREDDIT: r/AskReddit\n\nTITLE: My sleepy cat\n\n"
        f"POST: My cat sleeps all day.\nShould I wake her?\n\nTL;DR:{ASSISTANT}"
    )
    short, long = " Cat sleeps.", " My cat sleeps a lot; should I wake her?"
    assert first == {"prompt": prompt, "chosen": short, "rejected": long}
    assert second == {"prompt": prompt, "chosen": long, "rejected": short}


def test_comparisons_of_news_have_an_article_and_no_subreddit():
    row = comparison(post=None, subreddit=None, site="cnn", article="It rained.", title="Rain")
    assert (
        load_pairs([row])[0][0]["prompt"]
        == f"{HUMAN} TITLE: Rain\n\nARTICLE: It rained.\n\nTL;DR:{ASSISTANT}"
    )


def test_comparisons_as_the_authors_files_have_them():
    """The JSON lines outside the hub leave out what is null: no site, no article."""
    row = {**comparison(), "extra": {}}
    row["info"] = {name: value for name, value in row["info"].items() if value is not None}
    assert load_pairs([row])[0].to_list() == load_pairs([comparison()])[0].to_list()


def test_ultrafeedback_with_and_without_a_prompt_column_is_the_same_pair():
    expected = {
        "prompt": f"{HUMAN} how can i learn to draw{ASSISTANT}",
        "chosen": " Draw a little each day.",
        "rejected": " I am a model.",
    }
    assert load_pairs([ultra()])[0].to_list() == load_pairs([trl()])[0].to_list() == [expected]


def test_a_prompt_of_messages_and_sides_of_one_answer():
    """TRL's explicit prompt: the history is in `prompt`, each side holds the answer alone."""
    row = {
        "prompt": says("Hi", "Hello!", "Why?"),
        "chosen": says("", "Because.")[1:],
        "rejected": says("", "No.")[1:],
    }
    before = f"{HUMAN} Hi{ASSISTANT} Hello!{HUMAN} Why?{ASSISTANT}"
    assert load_pairs([row])[0].to_list() == [
        {"prompt": before, "chosen": " Because.", "rejected": " No."}
    ]


CHAT = [*says("Hi"), *says("", "Hello!")[1:], *says("Why\n\nis it?")]
TALK = f"{HUMAN} Hi{ASSISTANT} Hello!{HUMAN} Why\n\nis it?{ASSISTANT}"


def test_a_dialogue_and_its_messages_are_each_others_inverse():
    assert messages_of(TALK) == CHAT and dialogue(CHAT) == TALK
    assert messages_of(" Hi ") == messages_of("Human: Hi") == says("Hi")
    assert messages_of(f"{HUMAN} Hi{ASSISTANT} {HUMAN} Why{ASSISTANT}") == says("Hi") + says("Why")
    assert messages_of("") == []


@pytest.mark.parametrize(
    "prompt",
    [
        "Human: Hi",
        "\n\nHuman: Hi\n\nAssistant:",
        "Human: Hi\nAssistant:",
        " Human: Hi\n\nAssistant: ",
        "Hi",
    ],
)
def test_a_prompt_that_is_a_dialogue_already_is_not_wrapped_again(prompt):
    assert as_prompt(prompt) == as_prompt(as_prompt(prompt)) == f"{HUMAN} Hi{ASSISTANT}"


# --- turns are counted once

ANSWERS = {"chosen": "Because.", "rejected": "No."}


def sides(*before: dict) -> dict:
    """Message lists: these turns, and an answer."""
    return {
        side: [*before, {"role": "assistant", "content": text}] for side, text in ANSWERS.items()
    }


def transcripts(prompt: str) -> dict:
    return {side: f"{prompt} {text}" for side, text in ANSWERS.items()}


SYSTEM = {"role": "system", "content": "Be kind."}
KIND = f"{HUMAN} Be kind."
TURNS = {  # a row -> its prompt
    "a question beside a system message": ({"prompt": "Hi", **sides(SYSTEM)}, f"{KIND}{HUMAN} Hi"),
    "a question and no list before the answer": ({"prompt": "Hi", **sides()}, f"{HUMAN} Hi"),
    "a prompt of messages that the sides repeat": ({"prompt": CHAT, **sides(*CHAT)}, TALK),
    "a prompt of text that the sides repeat": ({"prompt": "Hi", **sides(*CHAT)}, TALK),
    "a dialogue as text that the sides repeat": ({"prompt": TALK, **sides(*CHAT)}, TALK),
    "sides that repeat the last message": ({"prompt": CHAT, **sides(CHAT[-1])}, TALK),
    "sides that go on": ({"prompt": CHAT[:1], **sides(*CHAT[1:])}, TALK),
    "system in the prompt alone": ({"prompt": [SYSTEM, *CHAT], **sides(*CHAT)}, KIND + TALK),
    "whole transcripts beside their prompt": ({"prompt": TALK, **transcripts(TALK)}, TALK),
    "whole transcripts beside a question": (
        {"prompt": "Hi", **transcripts(f"Human: Hi{ASSISTANT}")},
        f"{HUMAN} Hi",
    ),
    "whole transcripts beside no prompt": ({"prompt": None, **transcripts(TALK)}, TALK),
    "answers that begin with their mark": (
        {"prompt": "Hi", "chosen": "Assistant: Because.", "rejected": "Assistant: No."},
        f"{HUMAN} Hi",
    ),
    "a prompt with its mark": ({"prompt": "Human: Hi", **ANSWERS}, f"{HUMAN} Hi"),
    "a prompt of two turns": ({"prompt": TALK.removesuffix(ASSISTANT), **ANSWERS}, TALK),
    "system, plain": ({"system": "Be kind.", "prompt": "Hi", **ANSWERS}, f"{KIND}{HUMAN} Hi"),
    "system, transcripts": ({"system": "Be kind.", **transcripts(TALK)}, KIND + TALK),
    "system, messages": ({"system": " Be kind. ", **sides(*CHAT)}, KIND + TALK),
    "system, in the messages too": ({"system": "Be kind.", **sides(SYSTEM, *CHAT)}, KIND + TALK),
    "system, empty": ({"system": None, "prompt": "Hi", **ANSWERS}, f"{HUMAN} Hi"),
    "an empty system message": (sides({"role": "system", "content": ""}, *CHAT), TALK),
    "a model": (sides(CHAT[0], {**CHAT[1], "role": "model"}, CHAT[2]), TALK),
    "names of others": (
        sides({**CHAT[0], "role": "human"}, {**CHAT[1], "role": "GPT"}, CHAT[2]),
        TALK,
    ),
    "an instruction": ({"instruction": "Hi", "input": "", **ANSWERS}, f"{HUMAN} Hi"),
    "an instruction alone": ({"instruction": "Hi", **ANSWERS}, f"{HUMAN} Hi"),
    "an instruction with its input": (
        {"instruction": "Why", "input": "is it?", "system": "Be kind.", **ANSWERS},
        f"{KIND}{HUMAN} Why\n\nis it?",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_each_turn_stands_in_the_prompt_once(name):
    row, prompt = TURNS[name]
    expected = {side: f" {text}" for side, text in ANSWERS.items()}
    whole = prompt if prompt.endswith(ASSISTANT) else prompt + ASSISTANT
    assert load_pairs([row])[0].to_list() == [{"prompt": whole, **expected}]


TOOL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
UNUSABLE = {
    "a call of a tool": sides(CHAT[0], TOOL, CHAT[2]),
    "an answer of a tool": sides(*CHAT, {"role": "tool", "content": "7"}),
    "an empty turn": sides(CHAT[0], {**CHAT[1], "content": " "}, CHAT[2]),
    "an unknown role": sides({**CHAT[0], "role": "narrator"}),
    "no role": sides({**CHAT[0], "role": None}),
    "another question": {"prompt": "Where?", **sides(*CHAT)},
    "another question beside transcripts": {"prompt": "Where?", **transcripts(TALK)},
    "one transcript": {"prompt": "Hi", **ANSWERS, "chosen": TALK + " Because."},
    "an answer in the prompt": {"prompt": f"{TALK} Because.", **ANSWERS},
    "earlier turns": {"instruction": "Hi", "history": [["a", "b"]], **ANSWERS},
    "no question": transcripts(ASSISTANT),
    "another name of the prompt": {"question": "Hi", **ANSWERS},
}
REASONS = {
    "a call of a tool": "a call of a tool",
    "an answer of a tool": "a call of a tool",
    "an empty turn": "a turn without text",
    "an unknown role": "unknown role 'narrator'",
    "no role": "unknown role ''",
    "another question": "prompts that differ",
    "another question beside transcripts": "prompts that differ",
    "one transcript": "prompts that differ",
    "an answer in the prompt": "the prompt ends with an answer",
    "earlier turns": "earlier turns in a column history: write them into the prompt",
    "no question": "empty prompt",
    "another name of the prompt": "no assistant turn "
    "(rename the column of the question to prompt: question?)",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_turns_that_cannot_be_read_are_counted(name):
    pairs, report = load_pairs([trl(), UNUSABLE[name]])
    assert len(pairs) == 1 and dict(report.dropped) == {REASONS[name]: 1}


def test_messages_become_what_the_chat_template_writes():
    """A system message too; the course has no third role."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "system", "content": "Be kind."}, *says("Hi ", " Hello!", "Why?")]
    assert dialogue(messages) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (shp(human_ref_B=" \n"), "empty side"),
        (shp(history=""), "empty prompt"),
        (shp(labels=2), "no choice between the two comments"),
        (shp(human_ref_B="Eat it. "), "identical sides"),
        (shp(score_ratio=None), "score ratio under 2"),
        (comparison(post=None), "empty prompt"),
        (comparison(2), "no choice between two summaries"),
        ({**comparison(), "choice": None}, "no choice between two summaries"),
        (
            {**comparison(), "summaries": comparison()["summaries"][:1]},
            "no choice between two summaries",
        ),
        ({**comparison(), "summaries": comparison()["summaries"][:1] * 2}, "identical sides"),
        ({**comparison(), "summaries": [{"text": ""}, {"text": " a"}]}, "empty side"),
        (ultra(scores=(8.5, 8.5)), "tie: the two sides have one score"),
        (ultra(scores=(6.0, 8.5)), "scores that contradict the choice"),
        (ultra("Same.", "Same. "), "identical sides"),
        (ultra("", "No."), "empty side"),
        (ultra(chosen=says("a"), rejected=says("a")), "no assistant turn"),
        (
            ultra(
                rejected=[*says("how can i learn to draw"), {"role": "assistant", "content": None}]
            ),
            "empty side",
        ),
        (ultra(rejected=says("another question", "No.")), "prompts that differ"),
        (ultra(rejected=None), "empty side"),
        (ultra(chosen=[], rejected=[]), "empty side"),
        ({"chosen": says("", "Yes."), "rejected": says("", "No.")}, "a turn without text"),
        (
            {"prompt": "a", "chosen": "b \ud83d", "rejected": "c"},
            "broken characters (a lone surrogate)",
        ),
    ],
)
def test_what_upstream_rows_lack_is_counted(row, reason):
    pairs, report = load_pairs([ultra(), row])
    assert dict(report.dropped) == {reason: 1} and len(pairs) == 1


def test_alpaca_joins_instruction_and_input():
    rows, report = load_demonstrations(
        [alpaca("<noinput>"), alpaca("As a list."), alpaca(), alpaca(output="")]
    )
    alone, joined = "Name the primary colours.", "Name the primary colours.\n\nAs a list."
    assert rows["prompt"] == [f"{HUMAN} {prompt}{ASSISTANT}" for prompt in (alone, joined)]
    assert set(rows["chosen"]) == {" Red, blue, yellow."}
    assert rows.column_names == ["prompt", "chosen"]
    assert dict(report.dropped) == {"empty side": 1, "duplicate of an earlier row": 1}


def test_demonstrations_from_other_formats():
    rows = [
        {"messages": says("Hi", "Hello!")},
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": "Hi", "response": "Hello!"},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"chosen": says("Hi", "Hello!"), "rejected": says("Hi", "No.")},
    ]
    expected = {"prompt": f"{HUMAN} Hi{ASSISTANT}", "chosen": " Hello!"}
    assert [load_demonstrations([row])[0].to_list() for row in rows] == [[expected]] * 5


def test_a_conversation_without_an_answer_is_counted():
    """UltraFeedback's train_gen split: `messages` ends with the user."""
    assert load_demonstrations([alpaca(), {"messages": says("Hi")}])[1].dropped == {
        "no assistant turn": 1
    }


# --- which format is it?


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (shp(), "Stanford SHP"),
        (comparison(), "summarize-from-feedback comparisons"),
        (ultra(), "UltraFeedback binarized"),
        (trl(), "UltraFeedback binarized"),
        ({"chosen": "a", "rejected": "b"}, "HH-RLHF transcripts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "plain rows"),
    ],
)
def test_the_columns_say_which_format_it_is(row, name):
    assert format_of(row).name == name
    assert format_of(dict(reversed(row.items()))).name == name


def test_an_unknown_format_lists_the_columns_and_all_known_formats():
    """HH-RLHF's red-team transcripts are no pairs."""
    row = {"min_harmlessness_score_transcript": 0.1, "transcript": "\n\nHuman: a", "rating": 4.0}
    with pytest.raises(
        DataError, match="the columns min_harmlessness_score_transcript, transcript, rating"
    ) as raised:
        load_pairs([row])
    assert all(str(known) in str(raised.value) for known in PAIRS)
    with pytest.raises(DataError) as raised:
        load_demonstrations([row])
    assert all(str(known) in str(raised.value) for known in DEMONSTRATIONS)


def test_demonstrations_in_place_of_pairs_are_named_as_such():
    with pytest.raises(DataError, match="instruction, input, output.*demonstrations.*LAB_SFT_DATA"):
        load_pairs([alpaca()])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            ultra(chosen=["a", "b"]),
            "column chosen must hold messages with role and content, not 'a'",
        ),
        (
            ultra(chosen=[{"role": "user", "content": [{"type": "text"}]}]),
            "column content of a message in chosen must hold text, not list",
        ),
        (shp(history=5), "column history must hold text, not int"),
        (comparison() | {"info": "t3_1"}, "column info must hold an object"),
    ],
)
def test_a_wrong_type_inside_a_known_format_is_named(row, problem):
    row = {**row, "rejected": row["chosen"]} if "chosen" in row else row
    with pytest.raises(DataError, match=problem):
        load_pairs([row])


# --- in every kind of file


def test_many_rows_are_arrow_and_text():
    """More than one chunk of 10,000 rows, in order."""
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(10_001)]
    pairs = load_pairs(rows)[0]
    assert pairs.features == Features(
        {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    )
    assert pairs[10_000]["prompt"] == f"{HUMAN} 10000{ASSISTANT}"


@pytest.mark.parametrize(
    "row", [shp(), comparison(), ultra(), trl()], ids=["shp", "comparison", "ultra", "trl"]
)
def test_the_scored_tokens_of_every_format_are_the_response_and_its_end(row):
    tokenizer = tiny.tokenizer()
    [pair] = load_pairs([row])[0]
    [tokens] = tokenize_pairs([pair], tokenizer, 1000)[0]
    assert tokenizer.decode(tokens["prompt_ids"]).endswith(ASSISTANT) and pair["prompt"].endswith(
        ASSISTANT
    )
    assert (
        tokenizer.decode(tokens["chosen_ids"][:-1])
        == pair["chosen"]
        == " " + pair["chosen"].strip()
    )
    assert tokens["chosen_ids"][-1] == tokens["rejected_ids"][-1] == tokenizer.eos_token_id


# --- in a lab


def test_sft_data_of_their_own(tmp_path, monkeypatch):
    """LAB_SFT_DATA: nine tenths of its prompts are demonstrations; the pairs stay those of
    LAB_DATA.
    """
    pairs = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "sft.jsonl").write_text(
        "".join(json.dumps(alpaca(f"Number {n}.")) + "\n" for n in range(60))
    )
    monkeypatch.setenv("LAB_SFT_DATA", str(tmp_path / "sft.jsonl"))
    with pytest.raises(DataError, match="LAB_SFT_DATA goes with LAB_DATA"):
        load_lab_data(get_profile("smoke"))
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "pairs.jsonl"))
    profile = get_profile("smoke")
    data = load_lab_data(profile)
    assert profile.run_name == "smoke@pairs+sft"
    assert 45 <= len(data.demonstrations) < 60 and set(data.demonstrations["chosen"]) == {
        " Red, blue, yellow."
    }
    assert (
        data.reports["demonstrations"].kept == len(data.demonstrations)
        and data.train["chosen"][0] == " Yes."
    )
