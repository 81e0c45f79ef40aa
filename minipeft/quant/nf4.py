"""NF4 and double quantization, as the QLoRA paper has them (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Cut the weights into blocks of 64. Store each block's largest magnitude c, and for each weight the four-bit number of
the nearest of 16 points q:

    c_b    = max |x_i|,  i in block b                      the block's scale, "absmax"                    [B]
    code_i = argmin_k |x_i / c_b - q_k|                    of two equally near points the lower           [n]
    x_i   ~= q[code_i] c_b

    q: 0,  Q(1/2 + i d/8) for i = 1..8,  -Q(1/2 + i d/7) for i = 1..7,  divided by Q(1/2 + d), in ascending order

Q is the quantile function of N(0, 1) and d = 0.4677083, as in the authors' code: appendix E's table (`codebooks`).

Double quantization (eq. 6; the paper calls c c2, and c2 c1) stores the scales in eight bits: it subtracts their mean
and quantizes blocks of 256, with scales c2, to the points q8 (`codebooks.dynamic_map`):

    c ~= q8[code8] c2 + mean(c)                            so that  x ~= q[code] (q8[code8] c2 + mean(c))

Bits a weight, code books aside: 4 + 32/64 = 4.5, and 4 + 8/64 + 32/(64 * 256) = 4.127 with double quantization. Here a
code takes a byte. `kernels` packs two into one, the first in the high half, and gives the same codes faster.

Departures from the paper: 1. q is its table; its eq. 4, which averages neighboring quantiles, does not give that.
2. q8 is bitsandbytes' map (the paper: 8-bit floats). 3. Rounding at the edges is bitsandbytes', see `_divide`.
"""

from __future__ import annotations

import numpy as np

from ..backend import Array, asarray, to_numpy, xp_of
from . import eight_bits
from .checks import QuantError
from .codebooks import thresholds

SMALLEST = 1e-38  # the least scale that a block is divided by; a GPU's float arithmetic takes it for zero
NESTED_BLOCKSIZE = 256  # scales that double quantization puts into a block
DESCRIPTION = 256  # bytes that a stored weight has beside its arrays: JSON padded to this


def quantize(x: Array, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Array, Array]:
    """(codes uint8 [n], one a byte; c float32 [B]) of x [n], float32 or float16 and finite; B = ceil(n / blocksize)."""
    xp, n = xp_of(x), x.size
    midpoints, order = (asarray(a, xp) for a in thresholds(quant_type))  # [15], between neighboring points; [16]
    blocks = in_blocks(x, blocksize)
    scaled, c = _divide(blocks, abs(blocks).max(axis=1), partial=n % blocksize > 0)  # [B, blocksize] in [-1, 1], [B]
    rank = xp.searchsorted(midpoints, scaled)  # how many midpoints lie below: the rank of the nearest point
    return order.take(rank).reshape(-1)[:n], c  # rank -> code: for NF4 the same number


def dequantize(codes: Array, c: Array, q: Array, blocksize: int = 64) -> Array:
    """q[code] c, float32 [n]: codes uint8 [n], c float32 [B], the code book q [16] or [256]."""
    return q.take(codes) * c.repeat(blocksize)[: codes.size]


def quantize_scales(c: Array) -> tuple[Array, Array, float]:
    """Double quantization: (codes uint8 [B], c2 float32 [ceil(B / 256)], mean) of c [B].

    Raises QuantError where the sum of the scales is no float32 number.
    """
    host = to_numpy(c)  # a device adds in another order, and takes a small difference for zero
    with np.errstate(over="ignore"):
        mean = float(host.mean())
    if mean == np.inf:
        raise QuantError("the scales are too large for double quantization: their sum is above 3.4e38, a float32's limit")
    codes, c2 = eight_bits.quantize(in_blocks(asarray(host - np.float32(mean), xp_of(c)), NESTED_BLOCKSIZE))
    return codes.reshape(-1)[: c.size], c2, mean


def dequantize_scales(codes: Array, c2: Array, mean: float, q8: Array, blocksize: int = NESTED_BLOCKSIZE) -> Array:
    """q8[code8] c2 + mean, float32 [B]."""
    return dequantize(codes, c2, q8, blocksize) + xp_of(codes).float32(mean)


def storage_bytes(n: int, blocksize: int = 64, compress_statistics: bool = False) -> int:
    """The bytes of a weight of n numbers as a `Linear4bit` holds it: codes, scales, books, description."""
    B = -(-n // blocksize)
    scales = B + 4 * -(-B // NESTED_BLOCKSIZE) if compress_statistics else 4 * B
    return (n + 1) // 2 + scales + book_bytes(compress_statistics) + DESCRIPTION


def book_bytes(compress_statistics: bool = False) -> int:
    """The bytes of the code books: layers that are quantized together share them."""
    return 4 * (16 + 256 if compress_statistics else 16)


def in_blocks(x: Array, blocksize: int) -> Array:
    """x [n] as float32 [B, blocksize]; zeros fill up the last block."""
    xp = xp_of(x)
    blocks = xp.zeros((-(-x.size // blocksize), blocksize), xp.float32)
    blocks.reshape(-1)[: x.size] = x.reshape(-1)
    return blocks


def reciprocal(c: Array) -> Array:
    """1 / max(c, 1e-38); on a GPU 1e-38 is zero, and this is 2^127 in place of infinity."""
    xp = xp_of(c)
    return xp.minimum(1 / xp.maximum(c, SMALLEST), 2.0**127)


def _divide(blocks: Array, c: Array, partial: bool) -> tuple[Array, Array]:
    """(blocks / c, c), rounded as bitsandbytes 0.50 does on the CPU, so that a weight next to a midpoint gets its code.

    1. A whole block is multiplied by the float32 reciprocal of c; a partial one, at the end, is divided by c.
    2. c is raised to 1e-38 first. A whole block still stores its own c, a partial one the raised c.
    3. This definition, on a GPU, gives only the code of zero where c, or 1 / c of a whole block, is below 1.18e-38.
    """
    xp, scaled = xp_of(c), blocks * reciprocal(c)[:, None]
    if partial:
        smallest = asarray(np.array([SMALLEST], np.float32), xp)
        c = xp.concatenate([c[:-1], xp.where(c[-1:] <= SMALLEST, smallest, c[-1:])])
        scaled[-1] = xp.where(c[-1] > 0, blocks[-1] / c[-1], 0)  # false only on a GPU: see 3
    return scaled, c
