"""Layers in four bits on shapes: their bytes, and a stand-in that has no weight.

Loaded only for a model that has such layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..nn.module import Parameter
from ..quant.blockwise import NESTED_BLOCKSIZE
from ..quant.linear import Linear4bit, tile_size
from .shapes import Meter, Shape, ShapeArray

BLOCKSIZE = 64  # weights that share a scale, as in `quantize_model`


def storage_bytes(n: int, blocksize: int = BLOCKSIZE, compress_statistics: bool = False) -> int:
    """Bytes of n weights: codes, scales, code books, and the JSON state."""
    blocks = -(-n // blocksize)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 * 256 if compress_statistics else 4 * blocks
    return (n + 1) // 2 + scales + 4 * 16 + 256


def layers_bytes(sizes: Iterable[int], nested: bool) -> int:
    """Bytes of layers of these many weights; `nested`: with double quantization. Layers share the code books."""
    sizes = list(sizes)
    books = 4 * 16 + nested * 4 * 256
    return sum(storage_bytes(n, BLOCKSIZE, nested) - books for n in sizes) + books * bool(sizes)


class PackedShape(NamedTuple):
    """What the memory of a product depends on, of a `QuantState`."""

    shape: Shape  # [out, in]
    blocksize: int
    nested: bool


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
