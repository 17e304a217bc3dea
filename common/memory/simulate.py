"""Peak memory of a training step, without using any: the step runs on fake tensors, which have
shapes and no data.

Model, method, LoRA, gradient checkpointing and autocast are the real ones. Tensors of the right
size stand for 4-bit layers and the optimiser's state. Every tensor alive is counted.
"""

import copy
import weakref
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
    *("weights", "constants", "LoRA", "gradients"),
    *("optimiser", "activations", "logits", "reference"),
)


@dataclass
class Forecast:
    """Predicted peak memory of training, in bytes."""

    profile: str
    method: str
    path: str
    parts: dict[str, int]  # at the peak of a training step; keys PARTS
    # The peak of each phase: "step", "evaluation" of held-out pairs, for DPO "answers" to prompts.
    phases: dict[str, int]
    parameters: int  # of the model, without LoRA
    lengths: list[list[int]]  # of the micro-batch: prompt, chosen, rejected, in tokens

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True)
class _Plan:
    """What is simulated: a profile's stage, and how and where it runs."""

    profile: Profile
    method: str
    path: str
    dtype: str
    device: str
    lengths: list[list[int]]  # of the largest micro-batch
    answers: int  # written at once


class _Count(TorchDispatchMode):
    """Counts the bytes of all tensors alive; `by_part` gives those at the peak of a phase."""

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
        """Says of what part some tensors are."""
        for tensor in tensors:
            self.part[self.alive[tensor.untyped_storage()._cdata][0]] = part

    def by_part(self) -> dict[str, int]:
        found = dict.fromkeys(PARTS, 0)
        for number, size in self.snapshot.items():
            found[self.part[number]] += size
        return found


