"""The fast forms of four bits: packed bytes, a cache-sized piece after another, spread over threads.

    quantize           nf4.quantize, two codes to a byte: the first in the high half, zero's code beside a last odd one
    dequantize         nf4.dequantize of such bytes
    times_transposed   x Wᵀ of packed W [out, in]
    times              g W

A test holds each equal to its plain definition, the first two bit for bit. A byte's two numbers are looked up at once, in
a table of 256 pairs. A product dequantizes a tile of W into a buffer that stays in the cache, and the next tile overwrites
it, so no float copy of a whole weight exists. Each thread has tiles of its own, and waits for no other until the end:
x Wᵀ takes them as rows of W, g W as columns, so that a tile gives whole columns of the result and nothing is summed up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Array, asarray, get_num_threads, matmul, one_blas_thread, parallel_rows, split_rows, xp_of
from . import device, nf4
from .codebooks import CODES_4BIT, thresholds

if TYPE_CHECKING:
    from .bitsandbytes import QuantState

# Numbers looked up together: with their bytes widened to indices they stay in a core's cache, and the two calls for them
# are so long that threads seldom wait for Python's lock between them.
PIECE = 1 << 17
TILE = 128  # rows (or columns) dequantized together: enough for the matrix product to run at full speed


# ---------------------------------------------------------------------------------------------------------------- codes


def quantize(x: Array, blocksize: int, quant_type: str) -> tuple[Array, Array]:
    """(packed uint8 [(n + 1) // 2], absmax float32 [blocks]) of x [n]; where x holds NaN or infinity so does absmax."""
    xp, n = xp_of(x), x.size
    midpoints, order = thresholds(quant_type)
    zero = int(abs(CODES_4BIT[quant_type]()).argmin())
    if xp.__name__ == "cupy":
        return device.quantize_4bit(x, blocksize, xp.asarray(midpoints), xp.asarray(order), zero, nf4.SMALLEST)
    midpoints, order = midpoints.tolist(), None if quant_type == "nf4" else asarray(order, xp)  # NF4's codes ascend
    absmax, packed = xp.empty(-(-n // blocksize), xp.float32), xp.empty((n + 1) // 2, xp.uint8)
    full = n // blocksize
    blocks = x[: full * blocksize].reshape(full, blocksize)
    halves = packed[: full * blocksize // 2].reshape(full, blocksize // 2)

    def part(s: slice) -> None:
        block = blocks[s].astype(xp.float32, copy=False)
        bits = block.view(xp.int32)  # magnitudes, as integers, are ordered as the floats are, and compared faster
        absmax[s] = (bits & 0x7FFFFFFF).max(axis=1).view(xp.float32)
        scaled = block * nf4.reciprocal(absmax[s])[:, None]
        rank = xp.zeros(block.shape, xp.uint8)
        for midpoint in midpoints:  # faster than a search, a few cache-sized comparisons at a time
            rank += (scaled > midpoint).view(xp.uint8)
        halves[s] = _pack(rank if order is None else order.take(rank))

    parallel_rows(xp, part, full, blocksize)
    if full < absmax.size:  # part of a block; an odd last code has zero's for its partner
        tail = x[full * blocksize :]
        codes = xp.full((tail.size + 1) // 2 * 2, zero, xp.uint8)
        codes[: tail.size], absmax[full:] = nf4.quantize(tail, blocksize, quant_type)
        packed[full * blocksize // 2 :] = _pack(codes)
    return packed, absmax


def _pack(codes: Array) -> Array:
    """[..., 2 k] codes -> [..., k] bytes, the first of two in the high half."""
    two = codes.view(xp_of(codes).uint16)  # little-endian: the first code is the low byte
    return (two << 4 | two >> 8).astype(np.uint8)


def dequantize(packed: Array, state: QuantState) -> Array:
    """code[codes] * scales, of the state's shape and dtype: packed uint8 [(n + 1) // 2]."""
    xp, n, size = xp_of(packed), math.prod(state.shape), state.blocksize
    if xp.__name__ == "cupy":
        return on_device(packed, state, state.dtype)
    out, tiles = xp.empty(n, state.dtype), Tiles(packed, state)
    work = n if xp is np else 0
    split_rows(lambda s: tiles.read(out[s.start * size : s.stop * size], s.start * size), tiles.scales.size, work)
    return out.reshape(state.shape)


def on_device(packed: Array, state: QuantState, dtype: Any) -> Array:
    """`dequantize` with CuPy into any dtype: one launch, without a table or the scales in memory."""
    inner = state.state2
    nested = None if inner is None else (inner.code, inner.absmax, inner.blocksize, state.offset)
    out = xp_of(packed).empty(state.shape, dtype)
    device.dequantize_4bit(out, packed, state.code, state.blocksize, state.absmax, nested)
    return out


def unpack(out: Array, codes: Array, scales: Array, pairs: Array) -> None:
    """out [R, C] = code[codes] * scales: codes [R, C/2] bytes; scales [R, S], each of C/S columns side by side."""
    xp, (rows, columns), blocks = xp_of(codes), out.shape, scales.shape[1]
    for s in _pieces(slice(0, rows), max(1, PIECE // max(1, columns)) if xp is np else max(1, rows)):
        into = out[s]
        shape = into.shape[0], blocks, columns // max(1, blocks)
        values = _numbers(codes[s], pairs, into if into.dtype == np.float32 else None).reshape(shape)
        xp.multiply(values, scales[s][..., None], out=into.reshape(shape), casting="same_kind")


def _numbers(codes: Array, pairs: Array, out: Array | None = None) -> Array:
    """The numbers of bytes: codes [..., k], pairs [256, 2] float32 -> [..., 2 k] float32, on the host in `out` where given."""
    if xp_of(codes) is not np:
        return pairs.take(codes, axis=0).reshape(*codes.shape[:-1], -1)
    found = np.empty(codes.shape, np.float64) if out is None else out.view(np.float64)  # a pair is moved as 64 bits
    pairs.view(np.float64)[:, 0].take(codes, out=found, mode="clip")  # no byte is out of range, and "raise" takes 4 times as long
    return found.view(np.float32)


# ------------------------------------------------------------------------------------------------------------- products


def times_transposed(x: Array, packed: Array, state: QuantState) -> Array:
    """x Wᵀ [n, out] in x's dtype: x [n, in], the codes of W [out, in]."""
    xp, n_out, tiles = xp_of(x, packed), state.shape[0], Tiles(packed, state)
    y = xp.empty((x.shape[0], n_out), x.dtype)

    def part(s: slice) -> None:
        for rows, w in tiles.rows(s):
            xp.matmul(x, w.astype(x.dtype, copy=False).T, out=y[:, rows])

    with one_blas_thread():  # each thread computes its own products
        split_rows(part, n_out, tiles.work(x.shape[0]))
    return y


def times(g: Array, packed: Array, state: QuantState) -> Array:
    """g W [..., in] in g's dtype, an array that nobody else holds: g [..., out], the codes of W [out, in]."""
    xp, (n_out, n_in), tiles = xp_of(g, packed), state.shape, Tiles(packed, state)
    made = xp.empty((*g.shape[:-1], n_in), g.dtype)
    g, d = g.reshape(-1, n_out), made.reshape(-1, n_in)
    if not tiles.column_unit:  # blocks run across rows, so that no columns share their absmax: row tiles are summed up
        d[...] = 0
        for rows, w in tiles.rows():
            d += matmul(g[:, rows], w.astype(g.dtype, copy=False))
        return made

    def part(s: slice) -> None:
        for columns, w in tiles.columns(s):
            xp.matmul(g, w.astype(g.dtype, copy=False), out=d[:, columns])

    with one_blas_thread():
        split_rows(part, n_in // tiles.column_unit, tiles.work(g.shape[0]))
    return made


def tile_size(n: int) -> int:
    """Rows (of `n`) of a tile: the tiles of all threads together are at most half of the weight."""
    return max(1, min(TILE, n // (2 * get_num_threads())))


class Tiles:
    """A quantized weight [out, in], read tile by tile as float32. The next tile of a thread overwrites its last one."""

    def __init__(self, packed: Array, state: QuantState):
        self.packed, self.state, self.xp = packed.reshape(-1), state, xp_of(packed)
        code = state.code
        self.scales = state.scales()  # [blocks] float32
        self.pairs = self.xp.stack([code.repeat(16), self.xp.tile(code, 16)], axis=1)  # [256, 2]: the numbers of each byte

    def work(self, n: int) -> int:
        """How many elements a product with n rows is worth, for `split_rows`; on a device none, it is not split.

        To dequantize a weight takes as long as 64 of its products.
        """
        return math.prod(self.state.shape) * max(1, n // 64) if self.xp is np else 0

    def read(self, out: Array, first: int) -> None:
        """Write the numbers from position `first` (where a block starts) on into the flat array `out`, in this thread."""
        size, stop = self.state.blocksize, first + out.size
        codes, absmax = self.packed[first // 2 : (stop + 1) // 2], self.scales[first // size : -(-stop // size)]
        full = out.size // size
        n = full * size
        unpack(out[:n].reshape(full, size), codes[: n // 2].reshape(full, size // 2), absmax[:full, None], self.pairs)
        if n < out.size:  # part of a block; an odd number of codes ends with one that stands for nothing
            out[n:] = _numbers(codes[n // 2 :], self.pairs).reshape(-1)[: out.size - n] * absmax[full:]

    def rows(self, part: slice | None = None) -> Iterator[tuple[slice, Array]]:
        """(rows, values [rows, in]) through a part of the rows, or all."""
        (n_out, n_in), size = self.state.shape, self.state.blocksize
        buffer = self.xp.empty(tile_size(n_out) * n_in + size, self.xp.float32)
        for rows in _pieces(part or slice(0, n_out), tile_size(n_out)):
            first = rows.start * n_in // size * size  # blocks run across rows: a tile may start inside of one
            values = buffer[: rows.stop * n_in - first]
            self.read(values, first)
            yield rows, values[rows.start * n_in - first :].reshape(-1, n_in)

    @property
    def column_unit(self) -> int:
        """A number of columns side by side that share their absmax in every row, at most a tile's; 0: no columns do."""
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
