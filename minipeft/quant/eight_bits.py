"""Eight bits a number: the dynamic map for blocks, which double quantization uses, and plain rounding for rows.

    dynamic map      code = the point of `codebooks.dynamic_map` nearest to x / c,    c = max |x| over the block
    int8 by rows     code = round(127 x / c),    x ~= code c / 127,                   c = max |x| over the row

Sources: "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2022, arXiv:2110.02861, section 2.1); LLM.int8()
(Dettmers et al. 2022, arXiv:2208.07339, section 2), with which four bits are compared. Names are bitsandbytes'.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..backend import Array, asarray, xp_of
from . import device
from .checks import QuantError, check_array, check_finite
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


def int8_vectorwise_quant(A: Array) -> tuple[Array, Array]:
    """(codes int8 of A's shape, absmax float32 [rows]) of A [..., d], float32 or float16: round(127 A / absmax).

    A row of zeros has absmax 0 and the codes 0. Raises QuantError for another dtype, and for NaN or infinity.
    """
    check_array("int8_vectorwise_quant", A)
    xp = xp_of(A)
    x = A.reshape(-1, A.shape[-1]).astype(xp.float32, copy=False)
    absmax = abs(x).max(axis=1)
    check_finite("int8_vectorwise_quant", absmax, A.shape[-1])
    scale = xp.float32(127) / xp.where(absmax > 0, absmax, 1)
    return xp.rint(x * scale[:, None]).astype(xp.int8).reshape(A.shape), absmax


def int8_vectorwise_dequant(codes: Array, absmax: Array) -> Array:
    """codes * absmax / 127 in float32; codes [..., d], absmax [rows]. Raises QuantError for shapes that do not fit."""
    xp = xp_of(codes, absmax)
    rows = codes.reshape(-1, codes.shape[-1])
    if codes.dtype != xp.int8 or absmax.shape != (rows.shape[0],):
        raise QuantError(f"int8 codes of shape {codes.shape} and dtype {codes.dtype} do not fit scales of shape {absmax.shape}")
    return (rows * (absmax / xp.float32(127))[:, None]).reshape(codes.shape)
