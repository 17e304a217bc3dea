"""A stand-in for SmolLM2: `python tests/stand_in.py REAL_FOLDER RUN_FOLDER`.

A Llama of two thin layers with random weights, under SmolLM2's own tokenizer and template, written
where a run folder keeps the real one. What it says is noise, so it tests only that things run.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Widths that 4-bit layers can divide, as those of the real one.
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def write_stand_in(real: Path, runs: Path) -> Path:
    """Writes `models/smollm2` into a run folder, from the folder that `make model` wrote."""
    folder = runs / "models" / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    for path in real.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((real / "config.json").read_text(encoding="utf-8")) | SIZES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write_stand_in(Path(sys.argv[1]), Path(sys.argv[2])))
