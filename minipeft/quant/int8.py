"""Plain absmax quantization to eight bits, a scale for each row: what four bits are compared with.

    code = round(127 x / absmax),  absmax = max |x| over the row;   x ~= code * absmax / 127

Source: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 2); names as in bitsandbytes. A row of zeros has the
scale 0 and the codes 0.
"""

from __future__ import annotations

from ..backend import Array, xp_of
from .blockwise import QuantError, _check_array


def int8_vectorwise_quant(A: Array) -> tuple[Array, Array]:
    """(codes int8 of A's shape, absmax float32 [rows]) of A [..., d]. Raises QuantError for NaN or infinity."""
    _check_array("int8_vectorwise_quant", A)
    xp = xp_of(A)
    x = A.reshape(-1, A.shape[-1]).astype(xp.float32, copy=False)
    absmax = abs(x).max(axis=1)
    if not bool(xp.isfinite(absmax).all().item()):
        raise QuantError("int8_vectorwise_quant: the array holds NaN or infinity; only finite numbers can be quantized")
    scale = xp.float32(127) / xp.where(absmax > 0, absmax, 1)
    return xp.rint(x * scale[:, None]).astype(xp.int8).reshape(A.shape), absmax


def int8_vectorwise_dequant(codes: Array, absmax: Array) -> Array:
    """codes * absmax / 127 in float32; codes [..., d], absmax [rows]. Raises QuantError for shapes that do not fit."""
    xp = xp_of(codes, absmax)
    rows = codes.reshape(-1, codes.shape[-1])
    if codes.dtype != xp.int8 or absmax.shape != (rows.shape[0],):
        raise QuantError(f"int8 codes of shape {codes.shape} and dtype {codes.dtype} do not fit scales of shape {absmax.shape}")
    return (rows * (absmax / xp.float32(127))[:, None]).reshape(codes.shape)
