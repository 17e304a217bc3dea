"""Log-probabilities of responses without padding, and with each prompt computed once.

`response_logps` has the signature and the values of `common.logprobs.response_logps`. The idea is
prefix sharing (Liu et al. 2024, arXiv 2410.20305). It needs SDPA attention without a sliding
window; `checked_path` tells whether it can be used for a model and its rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common import logprobs
from common.logprobs import PairLogps, SideLogps, sides_of, token_logps, unwrapped

ATTENTION = "packed_sdpa"  # our attention's name in transformers
ROUNDING = 1e-5  # nats per token that pass for rounding; in float32 the paths are 1e-7 apart


@dataclass
class Layout:
    """Where the tokens of packed pairs lie, each of shape (tokens,).

    The order is: prompt, chosen and rejected of the first pair, then those of the next pair. Both
    responses continue the one prompt, at the same positions.
    """

    part: Tensor  # 0, 1, 2: the first pair's prompt, chosen and rejected; 3, …: the next pair's
    is_prompt: Tensor
    position_ids: Tensor  # a response counts on from the end of its prompt
    before: Tensor  # index of the token that predicts this one


def packed_layout(lengths: Tensor) -> Layout:
    """The layout of a batch.

    Args: `lengths` in tokens, (pairs, parts): prompt, chosen and, for pairs, rejected.
    """
    sizes, parts = lengths.flatten(), lengths.shape[1]
    starts = sizes.cumsum(0) - sizes
    # Which part is a token of, and which part is that one's prompt?
    part = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    prompt = part - part % parts
    # Positions count within a part; those of a response start after its prompt.
    token = torch.arange(len(part), device=sizes.device)
    place = token - starts[part]
    position_ids = torch.where(part == prompt, place, sizes[prompt] + place)
    # The first token of either response is predicted by the last one of the prompt.
    before = torch.where(place == 0, starts[prompt] + sizes[prompt] - 1, token - 1)
    return Layout(part, part == prompt, position_ids, before)


def _attention(module, query, key, value, attention_mask, **options):
    """SDPA attention; packed where the "mask" is a table of lengths, (1, 1, pairs, parts).

    Each response attends to its prompt and to itself, causally, in one call without any mask. The
    prompt's own outputs are the same in both calls and are taken from the first.
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


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_attention(model) -> None:
    """Gives a model the packed attention, which is SDPA for every batch that is not packed.

    It stays: gradient checkpointing asks for it again in the backward pass.
    Raises: ValueError for a model with another attention than SDPA.
    """
    name = _attention_of(model)
    if name not in ("sdpa", ATTENTION):
        raise ValueError(f'The packed path needs attn_implementation="sdpa", not {name!r}.')
    if name == "sdpa":
        unwrapped(model).set_attn_implementation(ATTENTION)


def response_logps(model, batch: dict[str, Tensor], score_prompt: bool = False) -> PairLogps:
    """As `common.logprobs.response_logps`: the same arguments and the same values.

    Raises: ValueError for a model with another attention than SDPA.
    """
    use_packed_attention(model)
    # 1. All parts of all pairs in one row.
    names = ["prompt", *sides_of(batch)]
    lengths = torch.stack([batch[f"{name}_lengths"] for name in names], dim=1)
    parts = [
        batch[f"{name}_ids"][pair, :length]
        for pair, row in enumerate(lengths.tolist())
        for name, length in zip(names, row, strict=True)
    ]
    ids, layout = torch.cat(parts), packed_layout(lengths)
    # 2. One forward pass. transformers hands a mask of four dimensions on as it is.
    scored = ~layout.is_prompt | ((layout.position_ids > 0) & score_prompt)
    where, mask = (0, layout.before[scored]), lengths.cpu()[None, None]
    positions = layout.position_ids[None]
    logps = token_logps(
        model,
        ids[scored],
        where,
        input_ids=ids[None],
        position_ids=positions,
        attention_mask=mask,
    )
    # 3. Summed by part.
    sums = torch.zeros(lengths.numel(), dtype=logps.dtype, device=logps.device)
    sums = sums.index_add(0, layout.part[scored], logps).view(lengths.shape)
    by_name = {name: SideLogps(sums[:, part], lengths[:, part]) for part, name in enumerate(names)}
    by_name["prompt"] = SideLogps(sums[:, 0], lengths[:, 0] - 1) if score_prompt else None
    return PairLogps(**by_name)


PATHS = {"simple": logprobs.response_logps, "packed": response_logps}  # as recipes name them


def _attention_of(model) -> str | None:
    """The name of a model's attention implementation."""
    return getattr(getattr(unwrapped(model), "config", None), "_attn_implementation", None)


@torch.no_grad()
def checked_path(model, batches: list[dict[str, Tensor]], longest: int) -> tuple[str, str]:
    """The path that a run can use, and why: "packed" only where it gives what the simple one gives.

    Args: `batches`: the first batch of a run, then its longest row as a batch of its own.
        `longest`: tokens of the longest row that will ever be scored, held-out rows and sampled
        answers included: it alone may reach beyond a sliding window.
    Returns: ("packed", how far apart the paths are) or ("simple", why).
    The tolerance is 1e-5 nats per token or, where that is more (in 16 bit), five times what mere
    padding changes in the simple path. A wrong mask or a wrong position changes 1e-2 and more.
    """
    attention, window = _attention_of(model), getattr(unwrapped(model).config, "sliding_window", 0)
    if attention not in ("sdpa", ATTENTION):
        return "simple", f"its attention is {attention!r}, not 'sdpa'"
    if window and window < longest:
        return "simple", f"it looks back {window} tokens only, and the longest row has {longest}"
    training, first = model.training, batches[0]
    rows = [
        {name: ids[[row]] for name, ids in first.items()} for row in range(len(first["prompt_ids"]))
    ]
    model.eval()
    try:
        simple = [_means(model, [batch], "simple") for batch in batches]
        tolerance = max(ROUNDING, 5 * _apart(simple[0], _means(model, rows, "simple")))
        packed = [_means(model, [batch], "packed") for batch in batches]
    except Exception as error:  # whatever another kind of model makes of packed rows
        said = str(error).strip().splitlines()[0][:120]
        return "simple", f"packed rows fail with {type(error).__name__}: {said}"
    finally:
        model.train(training)
    apart = max(_apart(*pair) for pair in zip(simple, packed, strict=True))
    if not apart <= tolerance:  # NaN is not
        return "simple", f"packed rows differ by up to {apart:.1g} nats per token"
    found = f"within {apart:.1g} nats per token of the simple path"
    return "packed", f"{found} on the first batch and the longest row"


def _means(model, batches: list[dict[str, Tensor]], path: str) -> Tensor:
    """(2, rows), or (1, rows) of demonstrations: the mean log-probability of each response."""
    logps = [PATHS[path](model, batch) for batch in batches]
    sides = [[each.chosen for each in logps], [each.rejected for each in logps if each.rejected]]
    return torch.stack([torch.cat([each.means for each in side]) for side in sides if side])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
