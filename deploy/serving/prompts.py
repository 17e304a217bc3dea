"""The text of a prompt in the course's format, and how many tokens a model's own template makes of
it.
"""

import json
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer


def prompt_text(messages: list[dict]) -> str:
    """The messages as in the course's data: `\\n\\nHuman: {x}\\n\\nAssistant:`, what the chat
    template also writes.
    """
    turns = [
        ("Assistant" if m["role"] == "assistant" else "Human", m["content"].strip())
        for m in messages
    ]
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in turns) + "\n\nAssistant:"


def read_json(path: Path) -> dict:
    """A JSON file of a model folder; {} where there is none. Raises: ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Export the model again.") from error


def check_folder(folder: Path) -> None:
    """Raises ValueError, with what to do, unless `folder` is a whole model in safetensors without
    code of its own.
    """
    if not folder.is_dir():
        raise ValueError(
            f"No model folder {folder}. Train or export one first: python -m common.training dpo"
        )
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is a LoRA adapter alone. Merge it into its base model, and serve that folder."
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}. Save model and tokenizer with save_pretrained."
        )
    if not any(
        (folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        raise ValueError(
            f"{folder} has no model.safetensors. Pickled weights are not served: save the model again."
        )
    if any(
        "auto_map" in read_json(folder / name) for name in ("config.json", "tokenizer_config.json")
    ):
        raise ValueError(
            f"{folder} asks for remote code (auto_map). It is not run: remove it, or convert the model."
        )


class PromptFormat:
    """Counts the tokens of a prompt as the engine will see it: the folder's own chat template and
    tokenizer.
    """

    def __init__(self, folder: Path):
        check_folder(folder)
        config, tokens = (
            read_json(folder / "config.json"),
            read_json(folder / "tokenizer_config.json"),
        )
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        self.context = next(
            (config[name] for name in names if config.get(name)), None
        )  # tokens; None: unknown
        self.generation = read_json(folder / "generation_config.json")
        template = folder / "chat_template.jinja"
        source = (
            template.read_text(encoding="utf-8")
            if template.exists()
            else tokens.get("chat_template")
        )
        if not isinstance(source, str):
            raise ValueError(
                f"{folder} has no chat template. Save the course's tokenizer beside the model."
            )
        self.special = {name: value for name, value in tokens.items() if name.endswith("_token")}
        self.special = {
            n: v["content"] if isinstance(v, dict) else v for n, v in self.special.items()
        }
        extensions = ["jinja2.ext.loopcontrols"]
        self.template = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        ).from_string(source)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def text(self, messages: list[dict]) -> str:
        """The prompt as text. Raises: ValueError if the template refuses these messages."""
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except TemplateError as error:
            raise ValueError(
                f"The model's chat template refuses these messages: {error}"
            ) from error

    def count(self, messages: list[dict]) -> int:
        """Tokens of the prompt. Raises: ValueError if the template refuses these messages."""
        return len(self.tokenizer.encode(self.text(messages), add_special_tokens=False))
