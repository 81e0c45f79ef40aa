"""A linear layer that holds its weight in four bits and multiplies by it a tile at a time.

    y = x Wᵀ + b,  W = book[codes] * absmax           dx = g W;  W itself is frozen and has no gradient

A tile of W is dequantized into a buffer that stays in the cache, multiplied, and overwritten by the next. No float copy
of a whole weight exists at any time, in forward or in backward, and the graph keeps nothing but the packed codes, which
the layer holds anyway. Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6).

Each thread has tiles of its own, dequantizes and multiplies them, and waits for no other until the end. Forward takes
them as rows of W, backward as columns: a tile then gives whole columns of the result, and nothing has to be summed up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from types import ModuleType

import numpy as np

from ..autograd.cases import Case, cases, normal
from ..autograd.tensor import Tensor, op
from ..backend import Array, Rng, get_num_threads, matmul, one_blas_thread, split_rows, xp_of
from ..nn.layers import Conv1D, Linear
from ..nn.module import Module, Parameter
from .blockwise import QuantError, QuantState, byte_table, dequantize_4bit, dequantize_into, quantize_4bit, unpack

TILE = 128  # rows (or columns) dequantized together: enough for the matrix product to run at full speed


def tile_size(n: int) -> int:
    """Rows (of `n`) of a tile: as many that the tiles of all threads together are at most half of the weight."""
    return max(1, min(TILE, n // (2 * get_num_threads())))


class Tiles:
    """A quantized weight [out, in], read tile by tile as float32. A tile is overwritten by the next of its thread."""

    def __init__(self, packed: Array, state: QuantState):
        self.packed, self.state, self.xp = packed, state, xp_of(packed)
        self.scales, self.pairs = state.scales(), byte_table(state.code)

    def rows(self, part: slice | None = None) -> Iterator[tuple[slice, Array]]:
        """(rows, values [rows, in]) through a part of the rows, or all."""
        (n_out, n_in), size = self.state.shape, self.state.blocksize
        part = part or slice(0, n_out)
        buffer = self.xp.empty(tile_size(n_out) * n_in + size, self.xp.float32)
        for rows in _pieces(part, tile_size(n_out)):
            first = rows.start * n_in // size * size  # blocks run across rows: a tile may start inside of one
            values = buffer[: rows.stop * n_in - first]
            dequantize_into(values, self.packed, size, self.scales, self.pairs, first)
            yield rows, values[rows.start * n_in - first :].reshape(-1, n_in)

    @property
    def column_unit(self) -> int:
        """A number of neighbouring columns that share their absmax in every row, at most a tile's; 0: no columns do."""
        (_, n_in), size = self.state.shape, self.state.blocksize
        if n_in % size:
            return 0
        return 2 ** max(1, min(5, tile_size(n_in).bit_length() - 1))  # at most 32, the smallest block

    def columns(self, part: slice) -> Iterator[tuple[slice, Array]]:
        """(columns, values [out, columns]) through a part of the columns, counted in `column_unit`, which is not 0."""
        (n_out, n_in), size, unit = self.state.shape, self.state.blocksize, self.column_unit
        codes, scales = self.packed.reshape(n_out, n_in // 2), self.scales.reshape(n_out, n_in // size)
        most = max(1, tile_size(n_in) // unit)
        buffer = self.xp.empty(n_out * most * unit, self.xp.float32)
        for units in _pieces(part, most):
            a, b = units.start * unit, units.stop * unit
            values = buffer[: n_out * (b - a)].reshape(n_out, b - a)
            unpack(values, codes[:, a // 2 : b // 2], scales[:, self.xp.arange(a, b, unit) // size], self.pairs)
            yield slice(a, b), values


def _pieces(part: slice, most: int) -> Iterator[slice]:
    """Slices that cover `part`, of about equal length, at most `most`."""
    n = -(-(part.stop - part.start) // most)
    cuts = [part.start + (part.stop - part.start) * i // n for i in range(n + 1)] if n else []
    return (slice(a, b) for a, b in pairwise(cuts))


def _spread(xp: ModuleType, run: Callable[[slice], None], n: int, work: int) -> None:
    """run(slice) for a part of range(n) in each thread, whose products are computed there."""
    if xp is np:
        with one_blas_thread():
            split_rows(run, n, work)
    else:
        run(slice(0, n))


@op
def linear_4bit(x, packed, state, bias=None):
    """y = x Wᵀ + b with x [..., in] and the codes of W [out, in] (`quantize_4bit`); no gradient reaches them.

    The product has x's dtype. Raises ValueError where x does not match the weight, or is not floating-point.
    """
    if len(state.shape) != 2 or x.ndim == 0 or x.shape[-1] != state.shape[1]:
        raise ValueError(f"linear_4bit: input {x.shape} does not match the quantized weight {tuple(state.shape)}")
    if x.dtype.kind != "f":
        raise ValueError(f"linear_4bit: the input must be floating-point, not {x.dtype}")
    xp, (n_out, n_in), shape = xp_of(x, packed, bias), state.shape, x.shape
    n = math.prod(shape[:-1])
    work = n_out * n_in * max(1, n // 64)  # decoding a weight takes as long as 64 of its products
    x2, y, tiles = x.reshape(n, n_in), xp.empty((n, n_out), x.dtype), Tiles(packed, state)

    def forward(part):
        for rows, w in tiles.rows(part):
            xp.matmul(x2, w.astype(x.dtype, copy=False).T, out=y[:, rows])

    _spread(xp, forward, n_out, work)
    if bias is not None:
        y += bias

    def dx(g):
        g2, d, tiles = g.reshape(n, n_out), xp.empty((n, n_in), g.dtype), Tiles(packed, state)

        def backward(part):
            for columns, w in tiles.columns(part):
                xp.matmul(g2, w.astype(g.dtype, copy=False), out=d[:, columns])

        if tiles.column_unit:
            _spread(xp, backward, n_in // tiles.column_unit, work)
        else:  # blocks run across rows, so that no columns share their absmax: the products of row tiles are summed up
            d[...] = 0
            for rows, w in tiles.rows():
                d += matmul(g2[:, rows], w.astype(g.dtype, copy=False))
        return d.reshape(shape)

    return y.reshape(*shape[:-1], n_out), dx, None, None, lambda g: g.reshape(n, n_out).sum(axis=0)


class Linear4bit(Module):
    """y = x Wᵀ + b with W [out_features, in_features] in four bits (bitsandbytes' Linear4bit).

    Its state dict is bitsandbytes': `weight` (packed codes), `weight.absmax`, `weight.quant_map`, with double quantization
    `weight.nested_absmax` and `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON as bytes), `bias`. All
    but the bias are frozen. A GPT-2 Conv1D becomes a Linear4bit of its transposed weight, as it does in transformers.

    Args:
        packed, state: what `quantize_4bit` gave for a matrix [out, in].
        bias: the layer's parameter, kept as it is, or None.

    Raises QuantError where they do not fit each other, or the weight is no matrix.
    """

    def __init__(self, packed: Array, state: QuantState, bias: Parameter | None = None):
        state.check(packed)
        if len(state.shape) != 2:
            raise QuantError(f"the weight of a Linear4bit is a matrix [out, in], not of the shape {tuple(state.shape)}")
        if bias is not None and bias.shape != state.shape[:1]:
            raise QuantError(f"a bias of shape {bias.shape} does not match a weight {tuple(state.shape)}")
        self.weight = Parameter(packed, requires_grad=False)
        for key, array in state.as_dict(packed=True).items():
            setattr(self, f"weight.{key}", Parameter(array, requires_grad=False))
        self.bias = bias
        self._read: tuple[list[Array], QuantState] | None = None

    @classmethod
    def from_linear(
        cls, layer: Linear | Conv1D, blocksize: int = 64, quant_type: str = "nf4", compress_statistics: bool = True
    ) -> Linear4bit:
        """The layer with its weight quantized; it shares the bias. Raises QuantError as `quantize_4bit`."""
        W = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        return cls(*quantize_4bit(W, blocksize, quant_type, compress_statistics), layer.bias)

    @classmethod
    def from_state_dict(cls, arrays: Mapping[str, Array]) -> Linear4bit:
        """The layer from a checkpoint's entries, ours or bitsandbytes': weight, weight.absmax, ..., and bias if any.

        Raises QuantError naming what is missing or contradictory.
        """
        if "weight" not in arrays:
            raise QuantError(f"a quantized layer has an entry 'weight'; there are {', '.join(arrays) or 'none'}")
        state = QuantState.from_dict({k[len("weight.") :]: a for k, a in arrays.items() if k.startswith("weight.")})
        bias = Parameter(arrays["bias"], requires_grad=False) if "bias" in arrays else None
        return cls(arrays["weight"], state, bias)

    @property
    def quant_state(self) -> QuantState:
        """How the weight is quantized, as its arrays say."""
        entries = {name[len("weight.") :]: p.data for name, p in self.__dict__.items() if name.startswith("weight.")}
        arrays = list(entries.values())
        if self._read is None or any(a is not b for a, b in zip(arrays, self._read[0])):  # moved, or loaded anew
            self._read = arrays, QuantState.from_dict(entries)
        return self._read[1]

    in_features = property(lambda self: self.quant_state.shape[1])
    out_features = property(lambda self: self.quant_state.shape[0])

    def requires_grad_(self, requires_grad: bool = True) -> Linear4bit:
        """Set `requires_grad` of the bias: codes and their scales have no gradient. Returns self."""
        if self.bias is not None:
            self.bias.requires_grad = requires_grad
        return self

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear_4bit(x, self.weight, self.quant_state, self.bias)

    def dequantize(self) -> Array:
        """The weight, [out, in], as a whole, in the dtype it had."""
        return dequantize_4bit(self.weight.data, self.quant_state)

    def tiles(self) -> Iterator[tuple[slice, Array]]:
        """(rows, float32 values [rows, in]) through the weight; each is overwritten by the next."""
        return Tiles(self.weight.data, self.quant_state).rows()

    def quantize(self, W: Array) -> Linear4bit:
        """A layer with another weight [out, in], quantized in the same way, and this bias.

        Raises QuantError as `quantize_4bit`.
        """
        state = self.quant_state
        packed, new = quantize_4bit(W.astype(state.dtype, copy=False), state.blocksize, state.quant_type, state.nested)
        return Linear4bit(packed, new, self.bias)


@cases("linear_4bit")
def _linear_4bit_cases() -> Iterator[Case]:
    for label, lead, (n_out, n_in), blocksize, kind, nested in (
        ("rows of whole blocks", (2, 3), (6, 64), 64, "nf4", False),
        ("blocks across rows", (4,), (5, 33), 32, "fp4", False),
        ("double quantization", (3,), (9, 40), 64, "nf4", True),
        ("one block", (), (3, 5), 64, "int4", False),
        ("no rows", (0,), (4, 8), 32, "nf4", False),
    ):
        W = normal(n_out, n_in).astype(np.float32)
        packed, state = quantize_4bit(W, blocksize, kind, nested)
        entries = state.as_dict(packed=True)
        call = partial(_applied, list(entries))
        yield Case(label, call, (normal(*lead, n_in), normal(n_out)), (packed, *entries.values()))


def _applied(keys: list[str], x: Tensor, bias: Tensor, packed: Array, *entries: Array) -> Tensor:
    """linear_4bit of a state given as arrays, whose floats may come in any dtype."""
    arrays = [a.astype("float32") if a.dtype.kind == "f" else a for a in entries]
    return linear_4bit(x, packed, QuantState.from_dict(dict(zip(keys, arrays))), bias)
