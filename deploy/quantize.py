"""Fewer bits per weight: bitsandbytes int8 and nf4, bfloat16, and ONNX with dynamic int8, each
measured the same way.

Every variant starts from an export in full precision: what is already rounded is never rounded
again.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from common.evaluation import Sampling, generate, logps_of, perplexity
from common.io.files import written_whole
from common.judges import Judge, head_to_head
from common.lab import Lab, not_measured
from common.memory.meter import bytes_of
from common.models import four_bit_settings
from deploy.export import load_exported
from deploy.inference import speed

# Of a model written as ONNX: tokens, mask, positions, and the places whose logits are asked for.
INPUTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
PRECISIONS = ("float32", "bfloat16", "bnb-int8", "bnb-nf4", "onnx-float32", "onnx-int8")


def rounded(weights: Tensor, bits: int, block: int) -> Tensor:
    """Weights after absmax rounding in blocks of `block` neighbours: same shape.

    Each block has its own step, max |w| / (2^(bits-1) - 1). A block of zeros stays zeros.
    Raises: RuntimeError where blocks of this size do not fill the weights.
    """
    blocks = weights.reshape(-1, block)
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, 1.0)
    return ((blocks / step).round() * step).reshape(weights.shape)


def merge_routes(start: Tensor, change: Tensor, bits=4, block=64) -> dict[str, tuple[float, float]]:
    """What becomes of an adapter's `change` Δ that was trained on the rounded weights Q(W₀).

    Returns: route → (relative distance from Q(W₀) + Δ, which was trained; share of Δ that is kept:
        how far the route went from Q(W₀) along Δ, in lengths of Δ).
    """
    base = rounded(start, bits, block)
    trained = base + change
    routes = {
        "bfloat16 of Q(W₀) + Δ": trained.bfloat16().float(),
        "W₀ + Δ": start + change,
        "Q(W₀ + Δ)": rounded(start + change, bits, block),
        "Q(Q(W₀) + Δ)": rounded(trained, bits, block),
    }
    return {
        name: (
            float((weights - trained).norm() / trained.norm()),
            float(((weights - base) * change).sum() / change.square().sum()),
        )
        for name, weights in routes.items()
    }


class QuantizeError(RuntimeError):
    """A variant that cannot be made on this machine. The message says why."""


@dataclass
class ModelVariant:
    """One way to keep and run the weights. `use_cache`: does it keep keys and values of the tokens
    read so far?
    """

    name: str
    model: torch.nn.Module
    disk_bytes: int  # its files of weights
    weight_bytes: int  # weights in memory, counted: not what the runtime allocates around them
    rounded_share: float  # of the parameters: those with fewer bits than float32
    use_cache: bool = True


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A causal language model run by onnxruntime, behind the interface of the library. It has no KV
    cache.
    """

    main_input_name = "input_ids"
    # The graph has its own attention: this only satisfies a check of the library.
    _supports_sdpa = True

    def __init__(self, config, path: Path):
        import onnxruntime

        super().__init__(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        # `common.logprobs` asks the output head for the scored positions only.
        self.head = torch.nn.Identity()
        self.generation_config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, logits_to_keep: int = 0, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (mask.cumsum(1) - 1).clamp(min=0)
        keep = torch.arange(input_ids.shape[1])[-logits_to_keep:]
        values = [tensor.numpy() for tensor in (input_ids, mask, places, keep)]
        logits = self.session.run(None, dict(zip(INPUTS, values, strict=True)))[0]
        return CausalLMOutput(logits=self.head(torch.from_numpy(logits)))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}


@contextlib.contextmanager
def _quiet():
    """Silences the exporters, which say much that is of no use here. What they raise still comes
    through.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def write_onnx(source: Path, folder: Path) -> Path:
    """Writes an export as `folder/float32.onnx` and, with dynamic int8 matrix products,
    `folder/int8.onnx`.

    The weights are int8 per tensor; activations are rounded while it runs, to the range of each
    batch.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = load_exported(source, dtype=torch.float32)[0]
    # Any batch and length but 0 and 1, which would be taken as fixed.
    ids = torch.arange(2, 14).reshape(2, 6)
    tensors = (ids, torch.ones_like(ids), torch.arange(6).repeat(2, 1), torch.arange(3))
    free, values = torch.export.Dim.DYNAMIC, dict(zip(INPUTS, tensors, strict=True))
    shapes = {name: dict.fromkeys(range(value.ndim), free) for name, value in values.items()}
    model.config.use_cache = False
    with _quiet(), written_whole(folder) as scratch:
        scratch.mkdir()
        program = torch.onnx.export(
            model,
            kwargs=values,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        exact, rounded = scratch / "float32.onnx", scratch / "int8.onnx"
        program.save(exact)
        quantize_dynamic(exact, rounded, weight_type=QuantType.QInt8)
    return folder


def _size(path: Path, *patterns: str) -> int:
    """Bytes of the files of weights of a variant."""
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))


def _save(loaded: tuple, folder: Path) -> None:
    """Writes (model, tokenizer) to `folder`, whole or not at all."""
    with written_whole(folder) as scratch:
        for part in loaded:
            part.save_pretrained(scratch)


