"""Log-probabilities of responses: the one hot loop of preference alignment. A readable path and a
fast one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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
    """Both sides of a batch of pairs; `rejected` is None for demonstrations, `prompt` unless it was
    asked for.
    """

    chosen: SideLogps
    rejected: SideLogps | None = None
    prompt: SideLogps | None = None


def _token_logps(model, targets: Tensor, where, **inputs) -> Tensor:
    """log p of the tokens `targets`, as one flat row (tokens,). `where` indexes the positions that
    predict them.

    The model runs its own forward. A hook hands its output head only these positions: the head,
    with its huge vocabulary, is most of the cost of a small model.
    """
    head = _unwrapped(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][where],))
    try:
        logits = model(use_cache=False, **inputs).logits
    finally:
        hook.remove()
    logits = (
        logits if logits.dtype == torch.float64 else logits.float()
    )  # bfloat16 would lose whole nats
    wide = (
        torch.float32 if targets.device.type == "mps" else torch.float64
    )  # Apple GPUs have no float64
    return -F.cross_entropy(logits, targets, reduction="none").to(wide)


def _simple(model, batch: dict[str, Tensor], sides: list[str], score_prompt: bool) -> PairLogps:
    """One padded row per response, its prompt before it: all chosen, then all rejected."""
    pairs, starts = len(batch["prompt_ids"]), batch["prompt_lengths"].repeat(len(sides))
    lengths = torch.cat([batch[f"{side}_lengths"] for side in sides])
    # prompt and response in one row each, no pad between them: first all chosen, then all rejected
    rows = []
    for side in sides:
        parts = (
            batch["prompt_ids"],
            batch["prompt_lengths"],
            batch[f"{side}_ids"],
            batch[f"{side}_lengths"],
        )
        rows += [
            torch.cat([prompt[:start], ids[:end]])
            for prompt, start, ids, end in zip(*parts, strict=True)
        ]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_row = position < (starts + lengths)[:, None]
    response = in_row & (position >= starts[:, None])
    scored = response.clone()
    if score_prompt:
        scored[:pairs] |= in_row[:pairs] & (position > 0)

    predicts = scored.roll(-1, dims=1)  # position t predicts token t + 1; token 0 is never scored
    found = _token_logps(
        model, input_ids[scored], predicts, input_ids=input_ids, attention_mask=in_row.long()
    )
    logps = torch.zeros(input_ids.shape, dtype=found.dtype, device=found.device).masked_scatter(
        scored, found
    )
    sums = (logps * response).sum(1)
    return PairLogps(
        chosen=SideLogps(sums[:pairs], lengths[:pairs]),
        rejected=SideLogps(sums[pairs:], lengths[pairs:]) if len(sides) == 2 else None,
        prompt=SideLogps((logps * ~response)[:pairs].sum(1), batch["prompt_lengths"] - 1)
        if score_prompt
        else None,
    )


@dataclass
class Layout:
    """Where the tokens of packed pairs lie: prompt, chosen and rejected of the first pair, then of
    the next, unpadded.

    Each of shape (tokens,). A prompt is there once: both responses continue it, at the same
    positions.
    """

    # which part of which pair: 0, 1, 2 are the first pair's prompt, chosen and rejected, 3, … the
    # next
    part: Tensor
    is_prompt: Tensor
    position_ids: Tensor  # a response counts on from the end of its prompt
    # index of the token before: for the first token of either response, the last one of the prompt
    before: Tensor


def packed_layout(lengths: Tensor) -> Layout:
    """The layout of a batch. Args: `lengths` in tokens, (pairs, parts): prompt, chosen and, for
    pairs, rejected.
    """
    sizes, parts = lengths.flatten(), lengths.shape[1]
    starts = sizes.cumsum(0) - sizes
    part = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    prompt = part - part % parts  # the part that is this token's prompt
    token = torch.arange(len(part), device=sizes.device)
    place = token - starts[part]
    position_ids = torch.where(part == prompt, place, sizes[prompt] + place)
    before = torch.where(place == 0, starts[prompt] + sizes[prompt] - 1, token - 1)
    return Layout(part, part == prompt, position_ids, before)


def _attention(module, query, key, value, attention_mask, **options):
    """Attention as transformers has it and, where the "mask" is a table of lengths (1, 1, pairs,
    parts), packed.

    Each response attends with its prompt before it, causally, as if they were alone: one plain
    causal call per response, without any mask. The prompt's own outputs, the same in both calls,
    are taken from the first.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths, outputs = attention_mask.tolist()[0][0], []
    parts = [states.split(sum(lengths, []), dim=2) for states in (query, key, value)]
    for pair, row_lengths in enumerate(lengths):
        prompt = pair * len(row_lengths)
        for side in range(1, len(row_lengths)):
            row = [torch.cat([states[prompt], states[prompt + side]], dim=2) for states in parts]
            output, _ = sdpa_attention_forward(module, *row, None, **options)
            outputs.append(output if side == 1 else output[:, parts[0][prompt].shape[2] :])
    return torch.cat(outputs, dim=1), None


# Under the name that models look up at every forward, the recomputed ones of gradient checkpointing
# included. Every other caller gets what it always got.
AttentionInterface.register("sdpa", _attention)


