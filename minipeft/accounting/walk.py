"""A step of a model run on shapes: what is alive when, while it learns, is evaluated, or generates.

The code that runs is the model's own and the engine's own. Only its arrays are `ShapeArray`s: the weights, which are
counted elsewhere, and through them everything that is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import Array, Rng
from ..nn.generation import next_logits
from ..nn.module import Module
from ..nn.transformer import Backbone, KeyValue, KVCache
from ..quant.kernels import tile_size
from ..quant.linear import Linear4bit
from .shapes import Buffer, Meter, ShapeArray


class Walk(NamedTuple):
    """What a step was seen to need: bytes.

    at_peak    by line, at the moment of the most
    held       activations and logits that the forward pass keeps
    per_layer  activations that each block keeps; by_op: the same by op
    positions  of the cache, at the end of a generation
    """

    at_peak: dict[str, int]
    held: dict[str, int] | None = None
    per_layer: tuple[int, ...] = ()
    by_op: dict[str, int] | None = None
    positions: int = 0


def train(model: Module, batch: int, seq_len: int, itemsize: int, labels: Array | None = None) -> Walk:
    """Loss and backward pass, in the lines activations, logits, working memory and gradients. Changes the model."""
    meter, marks = Meter(itemsize), []
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


def evaluate(model: Module, batch: int, seq_len: int, itemsize: int, labels: Array | None = None) -> Walk:
    """The loss, without a graph."""
    meter = Meter(itemsize)
    onto_shapes(model, meter)
    ids = np.zeros((batch, seq_len), np.int64)
    with meter, no_grad():
        model.loss(ids, ids if labels is None else labels)
    return Walk(meter.at_peak)


def generate(model: Module, batch: int, seq_len: int, itemsize: int, max_new_tokens: int) -> Walk:
    """Greedy generation after a prompt."""
    meter = Meter(itemsize)
    onto_shapes(model, meter)
    positions = continue_prompt(model, np.zeros((batch, seq_len), np.int64), max_new_tokens, meter)
    return Walk(meter.at_peak, positions=positions)


def continue_prompt(model: Module, ids: Array, max_new_tokens: int, meter: Meter, sampled: bool = False) -> int:
    """Generate from a model that is on shapes; returns how many positions the cache holds in the end."""
    with meter, no_grad():
        cache = _Cache(meter)
        logits = next_logits(model, ids, None, cache)  # alive until the next ones are there, as in `generate`
        if sampled:
            Buffer(meter, 3 * 8 * logits.size)  # scores, their distance from the largest, and probabilities in float64
            probabilities = Buffer(meter, 8 * logits.size)  # noqa: F841  alive as well
        end = len(cache) + max_new_tokens - 1  # the last token is not fed back
        while len(cache) < end:  # of the steps after the prompt, those at which the cache grows, and the last
            cache.skip_to(min(cache.room, end - 1))
            logits = next_logits(model, ids[:, :1], None, cache)
    return end


def onto_shapes(model: Module, meter: Meter) -> None:
    """Give a model's parameters, in place, arrays without content, which are not counted."""
    packed = [(path, m) for path, m in model.named_modules() if isinstance(m, Linear4bit)]
    insides = {id(q) for _, m in packed for q in m.parameters() if q is not m.bias}  # read as they are
    for path, layer in packed:
        model.replace(path, _Packed(layer, meter))
    for q in model.parameters():
        if id(q) not in insides:
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
    """Notes how much is held when a block is reached, and passes on."""

    def __init__(self, module: Module, marks: list[int], meter: Meter):
        self.module, self.marks, self.meter = module, marks, meter

    def forward(self, *args: Any) -> Any:
        self.marks.append(self.meter.current)
        return self.module(*args)


class _Packed(Linear4bit):
    """A Linear4bit whose dequantized tiles are shapes (DoRA reads them)."""

    def __init__(self, layer: Linear4bit, meter: Meter):
        self.__dict__.update(layer.__dict__)
        self.meter = meter

    def tiles(self) -> Iterator[tuple[slice, Array]]:
        """As in Linear4bit."""
        (n_out, n_in), size = self.quant_state.shape, tile_size(self.out_features)
        buffer = ShapeArray.new(self.meter, (size, n_in))
        for i in range(0, n_out, size):
            yield slice(i, min(i + size, n_out)), buffer[: min(size, n_out - i)]


class _Cache(KVCache):
    """A cache whose buffers are counted in a line of their own."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def append(self, layer: int, k: Array, v: Array) -> KeyValue:
        """As in KVCache."""
        before, self.meter.line = self.meter.line, "KV cache"
        try:
            return super().append(layer, k, v)
        finally:
            self.meter.line = before

    @property
    def room(self) -> int:
        """Positions that the buffers have."""
        return self._buffers[0][0].shape[2]

    def skip_to(self, positions: int) -> None:
        """Hold so many positions, without computing them."""
        self._lengths = [positions] * len(self._lengths)
