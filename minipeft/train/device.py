"""Updates of many arrays in one launch: their addresses go to the device as a table, and each block of threads finds its own.

    table      first block of threads of each array · its size · then, a column after the other, the arrays' addresses

What costs on a device is to launch a kernel, and a model has hundreds of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..autograd.cuda import cupy, made
from ..backend import Array, xp_of
from .finite import Finite

CHUNK = 1 << 14  # elements that a block of threads works on
THREADS = 256

_FIND = """
    int a = 0, end = arrays;  // the array this block works on: the last one that begins at this block or before it
    while (end - a > 1) {
        const int middle = (a + end) / 2;
        if (table[middle] <= (long long)blockIdx.x) a = middle; else end = middle;
    }
    const long long first = ((long long)blockIdx.x - table[a]) * CHUNK;
    const int n = (int)min(table[arrays + a] - first, (long long)CHUNK);
"""


def _raw(name: str, dtype: Any, arguments: str, body: str) -> Callable:
    number = {"f": "float", "d": "double"}[dtype.char]
    code = f'typedef {number} T;\n#define CHUNK {CHUNK}\n#define THREADS {THREADS}\nextern "C" __global__ void {name}({arguments}) {{{body}}}'
    return made("RawKernel", code, name)


def _table(columns: Sequence[Sequence[Array]]) -> tuple[Array, int]:
    """(table int64 on the device, blocks): of each array its first block and its size; then every column's addresses."""
    sizes = np.array([a.size for a in columns[0]], np.int64)
    blocks = -(-sizes // CHUNK)
    addresses = [[a.data.ptr for a in column] for column in columns]
    table = np.array([np.cumsum(blocks) - blocks, sizes, *addresses], np.int64)
    return cupy().asarray(table), int(blocks.sum())


def fits(arrays: Sequence[Array]) -> bool:
    """Whether `for_each` takes arrays such as these: CuPy's, contiguous, of one dtype, float32 or float64."""
    dtype = arrays[0].dtype
    floats = dtype in (np.float32, np.float64) and all(a.dtype == dtype and a.flags.c_contiguous for a in arrays)
    return floats and xp_of(*arrays).__name__ == "cupy"


def for_each(
    name: str, body: str, columns: dict[str, Sequence[Array]], numbers: dict[str, float], finite: Finite | None = None
) -> None:
    """Runs `body`, CUDA for one element, through lists of arrays: all contiguous and of one dtype, float32 or float64.

    Each column's elements go by its name in `body`, as a reference to a T, and `numbers` as T's. One launch, one upload.
    Nothing happens where one of the numbers `looked` at of `finite` is not finite.
    """
    lists = list(columns.values())
    table, blocks = _table(lists)
    if not blocks:
        return
    dtype = lists[0][0].dtype
    pointers = "".join(f"T* {c}_ = (T*)table[{i} * arrays + a] + first;\n" for i, c in enumerate(columns, start=2))
    named = " ".join(f"T& {c} = {c}_[i];" for c in columns)
    look = "for (int k = 0; k < n_looked; ++k) if (!isfinite(looked[k])) return;\n"
    whole = f"{look}{_FIND}{pointers}for (int i = threadIdx.x; i < n; i += blockDim.x) {{ {named} {body} }}\n"
    first = "const long long* table", "const int arrays", "const double* looked", "const int n_looked"
    kernel = _raw(name, dtype, ", ".join([*first, *(f"const T {n}" for n in numbers)]), whole)
    looked = table if finite is None else finite.looked
    n_looked = 0 if finite is None else looked.size
    given = table, np.int32(len(lists[0])), looked, np.int32(n_looked), *map(dtype.type, numbers.values())
    kernel((blocks,), (THREADS,), given)


def adam(p: Sequence[Array], g: Sequence[Array], m: Sequence[Array], v: Sequence[Array], finite: Any, **numbers: float) -> None:
    """`optim.Adam.update` of all these parameters; the numbers are its `numbers`, and `finite` that of its step."""
    body = """
        p *= keep;
        const T d = g + decay * p;
        m = beta1 * m + rest1 * d;
        v = beta2 * v + rest2 * (d * d);
        p -= rate * (m / (sqrt(v) + eps));
    """
    for_each("adam", body, {"p": p, "g": g, "m": m, "v": v}, numbers, finite)


def sgd(p: Sequence[Array], g: Sequence[Array], b: Sequence[Array] | None = None, *, finite: Any, **numbers: float) -> None:
    """`optim.SGD.update` of all these parameters; the numbers are its `numbers`, and `finite` that of its step."""
    if b is None:
        for_each("descend", "p -= lr * (g + decay * p);", {"p": p, "g": g}, numbers, finite)
        return
    body = """
        const T d = g + decay * p;
        b = kept * b + rest * d;
        p -= lr * (ahead != 0 ? d + ahead * b : b);
    """
    for_each("sgd", body, {"p": p, "g": g, "b": b}, numbers, finite)


def scale(g: Sequence[Array], factor: float) -> None:
    """g *= factor, of all these arrays."""
    for_each("scale", "g *= factor;", {"g": g}, {"factor": factor})


def clip(g: Sequence[Array], finite: Finite, max_norm: float) -> None:
    """g *= max_norm / (norm + 1e-6) where that is below 1, of all these arrays; norm² is the first number of `finite`."""
    body = "const double reach = sqrt(looked[0]) + 1e-6; if (reach > limit) g *= T(limit / reach);"
    for_each("clip", body, {"g": g}, {"limit": max_norm}, finite)


def sum_of_squares(arrays: Sequence[Array]) -> Array:
    """Σ x² over all elements, float64 [], added up in float64 in a fixed order: arrays as `for_each` takes them."""
    table, blocks = _table([arrays])
    partial = cupy().empty(blocks, np.float64)
    if blocks:
        body = """
            const T* x = (const T*)table[2 * arrays + a] + first;
            __shared__ double sums[THREADS];
            double sum = 0;
            for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i] * x[i];
            sums[threadIdx.x] = sum;
            for (int half = blockDim.x / 2; half; half /= 2) {
                __syncthreads();
                if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
            }
            if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
        """
        arguments = "const long long* table, const int arrays, double* partial"
        kernel = _raw("sum_of_squares", arrays[0].dtype, arguments, _FIND + body)
        kernel((blocks,), (THREADS,), (table, np.int32(len(arrays)), partial))
    return partial.sum()
