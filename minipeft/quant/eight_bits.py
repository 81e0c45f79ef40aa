"""Eight bits a number, in blocks: for the scales of double quantization, and for Adam's moments.

    code = the point of `codebooks.dynamic_map` nearest to x / c,    c = max |x| over the block

Source: "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2022, arXiv:2110.02861, section 2.1).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..backend import Array, asarray, xp_of
from . import device
from .codebooks import dynamic_map


def quantize(blocks: Array, signed: bool = True) -> tuple[Array, Array]:
    """(codes uint8 [m, blocksize], c float32 [m]) of finite blocks float32 [m, blocksize], by `dynamic_map(signed)`.

    As bitsandbytes does on the CPU, x * (1 / c) is rounded to the nearest of 65536 even steps of [-1, 1] and the step's
    nearest point is taken. In a block whose c has no finite reciprocal a number above zero has code 255, any other 0.
    """
    xp = xp_of(blocks)
    c = (blocks.view(xp.int32) & 0x7FFFFFFF).max(axis=1).view(xp.float32)  # as integers, magnitudes are ordered the same
    if xp.__name__ == "cupy":
        return device.quantize_8bit(blocks, c, xp.asarray(_steps(signed))), c
    usable = c > 2.0**-128
    scaled = blocks * (1 / xp.where(usable, c, 1))[:, None]
    xp.fmin(xp.fmax(scaled, -1, out=scaled), 1, out=scaled)  # NaN, which c keeps, becomes -1: no index outside
    scaled += 1
    scaled *= 65535 / 2
    scaled += 0.5
    codes = asarray(_steps(signed), xp).take(scaled.astype(xp.intp))
    return xp.where(usable[:, None], codes, (blocks > 0) * xp.uint8(255)), c


@cache
def _steps(signed: bool) -> np.ndarray:
    """[65536] uint8: the code nearest to -1 + 2 i / 65535."""
    code = dynamic_map(signed)
    midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    values = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)
