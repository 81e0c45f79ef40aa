"""A step of a model run on shapes: what is alive when, while the model is trained, is evaluated, or generates.

The code that runs is the model's own and the engine's own. Only its arrays are `ShapeArray`s: the weights, which are
counted elsewhere, and through them everything that is computed from them. All sizes are in bytes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import Array, Rng
from ..nn.generation import next_logits
from ..nn.module import Module, Parameter, unallocated
from ..nn.transformer import FAMILIES, Backbone, KVCache, Transformer
from .architectures import Architecture
from .precision import Precision
from .shapes import Buffer, Meter, ShapeArray


class Walk(NamedTuple):
    """What a step needs, in bytes.

    at_peak    by line, at the moment at which the sum is largest
    held       activations and logits that the forward pass keeps
    per_layer  activations that each block keeps
    by_op      bytes that the forward pass keeps, by the op that made them
    positions  number of positions in the cache at the end of a generation
    """

    at_peak: dict[str, int]
    held: dict[str, int] | None = None
    per_layer: tuple[int, ...] = ()
    by_op: dict[str, int] | None = None
    positions: int = 0


def train(model: Module, batch: int, seq_len: int, meter: Meter, labels: Array | None = None) -> Walk:
    """Loss and backward pass, in the lines activations, logits, working memory and gradients. Changes the model.

    `meter` is a new one; `labels` are the loss's, by default the input ids [batch, seq_len].
    Raises ValueError as `backbone_of`.
    """
    marks: list[int] = []
    backbone = backbone_of(model)
    paths = {id(m): path for path, m in model.named_modules()}
    for module in (*backbone.blocks, backbone.final_norm):
        model.replace(paths[id(module)], _Mark(module, marks, meter))
    onto_shapes(model, meter)
    ids = np.zeros((batch, seq_len), np.int64)
    with meter:
        loss = model.loss(ids, ids if labels is None else labels, rng=Rng(0))
        held = {line: meter.lines.get(line, 0) for line in ("activations", "logits")}
        by_op = {op: n for op, n in meter.ops.items() if n}
        per_layer = tuple(b - a for a, b in pairwise(marks))  # before checkpoints run the blocks again
        meter.backward(loss)
    return Walk(meter.at_peak, held, per_layer, by_op)


def evaluate(model: Module, batch: int, seq_len: int, meter: Meter, labels: Array | None = None) -> Walk:
    """The loss, without a graph; arguments as in `train`."""
    onto_shapes(model, meter)
    ids = np.zeros((batch, seq_len), np.int64)
    with meter, no_grad():
        model.loss(ids, ids if labels is None else labels)
    return Walk(meter.at_peak)


def generate(model: Module, batch: int, seq_len: int, meter: Meter, max_new_tokens: int) -> Walk:
    """Greedy generation after a prompt [batch, seq_len]; `meter` as in `train`."""
    onto_shapes(model, meter)
    positions = continue_prompt(model, np.zeros((batch, seq_len), np.int64), max_new_tokens, meter)
    return Walk(meter.at_peak, positions=positions)


def continue_prompt(model: Module, ids: Array, max_new_tokens: int, meter: Meter, sampled: bool = False) -> int:
    """Generate from a model that is on shapes, after a prompt [batch, T]; returns the positions in the cache."""
    with meter, no_grad():
        cache = _Cache(meter)
        logits = next_logits(model, ids, None, cache)  # kept until the next ones are there, as in `generate`
        if sampled:
            Buffer(meter, 3 * 8 * logits.size)  # scores, their distance from the largest, and probabilities in float64
            probabilities = Buffer(meter, 8 * logits.size)  # noqa: F841  kept as well
        end = len(cache) + max_new_tokens - 1  # the last token is not fed back
        while len(cache) < end:  # of the steps after the prompt, those at which the cache grows, and the last
            cache.skip_to(min(cache.room, end - 1))
            logits = next_logits(model, ids[:, :1], None, cache)
    return end


def unallocated_model(
    arch: Architecture, config: Any, p: Precision, quantization: str | None, double_quantization: bool
) -> Module:
    """A model under a method, without values: what is trained requires gradients, the rest has its storage dtype.

    Raises ValueError for a family that this package does not build, or another head than a language model's.
    """
    if arch.config is None:
        raise ValueError(
            f"activations are known of the families this package builds ({', '.join(FAMILIES)}) with a language model's "
            f"head; {arch.name}, of the family {arch.model_type}, is none of these: leave seq_len out (--seq)"
        )
    model = Transformer(arch.config, seed=None)
    if quantization:
        from ..quant.surgery import quantizable_layers
        from .four_bits import Packed, PackedShape

        for path, layer in quantizable_layers(model).items():
            shape = PackedShape((layer.out_features, layer.in_features), double_quantization)
            model.replace(path, Packed(shape, layer.bias))
        model.requires_grad_(False)
    if isinstance(config, str):
        model.requires_grad_(False)
        if config == "head":
            model.lm_head.weight = Parameter(unallocated(*model.lm_head.weight.shape))
    elif config is not None:
        from ..peft.model import PeftModel

        model = PeftModel(model, config, seed=None)
    for q in model.parameters():
        if not q.requires_grad and q.dtype.kind == "f" and p.frozen < p.activations:
            q.data = np.broadcast_to(np.float16(0), q.shape)
    return model


def onto_shapes(model: Module, meter: Meter) -> None:
    """Give a model's parameters, in place, arrays without content, which are not counted."""
    packed = [(path, layer) for path, layer in model.named_modules() if hasattr(type(layer), "quant_state")]
    if packed:
        from .four_bits import Packed

        for path, layer in packed:
            model.replace(path, Packed(layer.quant_state, layer.bias, meter))
    for q in model.parameters():
        q.data = ShapeArray.uncounted(meter, q.shape, q.dtype)


def backbone_of(model: Module) -> Backbone:
    """The transformer inside a model. Raises ValueError where there is none."""
    found = next((m for _, m in model.named_modules() if isinstance(m, Backbone)), None)
    if found is None:
        raise ValueError(
            f"activations are known of models with a Backbone; this {type(model).__name__} has none: leave seq_len out"
        )
    return found


class _Mark(Module):
    """Notes the bytes that are held when a block is reached, and calls the block."""

    def __init__(self, module: Module, marks: list[int], meter: Meter):
        self.module, self.marks, self.meter = module, marks, meter

    def forward(self, *args: Any) -> Any:
        self.marks.append(self.meter.current)
        return self.module(*args)


class _Cache(KVCache):
    """A cache whose buffers are counted in the line "KV cache"."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def reserve(self, *arguments: Any, **like: Array) -> tuple[Array, Array, int]:
        """As in KVCache."""
        before, self.meter.line = self.meter.line, "KV cache"
        try:
            return super().reserve(*arguments, **like)
        finally:
            self.meter.line = before

    @property
    def room(self) -> int:
        """Positions that the buffers have."""
        return self._buffers[0][0].shape[2]

    def skip_to(self, positions: int) -> None:
        """Hold this many positions, without computing them."""
        self._lengths = [positions] * len(self._lengths)