def _packed(model, batch: dict[str, Tensor], sides: list[str], score_prompt: bool) -> PairLogps:
    """All pairs in one row without padding, each prompt once (Liu et al. 2024, arXiv 2410.20305)."""
    names = ["prompt", *sides]
    lengths = torch.stack([batch[f"{name}_lengths"] for name in names], dim=1)
    ids = torch.cat(
        [
            batch[f"{name}_ids"][pair, :length]
            for pair, row in enumerate(lengths.tolist())
            for name, length in zip(names, row, strict=True)
        ]
    )
    layout = packed_layout(lengths)
    scored = ~layout.is_prompt | ((layout.position_ids > 0) & score_prompt)
    logps = _token_logps(
        model,
        ids[scored],
        (0, layout.before[scored]),
        input_ids=ids[None],
        position_ids=layout.position_ids[None],
        attention_mask=lengths.cpu()[
            None, None
        ],  # transformers hands a mask of four dimensions on as it is
    )
    sums = torch.zeros(lengths.numel(), dtype=logps.dtype, device=logps.device)
    sums = sums.index_add(0, layout.part[scored], logps).view(lengths.shape)
    by_name = {name: SideLogps(sums[:, part], lengths[:, part]) for part, name in enumerate(names)}
    by_name["prompt"] = SideLogps(sums[:, 0], lengths[:, 0] - 1) if score_prompt else None
    return PairLogps(**by_name)


def response_logps(
    model, batch: dict[str, Tensor], path: str = "simple", score_prompt: bool = False
) -> PairLogps:
    """Log-probabilities of the responses of a batch under a causal language model.

    Args: `batch`: prompt_ids, chosen_ids and, for pairs, rejected_ids, each (batch, length)
        right-padded, with prompt_lengths, chosen_lengths, rejected_lengths (EOS counted). `path`:
        "simple", one padded row per response, for any model; or "packed", the same numbers for
        less: no padding, and the prompt computed once for both responses. It needs SDPA attention
        without a sliding window: `checked_path` tells whether a model will do. `score_prompt`: also
        score the chosen row's prompt, from its second token on (ORPO's NLL in TRL).
    Returns: PairLogps, sums in float64 (float32 on Apple GPUs, which have no float64).
    Raises: ValueError for an unknown path, or for the packed path under another attention than
        SDPA.
    Source: Rafailov et al. 2023, Eq. 7 (sums); Hong et al. 2024, Eq. 3 (means).
    """
    if path not in ("simple", "packed"):
        raise ValueError(f'Unknown path {path!r}: use "simple" or "packed".')
    if path == "packed" and _attention_of(model) != "sdpa":
        raise ValueError(
            f'The packed path needs attn_implementation="sdpa", not {_attention_of(model)!r}.'
        )
    sides = ["chosen", "rejected"] if "rejected_ids" in batch else ["chosen"]
    return (_packed if path == "packed" else _simple)(model, batch, sides, score_prompt)


def _unwrapped(model):
    """The model inside distributed training's wrapper."""
    return getattr(model, "module", model)


def _attention_of(model) -> str | None:
    """The name of a model's attention implementation."""
    return getattr(getattr(_unwrapped(model), "config", None), "_attn_implementation", None)


# nats per token that always pass for rounding; in float32 the two paths are some 1e-7 apart
ROUNDING = 1e-5


@torch.no_grad()
def checked_path(model, batches: list[dict[str, Tensor]]) -> tuple[str, str]:
    """The path that a run can use, and why: "packed" only where it gives what the simple path
    gives.

    Args: `batches`: the first batch of a run, then its longest row as a batch of its own: it alone
        may reach beyond a sliding window.
    Returns: ("packed", how far apart the paths are) or ("simple", why).
    The tolerance is 1e-5 nats per token or, where that is more (in 16 bit), five times what mere
    padding changes in the simple path. A wrong mask or a wrong position changes 1e-2 and more.
    """
    lengths = [
        batch["prompt_lengths"] + batch[f"{side}_lengths"]
        for batch in batches
        for side in ("chosen", "rejected")
        if f"{side}_lengths" in batch
    ]
    longest, window = (
        int(torch.cat(lengths).max()),
        getattr(_unwrapped(model).config, "sliding_window", None),
    )
    if _attention_of(model) != "sdpa":
        return "simple", f"its attention is {_attention_of(model)!r}, not 'sdpa'"
    if window and window < longest:
        return "simple", f"it looks back {window} tokens only, and the longest row has {longest}"
    training, first = model.training, batches[0]
    rows = [
        {name: ids[row : row + 1] for name, ids in first.items()}
        for row in range(len(first["prompt_ids"]))
    ]
    model.eval()
    try:
        simple = [_means(model, [batch], "simple") for batch in batches]
        tolerance = max(ROUNDING, 5 * _apart(simple[0], _means(model, rows, "simple")))
        apart = [
            _apart(expected, _means(model, [batch], "packed"))
            for batch, expected in zip(batches, simple, strict=True)
        ]
    except (
        Exception
    ) as error:  # whatever another kind of model makes of packed rows, the run goes on
        return (
            "simple",
            f"packed rows fail with {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}",
        )
    finally:
        model.train(training)
    if not max(apart) <= tolerance:  # NaN is not
        return "simple", f"packed rows differ by up to {max(apart):.1g} nats per token"
    return (
        "packed",
        f"within {max(apart):.1g} nats per token of the simple path on the first batch and the longest row",
    )


def _means(model, batches: list[dict[str, Tensor]], path: str) -> Tensor:
    """(2, rows) of these batches, or (1, rows) of demonstrations: the mean log-probability of each
    response.
    """
    logps = [response_logps(model, batch, path) for batch in batches]
    sides = [
        [each.chosen for each in logps],
        [each.rejected for each in logps if each.rejected is not None],
    ]
    return torch.stack([torch.cat([each.means for each in side]) for side in sides if side])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
