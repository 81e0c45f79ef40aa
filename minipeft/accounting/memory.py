"""Where the memory of a training step goes: predicted from shapes, line by line.

    model states     frozen weights · trained weights or adapters · master copies · gradients · optimizer states
    what the batch   activations kept for backward · logits · keys and values · working memory of the op that runs
    needs

The states are bytes of an element (`Precision`) times numbers of elements. The rest is read off a step that is run on
shapes alone (`minipeft.accounting.walk`): the model's own code, the engine's own graph and its walk back, in which
activations are freed while gradients are made. The ledger is the moment at which the sum is largest.
"""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, get_num_threads
from ..nn.module import Module
from ..nn.transformer import TransformerConfig
from .architectures import Architecture, architecture
from .parameters import Shape, constant_parameters, elements, trained_parameters
from .precision import (
    OPTIMIZERS,
    PRECISIONS,
    QUANT_TYPES,
    Precision,
    check_positive,
    named,
    state_bytes,
    step_bytes,
)  # fmt: skip

MODES = ("train", "evaluate", "generate")

WEIGHT_LINES = ("frozen weights", "trained weights", "adapters")
STATE_LINES = (*WEIGHT_LINES, "master copies", "gradients", "optimizer states", "running averages")
LINES = (
    *WEIGHT_LINES, "reference", "value model", "reward model", *STATE_LINES[3:],
    "activations", "logits", "KV cache", "working memory",
    # of a PyTorch loop
    "gradient buckets", "gradients of blocks' inputs", "gradient of what is in no block", "last pass", "last norm and head",
    "recomputed block", "dequantized weight", "gathered weights", "weights in 16 bits", "optimizer's temporary",
    "cuBLAS workspaces", "CUDA context", "headroom",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes, by line.

    lines                  at the moment of the peak; they sum to `total`
    held                   each line in full: all gradients, everything that the forward pass keeps, all positions of
                           the cache
    activations_per_layer  what each block keeps for its backward pass
    activations_by_op      the same of all blocks, by the op that made it
    """

    lines: Mapping[str, int]
    held: Mapping[str, int]
    activations_per_layer: tuple[int, ...] = ()
    activations_by_op: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name in ("lines", "held"):
            lines = getattr(self, name)
            order = {line: i for i, line in enumerate(LINES)}
            object.__setattr__(self, name, {line: lines[line] for line in sorted(lines, key=order.__getitem__)})

    @property
    def total(self) -> int:
        """The predicted peak, in bytes."""
        return sum(self.lines.values())

    @property
    def model_states(self) -> int:
        """Bytes of the weights, master copies, gradients and optimizer states in full."""
        return sum(self.held.get(line, 0) for line in STATE_LINES)


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
    max_new_tokens: int | None = None,
    labels: Array | None = None,
) -> MemoryLedger:
    """The memory of one step in the steady state: the optimizer has its moments, and no gradient is left from before.

    Args:
        model: a built `Module`, whose parameters' `requires_grad` say what is trained (`config` must be None); or an
            `Architecture`, or what `architecture` takes, with `config` as in `count_parameters`.
        batch, seq_len: the number of sequences and their length in tokens (in generation, of the prompt). Without a
            length the ledger holds the model states alone, which is all that is known of a family that this package
            does not build.
        optimizer: "adamw", "adam", "adamw_8bit", "momentum" (SGD with momentum) or "sgd".
        precision: a name in `PRECISIONS` or a `Precision`.
        checkpointing: keep the inputs of blocks only; None: as the model is set.
        quantization: "nf4", "fp4" or "int4": every linear layer but the output head in four bits, in blocks of 64,
            as `quantize_model` makes it; None leaves them. `double_quantization` quantizes the scales too.
        mode: "train" (loss, backward, optimizer step), "evaluate" (the loss alone), or "generate" (`max_new_tokens`
            tokens, by default 1, after a prompt of `seq_len`, with a cache of keys and values).
        labels: what the model's loss takes: for a language model integers [batch, seq_len], -100 at a position that
            does not count (by default all count); for a classifier one for each sequence.

    Bytes are those of arrays: an allocator's rounding and code come on top, and input ids belong to the caller. For
    PPO see `ppo_ledger`. Raises ValueError for an unknown name, and for an argument that the mode does not use.
    """
    p, optimizer = named("precision", precision, PRECISIONS), named("optimizer", optimizer, OPTIMIZERS)
    check_step(mode, batch, seq_len, max_new_tokens, labels is not None, checkpointing)
    training = mode == "train"
    states, build = states_and_model(model, config, p, quantization, double_quantization)
    held = states.lines | optimizer_lines(states.trained if training else (), p, optimizer)
    held["running averages"] = training * states.averaged * p.states
    if seq_len is None:
        return MemoryLedger({line: n for line, n in held.items() if n}, held)
    always = {line: n for line, n in held.items() if line != "gradients"}

    from . import walk
    from .shapes import Meter

    twin, meter = build(), Meter(p.activations, p.gradients)
    backbone = walk.backbone_of(twin)
    if checkpointing is not None:
        backbone.gradient_checkpointing = checkpointing
    if mode == "generate":
        seen = walk.generate(twin, batch, seq_len, meter, max_new_tokens or 1)
        held["KV cache"] = kv_cache_bytes(backbone.config, batch, seen.positions, p.activations)
    else:
        seen = (walk.train if training else walk.evaluate)(twin, batch, seq_len, meter, labels)
    at_peak = at_step(seen.at_peak, states.trained, p, optimizer) if training else seen.at_peak
    lines = {line: n for line, n in (always | dict(at_peak)).items() if n}
    return MemoryLedger(lines, held | (seen.held or {}), seen.per_layer, seen.by_op)


def check_step(
    mode: str, batch: int, seq_len: int | None, max_new_tokens: int | None, labels: bool = False,
    checkpointing: bool | None = False,
) -> None:  # fmt: skip
    """Raises ValueError for an unknown mode, a number that is not positive, and an argument that the mode does not use.

    `labels` says whether there are any; the others are `memory_ledger`'s.
    """
    named("mode", mode, MODES)
    check_positive(batch=batch, seq_len=seq_len, max_new_tokens=max_new_tokens)
    if mode == "generate" and seq_len is None:
        raise ValueError("mode='generate' needs seq_len, the length of the prompt")
    for name, given, effective in (
        ("max_new_tokens", max_new_tokens, mode == "generate"),
        ("labels", labels, seq_len and mode != "generate"),
        ("checkpointing", checkpointing, seq_len and mode == "train"),
    ):
        if given and not effective:
            raise ValueError(f"{name} has no effect with mode={mode!r} and seq_len={seq_len}: leave it out")


def optimizer_lines(trained: tuple[int, ...], p: Precision, optimizer: str) -> dict[str, int]:
    """Bytes of what the optimizer needs beside the weights, for trained parameters of these numbers of elements."""
    n = sum(trained)
    states = state_bytes(optimizer, trained, p)
    return {"master copies": n * p.master, "gradients": n * p.gradients, "optimizer states": states}


def at_step(at_peak: Mapping[str, int], trained: tuple[int, ...], p: Precision, optimizer: str) -> Mapping[str, int]:
    """Bytes by line: the more of what a backward pass needs at once and what the optimizer's step after it does."""
    step = {"gradients": sum(trained) * p.gradients, "working memory": optimizer_work(trained, p, optimizer)}
    return step if sum(step.values()) > sum(at_peak.values()) else at_peak  # nothing of the batch is left by then


def optimizer_work(trained: tuple[int, ...], p: Precision, optimizer: str) -> int:
    """Bytes that an optimizer's step works in: on each thread a piece of the same parameter, which may be smaller."""
    from ..train.optim import ELEMENTS

    return step_bytes(optimizer, p) * min(ELEMENTS * get_num_threads(), max(trained, default=0))


def kv_cache_bytes(config: TransformerConfig, batch: int, positions: int, itemsize: int = 4) -> int:
    """Bytes of all keys and values: 2 L B H' S D elements. (While a `KVCache` grows it takes up to twice that.)"""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_position * batch * positions * itemsize


def measure_peak(fn: Callable[[], Any], xp: ModuleType = np) -> int:
    """The most bytes that `fn()` had at once beyond what was there before, as NumPy reports them to tracemalloc.

    With CuPy for `xp`: the most of the device's memory that CuPy's pool took, which is a little more than arrays use.
    """
    gc.collect()
    if xp.__name__ == "cupy":
        pool = xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.used_bytes()
        fn()
        return pool.total_bytes() - before
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


# ------------------------------------------------------------------------------------------------------- model states


class States(NamedTuple):
    """A model's weights, and how much is kept beside them in training.

    lines     bytes of the frozen weights, the trained weights and the adapters
    trained   elements of each trained parameter, all of which have a gradient and the optimizer's moments
    averaged  elements of the arrays that the method keeps (AdaLoRA's running averages)
    """

    lines: dict[str, int]
    trained: tuple[int, ...]
    averaged: int


def states_and_model(
    model: Any, config: Any, p: Precision, quantization: str | None, double_quantization: bool
) -> tuple[States, Callable[[], Module]]:
    """(the states of what `memory_ledger` takes for a model, a function that makes a model to run on shapes).

    Raises ValueError for an unknown data type, for weights in four bits that would be trained, and for a built model
    with options that it decides itself.
    """
    if isinstance(model, Module):
        if config is not None or quantization is not None:
            raise ValueError(
                "a built model says itself what it trains and stores; config and quantization are for models given by "
                "name or shapes"
            )
        return states_of(model, p), lambda: model.copy(share=True)
    if quantization is not None:
        named("quantization", quantization, QUANT_TYPES)
        if config is None:
            raise ValueError("weights in four bits are frozen, so not all can be trained: give a method's config")
    arch = model if isinstance(model, Architecture) else architecture(model)
    given = arch, config, p, quantization, double_quantization

    def build() -> Module:
        from .walk import unallocated_model

        return unallocated_model(*given)

    return states_from_shapes(*given), build


def states_from_shapes(
    arch: Architecture, config: Any, p: Precision, quantization: str | None, double_quantization: bool,
    pack_experts: bool = False, shapes: Mapping[str, Shape] | None = None,
) -> States:  # fmt: skip
    """The states of a model under a method, from its table of shapes: linear layers, or experts too, in four bits.

    shapes: those of `trained_parameters`, where they are known.
    """
    shapes = trained_parameters(arch, config) if shapes is None else shapes
    trained, is_method = elements(shapes), hasattr(config, "parameter_shapes")
    frozen = {name: shape for name, shape in arch.items() if name not in shapes}
    packed = 0  # bytes in four bits
    if quantization:
        from ..quant.nf4 import book_bytes, storage_bytes
        from ..quant.surgery import HEADS

        inside = [n for n in frozen if arch.kinds[n] in ("linear", "conv1d") and not set(HEADS) & set(n.split("."))]
        inside += [n for n in arch.experts if n in frozen] if pack_experts else []
        sizes, books = [math.prod(frozen.pop(n)) for n in inside], book_bytes(double_quantization)
        packed = sum(storage_bytes(n, compress_statistics=double_quantization) - books for n in sizes)
        packed += books * bool(sizes)  # which all layers share
    lines = {
        "frozen weights": elements(frozen) * p.frozen + packed,
        "trained weights": 0 if is_method else trained * p.trained,
        "adapters": (trained + elements(constant_parameters(arch, config))) * p.trained if is_method else 0,
    }
    sizes = tuple(map(math.prod, shapes.values()))
    return States(lines, sizes, elements(config.training_state_shapes(shapes)) if is_method else 0)


def states_of(model: Module, p: Precision) -> States:
    """The states of a built model: its frozen weights as they are stored."""
    added, averaged = set(), 0
    for _, peft in model.named_modules():
        for name, config in getattr(peft, "peft_config", {}).items():
            parts = dict(peft.parts(name))
            added |= {id(q) for part in parts.values() for q in part.parameters()}
            shapes = {f"{path}.{key}": q.shape for path, part in parts.items() for key, q in part.trained().items()}
            averaged += elements(config.training_state_shapes(shapes))
    lines, frozen, trained = dict.fromkeys(WEIGHT_LINES, 0), {}, []
    for q in model.parameters():
        trained += [q.size] * q.requires_grad
        if id(q) in added:
            lines["adapters"] += q.size * p.trained
        elif q.requires_grad:
            lines["trained weights"] += q.size * p.trained
        else:
            frozen[id(q.data)] = q.data.nbytes  # what several layers share (the code book's values) once
    lines["frozen weights"] = sum(frozen.values())
    return States(lines, tuple(trained), averaged)
