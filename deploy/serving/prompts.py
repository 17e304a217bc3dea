"""How many tokens a model's own template and tokenizer make of a list of messages."""

from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deploy.serving.folders import FolderError, check_folder, read_settings


class PromptFormat:
    """The chat template and tokenizer of a model folder: a prompt as its engine will see it.

    `context`: tokens that the model can read, None where the folder does not say; `generation`: its
    generation settings.
    Raises: FolderError for a folder that is no safe model, or has no chat template.
    """

    def __init__(self, folder: Path):
        check_folder(folder)
        config = read_settings(folder / "config.json")
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        self.context: int | None = next((config[name] for name in names if config.get(name)), None)
        self.generation = read_settings(folder / "generation_config.json")
        settings = read_settings(folder / "tokenizer_config.json")
        source, template = settings.get("chat_template"), folder / "chat_template.jinja"
        if template.exists():
            source = template.read_text(encoding="utf-8")
        if not isinstance(source, str):
            raise FolderError(f"{folder} has no chat template. Save its tokenizer with one.")
        self.special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token")
        }
        # As transformers renders templates.
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.template = sandbox.from_string(source)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def text(self, messages: list[dict]) -> str:
        """The prompt as text. Raises: ValueError if the template refuses these messages."""
        variables = {**self.special, "messages": messages, "add_generation_prompt": True}
        try:
            return self.template.render(variables)
        except TemplateError as error:
            said = f"The model's chat template refuses these messages: {error}"
            raise ValueError(said) from error

    def count(self, messages: list[dict]) -> int:
        """Tokens of the prompt. Raises: ValueError if the template refuses these messages."""
        return len(self.tokenizer.encode(self.text(messages), add_special_tokens=False))
