"""Where the memory of a training step goes: predicted from shapes line by line, and measured.

    model states     frozen weights · trained weights · master copies · gradients · optimizer states
    what the batch   activations kept for backward · logits · working memory of the op that runs
    needs

The states are bytes per parameter (`Precision`) times counts. The rest is read off a step that is run on shapes alone
(`minipeft.accounting.shapes`): the model's own code, the engine's own graph and its walk back, in which activations die
as gradients are born. The ledger is the moment at which the sum is largest.

Sources of the states: Rajbhandari et al. 2019 (ZeRO, arXiv:1910.02054, §3.1): 16 bytes a parameter for mixed precision
with Adam; Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, §1): 12 bytes, "more than 780 GB" for 65B.
"""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import Array, get_num_threads
from ..nn.module import Module, Parameter, unallocated
from ..nn.transformer import Backbone, Transformer, TransformerConfig
from ..peft.model import PeftModel
from ..train.optim import ELEMENTS
from .architectures import Architecture, architecture
from .parameters import trained_parameters
from .shapes import Meter


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
    "mixed-float32-gradients": Precision(2, 2, 4, 4, master=4, activations=2),  # 18: 2 + 4 + 8 + 4
    "bfloat16": Precision(2, 2, 2, 4, activations=2),  # 12: 2 + 2 + 8, no master copy (QLoRA, §1)
}
OPTIMIZERS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}  # moments kept per parameter

