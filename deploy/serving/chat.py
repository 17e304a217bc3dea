"""What a client may send, as pydantic models, and what it gets back, in OpenAI's shape."""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from deploy.serving.limits import Limits, Refusal

STRICT = ConfigDict(extra="forbid", strict=True)
CODES = {  # kind of error: its code in the answer
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
}
# What tokenizers and this course's transcripts read as a turn or an end, not as words.
TOKENS = r"<[|｜][^<>]*[|｜]>|<<?/?(s|SYS|bos|eos|pad|unk|[a-z]+_of_turn)>|\[/?(INST|PAD|SEP)\]"
MARKS = re.compile(rf"(?im){TOKENS}|^\s*(Human|Assistant):")
CHUNK = {"object": "chat.completion.chunk"}
Checked = TypeVar("Checked", bound=BaseModel)


def _join_parts(content):
    """A list of text parts as one text, joined by a space."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise ValueError("Every part should be text: this model reads text only")
    return " ".join(texts)


def _only(neutral):
    """The type of a parameter that is accepted at the one value that changes no answer."""

    def check(value):
        if value is not None and value != neutral:
            said = "The gateway does not support it. Leave it out"
            raise PydanticCustomError("unsupported_parameter", said)
        return value

    return Annotated[Any, AfterValidator(check)]


def _within_limit(tokens: int | None, info) -> int | None:
    most = info.context or 2**63
    if tokens is not None and not 1 <= tokens <= most:
        raise ValueError(f"Input should be from 1 to {most}")
    return tokens


def _plain(text: str | None) -> str | None:
    if found := MARKS.search(text or ""):
        raise ValueError(f"Leave out {found[0].strip()!r}: it should be plain words")
    return text


Tokens = Annotated[int | None, AfterValidator(_within_limit)]


class Message(TypedDict):
    """One turn of a talk. Other keys, such as a name, are dropped."""

    __pydantic_config__ = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class ChatRequest(BaseModel):
    """The body of `/v1/chat/completions`. None: the client leaves the choice to the gateway."""

    model_config = STRICT

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    max_completion_tokens: Tokens = None
    max_tokens: Tokens = None  # the older name of max_completion_tokens
    safety_identifier: str | None = None
    user: str | None = None  # the older name of safety_identifier
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = None
    # These change no answer.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    # These are refused rather than ignored, unless they have the value that changes nothing.
    n: _only(1) = None
    presence_penalty: _only(0) = None
    frequency_penalty: _only(0) = None
    logprobs: _only(False) = None
    top_logprobs: _only(0) = None
    logit_bias: _only({}) = None
    tools: _only([]) = None
    tool_choice: _only("none") = None
    response_format: _only({"type": "text"}) = None
    modalities: _only(["text"]) = None

    @property
    def tokens(self) -> int | None:
        """The largest length of the answer that the client asks for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def asker(self) -> str | None:
        """The client's own id of its user."""
        return self.safety_identifier or self.user

    @property
    def include_usage(self) -> bool:
        """Does the client want a last event that counts the tokens?"""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def options(self) -> dict:
        """Sampling options, those that were given."""
        return self.model_dump(include={"temperature", "top_p", "seed", "stop"}, exclude_none=True)


class Feedback(BaseModel):
    """The body of `/v1/feedback`. `consent`: may this be used to train the next model?"""

    model_config = STRICT

    request_id: str  # the id of an answer: chatcmpl-…
    rating: Literal["up", "down"]
    consent: bool = False
    # A better answer.
    correction: Annotated[str | None, AfterValidator(_plain)] = Field(None, max_length=20_000)


def read(kind: type[Checked], body: bytes, limits: Limits) -> Checked:
    """The checked object in a body. Raises: Refusal (400) that says what to change."""
    try:
        return kind.model_validate_json(body, context=limits.max_tokens)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    said, where, value = first["msg"].removeprefix("Value error, "), first["loc"], first["input"]
    if not where:  # the body as a whole
        raise Refusal(400, "invalid_json", f"{said}. Send one JSON object.")
    if first["type"] == "extra_forbidden":
        said = "The gateway does not know it. Leave it out"
    elif isinstance(value, str | int | float):
        said = f"{said}, not {str(value)[:40]}"
    # A place as in "messages[0].role"; `param` leaves out what follows the index.
    place = [f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in where]
    param, path = ("".join(place[:end]).removeprefix(".") for end in (2, None))
    raise Refusal(400, CODES.get(first["type"], "invalid_value"), f"{path}: {said}.", param)


def completion(head: dict, text: str, reason: str, usage: dict) -> dict:
    """The answer in one piece. `head`: its id, model and time of creation."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def event(value: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def chunk(head: dict, delta: dict, reason: str | None = None) -> bytes:
    """One piece of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return event({**head, **CHUNK, "choices": [choice]})
