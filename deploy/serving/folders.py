"""Is a folder a model that can be loaded without running code that came with it?"""

import json
from pathlib import Path

PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json")


class FolderError(ValueError):
    """A model folder that is not loaded. The message says what to do."""


def read_settings(path: Path) -> dict:
    """A JSON file of a model folder; {} where there is none. Raises: FolderError for no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise FolderError(f"{path} is not valid JSON ({error}). Export the model again.") from error


def check_folder(folder: Path) -> None:
    """Raises FolderError unless `folder` is a whole model in safetensors, with no pickled file and
    no code of its own.
    """
    files = {path.name for path in folder.glob("*")}
    if not folder.is_dir():
        advice = "Train or export one first: python -m common.training dpo"
    elif "adapter_config.json" in files and "config.json" not in files:
        advice = "It is a LoRA adapter alone. Merge it into its base model, and name that folder."
    elif pickled := sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLED):
        advice = f"It holds pickled files ({', '.join(pickled[:3])}): reading one can run any code."
        advice += " Remove them, and save the weights as safetensors."
    elif missing := [name for name in ("config.json", "tokenizer.json") if name not in files]:
        advice = f"It has no {' and no '.join(missing)}. Save model and tokenizer together."
    elif files.isdisjoint(WEIGHT_FILES):
        advice = "It has no model.safetensors. Save the model again."
    elif coded := [name for name in CONFIGS if "auto_map" in read_settings(folder / name)]:
        advice = f"{coded[0]} asks for remote code (auto_map). Read that code, then convert."
    else:
        return
    raise FolderError(f"{folder} is not a model folder that can be loaded. {advice}")
