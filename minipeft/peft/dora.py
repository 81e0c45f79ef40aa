"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

    W' = m * (W + s B A) / n,    n = ||W + s B A||, by rows        m [out] trained, at the start ||W||        eq. 5

A, B and s are LoRA's (lora.py), W is [out, in]. The paper writes W as [in, out], so its norms are of columns. LoRA turns
each row's direction, m alone sets its length. n is a constant in backward (section 4.3).

Around a layer that other adapters have changed, W x is theirs, and n and the bias b are the base layer's:

    y = b + m/n (inner(x) - b + s B A x)
"""

from __future__ import annotations

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng, xp_of
from ..nn.module import Module
from .config import Shape
from .layer import Inner
from .lora import LoraConfig, LoraLinear
from .lora_embedding import LoraEmbedding
from .olora import OloraLinear
from .pissa import PissaLinear
from .weights import dense_weight, out_in, with_weight


class DoraLinear(LoraLinear):
    """LoRA with lora_magnitude_vector, m [out]."""

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        super().start(layer, generator)
        self.lora_magnitude_vector.data = self.row_norms(layer)

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """y = W x + b + s B A z + (m/n - 1) (W z + s B A z): x [..., in] -> y [..., out].

        z is x, in training with dropout, which acts on both terms of the rescaled sum, as in PEFT.
        """
        p = self.config.lora_dropout
        z = F.dropout(x, p, rng) if p and rng is not None else x
        y, delta = inner(x), self.update(z)
        Wz, b = y if z is x else inner(z), getattr(base, "bias", None)
        Wz = Wz if b is None else Wz - b
        scale = self.lora_magnitude_vector / self.row_norms(base)
        return y + delta + (scale - 1) * (Wz + delta)  # of the two sums, backward keeps the second alone

    def row_norms(self, base: Module) -> Array:
        """n = ||W + s B A|| of each output, [out]."""
        if hasattr(base, "tiles"):  # in four bits: a few rows at a time, so that the weight is never there as a whole
            (A, B), xp = self.factors(), xp_of(base.weight.data)
            tiles = ((rows, W + B.data[rows] @ (A.data * self.scaling)) for rows, W in base.tiles())
            return xp.concatenate([xp.sqrt((V * V).sum(axis=1)) for _, V in tiles])
        V = out_in(base, dense_weight(base)) + self.delta_weight()
        return xp_of(V).sqrt((V * V).sum(axis=1))

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = m/n (W + s B A), by rows; where adapters below have moved the bias b to b', it is b + m/n (b' - b)."""
        scale = self.lora_magnitude_vector.data / self.row_norms(base)
        W = out_in(layer, dense_weight(layer)) + self.delta_weight()
        W *= scale[:, None]
        moved = layer is not base and getattr(base, "bias", None) is not None
        bias = base.bias.data + scale * (layer.bias.data - base.bias.data) if moved else None
        return with_weight(layer, out_in(layer, W), bias)

    @classmethod
    def factor_shapes(cls, config: LoraConfig, name: str, r: int, n_out: int, n_in: int) -> dict[str, Shape]:
        return {**super().factor_shapes(config, name, r, n_out, n_in), "lora_magnitude_vector": (n_out,)}


class DoraPissa(DoraLinear, PissaLinear):
    """DoRA that starts as PiSSA."""


class DoraOlora(DoraLinear, OloraLinear):
    """DoRA that starts as OLoRA."""


class DoraEmbedding(DoraLinear, LoraEmbedding):
    """DoRA around an embedding, m [d]: each number of a row is one of W's outputs."""

    def forward(self, ids: Array, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """ids [...] -> [..., d]."""
        return (inner(ids) + self.update(ids)) * (self.lora_magnitude_vector / self.row_norms(base))
