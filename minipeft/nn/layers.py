"""The layers a transformer is made of, with PyTorch's names, arguments and initializations.

`seed` names the random stream of the initial weights (same seed, same bytes); `seed=None` leaves them unallocated, for
a model that is about to be loaded or only counted. Every layer's `forward` accepts the call's random stream `rng`;
plain layers ignore it, layers with dropout draw their mask from it. `ops` has the formulas' sources; it raises for
inputs that do not fit.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import checks as check
from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng
from .module import Module, Parameter, unallocated


def _uniform(seed: int | None, bound: float, *shape: int) -> np.ndarray:
    if seed is None:
        return unallocated(*shape)
    return np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)


class Linear(Module):
    """y = x Wᵀ + b, weight [out_features, in_features], initialized uniformly in ±1/sqrt(in_features) (as PyTorch)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, seed: int | None = 0):
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self.weight = Parameter(_uniform(seed, bound, out_features, in_features))
        self.bias = Parameter(_uniform(None if seed is None else seed + 1, bound, out_features)) if bias else None

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Conv1D(Module):
    """y = x W + b, weight [in_features, out_features], initialized as Linear's, bias 0: GPT-2's, with its name."""

    def __init__(self, in_features: int, out_features: int, seed: int | None = 0):
        self.weight = Parameter(_uniform(seed, 1 / math.sqrt(in_features), in_features, out_features))
        self.bias = Parameter(np.zeros(out_features, np.float32) if seed is not None else unallocated(out_features))

    in_features = property(lambda self: self.weight.shape[0])
    out_features = property(lambda self: self.weight.shape[1])

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.addmm(self.bias, x, self.weight)


class Embedding(Module):
    """Row `id` of weight [num_embeddings, embedding_dim], initialized N(0, 1) (as PyTorch)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, seed: int | None = 0):
        shape = (num_embeddings, embedding_dim)
        self.weight = Parameter(
            unallocated(*shape) if seed is None else np.random.default_rng(seed).standard_normal(shape, np.float32)
        )

    num_embeddings = property(lambda self: self.weight.shape[0])
    embedding_dim = property(lambda self: self.weight.shape[1])

    def forward(self, ids: Array, rng: Rng | None = None) -> Tensor:
        """ids [...] (integer array) -> [..., embedding_dim]."""
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; weight [dim] is 1 at first, bias [dim] 0."""

    def __init__(self, dim: int, eps: float = 1e-5, seed: int | None = 0):
        self.weight = Parameter(unallocated(dim) if seed is None else np.ones(dim, np.float32))
        self.bias = Parameter(unallocated(dim) if seed is None else np.zeros(dim, np.float32))
        self.eps = eps

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., dim] -> the same shape."""
        return F.layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis; weight [dim] is 1 at first."""

    def __init__(self, dim: int, eps: float = 1e-6, seed: int | None = 0):
        self.weight = Parameter(unallocated(dim) if seed is None else np.ones(dim, np.float32))
        self.eps = eps

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., dim] -> the same shape."""
        return F.rms_norm(x, self.weight, eps=self.eps)


class Dropout(Module):
    """Zeroes elements with probability `p`, and scales the rest by 1/(1-p), when a random stream is given.

    Without one it passes its input on. Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.5):
        check.probability(p)
        self.p = p

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x -> the same shape."""
        return x if rng is None or self.p == 0 else F.dropout(x, self.p, rng)
