"""How a device is asked to compute: a kernel made of CUDA's text, or a matrix product by cuBLAS.

    elementwise, pointwise   y = f(x) for each element of arrays that broadcast; pointwise: with the gradients of x
    total                    the sum of f(x) along axes
    rows                     a block of threads for each row of the work
    updates                  one update of each element of many arrays
    product                  alpha a @ b + beta out, one matrix or many; transposed factors are read where they lie

CuPy is imported, and a kernel compiled, when it is first called. Nothing here waits for the device. The kernels themselves
are in `cuda_kernels`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # cupy.ndarray


@functools.cache
def cupy() -> Any:
    """The module."""
    return importlib.import_module("cupy")


def contiguous(a: Array) -> Array:
    """`a`, or a copy of it in C's order."""
    return a if a.flags.c_contiguous else a.copy()


# ------------------------------------------------------------------------------------------------------------ kernels


def _made(kind: str, *definition: Any) -> Callable:
    """cupy.kind(*definition), made when it is first called."""
    make = functools.cache(lambda: getattr(cupy(), kind)(*definition))
    return lambda *arrays, **options: make()(*arrays, **options)


def elementwise(name: str, inputs: str, outputs: str, operation: str, preamble: str = "") -> Callable:
    """`operation` for each element of inputs that broadcast; where arrays are `raw`, `i` counts to the call's `size`."""
    return _made("ElementwiseKernel", inputs, outputs, operation, name, True, preamble)


def pointwise(name: str, inputs: str, y: str, gradients: str, preamble: str = "") -> tuple[Callable, Callable]:
    """(y of the inputs; given g = dL/dy and the inputs, the gradient d<x> of each input <x>)."""
    typed, several = (", ".join(f"T {d}{x}" for x in inputs.split()) for d in ("", "d"))
    value = elementwise(name, typed, "T y", f"{preamble} y = {y}")
    return value, elementwise(f"{name}_gradient", f"T g, {typed}", several, f"{preamble} {gradients}")


def total(name: str, inputs: str, output: str, summand: str) -> Callable:
    """The sum of `summand` along the `axis` of the call."""
    return _made("ReductionKernel", inputs, output, summand, "a + b", f"{output.split()[-1]} = a", "0", name)


def rows(include: str, head: str, name: str, arguments: str, body: str, preamble: str = "") -> Callable[..., None]:
    """A kernel with a block of threads for each row: `kernel(like, other, blocks, width, *arguments)`.

    In its text T is the dtype of the array `like`, float32 or float64, and W the dtype `other`; what stands in `head` lets
    the threads of a block share a row of `width` elements. `threads` and bytes of `shared` memory may be given.
    """

    @functools.cache
    def compiled(T: str, W: str) -> Any:
        types = {"e": "float16", "f": "float", "d": "double", "?": "bool"}
        text = f"{include}typedef {types[T]} T;\ntypedef {types[W]} W;\n{head}{preamble}"
        return cupy().RawKernel(f'{text}\nextern "C" __global__ void {name}({arguments}) {{\n{body}\n}}', name, ("-std=c++17",))

    def launch(like: Array, other: Any, blocks: int, width: int, *given: Any, threads: int = 0, shared: int = 0) -> None:
        if blocks:
            threads = threads or min(1024, -(-max(1, width) // 128) * 32)
            compiled(like.dtype.char, np.dtype(other).char)((blocks,), (threads,), given, shared_mem=shared)

    return launch


def updates(rows: Callable, head: str, name: str, columns: str, numbers: str, body: str) -> Callable[..., None]:
    """A kernel that runs `body` for each element of many arrays: `kernel(like, blocks, arrays, table, looked, n, **numbers)`.

    `columns` names what belongs together, such as a parameter and its gradient: its elements go by these names in `body`,
    and the `numbers` by theirs, all T's. table int64 [2 + columns, arrays] has of each array its first block of threads,
    its size, then every column's address: FIND and COLUMN of `head` read it. Nothing happens where one of the n float64
    numbers `looked` at is not finite.
    """
    typed = "".join(f", T {number}" for number in numbers.split())
    pointers = "".join(f"T* {c}_ = COLUMN({i}); " for i, c in enumerate(columns.split()))
    named = "".join(f"T& {c} = {c}_[i]; " for c in columns.split())
    look = "for (int k = 0; k < n; ++k) if (!isfinite(looked[k])) return;"
    text = f"{look}\nFIND\n{pointers}\nEACH(i, size) {{ {named}\n{body} }}"
    kernel = rows(name, f"const int64* table, int arrays, const double* looked, int n{typed}", text, head)

    def launch(like: Array, blocks: int, arrays: int, table: Array, looked: Array, n: int, **given: float) -> None:
        values = (like.dtype.type(given[number]) for number in numbers.split())
        kernel(like, like.dtype, blocks, 0, table, np.int32(arrays), looked, np.int32(n), *values, threads=256)

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
