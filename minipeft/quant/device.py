"""Four and eight bits on a device: kernels that give the CPU's bytes, each function one launch."""

from __future__ import annotations

from .. import cuda_kernels as kernels
from ..backend import Array
from ..cuda import cupy


def quantize_4bit(
    x: Array, blocksize: int, midpoints: Array, order: Array, zero: int, smallest: float
) -> tuple[Array, Array]:
    """`quant.kernels.quantize`: (two codes to a byte, uint8 [(n + 1) // 2]; absmax float32 [blocks]) of x [n].

    midpoints float32 [15] and order uint8 [16] are `thresholds`; `zero` stands beside a last odd code; `smallest` is the
    least absmax that a block is divided by.
    """
    xp, size = cupy(), x.size
    absmax, packed = xp.empty(-(-size // blocksize), xp.float32), xp.empty((size + 1) // 2, xp.uint8)
    kernels.quantize_4bit(x, midpoints, order, size, blocksize, zero, smallest, absmax, packed, size=absmax.size)
    return packed, absmax


def dequantize_4bit(
    out: Array, packed: Array, code: Array, blocksize: int, absmax: Array,
    nested: tuple[Array, Array, int, float] | None = None,
) -> None:  # fmt: skip
    """Writes code[codes] * absmax, rounded to float32, into `out`, n numbers of any float dtype: one launch.

    packed uint8 [(n + 1) // 2]; absmax float32 [blocks], or with `nested` = (code2 [256], absmax2, blocksize2, offset)
    uint8 codes of it: absmax = code2[codes] * absmax2 + offset.
    """
    code2, absmax2, blocksize2, offset = nested or (code, code, 1, 0.0)
    shift = blocksize.bit_length() - 1  # block sizes are powers of two
    given = packed, code, absmax, code2, absmax2, out.size, shift, blocksize2, offset, out
    kernels.dequantize_4bit(*given, size=packed.size)


def quantize_8bit(blocks: Array, c: Array, steps: Array) -> Array:
    """`eight_bits.quantize`: codes uint8 [m, blocksize] of float32 blocks, whose largest magnitudes are c [m]; steps [65536]."""
    return kernels.quantize_8bit(blocks, c, steps, blocks.shape[1])
