"""Adam with moments of eight bits (Dettmers et al. 2022, arXiv:2110.02861): two bytes a parameter instead of eight.

    m = q[state1] c1,   v = q⁺[state2] c2                       from a byte each, and a scale c for each block of 256
    m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
    θ ← (1 - lr · weight_decay) θ - lr · m̂ / (sqrt(v̂) + eps)    m̂ = m / (1 - β1^t),  v̂ = v / (1 - β2^t)
    c = max |x| over the block,   state = the code nearest to x / c,    for x = m and x = v

q is the dynamic map, q⁺ the one without a sign (`quant.codebooks`): points over six decades, dense towards zero. A
block has a scale of its own, so that one large moment costs its 255 neighbors their precision and no other.

The states are, byte for byte, those of bitsandbytes 0.50 on the CPU, whose sums x + a b are rounded once (FMA).
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, asarray, xp_of
from ..nn.module import Parameter
from ..quant.codebooks import dynamic_map
from ..quant.eight_bits import quantize
from ..quant.nf4 import dequantize, in_blocks
from .optimizer import Optimizer, Params, Slots

BLOCK = 256


class AdamW8bit(Optimizer):
    """AdamW with 8-bit moments, as bitsandbytes' AdamW8bit.

    State per parameter: `state1` (codes of m) and `state2` (of v), uint8 of its shape; `absmax1` and `absmax2`, float32
    for each block of 256 consecutive numbers; `step`. A parameter of fewer than `min_8bit_size` elements has m and v
    themselves, in float32, as `state1` and `state2`. The paper (section 2.3) advises that for embeddings too: they go
    into a group with `"min_8bit_size": sys.maxsize`.

    Raises ValueError for options out of range.
    """

    block = BLOCK

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, min_8bit_size: int = 4096,
    ):  # fmt: skip
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, options)

    def slots(self, group: dict[str, Any], p: Parameter) -> Slots:
        """state1, state2, absmax1, absmax2; of a small parameter the two states alone."""
        if p.size < group["min_8bit_size"]:
            return dict.fromkeys(("state1", "state2"), (p.shape, "float32"))
        scales = ((-(-p.size // BLOCK),), "float32")
        return dict.fromkeys(("state1", "state2"), (p.shape, "uint8")) | dict.fromkeys(("absmax1", "absmax2"), scales)

    def update(
        self, group: dict, step: int, p: Array, g: Array, state1: Array, state2: Array,
        absmax1: Array | None = None, absmax2: Array | None = None,
    ) -> None:  # fmt: skip
        """One flat piece of θ, whole blocks of it, in place; g is its gradient, `slots` has the others, step is t."""
        xp, (beta1, beta2), lr = xp_of(p), group["betas"], group["lr"]
        m, v = _values(state1, absmax1, signed=True), _values(state2, absmax2, signed=False)
        g = g.astype(xp.float32, copy=False)
        m[...] = _plus_product(beta1 * m, g, xp.float32(1 - beta1))
        v[...] = _plus_product(beta2 * v, g * xp.float32(1 - beta2), g)
        if group["weight_decay"]:
            p *= 1 - lr * group["weight_decay"]
        p += (-lr / (1 - beta1**step)) * m / (xp.sqrt(v) / math.sqrt(1 - beta2**step) + group["eps"])
        _store(m, state1, absmax1, signed=True)
        _store(v, state2, absmax2, signed=False)


def _values(state: Array, absmax: Array | None, signed: bool) -> Array:
    """The moments [n], float32: q[state] c; of a small parameter the state itself, which is then written in place."""
    return state if absmax is None else dequantize(state, absmax, asarray(dynamic_map(signed), xp_of(state)), BLOCK)


def _store(x: Array, state: Array, absmax: Array | None, signed: bool) -> None:
    """Quantize the moments x [n] into `state` [n] and `absmax` [n / 256]."""
    if absmax is not None:
        codes, absmax[...] = quantize(in_blocks(x, BLOCK), signed)
        state[...] = codes.reshape(-1)[: x.size]


def _plus_product(x: Array, a: Array, b: Any) -> Array:
    """x + a b of float32 numbers, rounded once: their product is exact in float64."""
    xp = xp_of(x)
    total = xp.multiply(a, b, dtype=xp.float64)
    total += x
    return total.astype(xp.float32)
