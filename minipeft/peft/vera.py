"""VeRA: vector-based random matrix adaptation (Kopiczko, Blankevoort & Asano 2023, arXiv:2310.11454).

    W' = W + diag(b) B diag(d) A        eq. 2

A [r, in] and B [out, r] are random, frozen, and shared by all layers (each takes the corner of its size); a layer
trains only d [r], which starts at `d_initial`, and b [out], which starts at 0.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng
from ..nn.module import Module, Parameter
from ..options import configuration, option
from .config import PeftConfig, PeftError, Seed, Shape, kind_of, shape_of
from .layer import Adapter, Inner
from .targets import QUERY_AND_VALUE, out_in_shape
from .weights import fill, with_update

TARGETS = {**QUERY_AND_VALUE, "phi": ["q_proj", "v_proj"]}


class VeraLayer(Adapter):
    """VeRA around a linear layer: vera_lambda_d [r] and vera_lambda_b [out]."""

    frozen = ("projection",)

    projection: Projection  # shared by all layers

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        self.vera_lambda_d.data += self.config.d_initial

    def corners(self, base: Module) -> tuple[Array, Array]:
        """(A [r, in], B [out, r]) of the base layer's size."""
        return self.projection.vera_A.data[:, : base.in_features], self.projection.vera_B.data[: base.out_features]

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        (A, B), p = self.corners(base), self.config.vera_dropout
        z = F.dropout(x, p, rng) if p else x
        return inner(x) + self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(z, A), B)

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + diag(b) B diag(d) A."""
        A, B = self.corners(base)
        delta = (self.vera_lambda_b.data[:, None] * B) @ (self.vera_lambda_d.data[:, None] * A)
        return with_update(layer, delta)

    def saved(self) -> dict[str, Parameter]:
        return super().saved() | {f"base_model.{key}": p for key, p in self.projection.saved().items()}


class Projection(Adapter):
    """The shared A [r, in] and B [out, r], vera_A and vera_B: Kaiming-uniform, never trained."""

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        for p in (self.vera_A, self.vera_B):
            bound = math.sqrt(6 / p.shape[1])  # gain sqrt(2) (He et al. 2015): variance 2 / fan_in
            fill(p, generator.uniform(-bound, bound, p.shape).astype(np.float32))


@configuration
class VeraConfig(PeftConfig):
    """VeRA's options, with PEFT's names and defaults: W' = W + diag(b) B diag(d) A."""

    r: int = option(256, "rank of the shared projections", least=1)
    projection_prng_key: int = option(0, "seed of the shared projections", least=0)
    save_projection: bool = option(True, "must be True: the file holds the projections, which only this library draws")
    vera_dropout: float = option(0.0, "probability of dropping an element of the adapter's input", least=0, below=1)
    d_initial: float = option(0.1, "where d starts")
    fan_in_fan_out: bool | None = option(None, "whether weights are stored [in, out]; None: each layer knows its own")

    peft_type, adapter_class = "VERA", VeraLayer
    usual_learning_rate = 1e-1
    usual_targets = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            raise PeftError("save_projection must be True: a file without the projections cannot be loaded")

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"vera_lambda_b": (n_out,), "vera_lambda_d": (self.r,)}

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """The shared projections, of the largest sizes that a layer needs."""
        outs, ins = zip(*[out_in_shape(*layer) for layer in layers.values()])
        return {"vera_A": (self.r, max(ins)), "vera_B": (max(outs), self.r)}

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Adapter]:
        found = super().adapters(layers, seeds)
        if found:
            shapes = self.constant_shapes({name: (kind_of(layer), shape_of(layer)) for name, layer in layers.items()})
            first, like = next(iter(layers.items()))
            seed = None if seeds[first] is None else (self.projection_prng_key,)
            projection = Projection(shapes, like, seed).requires_grad_(False)
            for part in found.values():
                part.projection = projection
        return found
