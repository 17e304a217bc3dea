"""What a chat request may ask, checked by hand so that every message says what to change; and
OpenAI's answers.
"""

import json
import time
from dataclasses import dataclass, field

from deploy.serving.limits import Limits, Refusal

ROLES = ("system", "developer", "user", "assistant")
SAMPLING = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0)}  # name → allowed range
UNUSED = ("metadata", "store", "service_tier", "prompt_cache_key")  # change no answer
# Accepted at the value that changes nothing; anything else is refused rather than ignored.
NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tool_choice": "none",
    "top_logprobs": 0,
}


@dataclass(frozen=True)
class ChatRequest:
    """A request that was checked. `max_tokens` and `model` are None where the client left the
    choice to the gateway.
    """

    messages: list[dict]
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    user: str | None = None
    options: dict = field(
        default_factory=dict
    )  # temperature, top_p, seed, stop: those that were given


def wrong(param: str, message: str) -> Refusal:
    """A refusal (400) that names the parameter."""
    return Refusal(400, "invalid_value", message, param)


def read_object(body: bytes) -> dict:
    """The JSON object in a request's body. Raises: Refusal (400)."""
    try:
        found = json.loads(body)
        json.dumps(
            found, ensure_ascii=False
        ).encode()  # half a surrogate pair is no text, and no file could keep it
    except (ValueError, RecursionError) as error:
        detail = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise Refusal(
            400, "invalid_json", f"The body is not valid JSON: {detail[:200]}."
        ) from error
    if not isinstance(found, dict):
        raise Refusal(
            400, "invalid_json", 'The body must be one JSON object, such as {"messages": [...]}.'
        )
    return found


def read_messages(value) -> list[dict]:
    """Messages with plain text contents; text parts are joined by a space. Raises: Refusal (400)."""
    if not isinstance(value, list) or not value:
        raise wrong(
            "messages", 'messages must be a list, not empty: [{"role": "user", "content": "…"}]'
        )
    messages = []
    for at, message in enumerate(value):
        where = f"messages[{at}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise wrong(where, f"{where} must be an object with a role: one of {', '.join(ROLES)}.")
        content = message.get("content")
        if isinstance(content, list):
            if any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
                raise wrong(
                    where, f"{where} holds a part that is not text. This model reads text only."
                )
            content = " ".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise wrong(where, f"{where}.content must be text.")
        if any("\ud800" <= letter <= "\udfff" for letter in content):
            raise wrong(
                where, f"{where}.content holds half a surrogate pair, which is not Unicode text."
            )
        messages.append({"role": message["role"], "content": content})
    return messages


def read_max_tokens(body: dict, limits: Limits) -> int | None:
    """`max_completion_tokens`, or the older `max_tokens`. Raises: Refusal (400) outside 1 … limit."""
    name = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= limits.max_tokens:
        raise wrong(
            name,
            f"{name} must be a whole number from 1 to {limits.max_tokens}, not {str(value)[:40]}.",
        )
    return value


def read_options(body: dict) -> dict:
    """Sampling options, those that were given. Raises: Refusal (400)."""
    options = {}
    for name, (low, high) in SAMPLING.items():
        if (value := body.get(name)) is not None:
            if (
                type(value) not in (int, float) or not low <= value <= high
            ):  # NaN is not between either
                raise wrong(
                    name,
                    f"{name} must be a number from {low:g} to {high:g}, not {str(value)[:40]}.",
                )
            options[name] = float(value)
    if (seed := body.get("seed")) is not None:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise wrong("seed", "seed must be a whole number, 0 or larger.")
        options["seed"] = seed
    if (stop := body.get("stop")) is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if (
            not isinstance(stops, list)
            or not all(isinstance(s, str) and s for s in stops)
            or len(stops) > 4
        ):
            raise wrong("stop", "stop must be a text or a list of at most 4 texts.")
        options["stop"] = stops
    return options


def read_chat(body: bytes, limits: Limits) -> ChatRequest:
    """The checked request in a body. Raises: Refusal (400) that says what to change."""
    found = read_object(body)
    known = {
        "messages",
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "user",
        "seed",
        "stop",
        "safety_identifier",
        *SAMPLING,
        *NEUTRAL,
        *UNUSED,
    }
    for name, value in found.items():
        if name not in known:
            name = name[:60]
            raise Refusal(
                400, "unknown_parameter", f"The gateway does not know {name!r}. Leave it out.", name
            )
        if name in NEUTRAL and value is not None and value != NEUTRAL[name]:
            raise Refusal(
                400,
                "unsupported_parameter",
                f"The gateway does not support {name}. Leave it out.",
                name,
            )
    for name, kind in (("model", str), ("stream", bool), ("user", str), ("safety_identifier", str)):
        if found.get(name) is not None and not isinstance(found[name], kind):
            raise wrong(name, f"{name} must be {'true or false' if kind is bool else 'text'}.")
    stream_options = found.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise wrong("stream_options", 'stream_options must be an object: {"include_usage": true}.')
    return ChatRequest(
        messages=read_messages(found.get("messages")),
        model=found.get("model"),
        stream=bool(found.get("stream")),
        include_usage=bool(stream_options.get("include_usage")),
        max_tokens=read_max_tokens(found, limits),
        user=found.get("safety_identifier") or found.get("user"),
        options=read_options(found),
    )


def completion(answer_id: str, model: str, text: str, reason: str, usage: dict) -> dict:
    """The answer in one piece."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": None,
    }
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def event(value: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def chunk(
    answer_id: str, model: str, created: int, delta: dict, reason: str | None = None
) -> bytes:
    """One piece of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
    return event(head | {"choices": [choice]})


def usage_chunk(answer_id: str, model: str, created: int, usage: dict) -> bytes:
    """The last piece, for a client that asked for the usage."""
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
    return event(head | {"choices": [], "usage": usage})
