"""One row of any known format as prompt, chosen and rejected. The columns of a row say its format.

A reader takes a row and returns a dict of texts, or raises Unusable with the reason for dropping
it. To add a format: write its reader and add a line to PAIRS or DEMONSTRATIONS.
"""

import re
from collections.abc import Callable
from math import isnan
from typing import Any, NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SCORE_RATIO = 2.0  # SHP: the better comment must have this many times the votes of the other one
# Names of roles in chat messages. We have no third mark: the system speaks as the human.
ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "model", "gpt", "bot"), "assistant")


class DataError(ValueError):
    """Data that cannot be used at all. The message says what to do."""


class Unusable(Exception):
    """One row that cannot be used. The message is the reason that the report counts."""


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """(prompt, response) at the last assistant turn; its mark ends the prompt. None without it."""
    before, mark, response = transcript.rpartition(ASSISTANT)
    return (before + mark, response) if mark else None


def _is_transcript(text: str) -> bool:
    return re.match(r"\s*(Human|Assistant):", text) is not None


def as_prompt(text: str) -> str:
    """`text` as a prompt that ends at the assistant's turn. What is no dialogue is one turn."""
    if _is_transcript(text):
        return "\n\n" + re.sub(r"\n{1,2}Assistant:\Z", "", text.strip()) + ASSISTANT
    wrapped = f"{HUMAN} {text.strip()}{ASSISTANT}"
    return text.rstrip() if text.rstrip().endswith(ASSISTANT) else wrapped


def dialogue(messages: list[dict]) -> str:
    """Messages as a prompt, as our chat template writes it: all but the assistant are the human."""
    turns = ((ROLES.get(message["role"]), message["content"].strip()) for message in messages)
    marked = (f"{ASSISTANT if role == 'assistant' else HUMAN} {text}" for role, text in turns)
    return "".join(marked) + ASSISTANT


def messages_of(prompt: str) -> list[dict]:
    """The inverse of `dialogue`, without empty turns. A text without marks is one user message."""
    first, *rest = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", prompt)
    turns = zip(["Human", *rest[::2]], [first, *rest[1::2]], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in turns if text.strip()]


def _text(row: dict, name: str, where: str = "") -> str:
    """A text column. None, as an empty cell of a table, and a missing column are empty texts."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise DataError(f"column {name}{where} must hold text, not {type(value).__name__}.")
    return value or ""


def _number(value: Any) -> float | None:
    """A number, also as the text that a CSV file holds. None if it is none, or is NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isnan(number) else number


def _messages(row: dict, name: str) -> list[dict]:
    """A column of chat messages, with our names of roles. An empty system message is left out."""
    found = []
    for message in row[name] or []:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            what = "messages with role and content"
            raise DataError(f"column {name} must hold {what}, not {str(message)[:60]!r}.")
        where = f" of a message in {name}"
        role, content = _text(message, "role", where).lower(), _text(message, "content", where)
        if role in ("tool", "function", "ipython") or message.get("tool_calls"):
            raise Unusable("a call of a tool")
        if role not in ROLES:
            raise Unusable(f"unknown role {role[:20]!r}")
        if content.strip() or ROLES[role] != "system":
            found.append({"role": ROLES[role], "content": content.strip()})
    return found


def _joined(given: list[dict], before: list[dict]) -> list[dict]:
    """The turns of the column `prompt` and those before the answer in its own column, each once."""
    if all(message in before for message in given):
        return before
    every = [*given, *before]
    system = [m for n, m in enumerate(every) if m["role"] == "system" and m not in every[:n]]
    given, before = ([m for m in part if m["role"] != "system"] for part in (given, before))
    if all(message in before for message in given):
        given = []
    elif all(message in given for message in before):
        before = []
    elif given[-1]["role"] == before[0]["role"]:
        raise Unusable("prompts that differ")
    return system + given + before


def _history(messages: list[dict]) -> str:
    """The turns before an answer as a prompt."""
    if not all(message["content"] for message in messages):
        raise Unusable("a turn without text")
    return dialogue(messages)


