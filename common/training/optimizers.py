"""The optimiser that a profile asks for, as far as the device has it."""

import torch

from common.profiles import Profile, Recipe


def new_optimizer(
    parameters: list[torch.nn.Parameter], recipe: Recipe, profile: Profile, device: str
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW with the recipe's settings, and a note where it is another one than the profile asks
    for; else "".

    On a GPU it is PyTorch's fused AdamW, which takes no temporary copy of the weights, or
    bitsandbytes' 8-bit one, whose moments are paged to the CPU when memory runs out. Args:
    `device`: "cpu" or "cuda".
    """
    settings = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    paged = profile.optimizer == "paged_adamw_8bit"
    if paged and device == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **settings), ""
    if device == "cuda":
        settings["fused"] = True
    note = f"paged 8-bit AdamW needs a CUDA GPU: plain AdamW on {device}" if paged else ""
    return torch.optim.AdamW(parameters, **settings), note
