"""NF4 and double quantization, as the QLoRA paper has them (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Each block of 64 weights is stored as its largest magnitude c and one four-bit code a weight, which names a point q of a
code book; NF4's 16 points are quantiles of the normal distribution (`codebooks.nf4_code`):

    c_b    = max |x_i|,  i in block b                      the block's scale, "absmax"                    [blocks]
    code_i = argmin_k |x_i / c_b - q_k|                                                                   [n]
    x_i   ~= q[code_i] c_b

Double quantization stores the scales in the same way: minus their mean, in blocks of 256, with eight-bit codes.

    c ~= q8[code8] c2 + mean(c)                            so that  x ~= q[code] (q8[code8] c2 + mean(c))   (eq. 6)

That is 4 + 32/64 = 4.5 bits a weight with plain float32 scales, and 4 + 8/64 + 32/(64 * 256) = 4.127 with double
quantization. These are the definitions; `kernels` computes the same bits faster, two codes to a byte.

Departures, all of arithmetic and all bitsandbytes' on the CPU (0.50), so that a weight next to a threshold gets its code:
1. A whole block is multiplied by the float32 reciprocal of c; a partial one, at the end, is divided by c.
2. No c counts as less than 1e-38; a partial block's is stored as that, too.
3. A GPU's kernels take numbers below 1.2e-38 for zero: there a block has the codes of zeros where c, or in a whole block
   1 / c, is below that.
"""

from __future__ import annotations

import numpy as np

from ..backend import Array, asarray, xp_of
from . import eight_bits
from .codebooks import thresholds

SMALLEST = 1e-38  # the least scale that a block is divided by; zero to a GPU
NESTED_BLOCKSIZE = 256  # scales that double quantization puts into a block
DESCRIPTION = 256  # bytes of JSON that a stored weight has beside its arrays


def quantize(x: Array, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Array, Array]:
    """(codes uint8 [n], c float32 [blocks]) of x [n], float32 or float16 and finite."""
    xp, n = xp_of(x), x.size
    midpoints, order = (asarray(a, xp) for a in thresholds(quant_type))
    blocks = in_blocks(x, blocksize)  # [blocks, blocksize]
    c = abs(blocks).max(axis=1)  # [blocks]
    scaled = _divide(blocks, c, partial=n % blocksize > 0)  # in [-1, 1]
    rank = xp.searchsorted(midpoints, scaled)  # of the nearest point: how many midpoints between points lie below
    return order.take(rank).reshape(-1)[:n], c


def dequantize(codes: Array, c: Array, q: Array, blocksize: int = 64) -> Array:
    """q[code] c, float32 [n]: codes uint8 [n], c float32 [blocks], the code book q [16] or [256]."""
    return q.take(codes) * c.repeat(blocksize)[: codes.size]


def quantize_scales(c: Array) -> tuple[Array, Array, float]:
    """Double quantization: (codes uint8 [blocks], c2 float32 [ceil(blocks / 256)], mean) of c [blocks]."""
    mean = float(c.mean().item())
    codes, c2 = eight_bits.quantize(in_blocks(c - xp_of(c).float32(mean), NESTED_BLOCKSIZE))
    return codes.reshape(-1)[: c.size], c2, mean


def dequantize_scales(codes: Array, c2: Array, mean: float, q8: Array, blocksize: int = NESTED_BLOCKSIZE) -> Array:
    """q8[code8] c2 + mean, float32 [blocks]."""
    return dequantize(codes, c2, q8, blocksize) + xp_of(codes).float32(mean)


def storage_bytes(n: int, blocksize: int = 64, compress_statistics: bool = False) -> int:
    """The bytes of a weight of n numbers as a `Linear4bit` holds it: codes, scales, code books and description."""
    blocks = -(-n // blocksize)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) if compress_statistics else 4 * blocks
    return (n + 1) // 2 + scales + book_bytes(compress_statistics) + DESCRIPTION


def book_bytes(compress_statistics: bool = False) -> int:
    """The bytes of the code books: layers that are quantized together share them."""
    return 4 * (16 + 256 if compress_statistics else 16)


def in_blocks(x: Array, blocksize: int) -> Array:
    """x [n] as float32 [blocks, blocksize]; zeros fill up the last block."""
    xp = xp_of(x)
    blocks = xp.zeros((-(-x.size // blocksize), blocksize), xp.float32)
    blocks.reshape(-1)[: x.size] = x.reshape(-1)
    return blocks


def reciprocal(c: Array) -> Array:
    """1 / c, of no c less than 1e-38; where a GPU takes that for zero it stays finite, so that 0 * (1 / c) is 0."""
    xp = xp_of(c)
    return xp.minimum(1 / xp.maximum(c, SMALLEST), 2.0**127)


def _divide(blocks: Array, c: Array, partial: bool) -> Array:
    """blocks / c, as departures 1 and 2 say; the c of a partial block, the last, is raised to 1e-38 in place."""
    xp, scaled = xp_of(c), blocks * reciprocal(c)[:, None]
    if partial:
        c[-1:] = xp.where(c[-1:] <= SMALLEST, asarray(np.array([SMALLEST], np.float32), xp), c[-1:])
        scaled[-1] = xp.where(c[-1] > 0, blocks[-1] / c[-1], 0)  # c is not above 0: on a GPU
    return scaled
