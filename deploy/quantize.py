"""Fewer bits per weight: bitsandbytes int8 and nf4, bfloat16, and ONNX with dynamic int8, each
measured the same way.

Every variant starts from an export in full precision: what is already rounded is never rounded
again.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from common.evaluation import generate, logps_of, perplexity
from common.io.files import written_whole
from common.judges import Judge, head_to_head
from common.lab import Lab
from deploy.export import load_exported
from deploy.inference import speed

VARIANTS = ("float32", "bfloat16", "bnb-int8", "bnb-nf4", "onnx-float32", "onnx-int8")


class QuantizeError(RuntimeError):
    """A variant that cannot be made on this machine. The message says why."""


@dataclass
class Variant:
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
    _supports_sdpa = (
        True  # the graph has its own attention; this only satisfies a check of the library
    )

    def __init__(self, config, path: Path):
        import onnxruntime

        super().__init__(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.head = (
            torch.nn.Identity()
        )  # `common.logprobs` asks the output head for the scored positions only
        self.generation_config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(
        self, input_ids, attention_mask=None, logits_to_keep: int = 0, **_
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (mask.cumsum(1) - 1).clamp(min=0)
        keep = torch.arange(input_ids.shape[1])[-logits_to_keep:]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": places,
            "keep": keep,
        }
        logits = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        return CausalLMOutput(logits=self.head(torch.from_numpy(logits)))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}


class _Graph(torch.nn.Module):
    """What is written as ONNX: tokens, mask and positions in, logits at the positions `keep` out,
    no cache.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, keep):
        parts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        return self.model(**parts, logits_to_keep=keep, use_cache=False).logits


@contextlib.contextmanager
def _quiet():
    """Silences the exporters, which say much that is of no use here. What they raise still comes
    through.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root", "")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def write_onnx(source: Path, folder: Path) -> Path:
    """Writes an export as `folder/float32.onnx` and, with dynamic int8 matrix products,
    `folder/int8.onnx`.

    The weights are int8 per tensor; activations are rounded while it runs, to the range of each
    batch.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = load_exported(source, dtype=torch.float32)[0]
    ids = torch.arange(2, 14).reshape(
        2, 6
    )  # any batch and length but 0 and 1, which would be taken as fixed
    places, keep = torch.arange(6).repeat(2, 1), torch.arange(3)
    names, free = ("input_ids", "attention_mask", "position_ids", "keep"), torch.export.Dim.DYNAMIC
    shapes = {name: {0: free} if name == "keep" else {0: free, 1: free} for name in names}
    with _quiet(), written_whole(folder) as scratch:
        scratch.mkdir()
        program = torch.onnx.export(
            _Graph(model),
            (ids, torch.ones_like(ids), places, keep),
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        program.save(scratch / "float32.onnx")
        quantize_dynamic(
            scratch / "float32.onnx", scratch / "int8.onnx", weight_type=QuantType.QInt8
        )
    return folder


def _size(path: Path, *patterns: str) -> int:
    """Bytes of the files of weights of a variant."""
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))


def _onnx(name: str, source: Path, folder: Path) -> Variant:
    import onnx

    if not (folder / "onnx").exists():
        write_onnx(source, folder / "onnx")
    path = folder / "onnx" / f"{name.removeprefix('onnx-')}.onnx"
    tensors = onnx.load(path).graph.initializer
    bits = {
        onnx.TensorProto.INT8: 1,
        onnx.TensorProto.UINT8: 1,
        onnx.TensorProto.FLOAT: 4,
        onnx.TensorProto.INT64: 8,
    }
    counts = [
        (int(torch.Size(tensor.dims).numel()), bits.get(tensor.data_type, 4)) for tensor in tensors
    ]
    small, everything = sum(n for n, size in counts if size == 1), sum(n for n, _ in counts)
    model = OnnxModel(load_exported(source)[0].config, path).eval()
    files = _size(path.parent, path.name, path.name + ".data")
    return Variant(
        name, model, files, sum(n * size for n, size in counts), small / everything, use_cache=False
    )


