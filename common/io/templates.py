"""Chat templates: how a prompt and its answer become the text that a model reads.

Models that the course makes itself read HH-RLHF's transcripts as they are. A pre-trained chat model
reads them in its own template. The tokenizer carries the template, and so decides.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.io.formats import Unusable, messages_of

# Writes the same text as the data: "\n\nHuman: {x}\n\nAssistant:" and " {y}" after it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim }}"
    "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
HH = "hh"  # a profile that reads HH-RLHF's transcripts; "own": in the tokenizer's own template
# A template adds marks, and perhaps a system text, to what was said: never much more.
MOST_ADDED, MOST_TIMES = 20_000, 4  # characters
MOST_SECONDS = 5.0


def reads_transcripts(tokenizer) -> bool:
    """Does its model read HH-RLHF's transcripts as they are? So does one without any template."""
    return getattr(tokenizer, "chat_template", None) in (None, CHAT_TEMPLATE)


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """Raises Unusable after so many seconds. Only in the main thread, which alone an alarm reaches,
    and not on Windows, which has none.
    """
    alarms = hasattr(signal, "setitimer")
    if not alarms or threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(*_):
        raise Unusable(f"the chat template takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _marks(tokenizer) -> list[str]:
    """The texts of special tokens. In a message they would be taken for the template's."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _rendered(tokenizer, messages: list[dict], **options) -> str:
    """Messages as the tokenizer's own template writes them, in transformers' sandbox.

    Raises: Unusable for messages that it refuses, and for a template that takes too long or writes
        absurdly much.
    """
    said = [message["content"] for message in messages]
    if found := [mark for mark in _marks(tokenizer) if any(mark in text for text in said)]:
        raise Unusable(f"the text holds a mark of the chat template, {found[0]}")
    try:
        with _in_time(MOST_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Unusable:
        raise
    except Exception as error:  # a template is foreign code
        raise Unusable(f"the chat template refuses the prompt: {error}") from error
    if len(text) > MOST_ADDED + MOST_TIMES * sum(map(len, said)):
        raise Unusable("the chat template writes absurdly much")
    return text


def prompt_text(prompt: str, tokenizer) -> str:
    """A transcript that ends at the assistant's turn, as the model reads it.

    Raises: Unusable, whose text is the reason.
    """
    if reads_transcripts(tokenizer):
        return prompt
    if not (messages := messages_of(prompt)):
        raise Unusable("empty prompt")
    return _rendered(tokenizer, messages, add_generation_prompt=True)


def conversation(prompt: str, response: str, tokenizer) -> tuple[str, str]:
    """(prompt, response) as the model reads them, the response without its end token.

    In a template of its own both are cut out of the whole conversation, rendered at once.
    Raises: Unusable, also where the template does not keep the prompt in front of the answer, or
        changes the answer.
    """
    before = prompt_text(prompt, tokenizer)
    if reads_transcripts(tokenizer):
        return before, response
    answer = {"role": "assistant", "content": response.strip()}
    whole = _rendered(tokenizer, [*messages_of(prompt), answer])
    if not whole.startswith(before):
        raise Unusable("the chat template does not keep the prompt in front of the answer")
    said, end, _ = whole[len(before) :].partition(tokenizer.eos_token)
    if not end or said.strip() != answer["content"]:
        raise Unusable("the chat template changes the answer, or does not end it")
    return before, said


def read_as(template: str, tokenizer) -> None:
    """Gives a tokenizer the template in which its model is to read.

    Args: `template`: "hh": HH-RLHF's transcripts as they are. "own": its own template, and its EOS
        is then the mark that this sets after an answer, which may be another one than the end of a
        text.
    Raises: Unusable without a template of its own, or for one that sets no mark there.
    """
    if template == HH:
        tokenizer.chat_template = CHAT_TEMPLATE
        return
    if not tokenizer.chat_template:
        raise Unusable("it has no chat template")
    question, answer = {"role": "user", "content": "Hello?"}, "I am here."
    text = _rendered(tokenizer, [question, {"role": "assistant", "content": answer}])
    after = text.rpartition(answer)[2].strip()
    ends = [mark for mark in _marks(tokenizer) if after.startswith(mark)]
    if not ends:
        raise Unusable("its chat template sets no mark after an answer")
    if (end := max(ends, key=len)) != tokenizer.eos_token:
        tokenizer.eos_token = end
