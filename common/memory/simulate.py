"""Peak memory of a training step, before any is used: the step is taken on fake tensors, which have
shapes and no data.

Model, method, LoRA, gradient checkpointing and autocast are the real ones; 4-bit layers and the
optimiser's state are stood in for. Every tensor alive is counted.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from common import models
from common.logprobs import token_logps
from common.memory.architectures import profile_config
from common.packed import use_packed_attention
from common.profiles import Profile

PARTS = (
    "weights",
    "constants",
    "LoRA",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "reference",
)


@dataclass
class Forecast:
    """Predicted peak memory of training, in bytes."""

    profile: str
    method: str
    path: str
    parts: dict[str, int]  # at the peak of a training step; keys PARTS
    phases: dict[
        str, int
    ]  # the peak of each: "step", "evaluation" of held-out pairs, for DPO "answers" sampled there
    parameters: int  # of the model, without LoRA
    lengths: list[list[int]]  # of the micro-batch: prompt, chosen, rejected, in tokens

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class _Count(TorchDispatchMode):
    """Counts the bytes of all tensors alive; `at_peak` has those of the peak, by part."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.alive, self.part, self.now = vocabulary, {}, {}, 0
        self.start_phase()

    def start_phase(self) -> None:
        self.peak, self.snapshot = 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        if self.now > self.peak:
            self.peak, self.snapshot = self.now, dict(self.alive.values())
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        number, size = len(self.part), storage.nbytes()
        self.alive[storage._cdata] = number, size
        self.part[number] = "logits" if tensor.shape[-1:] == (self.vocabulary,) else "activations"
        self.now += size
        weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]

    def label(self, tensors: Iterable[Tensor], part: str) -> None:
        for tensor in tensors:
            self.part[self.alive[tensor.untyped_storage()._cdata][0]] = part

    def by_part(self) -> dict[str, int]:
        found = Counter()
        for number, size in self.snapshot.items():
            found[self.part[number]] += size
        return {part: found[part] for part in PARTS}


class _Dequantised(torch.autograd.Function):
    """A product with weights that are there in 4 bits only: unpacked for the product, forward and
    backward.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream @ upstream.new_empty(ctx.shape), None


class _Linear4bit(nn.Linear):
    """Takes the memory of bitsandbytes' nf4 layer with double quantisation (Dettmers et al. 2023,
    Sec. 3).
    """

    def __init__(self, layer: nn.Linear, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = (
            layer.in_features,
            layer.out_features,
            compute,
        )
        count = layer.weight.numel()
        self.weight = nn.Parameter(
            torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False
        )
        self.bias = layer.bias
        # One 8-bit constant per block of 64 weights, and one of 32 bits per block of 256 of those.
        self.register_buffer(
            "constants", torch.empty(count // 64 + 4 * (count // 64 // 256), dtype=torch.uint8)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        found = _Dequantised.apply(inputs.to(self.compute), (self.out_features, self.in_features))
        return (found if self.bias is None else found + self.bias.to(self.compute)).to(inputs.dtype)


def _apply(module: nn.Module, convert, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, behind `.to()`, for fake tensors: it exchanges parameters, which these do
    not allow.
    """
    for each in module.modules() if recurse else [module]:
        for name, weight in each._parameters.items():
            if weight is not None and (new := convert(weight.detach())).dtype != weight.dtype:
                each._parameters[name] = nn.Parameter(new, weight.requires_grad)
        for name, buffer in each._buffers.items():
            each._buffers[name] = buffer if buffer is None else convert(buffer)
    return module


def _quantised(model: nn.Module, compute: torch.dtype) -> nn.Module:
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(module, name, _Linear4bit(child, compute))
    model.is_loaded_in_4bit = True
    return model


