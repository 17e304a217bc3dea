"""The optimiser that a task asks for, as far as the device has it."""

import torch

from common.training.task import Task


def new_optimizer(
    parameters: list[torch.nn.Parameter], task: Task, device: str
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW with the recipe's settings, and a note where another one was asked for; else "".

    On a GPU it is PyTorch's fused AdamW, which takes no temporary copy of the weights, or
    bitsandbytes' 8-bit one, whose moments are paged to the CPU when memory runs out.
    Args: `device`: "cpu" or "cuda".
    """
    recipe, paged = task.recipe, task.optimizer == "paged_adamw_8bit"
    settings = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if paged and device == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **settings), ""
    if device == "cuda":
        settings["fused"] = True
    note = f"paged 8-bit AdamW needs a CUDA GPU: plain AdamW on {device}" if paged else ""
    return torch.optim.AdamW(parameters, **settings), note
