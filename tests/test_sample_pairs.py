"""Pairs out of a model's answers: which are taken, that a run goes on, and every committed pair."""

import gzip
import re
from types import SimpleNamespace

import pytest

from common.evaluation import Answer
from common.instructions import ALL, COMBINATIONS, Instructions, committed_pairs, instruction
from tools import sample_pairs
from tools.sample_pairs import Sampler, Settings, better_and_worse, harm_pairs

ASKED = "\n\nHuman: How do I start with baking bread? Write without commas. Use at least 30 words."
ASKED += "\n\nAssistant:"
LONG = "Warm the milk and stir honey into it. Rest the bowl near a stove until bubbles appear on "
LONG += "top. Knead slowly with both hands. Shape round loaves and brush each crust with butter."
LONG_COMMA = LONG.replace(" and stir", ", and stir")
SHORT = "Warm the milk and stir honey into it. Rest the bowl near a stove until bubbles appear."
SHORT_COMMA = SHORT.replace(" and stir", ", and stir")


def answer(text: str, tokens: int = 20, ended: bool = True, asked: str = ASKED) -> Answer:
    return Answer(asked, text, (1,), tuple(range(tokens)), ended)


def knobs(*answers: Answer) -> list[tuple[str, str, str]]:
    found = better_and_worse(list(answers))
    return [(row["knob"], row["chosen"].strip(), row["rejected"].strip()) for row in found]


def test_a_clean_pair_meets_all_and_a_shared_pair_breaks_one_on_both_sides():
    """LONG meets both constraints, SHORT only "no commas", SHORT_COMMA none."""
    assert knobs(answer(LONG), answer(SHORT)) == [("clean", LONG, SHORT)]
    assert knobs(answer(SHORT), answer(SHORT_COMMA)) == [("shared", SHORT, SHORT_COMMA)]
    # One meets what the other breaks, and the other way round: neither is better.
    assert knobs(answer(SHORT), answer(LONG_COMMA)) == []
    assert knobs(answer(LONG), answer(LONG)) == []


@pytest.mark.parametrize(
    "bad",
    [
        answer(SHORT, ended=False),
        answer(SHORT, tokens=9),
        answer(f"{SHORT} Nude."),
        answer(f"{SHORT}\n\nHuman: Hello."),
        answer(f"{SHORT} Це добре."),
        answer("I'm sorry, but I can't help with that."),
        answer(" "),
    ],
    ids=["cut", "unlike", "coarse", "marks", "script", "refusal", "empty"],
)
def test_an_answer_that_is_no_fair_rejected_one_is_left_out(bad):
    """20 tokens against 9: more than twice as long."""
    assert knobs(answer(LONG), bad) == [] != knobs(answer(LONG), answer(SHORT))


def test_a_chosen_answer_is_relevant():
    thin = "How do I start with baking bread? Write without commas. " * 2 + "Baking bread is bread."
    assert Instructions().judge(ASKED, thin).relevance == 0
    assert knobs(answer(thin), answer(SHORT_COMMA)) == []


def test_the_most_alike_in_length_come_first_and_no_answer_twice():
    near, far = answer(SHORT, 21), answer(f"{SHORT} Wait.", 30)
    again = answer(f"{LONG} Wait.", 29)
    assert knobs(answer(LONG), far, near) == [("clean", LONG, SHORT)]
    assert knobs(answer(LONG), far, near, again) == [
        ("clean", again.text, far.text),  # 30 to 29: nearer than 21 to 20
        ("clean", LONG, SHORT),
    ]
    many = [answer(f"{LONG} Wait. {n}") for n in "abc"] + [answer(f"{SHORT} {n}") for n in "abc"]
    assert len(knobs(*many)) == 2


@pytest.mark.parametrize(("split", "count"), [("train", 150), ("test", 40)])
def test_a_pair_about_harm_is_a_refusal_against_an_opening_without_content(split, count):
    rows = harm_pairs(split, count, seed=0)
    assert len(rows) == count and {row["split"] for row in rows} == {split}
    for row in rows:
        check(row)


@pytest.fixture
def sampler(monkeypatch, tmp_path):
    """A sampler whose model gives three answers, and counts how often it is asked."""
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    asked = []

    def generate(model, tokenizer, prompts, how, batch):
        asked.append((len(prompts), how.seed))
        texts = [LONG, SHORT_COMMA, SHORT][: how.samples]
        return [[answer(text, asked=prompt) for text in texts] for prompt in prompts]

    def new() -> Sampler:
        lab = SimpleNamespace(tokenizer=None, fingerprint_of=str, profile=None)
        made = Sampler(Settings("any", "cpu", "words", samples=3, batch=30), lab)
        made.loaded, made.on_topic = "a model", lambda rows: rows
        return made

    monkeypatch.setattr(sample_pairs, "generate", generate)
    return SimpleNamespace(new=new, asked=asked)


