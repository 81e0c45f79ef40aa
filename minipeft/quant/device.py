"""Four and eight bits on a device: CUDA that gives the CPU's bytes, each function one launch.

CuPy compiles with -ftz=true: float arithmetic takes subnormal numbers (below 1.18e-38) for zero. What must give the
CPU's bytes for them, too, goes through float64, where they are normal: `wide` reads one, `narrow` rounds to one. A product
or a quotient of two floats that is computed in float64 and then rounded to a float is the float that one rounding gives.
"""

from __future__ import annotations

from collections.abc import Callable

from ..autograd.cuda import cupy, made
from ..backend import Array

_SUBNORMAL = """
__device__ double wide(float x) {
    const unsigned m = __float_as_uint(x) & 0x7fffffff;
    return m == 0 || m >= 0x00800000 ? (double)x : (__float_as_uint(x) >> 31 ? -1.0 : 1.0) * m * 1.401298464324817e-45;  // 2^-149
}
__device__ float narrow(double x) {
    if (!(fabs(x) < 1.1754943508222875e-38)) return (float)x;  // 2^-126
    return __uint_as_float((unsigned)rint(fabs(x) * 7.1362384635298e44) | (x < 0 ? 0x80000000u : 0));
}
__device__ float product(float a, float b) {
    const float p = a * b;
    return a == 0 || fabsf(p) >= 1.17549435e-38f ? p : narrow(wide(a) * wide(b));
}
"""


def _few_bits(name: str, inputs: str, outputs: str, body: str) -> Callable:
    return made("ElementwiseKernel", inputs, outputs, body, name, True, _SUBNORMAL)


def quantize_4bit(
    x: Array, blocksize: int, midpoints: Array, order: Array, zero: int, smallest: float
) -> tuple[Array, Array]:
    """`quant.kernels.quantize`: (two codes to a byte, uint8 [(n + 1) // 2]; absmax float32 [blocks]) of x [n].

    midpoints float32 [15] and order uint8 [16] are `thresholds`; `zero` stands beside a last odd code; `smallest` is the
    least absmax that a block is divided by.
    """
    xp, size = cupy(), x.size
    absmax, packed = xp.empty(-(-size // blocksize), xp.float32), xp.empty((size + 1) // 2, xp.uint8)
    kernel = _few_bits(
        "quantize_4bit",
        "raw T x, raw float32 midpoints, raw uint8 order, int64 size, int64 blocksize, uint8 zero, float32 smallest",
        "raw float32 absmax, raw uint8 packed",
        """
        const long long first = i * blocksize, end = min(first + blocksize, size);
        const bool whole = end - first == blocksize;
        unsigned top = 0;  // magnitudes, as integers, are ordered as the floats are
        for (long long j = first; j < end; ++j) top = max(top, __float_as_uint((float)x[j]) & 0x7fffffff);
        const double c = wide(__uint_as_float(max(top, __float_as_uint(smallest))));
        absmax[i] = whole ? __uint_as_float(top) : narrow(c);
        const double reciprocal = wide(narrow(1 / c));
        for (long long j = first; j < end; j += 2) {
            unsigned char byte = 0;
            for (long long k = j; k < j + 2; ++k) {
                unsigned char code = zero;
                if (k < end) {
                    const double scaled = wide(narrow(whole ? wide((float)x[k]) * reciprocal : wide((float)x[k]) / c));
                    int rank = 0;
                    for (int m = 0; m < 15; ++m) rank += scaled > midpoints[m];
                    code = order[rank];
                }
                byte = byte << 4 | code;
            }
            packed[j / 2] = byte;
        }
        """,
    )  # fmt: skip
    kernel(x, midpoints, order, size, blocksize, zero, smallest, absmax, packed, size=absmax.size)
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
    kernel = _few_bits(
        "dequantize_4bit",
        "raw uint8 packed, raw float32 code, raw S absmax, raw float32 code2, raw float32 absmax2, int64 size, int32 shift, "
        "uint32 blocksize2, float32 offset",
        "raw T out",
        """
        const unsigned block = 2 * i >> shift;
        float c = absmax[block];
        if (sizeof(S) == 1)
            c = narrow(wide(narrow(code2[(int)c] * wide(absmax2[block / blocksize2]))) + wide(offset));
        out[2 * i] = (T)product(code[packed[i] >> 4], c);
        if (2 * i + 1 < size) out[2 * i + 1] = (T)product(code[packed[i] & 15], c);
        """,
    )  # fmt: skip
    shift = blocksize.bit_length() - 1  # block sizes are powers of two
    kernel(packed, code, absmax, code2, absmax2, out.size, shift, blocksize2, offset, out, size=packed.size)


def quantize_8bit(blocks: Array, c: Array, steps: Array) -> Array:
    """`eight_bits.quantize`: codes uint8 [m, blocksize] of float32 blocks, whose largest magnitudes are c [m]; steps [65536]."""
    kernel = _few_bits(
        "quantize_8bit", "float32 x, raw float32 c, raw uint8 steps, int64 blocksize", "uint8 code",
        """
        const double top = wide(c[i / blocksize]), value = wide(x);
        if (top > 2.938735877055719e-39) {  // 2^-128
            const float scaled = fminf(fmaxf((float)(value * wide(narrow(1 / top))), -1), 1) + 1;
            code = steps[(int)((float)(scaled * 32767.5) + 0.5f)];  // a product in float64 is not fused with the sum
        } else {
            code = value > 0 ? 255 : 0;
        }
        """,
    )  # fmt: skip
    return kernel(blocks, c, steps, blocks.shape[1])
