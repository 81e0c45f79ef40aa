"""Where the memory of a training step goes: predicted from shapes line by line, and measured.

    model states     frozen weights · trained weights or adapters · master copies · gradients · optimizer states
    what the batch   activations kept for backward · logits · keys and values · working memory of the op that runs
    needs

The states are bytes per parameter (`Precision`) times counts. The rest is read off a step that is run on shapes alone
(`minipeft.accounting.walk`): the model's own code, the engine's own graph and its walk back, in which activations die
as gradients are born. The ledger is the moment at which the sum is largest.

Sources of the states: Rajbhandari et al. 2019 (ZeRO, arXiv:1910.02054, §3.1): 16 bytes a parameter for mixed precision
with Adam; Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, §1): 12 bytes, "more than 780 GB" for 65B.
"""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, get_num_threads
from ..nn.module import Module, Parameter, unallocated
from ..nn.transformer import Transformer, TransformerConfig
from ..peft.model import PeftModel
from ..quant.blockwise import NESTED_BLOCKSIZE, QuantState
from ..quant.codebooks import CODES_4BIT, dynamic_map
from ..quant.linear import Linear4bit
from ..quant.surgery import HEADS, quantizable_layers
from ..train.optim import ELEMENTS
from . import walk
from .architectures import Architecture, architecture
from .parameters import constant_parameters, trained_parameters


@dataclass(frozen=True)
class Precision:
    """Bytes per element of each kind of memory."""

    frozen: int = 4
    trained: int = 4
    gradients: int = 4
    states: int = 4
    master: int = 0  # a float32 copy of the trained weights
    activations: int = 4


PRECISIONS = {
    "float32": Precision(),  # 16 bytes a trained parameter with Adam: 4 + 4 + 8
    "float16-base": Precision(frozen=2),  # a frozen base stored in float16, widened where it is used
    "mixed": Precision(2, 2, 2, 4, master=4, activations=2),  # 16: 2 + 2 + 8 + 4 (ZeRO, §3.1)
    "mixed-float32-gradients": Precision(2, 2, 4, 4, master=4, activations=2),  # 18: 2 + 4 + 8 + 4 (DeepSpeed's ZeRO-3)
    "bfloat16": Precision(2, 2, 2, 4, activations=2),  # 12: 2 + 2 + 8, no master copy (QLoRA, §1)
}
OPTIMIZERS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # moments kept per parameter
MODES = ("train", "evaluate", "generate")
BLOCKSIZE = 64  # weights that share a scale in four bits, as `quantize_model` has it

