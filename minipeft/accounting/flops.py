"""The arithmetic of a training step, from shapes: a multiplication and an addition are two operations (FLOPs).

    t tokens through a layer [out, in]     forward 2 t in out
                                           the gradient of its input, where anything before it is trained: as much again
                                           the gradient of its weight, where that is trained: as much again
    attention over s positions             forward 4 t s a d (q k^T, and the weights times v), half of it if causal;
                                           backward twice that
    checkpointing                          each block's forward once more

A frozen weight so saves a third of full fine-tuning's work, not all of it: gradients still flow through it. Norms,
activations, softmax and the optimizer's step are left out, as is usual. `counted_flops` obtains the same number from the
products of this engine's own graph, run on shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .activations import Block, Layer, blocks_of, first_trained, head_of, is_last_norm
from .architectures import Architecture, architecture
from .cards import CARDS
from .parameters import trained_name, trained_parameters, virtual_tokens
from .precision import PRECISIONS, check_positive


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step: forward, backward, and what checkpointing computes again."""

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.recomputed

    def seconds(self, card: str, utilization: float) -> float:
        """Of a card that spends this share of its time at its peak rate."""
        return self.total / (CARDS[card][1] * 1e12 * utilization)


def step_flops(
    model: Any, config: Any = None, batch: int = 1, seq_len: int = 1, checkpointing: bool = True, causal: bool = True
) -> Flops:
    """The FLOPs of one forward and backward pass over [batch, seq_len] tokens.

    Arguments as in `pytorch_ledger`; with `causal`, attention computes what it may see alone, as flash attention does.
    A prompt's positions have logits, as in PEFT; in this package's engine they have none (`counted_flops`).
    Raises ValueError where a model's blocks are not known.
    """
    check_positive(batch=batch, seq_len=seq_len)
    arch = model if isinstance(model, Architecture) else architecture(model)
    trained = trained_parameters(arch, config)
    blocks = blocks_of(arch, trained)
    if not blocks:
        raise ValueError(f"FLOPs need the shapes of blocks; {arch.name} has none")
    before_input, before_keys = virtual_tokens(config)
    seq_len += before_input
    t = batch * seq_len
    first, before = first_trained(arch, blocks, trained)
    forward = backward = again = 0.0
    for i, block in enumerate(blocks):
        # In the first block, gradients go back to the first layer that is trained, not beyond.
        stages = [_stage(block, layer) for layer in block.layers]
        mine = [stage for layer, stage in zip(block.layers, stages) if layer.trained or layer.added]
        reach = -1 if i > first or before or any(norm.trained for norm in block.norms) else min(mine, default=-1)
        reach = 4 if i < first else reach
        keys = seq_len / (2 if causal else 1) + before_keys
        attention = 4 * t * keys * block.queries * block.attentions
        own, back = attention, 2 * attention * (reach < 1)
        for layer, stage in zip(block.layers, stages):
            product = 2 * t * layer.share * layer.size
            own, back = own + product, back + product * (layer.trained + (stage > reach))
            for shape in layer.added:
                added = 2 * t * layer.share * math.prod(shape)
                own, back = own + added, back + added * (1 + (stage > reach or shape[1] != layer.n_in))
        forward, backward, again = forward + own, backward + back, again + own * (checkpointing and i >= first)
    if head := head_of(arch):
        path, beyond = head[0].rpartition(".")[0], first < len(blocks) or any(is_last_norm(arch, n) for n in trained)
        product, names = 2 * t * math.prod(arch[head[1]]), {trained_name(name) for name in trained}
        forward, backward = forward + product, backward + product * (any(n in names for n in head) + beyond)
        for name, shape in trained.items():
            if name.startswith(f"{path}.") and trained_name(name) not in head and len(shape) == 2:  # a method's matrix
                product = 2 * t * math.prod(shape)
                forward, backward = forward + product, backward + product * (1 + (beyond or shape[1] != arch[head[1]][1]))
    return Flops(round(forward), round(backward), round(again))


def _stage(block: Block, layer: Layer) -> int:
    """Where in a block a layer is: before attention, behind it, at the MLP's start, at its end."""
    if layer.kind == "norm":
        return 0 if layer.array == block.layers[0].array else 2
    return 1 if layer.kind == "attention" else 3


def counted_flops(model: Any, config: Any = None, batch: int = 1, seq_len: int = 1, checkpointing: bool = True) -> int:
    """The same from the engine's own graph: each product that a step computes, on shapes. Of families it builds."""
    from . import shapes, walk

    arch = model if isinstance(model, Architecture) else architecture(model)
    counted = [0]

    class Counter(shapes.Meter):
        def _evaluate(self, name: str, form: Any, *arrays: Any, **options: Any) -> tuple:
            y, *pulls = super()._evaluate(name, form, *arrays, **options)
            product = _product(name, arrays, y)
            counted[0] += product
            if not product:
                return y, *pulls
            if "attention" in name:  # one pullback computes the gradients of all inputs
                spent = []

                def pull(g: Any, p: Any) -> Any:
                    counted[0] += 0 if spent else 2 * product
                    spent.append(True)
                    return p(g)
            else:

                def pull(g: Any, p: Any) -> Any:
                    counted[0] += product
                    return p(g)

            return y, *[partial(pull, p=p) if p and i in FACTORS[name] else p for i, p in enumerate(pulls)]

    built = walk.unallocated_model(arch, config, PRECISIONS["float32"], None, True)
    walk.backbone_of(built).gradient_checkpointing = checkpointing
    meter = Counter()
    walk.onto_shapes(built, meter)
    ids = np.zeros((batch, seq_len), np.int64)
    with meter:
        meter.backward(built.loss(ids, ids))
    return counted[0]


# The ops that multiply matrices, and which of their inputs are factors.
FACTORS = {
    "linear": (0, 1), "addmm": (1, 2), "linear_cross_entropy": (0, 1), "rotary_attention": (0, 1, 2), "packed_attention": (0,),
    "scaled_dot_product_attention": (0, 1, 2),
}  # fmt: skip


def _product(name: str, arrays: tuple, y: Any) -> int:
    """FLOPs of an op's forward pass."""
    if name == "linear":
        return 2 * arrays[0].size * arrays[1].shape[0]
    if name == "addmm":
        return 2 * arrays[1].size * arrays[2].shape[1]
    if name == "linear_cross_entropy":
        weight, targets = arrays[1:3]
        return 2 * int((targets != -100).sum()) * weight.size
    if name == "scaled_dot_product_attention":
        return 4 * arrays[0].size * arrays[1].shape[2]
    if name in FACTORS:
        B, T, d = y.shape
        return 4 * B * T * T * d
    return 0
