"""Log-probabilities of responses: the one hot loop of preference alignment."""

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
    """Both sides of a batch of pairs; `rejected` is None for demonstrations, `prompt` unless it was asked for."""

    chosen: SideLogps
    rejected: SideLogps | None = None
    prompt: SideLogps | None = None


def _token_logps(model, input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> Tensor:
    """log p of the tokens that `scored` (batch, length) marks, as one flat row (number of scored tokens,).

    The model runs its own forward. A hook hands its output head only the positions that predict a scored token:
    the head, with its huge vocabulary, is most of the cost of a small model.
    """
    predicts = scored.roll(-1, dims=1)  # position t predicts token t + 1; token 0 is never scored
    head = getattr(model, "module", model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][predicts],))
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()
    logits = logits if logits.dtype == torch.float64 else logits.float()  # bfloat16 would lose whole nats
    return -F.cross_entropy(logits, input_ids[scored], reduction="none")


def response_logps(model, batch: dict[str, Tensor], path: str = "simple", score_prompt: bool = False) -> PairLogps:
    """Log-probabilities of the responses of a batch under a causal language model.

    Args: `batch`: prompt_ids, chosen_ids and, for pairs, rejected_ids, each (batch, length) right-padded, with
        prompt_lengths, chosen_lengths, rejected_lengths (EOS counted). `path`: "simple" (the readable path).
        `score_prompt`: also score the chosen row's prompt, from its second token on (ORPO's NLL in TRL).
    Returns: PairLogps, sums in float64 (float32 on Apple GPUs, which have no float64).
    Raises: ValueError for an unknown path.
    Source: Rafailov et al. 2023, Eq. 7 (sums); Hong et al. 2024, Eq. 3 (means).
    """
    if path != "simple":
        raise ValueError(f'Unknown path {path!r}: use "simple".')
    sides = ["chosen", "rejected"] if "rejected_ids" in batch else ["chosen"]
    pairs, starts = len(batch["prompt_ids"]), batch["prompt_lengths"].repeat(len(sides))
    lengths = torch.cat([batch[f"{side}_lengths"] for side in sides])
    rows = []  # prompt and response in one row each, no pad between them: first all chosen, then all rejected
    for side in sides:
        parts = batch["prompt_ids"], batch["prompt_lengths"], batch[f"{side}_ids"], batch[f"{side}_lengths"]
        rows += [torch.cat([prompt[:start], ids[:end]]) for prompt, start, ids, end in zip(*parts, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_row = position < (starts + lengths)[:, None]
    response = in_row & (position >= starts[:, None])
    scored = response.clone()
    if score_prompt:
        scored[:pairs] |= in_row[:pairs] & (position > 0)

    wide = torch.float32 if input_ids.device.type == "mps" else torch.float64
    logps = torch.zeros(input_ids.shape, dtype=wide, device=input_ids.device)
    logps = logps.masked_scatter(scored, _token_logps(model, input_ids, in_row.long(), scored).to(wide))
    sums = (logps * response).sum(1)
    return PairLogps(
        chosen=SideLogps(sums[:pairs], lengths[:pairs]),
        rejected=SideLogps(sums[pairs:], lengths[pairs:]) if len(sides) == 2 else None,
        prompt=SideLogps((logps * ~response)[:pairs].sum(1), batch["prompt_lengths"] - 1) if score_prompt else None,
    )
