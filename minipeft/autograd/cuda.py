"""How a device is asked to compute: a kernel made of CUDA's text, or a matrix product by cuBLAS.

    elementwise   y = f(x) for each element of arrays that broadcast
    rows          a block of threads for each row of the work
    product       alpha a @ b + beta out, one matrix or many; transposed factors are read where they lie

CuPy is imported, and a kernel compiled, when it is first called. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array


@functools.cache
def cupy() -> Any:
    """The module."""
    return importlib.import_module("cupy")


@functools.cache
def made(kind: str, *definition: Any) -> Callable:
    """cupy.kind(*definition), made once."""
    return getattr(cupy(), kind)(*definition)


def contiguous(a: Array) -> Array:
    """`a`, or a copy of it in C's order."""
    return a if a.flags.c_contiguous else a.copy()


# ------------------------------------------------------------------------------------------------------------ kernels

FLOAT16 = """#include <cupy/carray.cuh>
#if __has_include(<cupy/float16.cuh>)  // CuPy 14
#include <cupy/float16.cuh>
#endif
"""


def elementwise(inputs: str, outputs: str, operation: str, name: str, preamble: str = "") -> Callable:
    """A CuPy ElementwiseKernel: `operation` for each element of inputs that broadcast."""
    return lambda *arrays: made("ElementwiseKernel", inputs, outputs, operation, name, True, preamble)(*arrays)


ROWS = r"""
#define INFINITE T(__int_as_float(0x7f800000))
#define NOT_A_NUMBER T(__int_as_float(0x7fffffff))
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
__device__ T largest(T v) { return reduce(v, -INFINITE, [](T a, T b) { return max(a, b); }); }
"""


def rows(name: str, arguments: str, body: str, preamble: str = "") -> Callable[..., None]:
    """A kernel with a block of threads for each row: `kernel(like, other, blocks, width, *arguments)`.

    In its text T is the dtype of the array `like`, float32 or float64, and W the dtype `other`; EACH, `sum` and `largest`
    share a row of `width` elements among the threads of its block. `threads` and bytes of `shared` memory may be given.
    """

    @functools.cache
    def compiled(T: str, W: str) -> Any:
        types = {"e": "float16", "f": "float", "d": "double", "?": "bool"}
        head = f"{FLOAT16}typedef {types[T]} T;\ntypedef {types[W]} W;\n{ROWS}{preamble}"
        code = f'{head}\nextern "C" __global__ void {name}({arguments}) {{\n{body}\n}}'
        return cupy().RawKernel(code, name, ("-std=c++17",))

    def launch(like: Array, other: Any, blocks: int, width: int, *given: Any, threads: int = 0, shared: int = 0) -> None:
        if blocks:
            threads = threads or min(1024, -(-max(1, width) // 128) * 32)
            compiled(like.dtype.char, np.dtype(other).char)((blocks,), (threads,), given, shared_mem=shared)

    return launch


# ----------------------------------------------------------------------------------------------------------- products


def product(a: Array, b: Array, alpha: float = 1.0, out: Array | None = None, beta: float = 0.0) -> Array:
    """out = alpha a @ b + beta out, [..., n, k] @ [..., k, m] -> [..., n, m], of equal leading axes and one dtype.

    Transposed factors, and those that are parts of larger arrays, are read where they lie: to cuBLAS that is a flag.
    """
    (n, k), m, dtype = a.shape[-2:], b.shape[-1], a.dtype.char
    out = cupy().empty((*a.shape[:-1], m), dtype) if out is None else out
    if not (out.size and k):
        if not beta:
            out.fill(0)
        return out
    blas, handle, kind, compute = _blas(dtype)
    a, transposed_a, row_a, step_a = as_cublas_reads(a)
    b, transposed_b, row_b, step_b = as_cublas_reads(b)
    # [n, m], row by row, is to cuBLAS [m, n], column by column: outᵀ = bᵀ aᵀ
    first = handle(), transposed_b, transposed_a, m, n, k, _scalar(alpha, dtype)[1], b.data.ptr, kind, row_b
    then, last = (a.data.ptr, kind, row_a), (_scalar(beta, dtype)[1], out.data.ptr, kind, m)
    count = out.size // (n * m)
    if count == 1:
        blas.gemmEx(*first, *then, *last, compute, blas.CUBLAS_GEMM_DEFAULT)
    else:
        last = (*last, n * m, count, compute, blas.CUBLAS_GEMM_DEFAULT)
        blas.gemmStridedBatchedEx(*first, step_b, *then, step_a, *last)
    return out


def as_cublas_reads(x: Array) -> tuple[Array, int, int, int]:
    """(matrices [count, r, c], 1 where they are transposed, elements from row to row, and from matrix to matrix).

    They are a view of x [..., r, c], or a copy.
    """
    x = x.reshape(-1, *x.shape[-2:])  # a view where the matrices lie at equal distances
    (count, r, c), (step, down, right) = x.shape, (stride // x.itemsize for stride in x.strides)
    step = step if count > 1 else 0
    if step >= 0 and (right == 1 or c == 1) and (down >= c or r == 1):
        return x, 0, down if r > 1 else c, step
    if step >= 0 and (down == 1 or r == 1) and (right >= r or c == 1):
        return x, 1, right if c > 1 else r, step
    return x.copy(), 0, c, r * c


@functools.cache
def _blas(dtype: str) -> tuple[Any, Callable, int, int]:
    """cuBLAS, its handle, its numbers of the dtype and of how to compute: as CuPy does, in TF32 with CUPY_TF32=1."""
    blas, handle = cupy().cuda.cublas, cupy().cuda.device.get_cublas_handle
    if dtype == "d":
        return blas, handle, 1, blas.CUBLAS_COMPUTE_64F
    tf32 = int(os.environ.get("CUPY_TF32", "0")) > 0
    return blas, handle, 0, blas.CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else blas.CUBLAS_COMPUTE_32F


@functools.lru_cache(256)
def _scalar(value: float, dtype: str) -> tuple[Array, int]:
    array = np.array(value, dtype)
    return array, array.ctypes.data
