"""What can be quantized, and how; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, is_array, xp_of
from .codebooks import CODES_4BIT

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class QuantError(ValueError):
    """Something cannot be quantized, or a quantized buffer does not fit its description."""


def check_options(blocksize: Any, quant_type: Any, name: str = "blocksize") -> None:
    """Raises QuantError for a block size or a type of four bits that there is not."""
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise QuantError(f"{name} must be one of {', '.join(map(str, BLOCKSIZES))}, not {blocksize!r}")
    if not isinstance(quant_type, str) or quant_type not in CODES_4BIT:
        raise QuantError(f"quant_type must be one of {', '.join(CODES_4BIT)}, not {quant_type!r}")


def check_array(name: str, A: Any) -> None:
    """Raises QuantError for what the function `name` does not quantize; its values are not looked at."""
    if not is_array(A):
        raise QuantError(f"{name} takes an array, not {type(A).__name__}")
    if A.dtype not in (np.float32, np.float16):
        raise QuantError(f"{name} takes float32 or float16, not {A.dtype}: convert it first, x.astype('float32')")
    if A.size == 0:
        raise QuantError(f"{name}: an array of shape {A.shape} holds nothing to quantize")


def check_finite(name: str, values: Array, each: int) -> None:
    """Raises QuantError where one of `values` is NaN or infinite, naming the `each` elements that it stands for."""
    bad = ~xp_of(values).isfinite(values)
    if bool(bad.any().item()):
        first = int(bad.argmax().item()) * each
        where = f"its elements {first} to {first + each - 1}"
        raise QuantError(f"{name}: the array holds NaN or infinity among {where}; only finite numbers can be quantized")
