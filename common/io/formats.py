"""One row of any known format as prompt/chosen/rejected. The columns of a row say which format it
is, never a name.

A reader is a function from a row to a dict of texts, or to the reason why the row cannot be used.
To add a format: write its reader and add a line to PAIRS or DEMONSTRATIONS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SCORE_RATIO = (
    2.0  # SHP: pairs whose better comment has fewer votes than this times the other's say little
)


class DataError(ValueError):
    """Data that cannot be used at all. The message says what to do."""


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """(prompt, response) at the last assistant turn, or None without one. The prompt ends with that
    turn's mark.
    """
    before, mark, response = transcript.rpartition(ASSISTANT)
    return (before + mark, response) if mark else None


def as_prompt(text: str) -> str:
    """`text` as a prompt that ends at the assistant's turn, wrapped in the dialogue format if it is
    not yet.
    """
    return (
        text.rstrip() if text.rstrip().endswith(ASSISTANT) else f"{HUMAN} {text.strip()}{ASSISTANT}"
    )


def dialogue(messages: list[dict]) -> str:
    """Messages as a prompt, in the words of our chat template: whoever is not the assistant is the
    human.
    """
    marks = {
        message["role"]: ASSISTANT if message["role"] == "assistant" else HUMAN
        for message in messages
    }
    return (
        "".join(f"{marks[message['role']]} {message['content'].strip()}" for message in messages)
        + ASSISTANT
    )


def _text(row: dict, name: str) -> str:
    """A text column; None, as an empty cell of a table, is an empty text."""
    if not isinstance(row[name], str | None):
        raise DataError(f"column {name} must hold text, not {type(row[name]).__name__}.")
    return row[name] or ""


def _number(value: Any) -> float | None:
    """A number, also as the text that a CSV file holds; None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _messages(row: dict, name: str) -> list[dict]:
    """A column of chat messages, as role and stripped content."""
    for message in row[name] or []:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(
                f"column {name} must hold messages with role and content, not {str(message)[:60]!r}."
            )
        if not isinstance(message["content"], str | None):
            kind = type(message["content"]).__name__
            raise DataError(f"column {name}: the content of a message must be text, not {kind}.")
    return [
        {"role": message["role"], "content": (message["content"] or "").strip()}
        for message in row[name] or []
    ]


# --- preference pairs


def from_transcripts(row: dict) -> dict[str, str] | str:
    """HH-RLHF: two whole dialogues that share everything before the last assistant turn."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not chosen.strip() or not rejected.strip():
        return "empty side"
    sides = split_transcript(chosen), split_transcript(rejected)
    if None in sides:
        return "no assistant turn"
    if sides[0][0] != sides[1][0]:
        return "prompts that differ"
    return {"prompt": sides[0][0], "chosen": sides[0][1], "rejected": sides[1][1]}


def from_plain(row: dict) -> dict[str, str] | str:
    """Prompt, chosen and rejected as text."""
    prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    return (
        {"prompt": as_prompt(prompt), "chosen": chosen, "rejected": rejected}
        if prompt.strip()
        else "empty prompt"
    )


def from_messages(row: dict) -> dict[str, str] | str:
    """UltraFeedback binarized, and TRL's conversational rows: the sides are message lists.

    The prompt is what comes before the last answer, the same on both sides, after the column
    `prompt` where that is a message list too. A text column `prompt` only repeats the user's
    message, and counts where the lists lack it.
    """
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if not chosen or not rejected:
        return "empty side"
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        return "no assistant turn"
    if (before := chosen[:-1]) != rejected[:-1]:
        return "prompts that differ"
    given = row.get("prompt")
    if isinstance(given, list):
        before = [*_messages(row, "prompt"), *before]
    elif not before and given is not None:
        before = [{"role": "user", "content": _text(row, "prompt")}]
    if not any(message["content"] for message in before):
        return "empty prompt"
    return {
        "prompt": dialogue(before),
        "chosen": chosen[-1]["content"],
        "rejected": rejected[-1]["content"],
    }


def from_shp(row: dict, score_ratio: float = SCORE_RATIO) -> dict[str, str] | str:
    """Stanford Human Preferences: a Reddit post and two comments. `labels` is 1 where comment A is
    preferred.
    """
    label, ratio = _number(row["labels"]), _number(row["score_ratio"])
    if label not in (0, 1):
        return "no choice between the two comments"
    if ratio is None or ratio < score_ratio:
        return f"score ratio under {score_ratio:g}"
    if not (post := _text(row, "history")).strip():
        return "empty prompt"
    better, worse = ("human_ref_A", "human_ref_B")[:: 1 if label == 1 else -1]
    return {"prompt": as_prompt(post), "chosen": _text(row, better), "rejected": _text(row, worse)}


def from_comparison(row: dict) -> dict[str, str] | str:
    """OpenAI summarize-from-feedback, `comparisons`: a Reddit post or a news article, two summaries
    and a choice.

    The prompt has the form of the paper's (Stiennon et al. 2020, arXiv 2009.01325, Appendix B).
    """
    info, summaries, choice = row["info"], row["summaries"], _number(row["choice"])
    if not isinstance(info, dict) or not isinstance(summaries, list):
        raise DataError(
            "column info must hold an object and column summaries a list of two objects with text."
        )
    if len(summaries) != 2 or choice not in (0, 1):
        return "no choice between two summaries"
    if not (info.get("post") or info.get("article") or "").strip():
        return "empty prompt"
    parts = [
        ("SUBREDDIT: r/", "subreddit"),
        ("TITLE: ", "title"),
        ("POST: ", "post"),
        ("ARTICLE: ", "article"),
    ]
    lines = [mark + info[name].strip() for mark, name in parts if info.get(name)]
    sides = [_text(summary, "text") for summary in summaries][:: 1 if choice == 0 else -1]
    return {
        "prompt": as_prompt("\n\n".join([*lines, "TL;DR:"])),
        "chosen": sides[0],
        "rejected": sides[1],
    }


# --- demonstrations for SFT


def from_alpaca(row: dict) -> dict[str, str] | str:
    """Alpaca: an instruction, often without an input (some inputs only say that there is none), and
    an output.
    """
    instruction, given = (
        _text(row, "instruction").strip(),
        (_text(row, "input") if "input" in row else "").strip(),
    )
    if given.lower().strip("<>.") in ("noinput", "no input"):
        given = ""
    prompt = "\n\n".join(part for part in (instruction, given) if part)
    return (
        {"prompt": as_prompt(prompt), "chosen": _text(row, "output")}
        if instruction
        else "empty prompt"
    )


def from_conversation(row: dict) -> dict[str, str] | str:
    """One message list: the last answer is the demonstration."""
    messages = _messages(row, "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return "no assistant turn"
    return {"prompt": dialogue(messages[:-1]), "chosen": messages[-1]["content"]}


def _answered(name: str) -> Callable[[dict], dict[str, str] | str]:
    def read(row: dict) -> dict[str, str] | str:
        prompt = _text(row, "prompt")
        return (
            {"prompt": as_prompt(prompt), "chosen": _text(row, name)}
            if prompt.strip()
            else "empty prompt"
        )

    return read


# --- the tables


class Format(NamedTuple):
    """A format: what to call it, the columns that identify it, and its reader. `lists`: its sides
    are lists.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[..., dict[str, str] | str]
    lists: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)}{' as message lists' if self.lists else ''})"

    def fits(self, row: dict) -> bool:
        if not all(name in row for name in self.columns):
            return False
        kinds = {type(row[name]) for name in self.columns}
        return not self.lists or (list in kinds and kinds <= {list, type(None)})