class _Dequantised(torch.autograd.Function):
    """A product with 4-bit weights: they are unpacked for it, forward and backward."""

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
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute, self.bias, count = compute, layer.bias, layer.weight.numel()
        packed = torch.empty(count // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        # One 8-bit constant per block of 64 weights, and one of 32 bits per block of 256 of those.
        size = count // 64 + 4 * (count // 64 // 256)
        self.register_buffer("constants", torch.empty(size, dtype=torch.uint8))

    def forward(self, inputs: Tensor) -> Tensor:
        found = _Dequantised.apply(inputs.to(self.compute), (self.out_features, self.in_features))
        return (found if self.bias is None else found + self.bias.to(self.compute)).to(inputs.dtype)


def _apply(module: nn.Module, convert, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, behind `.to()`, which cannot exchange parameters that are fake."""
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


def _moments(plan: _Plan, weight: Tensor) -> list[Tensor]:
    """AdamW's state of a weight. bitsandbytes keeps it in 8 bits with a constant per 256, that of
    small weights in 32 bits.
    """
    count, plain = weight.numel(), plan.profile.optimizer == "adamw" or plan.device == "cpu"
    if plain or count < 4096:
        return [torch.empty_like(weight) for _ in range(2)]
    return [torch.empty(count + 4 * (count // 256), dtype=torch.uint8) for _ in range(2)]


def _score(model, path: str, rows: list[list[int]], table: Tensor, with_prompt=False) -> Tensor:
    """The log-probabilities that `response_logps` takes of rows, by their lengths: (scored,)."""
    scored = sum(sum(row[1:]) + with_prompt * (row[0] - 1) for row in rows)
    targets = torch.zeros(scored, dtype=torch.long)
    if path == "packed":
        use_packed_attention(model)
        ids = torch.zeros(1, sum(map(sum, rows)), dtype=torch.long)
        inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": table}
        return token_logps(model, targets, (0, targets), **inputs)
    width = max(row[0] + max(row[1:]) for row in rows)
    ids = torch.zeros(len(rows) * (len(rows[0]) - 1), width, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return token_logps(model, targets, (targets, targets), **inputs)


def full_rows(profile: Profile, count: int, sides: int) -> list[list[int]]:
    """`count` rows of the profile's full length, half of it prompt, as [prompt, chosen, …]."""
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

    All layers take as much memory: a deep model is simulated with 3 and with 6 of them.
    Args: `dtype`, `device`: the precision that it is run in, and where. `lengths`: those of the
        largest micro-batch (default: `full_rows`). Raises: models.ModelError where the model's
        configuration is not at hand.
    """
    recipe, config = profile.recipes[method], profile_config(profile)
    count, sides = min(recipe.micro_batch, recipe.batch_size), 1 if method == "sft" else 2
    lengths = lengths or full_rows(profile, count, sides)
    answers = min(profile.sampled_prompts, models.answers_at_once(config, profile.max_length))
    plan = _Plan(profile, method, path, dtype, device, lengths, answers)
    if device == "cuda":  # with dropout a CPU's attention keeps whole matrices, a GPU's does not
        for name in {"attn_pdrop", "attention_dropout"} & vars(config).keys():
            setattr(config, name, 0.0)
    depth = config.num_hidden_layers
    if depth <= 6:
        return _simulate(plan, config)
    few, more = (_simulate(plan, _with_layers(config, count)) for count in (3, 6))

    def deep(less: dict, larger: dict) -> dict:
        return {key: less[key] + (larger[key] - less[key]) * (depth - 3) // 3 for key in less}

    parameters = few.parameters + (more.parameters - few.parameters) * (depth - 3) // 3
    parts, phases = deep(few.parts, more.parts), deep(few.phases, more.phases)
    return replace(few, parts=parts, phases=phases, parameters=parameters)


def _with_layers(config, count: int):
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = count
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:count]
    return shallow


def _simulate(plan: _Plan, config) -> Forecast:
    profile, method, recipe = plan.profile, plan.method, plan.profile.recipes[plan.method]
    prompt = profile.max_length - profile.max_new_tokens
    batches = plan.lengths, full_rows(profile, profile.eval_batch, 2), [[prompt, 1]] * plan.answers
    # The lengths as real tensors too: the packed path reads their values.
    step, held_out, prompts = [(rows, torch.tensor(rows)[None, None]) for rows in batches]
    precision = getattr(torch, plan.dtype)
    mixed = partial(torch.autocast, "cpu", precision, enabled=plan.dtype != "float32")
    fake, count = FakeTensorMode(allow_non_fake_inputs=True), _Count(config.vocab_size)
    with catch_warnings(), fake, count:
        simplefilter("ignore")  # of the libraries, about layers that are stood in for
        # 1. What is there before a step: the policy, its reference, the optimiser's state.
        model, parameters = _build(plan, config, precision, count)
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        needs_reference = method == "dpo" and not recipe.cache_reference
        reference = _new(config) if needs_reference and not profile.lora else None
        count.label(reference.parameters() if reference else [], "reference")
        state = [moment for weight in learned for moment in _moments(plan, weight)]
        count.label(state, "optimiser")

        # 2. A training step.
        count.start_phase()
        with mixed():
            if needs_reference:
                with torch.no_grad(), nullcontext() if reference else model.disable_adapter():
                    _score(reference or model, plan.path, *step)
            _score(model, plan.path, *step, recipe.nll_on_prompt).sum().backward()
        if plan.device == "cpu":  # AdamW goes weight by weight there, with two copies of each
            torch.empty(2 * max(weight.numel() for weight in learned))
        parts = count.by_part()
        phases = {"step": sum(parts.values())}
        for weight in learned:
            weight.grad = None

        # 3. An evaluation of held-out pairs.
        model.eval()
        count.start_phase()
        with torch.no_grad(), mixed():
            _score(model, plan.path, *held_out)
        phases["evaluation"] = count.peak

        # 4. Answers, with their cache of keys and values. Only DPO samples some while it trains.
        if method == "dpo":
            count.start_phase()
            size = plan.answers * profile.max_length * models.cache_bytes(config)
            cache = torch.empty(size, dtype=torch.uint8)
            with torch.no_grad():
                _score(model, "simple", *prompts)
            del cache
            phases["answers"] = count.peak
    return Forecast(profile.name, method, plan.path, parts, phases, parameters, plan.lengths)


def _new(config, dtype: torch.dtype = torch.float32) -> nn.Module:
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_config(config, **options).requires_grad_(False)


def _build(plan: _Plan, config, compute: torch.dtype, count: _Count) -> tuple[nn.Module, int]:
    """The policy as `common.training` has it, its tensors labelled; its size without LoRA."""
    profile = plan.profile
    model = _new(config, compute if profile.four_bit else torch.float32)
    parameters = model.num_parameters()
    if profile.four_bit:
        model = _quantised(model, compute)
    lora = bool(profile.lora)
    with mock.patch.object(nn.Module, "_apply", _apply):
        model = models.prepared_policy(model.requires_grad_(not lora), profile, plan.method, lora)
    for name, weight in model.named_parameters():
        count.label([weight], "LoRA" if "lora_" in name else "weights")
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(
                lambda weight: count.label([weight.grad], "gradients")
            )
    constants = [tensor for name, tensor in model.named_buffers() if name.endswith("constants")]
    count.label(constants, "constants")
    return model.train(), parameters