def _onnx(name: str, source: Path, folder: Path) -> ModelVariant:
    import onnx

    if not (folder / "onnx").exists():
        write_onnx(source, folder / "onnx")
    path = folder / "onnx" / f"{name.removeprefix('onnx-')}.onnx"
    tensors = onnx.load(path).graph.initializer
    counts = [
        (math.prod(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        for tensor in tensors
    ]
    total, size = sum(n for n, _ in counts), sum(n * each for n, each in counts)
    share = sum(n for n, each in counts if each == 1) / total
    model = OnnxModel(load_exported(source)[0].config, path).eval()
    files = _size(path.parent, path.name, path.name + ".data")
    return ModelVariant(name, model, files, size, share, use_cache=False)


def _bitsandbytes(name: str, source: Path, folder: Path) -> ModelVariant:
    """Rounded while loading, saved before the first forward pass, and loaded again from there.

    On CPUs with AVX512-BF16 a 4-bit layer repacks its weights in its first forward pass: what is
    saved or merged after that has been turned back and forth by the library. What was saved before
    is right whatever it does.
    """
    cuda, path = torch.cuda.is_available(), folder / name
    device = {"device_map": "cuda" if cuda else "cpu"}
    if not path.exists():
        config = BitsAndBytesConfig(load_in_8bit=True)
        if name == "bnb-nf4":
            config = four_bit_settings(torch.bfloat16 if cuda else torch.float32)
        options = {"quantization_config": config, "dtype": torch.float32, **device}
        _save(load_exported(source, **options), path)
    model, rounded = load_exported(path, **device)[0], 0
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    for layer in model.modules():
        if type(layer).__name__ in ("Linear8bitLt", "Linear4bit"):
            del weights[id(layer.weight)]  # two weights of 4 bits count as one of 8
            rounded += layer.in_features * layer.out_features
    share = rounded / (rounded + sum(weights.values()))
    return ModelVariant(name, model, _size(path, "*.safetensors"), weight_bytes(model), share)


def _plain(name: str, source: Path, folder: Path) -> ModelVariant:
    dtype, rounded = getattr(torch, name), name != "float32"
    path = folder / name if rounded else source
    if not path.exists():
        _save(load_exported(source, dtype=dtype), path)
    model = load_exported(path, dtype=dtype)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    files = _size(path, "*.safetensors")
    return ModelVariant(name, model, files, weight_bytes(model), float(rounded))


def weight_bytes(model) -> int:
    """Bytes of parameters, saved buffers and the scales of quantised ones, each once if shared."""
    # The scales of bitsandbytes stand there too, and notes on its formats, which are no weights.
    state = model.state_dict().items()
    kept = [value for name, value in state if not name.endswith(("_format", "__nf4"))]
    return sum({tensor.data_ptr(): bytes_of([tensor]) for tensor in kept}.values())


def build(name: str, source: Path, folder: Path) -> ModelVariant:
    """A variant of the export at `source`, kept in `folder`. Remove `folder` when the export
    changes.

    Raises: ValueError for an unknown name; QuantizeError where this machine cannot make or run it.
    """
    if name not in PRECISIONS:
        raise ValueError(f"Unknown variant {name!r}. Choose one of: {', '.join(PRECISIONS)}.")
    make = _onnx if name.startswith("onnx") else _bitsandbytes if name.startswith("bnb") else _plain
    try:
        return make(name, Path(source), Path(folder))
    except (ImportError, NotImplementedError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise QuantizeError(f"{name} cannot be made here: {said}") from error


def every_variant(source: Path, folder: Path) -> Iterator[ModelVariant]:
    """The variants of an export that can be made here, one at a time: large ones need not fit side
    by side. One line says of each of the others why not.
    """
    large = _size(source, "*.safetensors") > 1e8
    for name in PRECISIONS:
        if large and name.startswith("onnx"):
            not_measured(name, "without a KV cache it would take hours on this model")
            continue
        try:
            yield build(name, source, folder)
        except QuantizeError as error:
            not_measured(name, str(error))


def measure_variants(
    lab: Lab, variants: Iterable[ModelVariant], judge: Judge, batch: int = 8, new_tokens: int = 32
) -> dict:
    """Every variant against the first, which is the one in full precision. An iterator is taken one
    at a time.

    Returns: name → `disk_bytes`, `weight_bytes` (counted), `rounded_share`, `perplexity` on
        held-out chosen answers, `same_greedy` (share of held-out prompts with the very same greedy
        answer), `win_rate` (WinRate of samples at temperature 1 against the first's),
        `tokens_per_second` and `latency_p50` (s) of a batch of `batch` rows.
    """
    report, first, rows = {}, None, lab.profile.eval_batch
    for variant in variants:
        model, parts = variant.model, (variant.model, lab.tokenizer, lab.prompts)
        # The seed is the lab's, so equal logits give equal samples.
        ways = [Sampling(lab.profile.max_new_tokens, heat, seed=lab.seed) for heat in (0.0, 1.0)]
        greedy, sampled = (generate(*parts, way, batch_size=4 * rows) for way in ways)
        first = first or (greedy, sampled)
        same = [a[0].chosen_ids == b[0].chosen_ids for a, b in zip(greedy, first[0], strict=True)]
        timed = speed(*parts, new_tokens, batch, variant.use_cache, runs=3)
        report[variant.name] = {
            "disk_bytes": variant.disk_bytes,
            "weight_bytes": variant.weight_bytes,
            "rounded_share": variant.rounded_share,
            "perplexity": perplexity(logps_of(model, lab.test_pairs, batch_size=rows).chosen),
            "same_greedy": sum(same) / len(same),
            "win_rate": head_to_head(judge, sampled, first[1]),
            "tokens_per_second": timed.tokens_per_second,
            "latency_p50": timed.latency_p50,
        }
    return report
