"""Blockwise quantization: each block of weights is its largest magnitude and one short code a weight.

    absmax_b = max |x_i|,  i in block b
    code_i   = the point of the code book nearest to x_i / absmax_b          four bits, two codes to a byte
    x_i     ~= book[code_i] * absmax_b                                       the book is `QuantState.code`

With blocks of 64 and a float32 absmax that is 4 + 32/64 = 4.5 bits a weight. Double quantization stores the absmax
themselves in blocks: 8-bit codes of absmax - mean(absmax), 256 to a block, and one float32 for each such block:
4 + 8/64 + 32/(64 * 256) = 4.127 bits. Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Names, layout and bytes are those of bitsandbytes on the CPU (0.50): a first weight's code is the byte's high half, a last
odd one's partner is the code of zero. Its arithmetic, which decides the weights that lie next to a threshold: full blocks
are multiplied by the float32 reciprocal of their absmax, the partial block at the end is divided; no absmax counts as
less than 1e-38.

Quantizing counts thresholds, one comparison of a cache-sized block after another; dequantizing looks up both weights of a
byte at once, in a table of 256 pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..backend import Array, asarray, is_array, parallel_rows, split_rows, to_numpy, xp_of
from .codebooks import CODES_4BIT, dynamic_map, thresholds

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
SMALLEST = 1e-38  # the least absmax that a 4-bit block is divided by
PIECE = 1 << 16  # numbers looked up together: with their bytes widened to indices they stay in a core's cache


class QuantError(ValueError):
    """Something cannot be quantized, or a quantized buffer does not fit its description."""


@dataclass(frozen=True)
class QuantState:
    """What is needed besides the packed codes to have the numbers back (bitsandbytes' QuantState).

    absmax      [blocks] float32, or with double quantization [blocks] uint8: codes of absmax - offset
    shape       of the array that was quantized
    code        [16] or [256] float32: the code book, the number that each code stands for (in files: quant_map)
    blocksize   weights that share an absmax
    quant_type  "nf4", "fp4", "int4"; None for 8-bit codes
    dtype       of the array that was quantized, and will be of the dequantized one
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
        return dequantize_blockwise(self.absmax, self.state2) + xp_of(self.absmax).float32(self.offset)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries that bitsandbytes writes beside a weight; `packed` puts all that are not arrays in one, as JSON bytes.

        Keys when packed: absmax, quant_map, nested_absmax, nested_quant_map, quant_state.bitsandbytes__nf4.
        """
        arrays = {"absmax": self.absmax, "quant_map": self.code}
        rest = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": np.dtype(self.dtype).name,
            "shape": list(self.shape),
        }
        if self.state2 is not None:
            arrays |= {"nested_absmax": self.state2.absmax, "nested_quant_map": self.state2.code}
            rest |= {
                "nested_blocksize": self.state2.blocksize,
                "nested_dtype": np.dtype(self.state2.dtype).name,
                "nested_offset": self.offset,
            }
        if not packed:
            return arrays | rest
        text = json.dumps(rest).encode().ljust(256)  # one length for all layers of a shape, whatever their offset's digits
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
                rest = json.loads(bytes(to_numpy(entries.pop(key))))
                entries |= rest
            except (ValueError, TypeError) as error:
                raise QuantError(f"{key} holds no JSON object: {error}") from error
        nested = [k for k in ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_offset") if k in entries]
        needed = ["absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"]
        needed += ["nested_absmax", "nested_quant_map", "nested_blocksize", "nested_offset"] if nested else []
        missing = [k for k in needed if k not in entries]
        if missing:
            raise QuantError(f"a quantization state lacks {', '.join(missing)}; it has {', '.join(sorted(entries)) or 'nothing'}")
        dtype = "float32" if entries["dtype"] == "bfloat16" else entries["dtype"]
        if dtype not in ("float32", "float16"):
            raise QuantError(f"a quantization state's dtype must be float32, float16 or bfloat16, not {dtype!r}")
        _check_options(entries["blocksize"], entries["quant_type"])
        absmax, code = entries["absmax"], entries["quant_map"]
        state2 = offset = None
        if nested:
            offset, size = float(entries["nested_offset"]), absmax.size
            state2 = cls(entries["nested_absmax"], (size,), entries["nested_quant_map"], entries["nested_blocksize"], None, np.dtype("float32"))
        state = cls(absmax, tuple(entries["shape"]), code, entries["blocksize"], entries["quant_type"], np.dtype(dtype), offset, state2)
        state.check()
        return state

    def check(self, packed: Array | None = None) -> None:
        """Raises QuantError where the arrays do not fit each other, or `packed` is not what the shape needs."""
        n = int(np.prod(self.shape, dtype=np.int64))
        blocks, nested = -(-n // self.blocksize), self.state2 is not None
        if packed is not None and (packed.dtype != np.uint8 or packed.size != (n + 1) // 2):
            raise QuantError(
                f"4-bit codes of the shape {tuple(self.shape)} are {(n + 1) // 2} bytes of uint8; "
                f"the packed buffer holds {packed.size} of {packed.dtype}, of shape {packed.shape}"
            )
        wanted = [("absmax", self.absmax, blocks, "uint8" if nested else "float32"), ("quant_map", self.code, 16, "float32")]
        if self.state2 is not None:
            inner = self.state2
            wanted += [
                ("nested_absmax", inner.absmax, -(-blocks // inner.blocksize), "float32"),
                ("nested_quant_map", inner.code, 256, "float32"),
            ]
        for name, array, size, dtype in wanted:
            if array.shape != (size,) or array.dtype != dtype:
                raise QuantError(
                    f"{name} must be [{size}] {dtype} for the shape {tuple(self.shape)} in blocks of {self.blocksize}, "
                    f"not {list(array.shape)} {array.dtype}"
                )


# ------------------------------------------------------------------------------------------------------------ four bits


def quantize_4bit(
    A: Array, blocksize: int = 64, quant_type: str = "nf4", compress_statistics: bool = False
) -> tuple[Array, QuantState]:
    """(packed uint8 [(n + 1) // 2, 1], state) of an array of n numbers; see the module's docstring.

    Args:
        A: float32 or float16, of any shape, finite. Blocks run through it in C order, across rows.
        blocksize: 32, 64, 128, ..., 4096.
        quant_type: "nf4", "fp4" or, for comparison, "int4" (absmax to 7, rounded to the nearest integer).
        compress_statistics: double quantization.

    Raises QuantError for another dtype or block size, and for NaN or infinity.
    """
    _check_options(blocksize, quant_type)
    _check_array("quantize_4bit", A)
    xp, n, flat = xp_of(A), A.size, A.reshape(-1)
    midpoints, order = thresholds(quant_type)
    order = None if quant_type == "nf4" else asarray(order, xp)  # NF4's codes are in ascending order
    absmax = xp.empty(-(-n // blocksize), xp.float32)
    packed = xp.empty((n + 1) // 2, xp.uint8)
    full = n // blocksize
    blocks = flat[: full * blocksize].reshape(full, blocksize)
    codes = packed[: full * blocksize // 2].reshape(full, blocksize // 2)

    def block(s: slice) -> None:
        x = blocks[s].astype(xp.float32, copy=False)
        absmax[s] = _absmax(x)
        codes[s] = _pack(x * (1 / xp.maximum(absmax[s], xp.float32(SMALLEST)))[:, None], midpoints, order)

    with np.errstate(invalid="ignore"):  # of NaN and infinity, which are refused below
        parallel_rows(xp, block, full, blocksize)
        if full < absmax.size:
            tail = xp.zeros((n - full * blocksize + 1) // 2 * 2, xp.float32)  # an odd one has zero for its partner
            tail[: n - full * blocksize] = flat[full * blocksize :]
            absmax[full:] = xp.maximum(_absmax(tail[None]), xp.float32(SMALLEST))
            packed[full * blocksize // 2 :] = _pack(tail / absmax[full:], midpoints, order)
    _check_finite("quantize_4bit", absmax, blocksize)

    state = QuantState(absmax, A.shape, asarray(CODES_4BIT[quant_type](), xp), blocksize, quant_type, A.dtype)
    if compress_statistics:
        offset = float(absmax.mean().item())
        absmax8, state2 = quantize_blockwise(absmax - xp.float32(offset), blocksize=NESTED_BLOCKSIZE)
        state = QuantState(absmax8, A.shape, state.code, blocksize, quant_type, A.dtype, offset, state2)
    return packed.reshape(-1, 1), state


def dequantize_4bit(packed: Array, state: QuantState) -> Array:
    """The numbers that the codes stand for, in the shape and dtype that were quantized: book[code] * absmax, in float32.

    Equal, bit for bit, to bitsandbytes'. Raises QuantError for a buffer or a state that do not fit each other.
    """
    state.check(packed)
    xp, size, n = xp_of(packed), state.blocksize, int(np.prod(state.shape, dtype=np.int64))
    out, scales, pairs = xp.empty(n, state.dtype), state.scales(), byte_table(state.code)

    def run(blocks: slice) -> None:
        a, b = blocks.start * size, min(blocks.stop * size, n)
        dequantize_into(out[a:b], packed, size, scales, pairs, a)

    if xp is np:
        split_rows(run, -(-n // size), n)
    else:
        run(slice(0, -(-n // size)))
    return out.reshape(state.shape)


def byte_table(code: Array) -> Array:
    """[256] int64: for each byte its two numbers, float32 side by side, the high half's first."""
    xp = xp_of(code)
    return xp.stack([code.repeat(16), xp.tile(code, 16)], axis=1).view(xp.int64).reshape(-1)


def dequantize_into(out: Array, packed: Array, blocksize: int, scales: Array, pairs: Array, first: int = 0) -> None:
    """Write the numbers from position `first` (where a block starts) on into the flat array `out`, in this thread.

    `scales` is `state.scales()`, `pairs` `byte_table(state.code)`: a caller with many parts to write has them once.
    """
    xp, size, stop = xp_of(packed), blocksize, first + out.size
    codes, absmax = packed.reshape(-1)[first // 2 : (stop + 1) // 2], scales[first // size : -(-stop // size)]
    full = out.size // size
    n = full * size
    unpack(out[:n].reshape(full, size), codes[: n // 2].reshape(full, size // 2), absmax[:full, None], pairs)
    if n < out.size:  # part of a block; an odd number of codes ends with one that stands for nothing
        out[n:] = pairs.take(codes[n // 2 :]).view(xp.float32)[: out.size - n] * absmax[full:]


def unpack(out: Array, codes: Array, scales: Array, pairs: Array) -> None:
    """out [R, C] = book[codes] * scales: codes [R, C/2] bytes; scales [R, S], each of C/S neighbours in a row."""
    xp, (rows, runs), width = xp_of(codes), scales.shape, out.shape[1] // max(1, scales.shape[1])
    pieces = math.ceil(out.size / PIECE) if xp is np else 1
    step = max(1, math.ceil(rows / max(1, pieces)))
    for i in range(0, rows, step):
        s = slice(i, min(i + step, rows))
        values, into = pairs.take(codes[s]).view(xp.float32), out[s].reshape(-1, runs, width)
        xp.multiply(values.reshape(into.shape), scales[s, :, None], out=into, casting="same_kind")
        del values  # before the next are made


def _absmax(x: Array) -> Array:
    """The largest magnitude of each row; not below infinity where a row holds infinity or NaN."""
    xp = xp_of(x)
    bits = x.view(xp.int32) & 0x7FFFFFFF  # magnitudes, as integers, are ordered as the floats are, and compared faster
    return bits.max(axis=1).view(xp.float32)


def _pack(x: Array, midpoints: tuple[float, ...], order: Array | None) -> Array:
    """[..., 2 k] numbers in [-1, 1] -> [..., k] bytes, the first of two codes in the high half."""
    xp = xp_of(x)
    rank = xp.zeros(x.shape, xp.uint8)
    for midpoint in midpoints:
        rank += (x > midpoint).view(xp.uint8)
    codes = rank if order is None else order.take(rank)
    two = codes.view(xp.uint16)  # little-endian: the first code is the low byte
    return (two << 4 | two >> 8).astype(xp.uint8)


# ----------------------------------------------------------------------------------------------------------- eight bits


def quantize_blockwise(A: Array, blocksize: int = 4096) -> tuple[Array, QuantState]:
    """(codes uint8 of A's shape, state): 8-bit codes of the dynamic map (bitsandbytes' quantize_blockwise).

    As bitsandbytes does on the CPU, x * (1 / absmax) is rounded to the nearest of 65536 even steps of [-1, 1] and the
    step's nearest point is taken. In a block whose absmax has no finite reciprocal a number above zero is 1, any other code 0.
    Raises QuantError for a dtype other than float32 or float16, and for NaN or infinity. Source: Dettmers et al. 2022,
    "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861, section 2.1).
    """
    _check_array("quantize_blockwise", A)
    if not isinstance(blocksize, int) or blocksize < 1:
        raise QuantError(f"blocksize must be a positive integer, not {blocksize!r}")
    xp, n = xp_of(A), A.size
    absmax = xp.empty(-(-n // blocksize), xp.float32)
    blocks = xp.zeros((absmax.size, blocksize), xp.float32)
    blocks.reshape(-1)[:n] = A.reshape(-1)
    codes = xp.empty(blocks.shape, xp.uint8)
    steps = asarray(_steps(), xp)

    def block(s: slice) -> None:
        absmax[s] = _absmax(blocks[s])
        usable = absmax[s] > 2.0**-128
        x = blocks[s] * (1 / xp.where(usable, absmax[s], 1))[:, None]
        at = (xp.clip(x, -1, 1) + 1) * 0.5 * 65535 + 0.5
        codes[s] = xp.where(usable[:, None], steps.take(at.astype(xp.int32)), (x > 0) * xp.uint8(255))

    with np.errstate(invalid="ignore"):
        if bool(xp.isfinite(blocks).all().item()):
            parallel_rows(xp, block, absmax.size, blocksize)
        else:
            raise QuantError("quantize_blockwise: the array holds NaN or infinity; only finite numbers can be quantized")
    codes = codes.reshape(-1)[:n].reshape(A.shape)
    return codes, QuantState(absmax, A.shape, asarray(dynamic_map(), xp), blocksize, None, A.dtype)


def dequantize_blockwise(codes: Array, state: QuantState) -> Array:
    """book[code] * absmax, in the state's dtype and the codes' shape. Raises QuantError for codes that do not fit."""
    size = state.blocksize
    blocks = -(-codes.size // size)
    if codes.dtype != np.uint8 or state.absmax.shape != (blocks,):
        raise QuantError(
            f"8-bit codes of shape {codes.shape} and dtype {codes.dtype} do not fit a state of {state.absmax.size} blocks of {size}: "
            f"uint8 and {blocks} blocks are needed"
        )
    values = state.code.take(codes.reshape(-1))
    values *= state.absmax.repeat(size)[: codes.size]
    return values.reshape(codes.shape).astype(state.dtype, copy=False)


@cache
def _steps() -> np.ndarray:
    """[65536] uint8: the code nearest to -1 + 2 i / 65535."""
    code = dynamic_map()
    midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    values = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_options(blocksize: Any, quant_type: Any) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise QuantError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, not {blocksize!r}")
    if quant_type not in CODES_4BIT:
        raise QuantError(f"quant_type must be one of {', '.join(CODES_4BIT)}, not {quant_type!r}")


def _check_array(name: str, A: Any) -> None:
    if not is_array(A):
        raise QuantError(f"{name} takes an array, not {type(A).__name__}")
    if A.dtype not in (np.float32, np.float16):
        raise QuantError(f"{name} takes float32 or float16, not {A.dtype}: convert it first, x.astype('float32')")
    if A.size == 0:
        raise QuantError(f"{name}: an array of shape {A.shape} holds nothing to quantize")


def _check_finite(name: str, absmax: Array, blocksize: int) -> None:
    bad = ~xp_of(absmax).isfinite(absmax)
    if bool(bad.any().item()):
        first = int(bad.argmax().item()) * blocksize
        raise QuantError(f"{name}: the array holds NaN or infinity among its elements {first} to {first + blocksize - 1}; only finite numbers can be quantized")
