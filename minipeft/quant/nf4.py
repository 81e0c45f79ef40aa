"""NF4 and double quantization, as the QLoRA paper has them (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Each block of 64 weights is stored as its largest magnitude c and one four-bit code a weight, which names a point q of a
code book; NF4's 16 points are quantiles of the normal distribution (`codebooks.nf4_code`):

    c_b    = max |x_i|,  i in block b                      the block's scale, "absmax"                    [B]
    code_i = argmin_k |x_i / c_b - q_k|                                                                   [n]
    x_i   ~= q[code_i] c_b

Double quantization (eq. 6; our c, c2 are the paper's c2, c1) stores the scales minus their mean (as the text has it)
in blocks of 256, with eight-bit codes:

    c ~= q8[code8] c2 + mean(c)                            so that  x ~= q[code] (q8[code8] c2 + mean(c))

That is 4 + 32/64 = 4.5 bits a weight with plain float32 scales, and 4 + 8/64 + 32/(64 * 256) = 4.127 with double
quantization. These are the definitions; `kernels` computes the same bits faster, two codes to a byte.

Departures, all but 3 bitsandbytes' on the CPU (0.50), so that a weight next to a threshold gets its code:
1. A whole block is multiplied by the float32 reciprocal of c; a partial one, at the end, is divided by c.
2. A block is divided by max(c, 1e-38). A whole block still stores its own c, a partial one the raised c.
3. A GPU flushes subnormals (below 1.18e-38) to zero: there a block gets zero's codes if c, or for a whole block 1 / c,
   is subnormal.
4. q8 is the dynamic map (the paper: 8-bit floats), and code8 is found on a grid of 65536 steps: 2 in 1000 scales of
   normal weights get another point than the nearest, farther by at most a step (`eight_bits.quantize`).
"""

from __future__ import annotations

import numpy as np

from ..backend import Array, asarray, xp_of
from . import eight_bits
from .codebooks import thresholds

SMALLEST = 1e-38  # the least scale that a block is divided by; zero to a GPU
NESTED_BLOCKSIZE = 256  # scales that double quantization puts into a block
DESCRIPTION = 256  # bytes that a stored weight has beside its arrays: JSON padded to this


def quantize(x: Array, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Array, Array]:
    """(codes uint8 [n], c float32 [B]) of x [n], float32 or float16 and finite; B = ceil(n / blocksize)."""
    xp, n = xp_of(x), x.size
    midpoints, order = (asarray(a, xp) for a in thresholds(quant_type))
    blocks = in_blocks(x, blocksize)
    scaled, c = _divide(blocks, abs(blocks).max(axis=1), partial=n % blocksize > 0)  # [B, blocksize] in [-1, 1], [B]
    rank = xp.searchsorted(midpoints, scaled)  # argmin_k |scaled - q_k|: the nearest point's rank: midpoints below it
    return order.take(rank).reshape(-1)[:n], c  # order: rank -> code (NF4: the same)


def dequantize(codes: Array, c: Array, q: Array, blocksize: int = 64) -> Array:
    """q[code] c, float32 [n]: codes uint8 [n], c float32 [B], the code book q [16] or [256]."""
    return q.take(codes) * c.repeat(blocksize)[: codes.size]


def quantize_scales(c: Array) -> tuple[Array, Array, float]:
    """Double quantization: (codes uint8 [B], c2 float32 [ceil(B / 256)], mean) of c [B]."""
    mean = float(c.mean().item())
    codes, c2 = eight_bits.quantize(in_blocks(c - xp_of(c).float32(mean), NESTED_BLOCKSIZE))
    return codes.reshape(-1)[: c.size], c2, mean


def dequantize_scales(codes: Array, c2: Array, mean: float, q8: Array, blocksize: int = NESTED_BLOCKSIZE) -> Array:
    """q8[code8] c2 + mean, float32 [B]."""
    return dequantize(codes, c2, q8, blocksize) + xp_of(codes).float32(mean)


def storage_bytes(n: int, blocksize: int = 64, compress_statistics: bool = False) -> int:
    """The bytes of a weight of n numbers as a `Linear4bit` holds it: codes, scales, code books and description."""
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
    """1 / max(c, 1e-38), at most 2^127 (where a GPU makes 1e-38 zero; 0 * inf would be NaN)."""
    xp = xp_of(c)
    return xp.minimum(1 / xp.maximum(c, SMALLEST), 2.0**127)


def _divide(blocks: Array, c: Array, partial: bool) -> tuple[Array, Array]:
    """(blocks / c, c), as departures 1 and 2 say: where the last block is partial, with its c raised."""
    xp, scaled = xp_of(c), blocks * reciprocal(c)[:, None]
    if partial:
        smallest = asarray(np.array([SMALLEST], np.float32), xp)
        c = xp.concatenate([c[:-1], xp.where(c[-1:] <= SMALLEST, smallest, c[-1:])])
        scaled[-1] = xp.where(c[-1] > 0, blocks[-1] / c[-1], 0)  # c is not above 0: on a GPU
    return scaled, c
