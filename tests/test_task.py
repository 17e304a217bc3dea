"""Which optimiser a profile gets on which device."""

from pathlib import Path

import pytest
import torch

from common.profiles import PROFILES
from common.training.task import Task, how_long


def built(name: str, device: str):
    """(optimiser, note) for one weight. It stays on the CPU: what is built does not depend on where
    the weight is.
    """
    profile = PROFILES[name]
    nowhere = Path("nowhere")
    task = Task("dpo", "dpo", profile.recipes["dpo"], [], nowhere, nowhere)
    task.optimizer = profile.optimizer
    return task.new_optimizer([torch.nn.Parameter(torch.ones(3))], device)


@pytest.mark.parametrize("name", ["cpu", "gpt2"])
def test_on_a_cpu_it_is_adamw_as_torch_has_it(name):
    optimizer, note = built(name, "cpu")
    assert (
        type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is None and note == ""
    )
    recipe = PROFILES[name].recipes["dpo"]
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (recipe.lr, recipe.betas)


def test_on_a_gpu_adamw_is_fused():
    optimizer, note = built("gpt2", "cuda")
    assert (
        type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True and note == ""
    )


def test_paged_8_bit_adamw_is_for_gpus_and_a_note_says_so_elsewhere():
    assert type(built("qlora-7b", "cuda")[0]).__name__ == "PagedAdamW8bit"
    optimizer, note = built("qlora-7b", "cpu")
    assert type(optimizer) is torch.optim.AdamW
    assert note == "paged 8-bit AdamW needs a CUDA GPU: plain AdamW on cpu"


def test_a_long_run_says_how_long_it_will_take_and_a_short_one_nothing():
    """32 steps of 13 s are 416 s, 7 minutes."""
    said = "about 7 minutes for 32 steps of 13 s, held-out measures not counted"
    assert how_long(13.0, 32) == said and how_long(1.8, 32) == ""