def _bitsandbytes(name: str, source: Path, folder: Path) -> Variant:
    """Rounded while loading, saved before the first forward pass, and loaded again from there.

    On CPUs with AVX512-BF16 a 4-bit layer repacks its weights in its first forward pass: what is
    saved or merged after that has been turned back and forth by the library. What was saved before
    is right whatever it does.
    """
    if name == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    device = {"device_map": "cuda" if torch.cuda.is_available() else "cpu"}
    if not (folder / name).exists():
        model, tokenizer = load_exported(
            source, quantization_config=config, dtype=torch.float32, **device
        )
        with written_whole(folder / name) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    model = load_exported(folder / name, **device)[0]
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
    ]
    rounded, packed = (
        sum(m.in_features * m.out_features for m in layers),
        {id(m.weight) for m in layers},
    )
    others = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    share = rounded / (rounded + others)
    return Variant(name, model, _size(folder / name, "*.safetensors"), weight_bytes(model), share)


def _plain(name: str, source: Path, folder: Path) -> Variant:
    dtype, path = getattr(torch, name), source
    if dtype != torch.float32:
        path = folder / name
        if not path.exists():
            model, tokenizer = load_exported(source, dtype=dtype)
            with written_whole(path) as scratch:
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
    model = load_exported(path, dtype=dtype)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    return Variant(
        name,
        model,
        _size(path, "*.safetensors"),
        weight_bytes(model),
        float(dtype != torch.float32),
    )


def weight_bytes(model) -> int:
    """Bytes of parameters, buffers and the scales of quantised ones, each once however often it is
    shared.
    """
    seen = {}
    for module in model.modules():
        state = getattr(
            getattr(module, "weight", None), "quant_state", None
        )  # 4-bit: scales, and theirs
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        while state is not None:
            tensors += [value for value in (state.absmax, state.code) if value is not None]
            state = state.state2
        tensors.append(
            getattr(getattr(module, "weight", None), "SCB", None)
        )  # 8-bit: one scale per row
        seen |= {
            t.data_ptr(): t.numel() * t.element_size()
            for t in tensors
            if isinstance(t, torch.Tensor)
        }
    return sum(seen.values())


def build(name: str, source: Path, folder: Path) -> Variant:
    """A variant of the export at `source`, kept in `folder`. Remove `folder` when the export
    changes.

    Raises: ValueError for an unknown name; QuantizeError where this machine cannot make or run it.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown variant {name!r}. Choose one of: {', '.join(VARIANTS)}.")
    make = _onnx if name.startswith("onnx") else _bitsandbytes if name.startswith("bnb") else _plain
    try:
        return make(name, Path(source), Path(folder))
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise QuantizeError(
            f"{name} cannot be made here: {type(error).__name__}: {error}"
        ) from error


def answers_of(lab: Lab, variant: Variant, temperature: float, samples: int = 1):
    """Answers to all held-out prompts. The seed is the lab's, so equal logits give equal samples."""
    profile = lab.profile
    return generate(
        variant.model,
        lab.tokenizer,
        lab.prompts,
        profile.max_new_tokens,
        temperature,
        samples,
        seed=lab.seed,
        batch_size=4 * profile.eval_batch,
    )


def measure_variants(
    lab: Lab, variants: Iterable[Variant], judge: Judge, batch: int = 8, new_tokens: int = 32
) -> dict:
    """Every variant against the first, which is the one in full precision. An iterator is taken one
    at a time.

    Returns: name → `disk_bytes`, `weight_bytes` (counted), `rounded_share`, `perplexity` on
        held-out chosen answers, `same_greedy` (share of held-out prompts with the very same greedy
        answer), `win_rate` (WinRate of samples at temperature 1 against the first's),
        `tokens_per_second` and `latency_p50` (s) of a batch of `batch` rows.
    """
    report, first = {}, None
    for variant in variants:
        name, model = variant.name, variant.model
        greedy, sampled = answers_of(lab, variant, 0.0), answers_of(lab, variant, 1.0)
        first = first or (greedy, sampled)
        same = [a[0].chosen_ids == b[0].chosen_ids for a, b in zip(greedy, first[0], strict=True)]
        timed = speed(
            model, lab.tokenizer, lab.prompts, new_tokens, batch, variant.use_cache, runs=3
        )
        report[name] = {
            "disk_bytes": variant.disk_bytes,
            "weight_bytes": variant.weight_bytes,
            "rounded_share": variant.rounded_share,
            "perplexity": perplexity(
                logps_of(model, lab.test_pairs, batch_size=lab.profile.eval_batch).chosen
            ),
            "same_greedy": sum(same) / len(same),
            "win_rate": head_to_head(judge, sampled, first[1]),
            "tokens_per_second": timed.tokens_per_second,
            "latency_p50": timed.latency_p50,
        }
    return report
