"""Four bits with bitsandbytes' names, bytes and files (0.50): a port of its `functional` for the CPU.

    quantize_4bit(A) = two codes to a byte [(n + 1) // 2, 1], and a QuantState; dequantize_4bit restores the numbers
    QuantState.as_dict, from_dict = what its files hold beside a weight

The arithmetic is that of `nf4`, and for double quantization that of `eight_bits`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from ..backend import Array, asarray, is_array, to_numpy, xp_of
from ..files import parse_json
from ..options import fits
from . import kernels, nf4
from .checks import QuantError, check_array, check_finite, check_options
from .codebooks import CODES_4BIT, dynamic_map


@cache
def _on(xp: ModuleType, book: Callable[[], np.ndarray]) -> Array:
    """A code book on the device of `xp`, one array for all that is quantized there."""
    return asarray(book(), xp)


@dataclass(frozen=True)
class QuantState:
    """What is needed besides the codes to restore the numbers (bitsandbytes' QuantState).

    absmax      [blocks] float32, or with double quantization [blocks] uint8: codes of absmax - offset
    shape       of the array that was quantized
    code        [16] or [256] float32: the code book, the number that each code stands for (in files: quant_map)
    blocksize   weights that share an absmax
    quant_type  "nf4", "fp4", "int4"; None for the 8-bit codes of a `state2`
    dtype       of the array that was quantized, and of the dequantized one
    offset      the mean that was taken off the absmax, and
    state2      how the rest was quantized; both None without double quantization
    """

    absmax: Array
    shape: tuple[int, ...]
    code: Array
    blocksize: int
    quant_type: str | None
    dtype: Any
    offset: float | None = None
    state2: QuantState | None = None

    nested = property(lambda self: self.state2 is not None)

    def scales(self) -> Array:
        """The absmax of each block, [blocks] float32, dequantized where it is quantized."""
        if self.state2 is None:
            return self.absmax
        inner = self.state2
        return nf4.dequantize_scales(self.absmax, inner.absmax, self.offset, inner.code, inner.blocksize)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries that bitsandbytes writes beside a weight; `packed` puts all that are not arrays in one, as JSON bytes.

        Keys when packed: absmax, quant_map, nested_absmax, nested_quant_map, quant_state.bitsandbytes__nf4.
        """
        arrays, inner = {"absmax": self.absmax, "quant_map": self.code}, self.state2
        rest = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        rest |= {"dtype": np.dtype(self.dtype).name, "shape": list(self.shape)}
        if inner is not None:
            arrays |= {"nested_absmax": inner.absmax, "nested_quant_map": inner.code}
            rest |= {"nested_blocksize": inner.blocksize, "nested_dtype": np.dtype(inner.dtype).name, "nested_offset": self.offset}
        if not packed:
            return arrays | rest
        text = json.dumps(rest).encode().ljust(nf4.DESCRIPTION)  # one length, whatever the digits of the offset
        described = asarray(np.frombuffer(text, np.uint8).copy(), xp_of(self.absmax))
        return arrays | {f"quant_state.bitsandbytes__{self.quant_type}": described}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> QuantState:
        """The state from what `as_dict`, or bitsandbytes, wrote (keys without the weight's name before them).

        A dtype of bfloat16 is read as float32, which NumPy has. Raises QuantError naming what is missing or contradictory.
        """
        entries = dict(entries)
        for key in [k for k in entries if k.startswith("quant_state.")]:
            try:
                entries = {**parse_json(bytes(to_numpy(entries.pop(key)))), **entries}
            except (ValueError, TypeError) as error:
                raise QuantError(f"{key} holds no JSON object: {error}") from error
            if key != f"quant_state.bitsandbytes__{entries.get('quant_type')}":
                raise QuantError(f"{key} holds the state of another type: {entries.get('quant_type')!r}")
        needed = ["absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"]
        double = ["nested_absmax", "nested_quant_map", "nested_blocksize", "nested_offset"]
        needed += double if any(k in entries for k in double) else []
        missing = [k for k in needed if k not in entries]
        if missing:
            raise QuantError(f"a quantization state lacks {', '.join(missing)}; it has {', '.join(sorted(entries)) or 'nothing'}")
        absmax, code, quant_type, blocksize, dtype, shape, *nested = (entries[k] for k in needed)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise QuantError(f"a quantization state's dtype must be float32, float16 or bfloat16, not {dtype!r}")
        dtype, float32 = np.dtype("float32" if dtype == "bfloat16" else dtype), np.dtype("float32")
        check_options(blocksize, quant_type)
        if not all(map(is_array, (absmax, code, *nested[:2]))):
            raise QuantError("the absmax and the quant_map of a quantization state are arrays")
        if not fits(shape, list[int]) or not all(size > 0 for size in shape):
            raise QuantError(f"the shape of a quantization state is a list of positive integers, not {shape!r}")
        state2, offset = None, None
        if nested:
            absmax2, code2, blocksize2, offset = nested
            check_options(blocksize2, quant_type, "nested_blocksize")
            if not fits(offset, float):
                raise QuantError(f"a quantization state's nested_offset must be a number, not {offset!r}")
            state2 = cls(absmax2, absmax.shape, code2, blocksize2, None, float32)
            offset = float(offset)
        state = cls(absmax, tuple(shape), code, blocksize, quant_type, dtype, offset, state2)
        state.check()
        return state

    def check(self, packed: Array | None = None, prefix: str = "") -> None:
        """Raises QuantError where the arrays do not fit each other, or `packed` is not what the shape needs."""
        n = math.prod(self.shape)
        if packed is not None and (packed.dtype != np.uint8 or packed.size != (n + 1) // 2):
            raise QuantError(
                f"4-bit codes of the shape {tuple(self.shape)} are {(n + 1) // 2} bytes of uint8; "
                f"the packed buffer holds {packed.size} of {packed.dtype}, of shape {packed.shape}"
            )
        absmax = self.absmax, -(-n // self.blocksize), "uint8" if self.nested else "float32"
        code = self.code, 16 if self.quant_type else 256, "float32"
        for name, (array, size, dtype) in {"absmax": absmax, "quant_map": code}.items():
            if array.shape != (size,) or array.dtype != dtype:
                raise QuantError(
                    f"{prefix}{name} must be [{size}] {dtype} for the shape {tuple(self.shape)} in blocks of {self.blocksize}, "
                    f"not {list(array.shape)} {array.dtype}"
                )
        if self.state2 is not None:
            self.state2.check(prefix="nested_")


def quantize_4bit(
    A: Array, blocksize: int = 64, quant_type: str = "nf4", compress_statistics: bool = False
) -> tuple[Array, QuantState]:
    """(packed uint8 [(n + 1) // 2, 1], state) of an array of n numbers; see `nf4`.

    Args:
        A: float32 or float16, of any shape, finite. Blocks run through it in C order, across rows.
        blocksize: 32, 64, 128, ..., 4096.
        quant_type: "nf4", "fp4" or, for comparison, "int4" (absmax to 7, rounded to the nearest integer).
        compress_statistics: double quantization.

    Raises QuantError for another dtype or block size, and for NaN or infinity.
    """
    check_options(blocksize, quant_type)
    check_array("quantize_4bit", A)
    xp = xp_of(A)
    with np.errstate(invalid="ignore"):  # of NaN and infinity, which are refused
        packed, absmax = kernels.quantize(A.reshape(-1), blocksize, quant_type)
    check_finite("quantize_4bit", absmax, blocksize)
    offset = state2 = None
    if compress_statistics:
        shape = absmax.shape
        absmax, absmax2, offset = nf4.quantize_scales(absmax)
        state2 = QuantState(absmax2, shape, _on(xp, dynamic_map), nf4.NESTED_BLOCKSIZE, None, absmax2.dtype)
    code = _on(xp, CODES_4BIT[quant_type])
    return packed.reshape(-1, 1), QuantState(absmax, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def dequantize_4bit(packed: Array, state: QuantState) -> Array:
    """The numbers that the codes stand for, in the shape and dtype that were quantized: code[codes] * absmax, in float32.

    Equal, bit for bit, to bitsandbytes'. Raises QuantError for a buffer or a state that do not fit each other.
    """
    state.check(packed)
    return kernels.dequantize(packed, state)