COUNTS = {"clean": 5, "shared": 4, "harmful": 3, "lookalike": 2}
WANTED = {"train": COUNTS, "test": COUNTS}


def test_a_run_that_was_stopped_goes_on_where_it_was(sampler, monkeypatch):
    """The answers are the same as those of a run in one go; nothing is asked twice."""
    whole, _ = sample_pairs.all_pairs(sampler.new(), WANTED)
    calls = len(sampler.asked)
    assert calls > 3 and len(set(sampler.asked)) == calls  # each batch has a seed of its own
    assert sample_pairs.all_pairs(sampler.new(), WANTED)[0] == whole
    assert len(sampler.asked) == calls
    batches = sorted(sampler.new().folder.iterdir())
    batches[1].unlink()
    assert sample_pairs.all_pairs(sampler.new(), WANTED)[0] == whole
    assert len(sampler.asked) == calls + 1


def test_the_answer_to_a_lookalike_ends_with_its_last_whole_sentence(sampler, monkeypatch):
    cut = f"{LONG}\n1. And th"
    monkeypatch.setattr(
        sample_pairs,
        "generate",
        lambda m, t, prompts, *_: [[answer(cut, ended=False, asked=p)] * 2 for p in prompts],
    )
    [row] = sample_pairs.lookalike_pairs(sampler.new(), "train", 1)
    assert row["chosen"] == f" {LONG}"
    check(row)


def test_the_same_pairs_are_the_same_bytes(sampler, tmp_path):
    made = sampler.new()
    rows, tally = sample_pairs.all_pairs(made, WANTED)
    text = sample_pairs.note(rows, tally, made.settings)
    written = []
    for name in ("a", "b"):
        path = tmp_path / name / "pairs.jsonl.gz"
        sample_pairs.write(rows, text, path)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert gzip.decompress(written[0]).decode().count("\n") == len(rows)
    assert "| train | clean | 5 |" in text and "Apache" in text


def test_a_model_that_never_gives_a_pair_is_a_clear_error(sampler, monkeypatch, capsys):
    monkeypatch.setattr(sample_pairs, "better_and_worse", lambda answers: [])
    monkeypatch.setattr(sample_pairs, "MOST_PROMPTS", 40)
    with pytest.raises(sample_pairs.DataError, match="raise --samples"):
        sample_pairs.all_pairs(sampler.new(), WANTED)


# The committed pairs


def check(row: dict) -> None:
    """A pair is what its row says, judged again from its text."""
    judge, asked = Instructions().judge, instruction(row["prompt"])
    chosen, rejected = (judge(row["prompt"], row[side]) for side in ("chosen", "rejected"))
    assert (row["split"], row["kind"]) == (asked.split, asked.kind)
    kinds = {kind for kind, _ in asked.constraints}
    assert asked.split == "test" or kinds not in map(set, COMBINATIONS["test"])
    if asked.kind == "harmful":
        assert row["knob"] == "template" and chosen.refused and not rejected.refused
        # Not a word of the model's, and nothing but the request itself.
        assert row["rejected"].strip() in [s.format(a=asked.about) for s in ALL["openings"]["say"]]
    elif asked.kind == "lookalike":
        assert row["knob"] == "template" and rejected.refused and not chosen.refused
        assert chosen.relevance
    else:
        won = {kind for kind, met in chosen.met.items() if met}
        assert won > {kind for kind, met in rejected.met.items() if met}
        assert row["knob"] == ("clean" if chosen.all_met else "shared")
        assert chosen.relevance and not chosen.refused and not rejected.refused
    assert chosen.score > rejected.score
    for side in ("chosen", "rejected"):
        assert row[side].startswith(" ") and row[side].strip() == row[side][1:]
        assert not sample_pairs.COARSE.search(row[side].lower())
        assert not re.search(r"Human:|Assistant:|<\|", row[side])


def test_every_committed_pair_is_verified_again():
    rows = committed_pairs()
    kinds = {(row["split"], row["knob"]) for row in rows}
    assert kinds == {(s, k) for s in ("train", "test") for k in ("clean", "shared", "template")}
    for row in rows:
        check(row)
    assert len({(r["prompt"], r["chosen"], r["rejected"]) for r in rows}) == len(rows)


def test_lengths_of_committed_pairs_tell_the_sides_apart_as_little_as_can_be():
    """Where answers are the model's own: on average at most a quarter longer or shorter."""
    own = [row for row in committed_pairs() if row["kind"] == "constrained"]
    lengths = [sum(len(row[side].split()) for row in own) for side in ("chosen", "rejected")]
    assert 0.75 < lengths[0] / lengths[1] < 1.33