def _moments(profile: Profile, weight: Tensor, device: str) -> list[Tensor]:
    """AdamW's state of a weight. bitsandbytes keeps it in 8 bits with a constant per 256, that of
    small ones in 32.
    """
    if profile.optimizer == "adamw" or device == "cpu" or weight.numel() < 4096:
        return [torch.empty_like(weight) for _ in range(2)]
    return [
        torch.empty(weight.numel() + 4 * (weight.numel() // 256), dtype=torch.uint8)
        for _ in range(2)
    ]


def _score(
    model, lengths: list[list[int]], table: Tensor, path: str, score_prompt: bool = False
) -> Tensor:
    """The log-probabilities that `response_logps` takes on pairs of these lengths, on fake tensors:
    (scored tokens,).

    `table`: the lengths as a real tensor, whose values the packed path reads.
    """
    scored = sum(sum(row[1:]) + score_prompt * (row[0] - 1) for row in lengths)
    targets = torch.zeros(scored, dtype=torch.long)
    if path == "packed":
        use_packed_attention(model)
        ids = torch.zeros(1, sum(map(sum, lengths)), dtype=torch.long)
        return token_logps(
            model, targets, (0, targets), input_ids=ids, position_ids=ids, attention_mask=table
        )
    width = max(row[0] + max(row[1:]) for row in lengths)
    ids = torch.zeros(len(lengths) * (len(lengths[0]) - 1), width, dtype=torch.long)
    return token_logps(
        model, targets, (targets, targets), input_ids=ids, attention_mask=torch.ones_like(ids)
    )


def full_rows(profile: Profile, count: int, sides: int) -> list[list[int]]:
    """So many rows of the profile's full length, half of it prompt: [prompt, chosen, …] in tokens."""
    half = profile.max_length // 2
    return [[profile.max_length - half] + [half] * sides] * count


def predict(
    profile: Profile,
    method: str,
    path: str = "packed",
    dtype: str = "bfloat16",
    device: str = "cuda",
    lengths: list[list[int]] | None = None,
) -> Forecast:
    """Peak memory of training a profile's stage `method` ("sft", "dpo", "orpo"), evaluations
    included.

    Layers are alike, and each adds as much as the one before: a deep model is simulated with 3 and
    with 6 of them.
    Args: `dtype`, `device`: the precision that it is run in, and where. `lengths`: those of the
        largest micro-batch (default: `full_rows`). Raises: models.ModelError where the model's
        configuration is not at hand.
    """
    recipe, config = profile.recipes[method], profile_config(profile)
    lengths = lengths or full_rows(
        profile, min(recipe.micro_batch, recipe.batch_size), 1 if method == "sft" else 2
    )
    at_once = min(profile.sampled_prompts, models.answers_at_once(config, profile.max_length))
    if (
        device == "cuda"
    ):  # with dropout the CPU's attention keeps whole matrices, which a GPU's does not
        for name in {"attn_pdrop", "attention_dropout"} & vars(config).keys():
            setattr(config, name, 0.0)
    at_depth = partial(_simulate, profile, method, path, dtype, device, lengths, at_once)
    depth = config.num_hidden_layers
    if depth <= 6:
        return at_depth(config)
    few, more = at_depth(_with_layers(config, 3)), at_depth(_with_layers(config, 6))

    def deep(less: int, larger: int) -> int:
        return less + (larger - less) * (depth - 3) // 3

    return replace(
        few,
        parts={part: deep(few.parts[part], more.parts[part]) for part in PARTS},
        phases={phase: deep(few.phases[phase], more.phases[phase]) for phase in few.phases},
        parameters=deep(few.parameters, more.parameters),
    )


def _with_layers(config, count: int):
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = count
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:count]
    return shallow


def _simulate(
    profile: Profile,
    method: str,
    path: str,
    dtype: str,
    device: str,
    lengths: list[list[int]],
    at_once: int,
    config,
) -> Forecast:
    recipe = profile.recipes[method]
    room, prompt = profile.max_length, profile.max_length - profile.max_new_tokens
    batches = [lengths, full_rows(profile, profile.eval_batch, 2), [[prompt, 1]] * at_once]
    tables = [torch.tensor(rows)[None, None] for rows in batches]
    precision = getattr(torch, dtype)
    with (
        catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Count(config.vocab_size) as count,
    ):
        simplefilter("ignore")  # of the libraries, about layers that are stood in for
        mixed = partial(torch.autocast, "cpu", precision, enabled=dtype != "float32")
        model, learned, parameters = _build(profile, config, method, precision, count)
        needs_reference = method == "dpo" and not recipe.cache_reference
        reference = _new(config) if needs_reference and not profile.lora else None
        count.label(reference.parameters() if reference else [], "reference")
        state = [moment for weight in learned for moment in _moments(profile, weight, device)]
        count.label(state, "optimiser")

        count.start_phase()
        with mixed():
            if needs_reference:
                with torch.no_grad(), nullcontext() if reference else model.disable_adapter():
                    _score(reference or model, lengths, tables[0], path)
            _score(model, lengths, tables[0], path, recipe.nll_on_prompt).sum().backward()
        if device == "cpu":  # AdamW goes weight by weight there, with two copies of each
            torch.empty(2 * max(weight.numel() for weight in learned))
        parts = count.by_part()
        phases = {"step": sum(parts.values())}
        for weight in learned:
            weight.grad = None
        model.eval()
        count.start_phase()
        with torch.no_grad(), mixed():
            _score(model, batches[1], tables[1], path)
        phases["evaluation"] = count.peak
        if method != "dpo":  # the others have no reference to compare answers with, and sample none
            return Forecast(profile.name, method, path, parts, phases, parameters, lengths)
        count.start_phase()
        with torch.no_grad():
            cache = torch.empty(at_once * room * models.cache_bytes(config), dtype=torch.uint8)  # noqa: F841 - alive meanwhile
            _score(model, batches[2], tables[2], "simple")
        phases["answers"] = count.peak
    return Forecast(profile.name, method, path, parts, phases, parameters, lengths)


def _new(config, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    ).requires_grad_(False)


def _build(
    profile: Profile, config, method: str, compute: torch.dtype, count: _Count
) -> tuple[nn.Module, list, int]:
    """The policy as `common.training` has it, its tensors labelled; what of it is learned; its size
    without LoRA.
    """
    model = _new(config, compute if profile.four_bit else torch.float32)
    parameters = model.num_parameters()
    if profile.four_bit:
        model = _quantised(model, compute)
    if profile.lora:
        with mock.patch.object(nn.Module, "_apply", _apply):
            model = models.add_lora(model, profile)
    else:
        model.requires_grad_(True)
    if profile.gradient_checkpointing and not profile.four_bit:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method != "sft":
        models.disable_dropout(model)
    for name, weight in model.named_parameters():
        count.label([weight], "LoRA" if "lora_" in name else "weights")
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(
                lambda weight: count.label([weight.grad], "gradients")
            )
    count.label(
        (tensor for name, tensor in model.named_buffers() if name.endswith("constants")),
        "constants",
    )
    return (
        model.train(),
        [weight for weight in model.parameters() if weight.requires_grad],
        parameters,
    )