PAIRS = (  # the first one that fits is taken
    Format(
        "Stanford SHP", ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio"), from_shp
    ),
    Format("summarize-from-feedback comparisons", ("info", "summaries", "choice"), from_comparison),
    Format("UltraFeedback binarized", ("chosen", "rejected"), from_messages, lists=True),
    Format("plain rows", ("prompt", "chosen", "rejected"), from_plain),
    Format("HH-RLHF transcripts", ("chosen", "rejected"), from_transcripts),
)
DEMONSTRATIONS = (
    Format("Alpaca", ("instruction", "output"), from_alpaca),
    *PAIRS,  # their chosen answers
    Format("conversations", ("messages",), from_conversation, lists=True),
    Format("prompts with a completion", ("prompt", "completion"), _answered("completion")),
    Format("prompts with a response", ("prompt", "response"), _answered("response")),
)


def format_of(row: Any, formats: tuple[Format, ...] = PAIRS) -> Format:
    """The format of a row, by its columns. Raises: DataError, listing the columns seen and the
    known formats.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row must have named columns; this one is a {type(row).__name__}.")
    for known in formats:
        if known.fits(row):
            return known
    if formats is PAIRS and any(known.fits(row) for known in DEMONSTRATIONS):
        hint = " These rows are demonstrations, without a preference: name them in LAB_SFT_DATA, for SFT."
    else:
        hint = " Rename the columns, or write plain rows."
    known = "; ".join(map(str, formats))
    raise DataError(
        f"a row with the columns {', '.join(map(str, row))} is of no known format. Known: {known}.{hint}"
    )


def _finished(row: dict, texts: dict[str, str] | str) -> dict[str, str] | str:
    """The checks that all formats share, and the one leading space of each response."""
    if isinstance(texts, str):
        return texts
    answers = [texts[side].strip() for side in ("chosen", "rejected") if side in texts]
    if not all(answers):
        return "empty side"
    if len(answers) == 2 and answers[0] == answers[1]:
        return "identical sides"
    try:
        "".join(texts.values()).encode()
    except UnicodeEncodeError:
        return "broken characters (a lone surrogate)"
    return {
        "prompt": texts["prompt"],
        **{side: f" {texts[side].strip()}" for side in texts if side != "prompt"},
    }


def read_pair(row: Any, score_ratio: float = SCORE_RATIO) -> dict[str, str] | str:
    """A row of any of PAIRS as prompt/chosen/rejected, or the reason why it cannot be used. Raises:
    DataError.
    """
    found = format_of(row)
    pair = _finished(
        row, found.read(row, score_ratio) if found.read is from_shp else found.read(row)
    )
    if isinstance(pair, dict):
        better, worse = _number(row.get("score_chosen")), _number(row.get("score_rejected"))
        if better is not None and better == worse:
            return "tie: the two sides have one score"
        if better is not None and worse is not None and better < worse:
            return "scores that contradict the choice"
    return pair


def read_demonstration(row: Any) -> dict[str, str] | str:
    """A row of any of DEMONSTRATIONS as prompt/chosen, or the reason why it cannot be used. Raises:
    DataError.
    """
    texts = format_of(row, DEMONSTRATIONS).read(row)
    return _finished(
        row,
        texts if isinstance(texts, str) else {name: texts[name] for name in ("prompt", "chosen")},
    )
