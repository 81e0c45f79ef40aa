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
from .weights import fill, placement, with_update, zeros


class VeraLayer(Adapter):
    """VeRA around a linear layer: vera_lambda_d [r] and vera_lambda_b [out]."""

    frozen = ("projection",)

    def __init__(
        self, config: VeraConfig, shapes: dict[str, Shape], layer: Module, seed: Seed, projection: Projection
    ):
        super().__init__(shapes, layer, seed)
        self.projection, self.dropout = projection, config.vera_dropout
        self.out_features, self.in_features = layer.out_features, layer.in_features
        if seed is not None:
            self.vera_lambda_d.data += config.d_initial

    def _corners(self) -> tuple[Array, Array]:
        return self.projection.vera_A.data[:, : self.in_features], self.projection.vera_B.data[: self.out_features]

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        A, B = self._corners()
        z = F.dropout(x, self.dropout, rng) if self.dropout else x
        return inner(x) + self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(z, A), B)

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + diag(b) B diag(d) A."""
        A, B = self._corners()
        delta = (self.vera_lambda_b.data[:, None] * B) @ (self.vera_lambda_d.data[:, None] * A)
        return with_update(layer, delta)

    def saved(self) -> dict[str, Parameter]:
        return {
            **super().saved(),
            "base_model.vera_A": self.projection.vera_A,
            "base_model.vera_B": self.projection.vera_B,
        }


class Projection(Module):
    """The shared A [r, in] and B [out, r], Kaiming-uniform; with no key (None) not drawn, as in `Adapter`."""

    def __init__(self, shapes: dict[str, Shape], like: Module, key: int | None):
        self.vera_A, self.vera_B = (
            Parameter(zeros(shapes[name], *placement(like), key), False) for name in ("vera_A", "vera_B")
        )
        if key is None:
            return
        generator = np.random.default_rng(key)
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

    peft_type = "VERA"
    usual_learning_rate = 1e-1
    kinds = ("linear", "conv1d")
    usual_targets = QUERY_AND_VALUE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            raise PeftError(
                "save_projection=False leaves the shared projections out of the file, and they cannot be drawn again; "
                "it must be True"
            )

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"vera_lambda_b": (n_out,), "vera_lambda_d": (self.r,)}

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """The shared projections, of the largest sizes that a layer needs."""
        outs, ins = zip(*[out_in_shape(*layer) for layer in layers.values()])
        return {"vera_A": (self.r, max(ins)), "vera_B": (max(outs), self.r)}

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Adapter]:
        if not layers:
            return {}
        shapes = self.constant_shapes({name: (kind_of(layer), shape_of(layer)) for name, layer in layers.items()})
        first, layer = next(iter(layers.items()))
        drawn = None if seeds[first] is None else self.projection_prng_key
        projection = Projection(shapes, layer, drawn)
        found: dict[str, Adapter] = {}
        for name, layer in layers.items():
            added = self.parameter_shapes(name, kind_of(layer), shape_of(layer))
            found[name] = VeraLayer(self, added, layer, seeds[name], projection)
        return found
