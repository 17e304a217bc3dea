"""Log-probabilities of responses: what every method of preference alignment is made of.

This is the readable path: one padded row per response. `common.packed` gives the same numbers for
less work.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class SideLogps:
    """Log-probabilities of one side of a batch, in nats."""

    sums: Tensor  # (batch,): log p(response | prompt), summed over tokens, EOS included
    lengths: Tensor  # (batch,): scored tokens

    @property
    def means(self) -> Tensor:
        """(batch,): mean per token, the log-likelihood in ORPO's odds."""
        return self.sums / self.lengths

    def detach(self) -> "SideLogps":
        return SideLogps(self.sums.detach(), self.lengths)


@dataclass
class PairLogps:
    """Both sides of a batch. `rejected` is None for demonstrations, `prompt` unless asked for."""

    chosen: SideLogps
    rejected: SideLogps | None = None
    prompt: SideLogps | None = None


def sides_of(batch: dict[str, Tensor]) -> list[str]:
    """The sides that a batch holds: chosen, and rejected where it is a batch of pairs."""
    return ["chosen", "rejected"] if "rejected_ids" in batch else ["chosen"]


def unwrapped(model):
    """The model inside distributed training's wrapper."""
    return getattr(model, "module", model)


def token_logps(model, targets: Tensor, where, **inputs) -> Tensor:
    """log p of the tokens `targets`, as one flat row (tokens,), in nats.

    Args: `where`: index of the positions that predict the targets; `inputs`: of the model.
    A hook hands the output head only these positions. The head, with its large vocabulary, is most
    of the cost of a small model.
    """
    head = unwrapped(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][where],))
    try:
        logits = model(use_cache=False, **inputs).logits
    finally:
        hook.remove()
    # bfloat16 would lose whole nats: never below float32, and float64 stays what it is.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Sums are taken in float64, except on Apple GPUs, which do not have it.
    wide = torch.float32 if targets.device.type == "mps" else torch.float64
    return -F.cross_entropy(logits, targets, reduction="none").to(wide)


def response_logps(model, batch: dict[str, Tensor], score_prompt: bool = False) -> PairLogps:
    """Log-probabilities of the responses of a batch under a causal language model.

    Args: `batch`: prompt_ids, chosen_ids and, for pairs, rejected_ids, each (batch, length)
        right-padded, with prompt_lengths, chosen_lengths, rejected_lengths (EOS counted).
        `score_prompt`: score the chosen row's prompt too, from its second token on (ORPO's NLL).
    Returns: PairLogps in nats, sums in float64 (float32 on Apple GPUs).
    Source: Rafailov et al. 2023, Eq. 7 (sums); Hong et al. 2024, Eq. 3 (means).
    """
    sides, pairs = sides_of(batch), len(batch["prompt_ids"])

    # 1. One row per response: its prompt, then itself, without padding between them.
    rows, lengths = [], torch.cat([batch[f"{side}_lengths"] for side in sides])
    for side in sides:
        for pair in range(pairs):
            prompt = batch["prompt_ids"][pair, : batch["prompt_lengths"][pair]]
            response = batch[f"{side}_ids"][pair, : batch[f"{side}_lengths"][pair]]
            rows.append(torch.cat([prompt, response]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    # 2. Masks from the lengths: the pad id may be EOS, and EOS is scored.
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = batch["prompt_lengths"].repeat(len(sides))
    in_row = position < (starts + lengths)[:, None]
    is_response = in_row & (position >= starts[:, None])
    scored = is_response.clone()
    if score_prompt:
        scored[:pairs] |= in_row[:pairs] & (position > 0)

    # 3. Position t predicts token t + 1, so the mask is shifted by one to the left.
    predicts = scored.roll(-1, dims=1)
    mask = in_row.long()
    found = token_logps(
        model, input_ids[scored], predicts, input_ids=input_ids, attention_mask=mask
    )

    # 4. Back into rows, and summed over each response.
    logps = torch.zeros(input_ids.shape, dtype=found.dtype, device=found.device)
    logps = logps.masked_scatter(scored, found)
    sums = (logps * is_response).sum(1)
    logps_of_sides = [
        SideLogps(sums[start : start + pairs], lengths[start : start + pairs])
        for start in range(0, len(sums), pairs)
    ]
    result = PairLogps(*logps_of_sides)
    if score_prompt:
        prompt_sums = (logps * ~is_response)[:pairs].sum(1)
        result.prompt = SideLogps(prompt_sums, batch["prompt_lengths"] - 1)
    return result