def _asked(row: dict) -> str:
    """The column prompt, or instruction and input (Alpaca's input may say "no input")."""
    if row.get("history"):
        raise Unusable("earlier turns in a column history: write them into the prompt")
    columns = ("prompt",) if "prompt" in row else ("instruction", "input")
    texts = {name: _text(row, name).strip() for name in columns}
    if texts.get("input", "").lower().strip("<>.") in ("noinput", "no input"):
        del texts["input"]
    prompt = as_prompt("\n\n".join(filter(None, texts.values())))
    if (turns := messages_of(prompt)) and turns[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with an answer")
    return prompt


# --- preference pairs


def from_transcripts(row: dict) -> dict[str, str]:
    """HH-RLHF: two whole dialogues that share everything before the last assistant turn."""
    texts = _text(row, "chosen"), _text(row, "rejected")
    if not all(text.strip() for text in texts):
        raise Unusable("empty side")
    sides = [split_transcript("\n\n" + t.lstrip() if _is_transcript(t) else t) for t in texts]
    if None in sides:
        asks = [name for name in row if name not in ("chosen", "rejected", "system")]
        asks = [name for name in asks if isinstance(row[name], str) and not any(sides)]
        hint = f" (rename the column of the question to prompt: {', '.join(asks)}?)" if asks else ""
        raise Unusable(f"no assistant turn{hint}")
    if sides[0][0] != sides[1][0]:
        raise Unusable("prompts that differ")
    return {"prompt": sides[0][0], "chosen": sides[0][1], "rejected": sides[1][1]}


def from_plain(row: dict) -> dict[str, str]:
    """Prompt, chosen and rejected as text. The sides may be whole transcripts, with the prompt."""
    prompt, sides = _asked(row), {side: _text(row, side) for side in ("chosen", "rejected")}
    transcripts = [_is_transcript(text) for text in sides.values() if text.strip()]
    if not any(transcripts):
        return {"prompt": prompt, **sides}
    if not all(transcripts):
        raise Unusable("prompts that differ")
    pair = from_transcripts(sides)
    before = messages_of(pair["prompt"])
    joined = _joined(messages_of(prompt), before)
    return pair if joined == before else {**pair, "prompt": dialogue(joined)}


def from_messages(row: dict) -> dict[str, str]:
    """UltraFeedback binarized, and TRL's conversational rows: the sides are message lists.

    The column `prompt`, text or messages, counts where the lists lack its turns.
    """
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if not chosen or not rejected:
        raise Unusable("empty side")
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise Unusable("no assistant turn")
    if (before := chosen[:-1]) != rejected[:-1]:
        raise Unusable("prompts that differ")
    listed = isinstance(row.get("prompt"), list)
    given = _messages(row, "prompt") if listed else messages_of(_text(row, "prompt"))
    texts = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return {"prompt": _history(_joined(given, before)), **texts}


def from_shp(row: dict) -> dict[str, str]:
    """Stanford Human Preferences: a Reddit post, two comments; `labels` is 1 if A is the better."""
    label, ratio = _number(row["labels"]), _number(row["score_ratio"])
    if label not in (0, 1):
        raise Unusable("no choice between the two comments")
    if ratio is None or ratio < SCORE_RATIO:
        raise Unusable(f"score ratio under {SCORE_RATIO:g}")
    better, worse = ("human_ref_A", "human_ref_B")[:: 1 if label == 1 else -1]
    prompt = as_prompt(_text(row, "history"))
    return {"prompt": prompt, "chosen": _text(row, better), "rejected": _text(row, worse)}


def from_comparison(row: dict) -> dict[str, str]:
    """OpenAI summarize-from-feedback, `comparisons`: a post or an article, and two summaries.

    The prompt has the form of the paper's (Stiennon et al. 2020, arXiv 2009.01325, Appendix B).
    """
    info, summaries, choice = row["info"], row["summaries"], _number(row["choice"])
    if not isinstance(summaries, list) or {type(one) for one in (info, *summaries)} != {dict}:
        raise DataError("column info must hold an object, and summaries a list of two with text.")
    if len(summaries) != 2 or choice not in (0, 1):
        raise Unusable("no choice between two summaries")
    if not (_text(info, "post") + _text(info, "article")).strip():
        raise Unusable("empty prompt")
    marks = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: "}
    marks |= {"post": "POST: ", "article": "ARTICLE: "}
    lines = [mark + _text(info, name).strip() for name, mark in marks.items() if info.get(name)]
    better, worse = [_text(one, "text") for one in summaries][:: 1 if choice == 0 else -1]
    prompt = as_prompt("\n\n".join([*lines, "TL;DR:"]))
    return {"prompt": prompt, "chosen": better, "rejected": worse}


# --- demonstrations for SFT


def from_answer(row: dict) -> dict[str, str]:
    """A prompt, or Alpaca's instruction and input, with one answer in a text column."""
    answer = next(name for name in ("output", "completion", "response") if name in row)
    return {"prompt": _asked(row), "chosen": _text(row, answer)}


def from_conversation(row: dict) -> dict[str, str]:
    """One message list: the last answer is the demonstration."""
    messages = _messages(row, "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable("no assistant turn")
    return {"prompt": _history(messages[:-1]), "chosen": messages[-1]["content"]}


# --- the tables


class Format(NamedTuple):
    """What to call a format, the columns that identify it, its reader. `lists`: of messages."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[dict], dict[str, str]]
    lists: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)}{' as message lists' if self.lists else ''})"

    def fits(self, row: dict) -> bool:
        kinds = {type(row.get(name)) for name in self.columns}
        lists = list in kinds and kinds <= {list, type(None)}
        return row.keys() >= set(self.columns) and (lists or not self.lists)


SHP = ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio")
PAIRS = (  # the first one that fits is taken
    Format("Stanford SHP", SHP, from_shp),
    Format("summarize-from-feedback comparisons", ("info", "summaries", "choice"), from_comparison),
    Format("UltraFeedback binarized", ("chosen", "rejected"), from_messages, lists=True),
    Format("plain rows", ("prompt", "chosen", "rejected"), from_plain),
    Format("instructions with two answers", ("instruction", "chosen", "rejected"), from_plain),
    Format("HH-RLHF transcripts", ("chosen", "rejected"), from_transcripts),
)
DEMONSTRATIONS = (
    Format("Alpaca", ("instruction", "output"), from_answer),
    *PAIRS,  # their chosen answers
    Format("conversations", ("messages",), from_conversation, lists=True),
    Format("prompts with a completion", ("prompt", "completion"), from_answer),
    Format("prompts with a response", ("prompt", "response"), from_answer),
)


def format_of(row: Any, formats: tuple[Format, ...] = PAIRS) -> Format:
    """The format of a row, by its columns. Raises: DataError that lists the columns and formats."""
    if not isinstance(row, dict):
        raise DataError(f"a row must have named columns; this one is a {type(row).__name__}.")
    for known in formats:
        if known.fits(row):
            return known
    hint = "Rename the columns, or write plain rows."
    if formats is PAIRS and any(known.fits(row) for known in DEMONSTRATIONS):
        hint = "These rows are demonstrations, without a preference: name them in LAB_SFT_DATA."
    columns, known = ", ".join(map(str, row)), "; ".join(map(str, formats))
    raise DataError(f"the columns {columns} are of no known format. Known: {known}. {hint}")


def _read(row: Any, formats: tuple[Format, ...], sides: tuple[str, ...]) -> dict[str, str]:
    """A row through the reader of its format, with the checks that all formats share."""
    texts = format_of(row, formats).read(row)
    answers = [texts[side].strip() for side in sides]
    if not all(answers):
        raise Unusable("empty side")
    if len(set(answers)) < len(answers):
        raise Unusable("identical sides")
    if not messages_of(prompt := texts["prompt"]):
        raise Unusable("empty prompt")
    system = f"{HUMAN} {_text(row, 'system').strip()}"
    if system != f"{HUMAN} " and not prompt.startswith(system):
        prompt = system + prompt
    if any(re.search("[\ud800-\udfff]", text) for text in (prompt, *answers)):
        raise Unusable("broken characters (a lone surrogate)")
    # Each response starts with one space of its own.
    return {"prompt": prompt, **{side: f" {texts[side].strip()}" for side in sides}}


def read_pair(row: Any) -> dict[str, str]:
    """A row of any of PAIRS as prompt, chosen, rejected. Raises: DataError, Unusable."""
    pair = _read(row, PAIRS, ("chosen", "rejected"))
    better, worse = _number(row.get("score_chosen")), _number(row.get("score_rejected"))
    if None not in (better, worse) and better <= worse:
        tie = "tie: the two sides have one score"
        raise Unusable(tie if better == worse else "scores that contradict the choice")
    return pair


def read_demonstration(row: Any) -> dict[str, str]:
    """A row of any of DEMONSTRATIONS as prompt and chosen. Raises: DataError, Unusable."""
    return _read(row, DEMONSTRATIONS, ("chosen",))