WEIGHTS = ("frozen weights", "trained weights", "adapters")
STATES = (*WEIGHTS, "master copies", "gradients", "optimizer states", "running averages")
ORDER = (
    *WEIGHTS, "reference", "value model", "reward model", *STATES[3:],
    "activations", "logits", "KV cache", "working memory",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes, by line.

    `lines` is the moment of the peak, and sums to `total`. `held` is each line in full: all gradients, everything that
    the forward pass kept, all positions of the cache. `activations_per_layer` is what each block keeps for its backward
    pass.
    """

    lines: Mapping[str, int]
    held: Mapping[str, int]
    activations_per_layer: tuple[int, ...] = ()
    activations_by_op: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name in ("lines", "held"):
            lines = getattr(self, name)
            object.__setattr__(self, name, {line: lines[line] for line in sorted(lines, key=ORDER.index)})

    @property
    def total(self) -> int:
        """The predicted peak."""
        return sum(self.lines.values())

    @property
    def model_states(self) -> int:
        """Weights, master copies, gradients and optimizer states in full: bytes per parameter times parameters."""
        return sum(self.held.get(line, 0) for line in STATES)


def memory_ledger(
    model: Any,
    config: Any = None,
    batch: int = 1,
    seq_len: int | None = None,
    optimizer: str = "adamw",
    precision: str | Precision = "float32",
    checkpointing: bool | None = None,
    quantization: str | None = None,
    *,
    double_quantization: bool = True,
    mode: str = "train",
    max_new_tokens: int = 1,
    labels: Array | None = None,
) -> MemoryLedger:
    """The memory of one step in the steady state (the optimizer's moments are there), gradients being None before it.

    Args:
        model: a `Module` as it is (its parameters' `requires_grad` say what is trained, `config` must be None); or an
            `Architecture`, or what `architecture` takes, with `config` as in `count_parameters`.
        batch, seq_len: sequences and their length (of the prompt, in generation). Without a length only the model
            states are counted, which is all that can be said of families this package does not build.
        optimizer: "adamw", "adam", "momentum" (SGD with momentum) or "sgd".
        precision: a name in `PRECISIONS` or a `Precision`.
        checkpointing: keep block inputs only; None takes what the model says.
        quantization: "nf4", "fp4" or "int4": every linear layer but the output head in four bits, in blocks of 64,
            as `quantize_model` makes it; None leaves them. `double_quantization` packs the scales too.
        mode: "train" (loss, backward, optimizer step), "evaluate" (the loss alone), or "generate" (`max_new_tokens`
            tokens after a prompt, with a cache of keys and values).
        labels: what the model's loss takes: for a language model integers [batch, seq_len], -100 where a position does
            not count (by default all count); for a classifier one a sequence.

    Bytes are those of arrays: no allocator's rounding, no code, and input ids are the caller's. PPO: see `ppo_ledger`.
    Raises ValueError for a name that is unknown and for arguments that make no sense together.
    """
    p = named("precision", precision, PRECISIONS)
    moments = named("optimizer", optimizer, OPTIMIZERS)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for name, value in (("batch", batch), ("seq_len", seq_len), ("max_new_tokens", max_new_tokens)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if isinstance(model, Module):
        if config is not None or quantization is not None:
            raise ValueError(
                "a built model says itself what it trains and stores; config and quantization are for models given by "
                "name or shapes"
            )
        twin = model.copy(share=True)
        weights, trained, averaged = weights_of(twin, p, as_stored=True)
    else:
        arch = model if isinstance(model, Architecture) else architecture(model)
        quantized = packing(config, quantization, double_quantization)
        if seq_len is None:
            twin = None
            weights, trained, averaged = weights_of_shapes(arch, config, p, quantized)
        else:
            twin = built(arch, config, p, quantized)
            weights, trained, averaged = weights_of(twin, p, as_stored=False)
    training = mode == "train"
    held = weights | {
        "master copies": training * trained * p.master,
        "gradients": training * trained * p.gradients,
        "optimizer states": training * trained * p.states * moments,
        "running averages": training * averaged * p.states,
    }
    static = {line: n for line, n in held.items() if line != "gradients" and n}
    if twin is None:
        return MemoryLedger({line: n for line, n in held.items() if n}, held)
    backbone = walk.backbone_of(twin)
    if checkpointing is not None:
        backbone.gradient_checkpointing = checkpointing
    if mode == "generate":
        seen = walk.generate(twin, batch, seq_len, p.activations, max_new_tokens)
        held["KV cache"] = kv_cache_bytes(backbone.config, batch, seen.positions, p.activations)
    else:
        seen = (walk.train if training else walk.evaluate)(twin, batch, seq_len, p.activations, labels)
    at_peak = at_step(seen.at_peak, held["gradients"], p) if training else seen.at_peak
    lines = {line: n for line, n in (static | dict(at_peak)).items() if n}
    return MemoryLedger(lines, held | (seen.held or {}), seen.per_layer, seen.by_op)


def packing(config: Any, quantization: str | None, double_quantization: bool) -> tuple[str, bool] | None:
    """(data type, whether its scales are packed too) of a base in four bits; None for one that is not."""
    if quantization is None:
        return None
    named("quantization", quantization, CODES_4BIT)
    if config is None:
        raise ValueError("weights in four bits are frozen, so not all can be trained: give a method's config")
    return quantization, double_quantization


def at_step(at_peak: Mapping[str, int], gradients: int, p: Precision) -> Mapping[str, int]:
    """The larger one of what a backward pass needs at once and what the optimizer's step does after it."""
    if "gradients" in at_peak:
        at_peak = {**at_peak, "gradients": at_peak["gradients"] * p.gradients // p.activations}
    step = {"gradients": gradients, "working memory": 3 * p.states * ELEMENTS * get_num_threads()}
    return step if sum(step.values()) > sum(at_peak.values()) else at_peak  # nothing of the batch is left by then


def kv_cache_bytes(config: TransformerConfig, batch: int, positions: int, itemsize: int = 4) -> int:
    """Keys and values of every layer: 2 L B H' S D elements. (Growing, a `KVCache` takes up to twice that.)"""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_position * batch * positions * itemsize


def measure_peak(fn: Callable[[], Any]) -> int:
    """The most bytes that `fn()` had at once beyond what was there before, as NumPy reports them to tracemalloc."""
    gc.collect()
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        fn()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if ours:
            tracemalloc.stop()


def named(what: str, value: Any, known: Mapping[str, Any]) -> Any:
    """The value of a name. Raises ValueError listing those that there are."""
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, Precision) and what == "precision":
        return value
    raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")


# ------------------------------------------------------------------------------------------------- the model's weights


def weights_of_shapes(arch: Architecture, config: Any, p: Precision, quantized: tuple[str, bool] | None) -> tuple:
    """({line: bytes} of the weights, parameters that are trained, numbers of which averages are kept)."""
    shapes = trained_parameters(arch, config)
    trained = sum(math.prod(shape) for shape in shapes.values())
    method = hasattr(config, "parameter_shapes")
    frozen, packed = 0, []
    for name, shape in arch.items():
        path, kind = name.rpartition(".")[0], arch.kinds[name]
        if name in shapes:
            continue
        if quantized and kind in ("linear", "conv1d") and not set(HEADS) & set(path.split(".")):
            packed.append(_four_bits(shape if kind == "linear" else shape[::-1], quantized))
        else:
            frozen += math.prod(shape) * p.frozen
    frozen += _nbytes(q.data for layer in packed for q in layer.parameters())
    constants = sum(math.prod(shape) for shape in constant_parameters(arch, config).values())
    weights = {
        "frozen weights": frozen,
        "trained weights": 0 if method else trained * p.trained,
        "adapters": (trained + constants) * p.trained if method else 0,
    }
    kept = config.training_state_shapes(shapes) if method else {}
    return weights, trained, sum(map(math.prod, kept.values()))


def weights_of(model: Module, p: Precision, as_stored: bool) -> tuple:
    """The same of a model; `as_stored`: its frozen weights as they are, not at the precision's size."""
    peft = [m for _, m in model.named_modules() if isinstance(m, PeftModel)]
    parts = [(m.peft_config[name], part) for m in peft for name in m.peft_config for _, part in m.parts(name)]
    added = {id(q) for _, part in parts for q in part.parameters()}
    packed = {
        id(q) for _, m in model.named_modules() if isinstance(m, Linear4bit) for q in m.parameters() if q is not m.bias
    }
    weights = dict.fromkeys(WEIGHTS, 0)
    trained, as_they_are = 0, []
    for q in model.parameters():
        line = "adapters" if id(q) in added else "trained weights" if q.requires_grad else "frozen weights"
        if line == "frozen weights" and (as_stored or id(q) in packed):
            as_they_are.append(q.data)
        else:
            weights[line] += q.size * (p.frozen if line == "frozen weights" else p.trained)
        trained += q.size * q.requires_grad
    weights["frozen weights"] += _nbytes(as_they_are)
    averaged = sum(
        math.prod(shape)
        for config, part in parts
        for shape in config.training_state_shapes({n: q.shape for n, q in part.trained().items()}).values()
    )
    return weights, trained, averaged


def built(arch: Architecture, config: Any, p: Precision, quantized: tuple[str, bool] | None) -> Module:
    """The model, unallocated, with what is trained requiring gradients and what is frozen in its storage dtype."""
    if arch.config is None:
        raise ValueError(
            f"activations are known of the families this package builds (gpt2, llama); {arch.name} is "
            f"{arch.model_type}: leave seq_len out"
        )
    model = Transformer(arch.config, seed=None)
    if quantized:
        for path, layer in quantizable_layers(model).items():
            model.replace(path, _four_bits((layer.out_features, layer.in_features), quantized, layer.bias))
        model.requires_grad_(False)
    if isinstance(config, str):
        model.requires_grad_(False)
        if config == "head":
            model.lm_head.weight = Parameter(unallocated(*model.lm_head.weight.shape))
    elif config is not None:
        model = PeftModel(model, config, seed=None)
    for q in model.parameters():
        if not q.requires_grad and q.dtype.kind == "f" and p.frozen < p.activations:
            q.data = np.broadcast_to(np.float16(0), q.shape)
    return model


def _four_bits(shape: tuple[int, int], quantized: tuple[str, bool], bias: Parameter | None = None) -> Linear4bit:
    """An unallocated layer in four bits, of a weight [out, in]."""
    quant_type, nested = quantized
    n = math.prod(shape)
    blocks = -(-n // BLOCKSIZE)

    def empty(dtype: Any, *shape: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    float32, inner = np.dtype(np.float32), None
    if nested:
        scales = empty(float32, -(-blocks // NESTED_BLOCKSIZE))
        inner = QuantState(scales, (blocks,), dynamic_map(), NESTED_BLOCKSIZE, None, float32)
    absmax = empty(np.uint8 if nested else float32, blocks)
    offset = 0.0 if nested else None
    state = QuantState(absmax, tuple(shape), CODES_4BIT[quant_type](), BLOCKSIZE, quant_type, float32, offset, inner)
    return Linear4bit(empty(np.uint8, (n + 1) // 2, 1), state, bias)


def _nbytes(arrays: Iterable[Array]) -> int:
    """Bytes of all, what several layers share (the code book's values) once."""
    return sum({id(array): array.nbytes for array in arrays}.values())
