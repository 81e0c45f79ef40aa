"""Layers in four bits on shapes. Loaded only for a model that has such layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..nn.module import Parameter
from ..quant.kernels import tile_size
from ..quant.linear import Linear4bit
from .shapes import Meter, Shape, ShapeArray


class PackedShape(NamedTuple):
    """The part of a `QuantState` that the memory of a product depends on."""

    shape: Shape  # [out, in]
    nested: bool
    blocksize: int = 64  # as in `quantize_model`


class Packed(Linear4bit):
    """A Linear4bit without its weight; the tiles of the weight that DoRA reads are shapes."""

    quant_state: Any = None

    def __init__(self, state: Any, bias: Parameter | None, meter: Meter | None = None):
        self.quant_state, self.bias, self.meter = state, bias, meter
        self.weight = Parameter(np.zeros(0, np.uint8), requires_grad=False)

    def tiles(self) -> Iterator[tuple[slice, Array]]:
        """As in Linear4bit."""
        (n_out, n_in), size = self.quant_state.shape, tile_size(self.out_features)
        buffer = ShapeArray.new(self.meter, (size, n_in))
        for i in range(0, n_out, size):
            yield slice(i, min(i + size, n_out)), buffer[: min(size, n_out - i)]