STATES = ("frozen weights", "trained weights", "master copies", "gradients", "optimizer states")


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes, by line.

    `lines` is the moment of the peak, and sums to `total`. `held` is each line in full: all gradients, everything that
    the forward pass kept. `activations_per_layer` is what each block keeps for its backward pass.
    """

    lines: Mapping[str, int]
    held: Mapping[str, int]
    activations_per_layer: tuple[int, ...] = ()
    activations_by_op: Mapping[str, int] | None = None

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
    *,
    optimizer: str = "adamw",
    precision: str | Precision = "float32",
    checkpointing: bool | None = None,
    mode: str = "train",
    labels: Array | None = None,
) -> MemoryLedger:
    """The memory of one step in the steady state (the optimizer's moments are there), gradients being None before it.

    Args:
        model: a `Module` as it is (its parameters' `requires_grad` say what is trained, `config` must be None); or an
            `Architecture`, or what `architecture` takes, with `config` as in `count_parameters`.
        batch, seq_len: sequences and their length. Without a length only the model states are counted, which is all
            that can be said of families this package does not build.
        optimizer: "adamw", "adam", "momentum" or "sgd".
        precision: a name in `PRECISIONS` or a `Precision`.
        checkpointing: keep block inputs only; None takes what the model says.
        mode: "train" (loss, backward, optimizer step), "evaluate" (the loss alone), or "generate" (keys and values of
            `seq_len` positions, and a forward pass over a prompt of that length).
        labels: what the model's loss takes: for a language model integers [batch, seq_len], -100 where a position does
            not count (by default all count); for a classifier one a sequence.

    Bytes are those of arrays: no allocator's rounding, no code, and input ids are the caller's.
    Raises ValueError for a name that is unknown and for arguments that make no sense together.
    """
    p = _named("precision", precision, PRECISIONS)
    moments = _named("optimizer", optimizer, OPTIMIZERS)
    if mode not in ("train", "evaluate", "generate"):
        raise ValueError(f"mode must be 'train', 'evaluate' or 'generate', not {mode!r}")
    for name, value in (("batch", batch), ("seq_len", seq_len)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if isinstance(model, Module):
        if config is not None:
            raise ValueError("a built model says itself what it trains; config is for models given by name or shapes")
        twin = model.copy(share=True)
        frozen = sum(q.data.nbytes for q in twin.parameters() if not q.requires_grad)
        trained = sum(q.size for q in twin.parameters() if q.requires_grad)
    else:
        arch = model if isinstance(model, Architecture) else architecture(model)
        shapes = trained_parameters(arch, config)
        trained = sum(math.prod(shape) for shape in shapes.values())
        frozen = p.frozen * sum(math.prod(shape) for name, shape in arch.items() if name not in shapes)
        twin = None if seq_len is None else _built(arch, config, p)
        if isinstance(twin, PeftModel):  # constants that a method adds and does not train: VeRA's projections
            fixed = sum(q.size for q in twin.parameters() if not q.requires_grad)
            frozen += p.frozen * (fixed - architecture(arch.config).size)
    training = mode == "train"
    held = {
        "frozen weights": frozen,
        "trained weights": trained * p.trained,
        "master copies": training * trained * p.master,
        "gradients": training * trained * p.gradients,
        "optimizer states": training * trained * p.states * moments,
    }
    static = {line: n for line, n in held.items() if line != "gradients" and n}
    if seq_len is None:
        return MemoryLedger({line: n for line, n in held.items() if n}, held)
    if checkpointing is not None:
        _backbone(twin).gradient_checkpointing = checkpointing
    if mode == "generate":
        c = _backbone(twin).config
        static["KV cache"] = held["KV cache"] = kv_cache_bytes(c, batch, seq_len, p.activations)
    meter, kept, per_layer, by_op = _walk(twin, batch, seq_len, p, mode, labels)
    held |= kept
    step = {"gradients": held["gradients"], "working memory": 3 * p.states * ELEMENTS * get_num_threads()}
    at_peak = dict(meter.at_peak)
    if "gradients" in at_peak:
        at_peak["gradients"] = at_peak["gradients"] * p.gradients // p.activations
    if training and sum(step.values()) > sum(at_peak.values()):
        at_peak = step  # the optimizer's step: nothing of the batch is left
    return MemoryLedger({k: n for k, n in (static | at_peak).items() if n}, held, per_layer, by_op)


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


def _named(what: str, value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, Precision) and what == "precision":
        return value
    raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")


def _built(arch: Architecture, config: Any, p: Precision) -> Module:
    """The model, unallocated, with what is trained requiring gradients and what is frozen in its storage dtype."""
    if arch.config is None:
        raise ValueError(
            f"activations are known of the families this package builds (gpt2, llama); {arch.name} is "
            f"{arch.model_type}: leave seq_len out"
        )
    model = Transformer(arch.config, seed=None)
    if isinstance(config, str):
        model.requires_grad_(False)
        if config == "head":
            model.lm_head.weight = Parameter(unallocated(*model.lm_head.weight.shape))
    elif config is not None:
        model = PeftModel(model, config, seed=None)
    for q in model.parameters():
        if not q.requires_grad and p.frozen < p.activations:
            q.data = np.broadcast_to(np.float16(0), q.shape)
    return model


def _backbone(model: Module) -> Backbone:
    found = next((m for _, m in model.named_modules() if isinstance(m, Backbone)), None)
    if found is None:
        raise ValueError(
            f"activations are known of models with a Backbone; this {type(model).__name__} has none: leave seq_len out"
        )
    return found


class _Mark(Module):
    """Notes how much is held when a block is reached, and passes on."""

    def __init__(self, module: Module, marks: list[int], meter: Meter):
        self.module, self.marks, self.meter = module, marks, meter

    def forward(self, *args: Any) -> Any:
        self.marks.append(self.meter.current)
        return self.module(*args)


def _walk(model: Module, batch: int, seq_len: int, p: Precision, mode: str, labels: Array | None) -> tuple:
    """(meter after the step, what the forward pass holds, what each block of it keeps, the same by op)."""
    meter, marks = Meter(p.activations), []
    backbone = _backbone(model)
    paths = {id(m): path for path, m in model.named_modules()}
    for module in (*backbone.blocks, backbone.final_norm):
        model.replace(paths[id(module)], _Mark(module, marks, meter))
    ids = np.zeros((batch, seq_len), np.int64)
    labels = ids if labels is None else labels
    with meter:
        if mode == "train":
            loss = model.loss(ids, labels)
            held = {"activations": meter.lines.get("activations", 0), "logits": meter.lines.get("logits", 0)}
            by_op = {op: n for op, n in meter.ops.items() if n}
            layers = tuple(b - a for a, b in pairwise(marks))
            meter.backward(loss)
            return meter, held, layers, by_op
        with no_grad():
            if mode == "evaluate":
                model.loss(ids, labels)
            else:
                hidden = backbone(ids)
                model.lm_head(hidden[:, -1])
    return meter, {}, (), {}
