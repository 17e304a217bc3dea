"""A prompt as a model's own template writes it, and its tokens.

A template is a program that came with the model: it runs in transformers' sandbox, in a process of
its own with little memory and time.
"""

import math
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path

from deploy.serving.folders import FolderError, check_folder, read_settings

PROMPT_MEMORY = 2**31  # bytes of address space; about 200 MB are taken before a prompt comes
PROMPT_SECONDS = 2.0  # of processor time for one prompt: a busy machine refuses nobody
PROMPT_TEXT = 1_000_000  # characters of one prompt


class PromptFormat:
    """The chat template and tokenizer of a model folder: a prompt as its engine will see it.

    `context`: tokens that the model can read, None where the folder does not say; `generation`: its
    generation settings. The template is not even compiled before the first prompt.
    Raises: FolderError for a folder that is no safe model, or has no chat template.
    """

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder, config = folder, read_settings(folder / "config.json")
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        self.context: int | None = next((config[name] for name in names if config.get(name)), None)
        self.generation = read_settings(folder / "generation_config.json")
        template = read_settings(folder / "tokenizer_config.json").get("chat_template")
        if not isinstance(template, str) and not (folder / "chat_template.jinja").exists():
            raise FolderError(f"{folder} has no chat template. Save its tokenizer with one.")

    @cached_property
    def tokenizer(self):
        """What renders and counts: large, and loaded only where prompts are written."""
        from transformers import PreTrainedTokenizerFast  # without torch, whatever the folder names

        return PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)

    def prompt(self, messages: list[dict]) -> tuple[str, int]:
        """The prompt as text, and its tokens. Raises: ValueError if the template refuses these
        messages, fails, or writes too much.
        """
        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # whatever a program can raise
            said = f"The model's chat template refuses these messages: {error or repr(error)}"
            raise ValueError(said[:300]) from error
        if len(text) > PROMPT_TEXT:
            raise ValueError(f"The model's chat template writes over {PROMPT_TEXT} characters.")
        return text, len(self.tokenizer.encode(text, add_special_tokens=False))


_format = cache(PromptFormat)


def prompt_of(folder: Path, messages: list[dict]) -> tuple[str, int]:
    """`PromptFormat.prompt`, in a process that ends over a prompt that takes too long."""
    form = _format(folder)
    assert form.tokenizer  # loaded now: their time is not the template's
    with suppress(ImportError):  # Windows has no such limits
        import resource

        used, most = resource.getrusage(resource.RUSAGE_SELF), resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (PROMPT_MEMORY, PROMPT_MEMORY))
        end = math.ceil(used.ru_utime + used.ru_stime + PROMPT_SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (end, most))
    return form.prompt(messages)
