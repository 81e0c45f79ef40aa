"""Updates of many arrays in one launch: their addresses go to the device as a table, and each block of threads finds its own.

    table      first block of threads of each array · its size · then, a column after the other, the arrays' addresses

What costs on a device is to launch a kernel, and a model has hundreds of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import cuda_kernels as kernels
from ..backend import Array, xp_of
from ..cuda import cupy
from .finite import Finite

Arrays = Sequence[Array]


def fits(arrays: Arrays) -> bool:
    """Whether the functions below take arrays such as these: CuPy's, contiguous, of one dtype, float32 or float64."""
    dtype = arrays[0].dtype
    floats = dtype in (np.float32, np.float64) and all(a.dtype == dtype and a.flags.c_contiguous for a in arrays)
    return floats and xp_of(*arrays).__name__ == "cupy"


def _table(columns: Sequence[Arrays]) -> tuple[Array, int]:
    """(table int64 on the device, blocks): of each array its first block and its size; then every column's addresses."""
    sizes = np.array([a.size for a in columns[0]], np.int64)
    blocks = -(-sizes // kernels.CHUNK)
    addresses = [[a.data.ptr for a in column] for column in columns]
    table = np.array([np.cumsum(blocks) - blocks, sizes, *addresses], np.int64)
    return cupy().asarray(table), int(blocks.sum())


def _update(kernel: Callable, columns: Sequence[Arrays], finite: Finite | None = None, **numbers: float) -> None:
    """One launch, one upload; nothing happens where one of the numbers `looked` at of `finite` is not finite."""
    table, blocks = _table(columns)
    looked, n = (0, 0) if finite is None else (finite.looked, finite.looked.size)
    kernel(columns[0][0], blocks, len(columns[0]), table, looked, n, **numbers)


def adam(p: Arrays, g: Arrays, m: Arrays, v: Arrays, finite: Finite, **numbers: float) -> None:
    """`optim.Adam.update` of all these parameters; the numbers are its `numbers`, and `finite` that of its step."""
    _update(kernels.adam, (p, g, m, v), finite, **numbers)


def sgd(p: Arrays, g: Arrays, b: Arrays | None = None, *, finite: Finite, **numbers: float) -> None:
    """`optim.SGD.update` of all these parameters; the numbers are its `numbers`, and `finite` that of its step."""
    if b is None:
        _update(kernels.descend, (p, g), finite, **numbers)
    else:
        _update(kernels.sgd, (p, g, b), finite, **numbers)


def scale(g: Arrays, factor: float) -> None:
    """g *= factor, of all these arrays."""
    _update(kernels.scale, (g,), factor=factor)


def clip(g: Arrays, finite: Finite, max_norm: float) -> None:
    """g *= max_norm / (norm + 1e-6) where that is below 1, of all these arrays; norm² is the first number of `finite`."""
    _update(kernels.clip, (g,), finite, limit=max_norm)


def sum_of_squares(arrays: Arrays) -> Array:
    """Σ x² over all elements, float64 [], added up in float64 in a fixed order."""
    table, blocks = _table([arrays])
    partial = cupy().empty(blocks, np.float64)
    like = arrays[0]
    kernels.sum_of_squares(like, like.dtype, blocks, 0, table, np.int32(len(arrays)), partial, threads=256)
    return partial.sum()
