"""The kernels of a device: forms of ops for CuPy's arrays, each of one launch or a few.

A GPU's time goes into launches and passes through memory. So an elementwise expression is one kernel; a row of a norm, of
attention's weights or of logits is the work of one block of threads; a product reads transposed factors where they lie;
and a gradient that such a kernel makes is added to the others by the kernel itself (`Sum`). Nothing here depends on the
order in which threads run, and nothing waits for the device.

A form equals its definition, to rounding, where the arrays have one dtype, float32 or float64; weights may be stored in
float16. Elsewhere the definition computes. Departure: ids and targets are not read beforehand, which would be to wait;
one that is out of range gives NaN. CuPy is imported, and a kernel compiled, when it is first called.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array
from . import checks as check
from . import ops
from .ops import _rows
from .tensor import Term, kernel, together


def device(of: Callable, alike: int = 1) -> Callable[[Callable], Callable]:
    """Register a form of an op for CuPy, where its first `alike` arrays have one dtype, float32 or float64."""

    def register(form: Callable) -> Callable:
        def chosen(*arrays: Any, **options: Any) -> tuple:
            kinds = {getattr(a, "dtype", None) for a in arrays[:alike]}
            return (form if kinds in FLOATS else of.definition)(*arrays, **options)

        kernel(of, "cupy")(chosen)
        return form

    return register


FLOATS = ({np.dtype(np.float32)}, {np.dtype(np.float64)})


class Sum(Term):
    """A gradient that a kernel adds to the others: `write(out, total)` makes out = total + gradient; None is 0."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Array, Array | None], Any]):
        self.write = write

    def alone(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The gradient, C-contiguous."""
        out = _cupy().empty(shape, dtype)
        self.write(out, None)
        return out

    def added(self, total: Array, owned: bool) -> Array:
        """total + the gradient, C-contiguous."""
        if not total.flags.c_contiguous:
            total, owned = total.copy(), True
        out = total if owned else _cupy().empty_like(total)
        self.write(out, total)
        return out


# ---------------------------------------------------------------------------------------------------------- building


@functools.cache
def _cupy() -> Any:
    return importlib.import_module("cupy")


@functools.cache
def _made(kind: str, *definition: Any) -> Callable:
    return getattr(_cupy(), kind)(*definition)


def elementwise(inputs: str, outputs: str, operation: str, name: str, preamble: str = "") -> Callable:
    """A CuPy ElementwiseKernel: `operation` for each element of inputs that broadcast."""
    return lambda *arrays: _made("ElementwiseKernel", inputs, outputs, operation, name, True, preamble)(*arrays)


def by_rows(name: str, rows: int, width: int, like: Array, other: Any, *arguments: Any) -> None:
    """Run a kernel of ROWS with one block of threads for each row; T is the dtype of `like`, W the dtype `other`."""
    if rows:
        threads = min(1024, -(-max(1, width) // 128) * 32)
        _row_kernel(name, like.dtype.char, np.dtype(other).char)((rows,), (threads,), arguments)


@functools.cache
def _row_kernel(name: str, T: str, W: str) -> Callable:
    return _row_module(T, W).get_function(name)


@functools.cache
def _row_module(T: str, W: str) -> Any:
    types = {"e": "float16", "f": "float", "d": "double", "?": "bool"}
    code = f"{FLOAT16}typedef {types[T]} T;\ntypedef {types[W]} W;\n{ROWS}"
    return _cupy().RawModule(code=code, options=("-std=c++17",))


FLOAT16 = """#include <cupy/carray.cuh>
#if __has_include(<cupy/float16.cuh>)  // CuPy 14
#include <cupy/float16.cuh>
#endif
"""
ROWS = r"""
#define EACH(j, n) for (long long j = threadIdx.x; j < n; j += blockDim.x)  // a row's elements, among the threads of a block

template <class F> __device__ T reduce(T v, T nothing, F f) {  // f over the block, in a fixed order; each thread gets it
    __shared__ T warps[32];
    for (int k = 16; k; k /= 2) v = f(v, __shfl_xor_sync(~0u, v, k));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : nothing;
    for (int k = 16; k; k /= 2) v = f(v, __shfl_xor_sync(~0u, v, k));
    __syncthreads();
    return v;
}
__device__ T sum(T v) { return reduce(v, 0, [](T a, T b) { return a + b; }); }

// y = (x - m) r w + b,  r = 1 / sqrt(mean((x - m)^2) + eps);  m = mean(x), or 0 without b
extern "C" __global__ void normalize(const T* x, const W* w, const W* b, double eps, long long d, T* y, T* mean, T* rstd) {
    x += blockIdx.x * d, y += blockIdx.x * d;
    T m = 0, v = 0;
    if (b) {
        EACH(j, d) m += x[j];
        m = sum(m) / d;
    }
    EACH(j, d) v += (x[j] - m) * (x[j] - m);
    T r = 1 / sqrt(sum(v) / d + T(eps));
    EACH(j, d) y[j] = (x[j] - m) * r * T(w[j]) + (b ? T(b[j]) : T(0));
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
}

// out = total + (h - mean(h) - n mean(h n)) r,  h = g w, n = (x - m) r;  without mean(h) where x was not centered
extern "C" __global__ void normalize_gradient(const T* x, const W* w, const T* g, const T* mean, const T* rstd, bool centered,
                                         long long d, const T* total, T* out) {
    x += blockIdx.x * d, g += blockIdx.x * d, out += blockIdx.x * d;
    if (total) total += blockIdx.x * d;
    T m = mean[blockIdx.x], r = rstd[blockIdx.x], h = 0, hn = 0;
    EACH(j, d) h += g[j] * T(w[j]), hn += g[j] * T(w[j]) * (x[j] - m) * r;
    h = centered ? sum(h) / d : T(0), hn = sum(hn) / d;
    EACH(j, d) out[j] = (total ? total[j] : T(0)) + (g[j] * T(w[j]) - h - (x[j] - m) * r * hn) * r;
}
"""

# -------------------------------------------------------------------------------------------------------- elementwise

silu = elementwise("T x", "T y", "y = x / (1 + exp(-x))", "silu")
silu_gradient = elementwise(
    "T g, T x", "T dx", "T s = 1 / (1 + exp(-x)); dx = g * (s + x * s * (1 - s))", "silu_gradient"
)


@device(ops.silu)
def _silu(x):
    return silu(x), lambda g: silu_gradient(g, x)


swiglu = elementwise("T gate, T up", "T y", "y = gate / (1 + exp(-gate)) * up", "swiglu")
swiglu_gradients = elementwise(
    "T g, T gate, T up", "T dgate, T dup",
    "T s = 1 / (1 + exp(-gate)), y = gate * s; dgate = g * up * (s + y * (1 - s)); dup = g * y", "swiglu_gradients",
)  # fmt: skip


@device(ops.swiglu, 2)
def _swiglu(gate, up):
    return swiglu(gate, up), *together(2, lambda g: swiglu_gradients(g, gate, up))


TANH = f"T c = {math.sqrt(2 / math.pi)}, k = 0.044715, t = tanh(c * (x + k * x * x * x)); "
gelu = elementwise("T x", "T y", TANH + "y = x * (1 + t) / 2", "gelu")
gelu_gradient = elementwise(
    "T g, T x", "T dx", TANH + "dx = g * (1 + t + x * (1 - t * t) * c * (1 + 3 * k * x * x)) / 2", "gelu_gradient"
)


@device(ops.gelu)
def _gelu(x):
    return gelu(x), lambda g: gelu_gradient(g, x)


# ------------------------------------------------------------------------------------------------------ normalization


@functools.cache
def _weight_gradient() -> Callable:
    """Σ_rows g n, n = (x - mean) rstd: [N, d] each, mean and rstd [N, 1] -> [d]."""
    return _cupy().ReductionKernel(
        "T g, T x, T mean, T rstd", "T dw", "g * (x - mean) * rstd", "a + b", "dw = a", "0", "norm_weight_gradient"
    )


@device(ops.layer_norm)
def _layer_norm(x, weight, bias, eps=1e-5):
    return _norm("layer_norm", x, eps, weight, bias)


@device(ops.rms_norm)
def _rms_norm(x, weight, eps=1e-6):
    return _norm("rms_norm", x, eps, weight, None)[:3]


def _norm(name: str, x: Array, eps: float, weight: Array, bias: Array | None) -> tuple:
    """Both norms, of three launches: forward, dx and dweight. Layer norm subtracts the mean, and adds a bias."""
    check.norm(name, x, weight=weight, **({"bias": bias} if bias is not None else {}))
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.astype(weight.dtype)
    xp, shape, x = _cupy(), x.shape, _contiguous(_rows(x))
    weight, (n, d), kind = _contiguous(weight), x.shape, weight.dtype
    y, mean, rstd = xp.empty(shape, x.dtype), xp.empty((n, 1), x.dtype), xp.empty((n, 1), x.dtype)
    by_rows("normalize", n, d, x, kind, x, weight, 0 if bias is None else _contiguous(bias), float(eps), d, y, mean, rstd)
    centered = bias is not None

    def dx(g):
        g = _contiguous(g)
        return Sum(
            lambda out, total: by_rows(
                "normalize_gradient", n, d, x, kind, x, weight, g, mean, rstd, centered, d, 0 if total is None else total, out
            )
        )

    return y, dx, lambda g: _weight_gradient()(_rows(g), x, mean, rstd, axis=0), lambda g: _rows(g).sum(axis=0)


def _contiguous(a: Array) -> Array:
    return a if a.flags.c_contiguous else a.copy()
