"""Which array library computes, on which device, in which blocks of work, from which random stream.

Everything above this file is written against "an array library": NumPy on the CPU, CuPy on a GPU. A function takes
its library from the arrays it is given (`xp = xp_of(x)`), so the same line computes on either, and nothing is ever
copied between host and device unless `to_numpy` or `asarray` says so.

On the CPU the work of an operation is cut into blocks of rows small enough to stay in a core's cache, and the blocks
are spread over a few threads (`parallel_rows`; the threads themselves are in `threads`). The assignment of rows to
blocks depends on shapes only, so results do not depend on timing.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .threads import SPLIT, BackendError, get_num_threads, one_blas_thread, split_rows
from .threads import run_tasks as run_tasks
from .threads import set_num_threads as set_num_threads

Array = Any  # numpy.ndarray, cupy.ndarray, or any array type whose top-level module offers NumPy's functions


# ---------------------------------------------------------------------------------------------------------- library


@functools.cache
def _library(kind: type) -> ModuleType | None:
    """The array library of a type of arrays; None for every other type (Python's and NumPy's scalars among them)."""
    if issubclass(kind, np.ndarray):
        return np
    if all(hasattr(kind, name) for name in ("dtype", "strides", "get")):
        return sys.modules[kind.__module__.partition(".")[0]]
    return None


def is_array(value: object) -> bool:
    """True for an array of any library (not for Python or NumPy scalars)."""
    return _library(type(value)) is not None


def xp_of(*arrays: Array) -> ModuleType:
    """The array library of the arguments: `numpy` for NumPy arrays, else the top-level module of the array's type.

    Arguments that are not arrays (None, Python scalars) are ignored. Raises BackendError when two libraries meet.
    """
    found = None
    for array in arrays:
        library = _library(type(array))
        if found is None:
            found = library
        elif library is not None and library is not found:
            raise BackendError(
                f"arrays of two libraries meet in one operation ({found.__name__} and {library.__name__}); "
                "move one of them explicitly with minipeft.backend.to_numpy or minipeft.backend.asarray"
            )
    return found or np


def get_backend(name: str | None = None) -> ModuleType:
    """The array library called `name` ("numpy" or "cupy"); None asks the environment variable MINIPEFT_BACKEND.

    Raises BackendError when the name is unknown, when CuPy is not installed, or when it finds no usable GPU.
    """
    name = name or os.environ.get("MINIPEFT_BACKEND") or "numpy"
    if name == "numpy":
        return np
    if name != "cupy":
        raise BackendError(f"unknown backend {name!r}; choose 'numpy' or 'cupy'")
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise BackendError(
            "the backend 'cupy' was asked for but CuPy is not installed; install the extra: pip install 'minipeft[gpu]'"
        ) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own CUDARuntimeError, or an import error of a missing driver library
        raise BackendError(f"CuPy is installed (extra 'gpu') but finds no usable GPU: {error}") from error
    if devices == 0:
        raise BackendError("CuPy is installed (extra 'gpu') but finds no GPU on this machine")
    return cupy


def to_numpy(array: Array) -> np.ndarray:
    """The array, of any shape, in host memory: itself if it is NumPy's, an explicit copy from the device otherwise."""
    return array if isinstance(array, np.ndarray) else array.get()


def read(*arrays: Array) -> list[np.ndarray]:
    """Small arrays, of any shapes, in host memory as float64: explicit copies, and one wait for the device for them all."""
    found = [a for a in arrays if _library(type(a)) not in (np, None)]
    if found:
        joined = xp_of(*found).concatenate([a.reshape(-1) for a in found], dtype=np.float64).get()
        parts = iter(np.split(joined, np.cumsum([a.size for a in found])[:-1]))
        arrays = [next(parts).reshape(a.shape) if _library(type(a)) not in (np, None) else a for a in arrays]
    return [np.asarray(a, np.float64) for a in arrays]


def synchronize(xp: ModuleType) -> None:
    """Wait until the device of `xp` has done what was asked of it; NumPy has when it returns."""
    if hasattr(xp, "cuda"):
        xp.cuda.Device().synchronize()


def asarray(array: Array, xp: ModuleType | str | None = None) -> Array:
    """The array, of any shape, on the device of library `xp` (a module or a name): an explicit move, or itself.

    Raises as `get_backend`.
    """
    if xp is None or isinstance(xp, str):
        xp = get_backend(xp)
    if is_array(array) and xp_of(array) is xp:
        return array
    if is_array(array):
        array = to_numpy(array)
    return xp.asarray(array)


def scatter_add(out: Array, ids: Array, rows: Array) -> None:
    """out[ids[i]] += rows[i] for every i, in order of i within one target row; ids [n], rows [n, ...], out [m, ...]."""
    xp = xp_of(out)
    if ids.size == 0:
        return
    if xp is not np:
        xp.add.at(out, ids, rows)
        return
    order = np.argsort(ids, kind="stable")  # sorted, each target's rows are one run: 10x faster than numpy.add.at
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.r_[True, sorted_ids[1:] != sorted_ids[:-1]])
    out[sorted_ids[starts]] += np.add.reduceat(rows[order], starts, axis=0)


# ------------------------------------------------------------------------------------------------------------ blocks

BLOCK = 1 << 17  # elements a block works on at a time: half a MiB of float32, so that a few blocks fit a core's L2 cache.
#                  Smaller ones would fit better, but each NumPy call hands the interpreter lock back and forth.
SMALL_PRODUCT, LARGE_PRODUCT = 1 << 22, 1 << 23  # multiplications of a matrix product; see `matmul`
SHORT_SIDE, FEW_ROWS, LARGE_FACTOR = 512, 64, 1 << 22


def parallel_rows(xp: ModuleType, block: Callable[[slice], None], rows: int, row_size: int) -> None:
    """Call `block(slice)` for slices that cover `range(rows)`: cache-sized on the CPU and spread over threads.

    `row_size` is the number of elements a row of the work touches. On a device one call covers everything. A block
    writes its own rows only, so the order in which blocks run does not matter.
    """
    if rows == 0:
        return
    if xp is not np or rows * row_size < SPLIT:
        block(slice(0, rows))
        return
    step = max(1, BLOCK // max(1, row_size))

    def run(part: slice) -> None:
        for i in range(part.start, part.stop, step):
            block(slice(i, min(i + step, part.stop)))

    split_rows(run, rows, rows * row_size)


def elementwise(fn: Callable[..., None], *arrays: Array, outputs: int = 1) -> Any:
    """y = fn over NumPy arrays of one shape, in cache-sized blocks: `fn(out, *inputs)` writes flat pieces of the result.

    With more `outputs` it is given as many arrays to write into, and they are returned as a list.
    """
    first = arrays[0]
    dtype = first.dtype if len(arrays) == 1 else np.result_type(*arrays)
    outs = [np.empty(first.shape, dtype) for _ in range(outputs)]
    if first.size >= SPLIT and all(a.flags.c_contiguous for a in arrays):
        flat = [a.reshape(-1) for a in (*outs, *arrays)]
        parallel_rows(np, lambda s: fn(*[a[s] for a in flat]), first.size, 1)
    elif first.ndim == 0:  # NumPy's functions give scalars for 0-d arrays, which cannot be written into
        fn(*[a.reshape(1) for a in (*outs, *arrays)])
    else:
        fn(*outs, *arrays)
    return outs[0] if outputs == 1 else outs


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a [n, k] @ b [k, m] -> [n, m]. Large products are divided, along its longer side, among the threads of `threads`.

    BLAS's own threads start faster, as they spin for a tenth of a second after each product; but meanwhile they take the
    cores from everything else. They get products of few rows, beside which nothing else is spread over threads.
    """
    xp = xp_of(a, b)
    if xp is not np:
        return xp.matmul(a, b, out=out)
    (n, k), m = a.shape, b.shape[1]
    if out is None:
        out = np.empty((n, m), a.dtype if a.dtype == b.dtype else np.result_type(a, b))
    if n <= FEW_ROWS and a.flags.c_contiguous:  # new tokens times a weight: what costs is to read the weight
        get_num_threads()  # which sets BLAS's number of threads too
        step = max(1, LARGE_FACTOR // max(1, k))  # its threads do not share one vector's product with a huge matrix
        for i in range(0, m, step):
            factor, part = b[:, i : i + step], out[:, i : i + step]
            if n > 1 and factor.flags.f_contiguous:  # x Wᵀ: its transpose, W xᵀ, BLAS computes in half of the time
                part[...] = np.matmul(factor.T, a.T).T
            else:
                np.matmul(a, factor, out=part)
        return out
    if SMALL_PRODUCT <= n * m * k < 4 * LARGE_PRODUCT and max(n, k) <= SHORT_SIDE:
        return np.matmul(a, b, out=out)
    with one_blas_thread():
        if n * m * k < LARGE_PRODUCT:
            np.matmul(a, b, out=out)
        elif n >= m:
            split_rows(lambda s: np.matmul(a[s], b, out=out[s]), n, SPLIT)
        else:
            split_rows(lambda s: np.matmul(a, b[:, s], out=out[:, s]), m, SPLIT)
    return out


# ----------------------------------------------------------------------------------------------------------- random


class Rng:
    """A random stream named by a path of integers: `Rng(seed).at(step, layer)`; the same path gives the same bytes.

    Unlike a generator it holds no state, so threads, gradient accumulation and activation checkpointing, which visit
    the same dropout mask in another order or twice, all see the same mask. `first_row` is the index, within the whole
    batch, of the first row that this stream is asked for. Where the rows asked for do not follow each other (`take`) or
    begin with padding (`behind`), `rows` has for each of them (its index, positions of padding).
    """

    __slots__ = ("first_row", "path", "rows")

    def __init__(self, *path: int, first_row: int = 0, rows: Sequence[tuple[int, int]] | None = None):
        self.path = tuple(int(p) for p in path)
        self.first_row = first_row
        self.rows = rows

    def at(self, *more: int) -> Rng:
        """The stream further down the path."""
        return Rng(*self.path, *more, first_row=self.first_row, rows=self.rows)

    def row(self, i: int) -> tuple[int, int]:
        """(index within the whole batch, positions of padding in front) of row i."""
        return (self.first_row + i, 0) if self.rows is None else self.rows[i]

    def take(self, index: Sequence[int]) -> Rng:
        """The stream of these rows alone: what each of them draws stays the same."""
        return Rng(*self.path, rows=[self.row(i) for i in index])

    def behind(self, padding: Sequence[int]) -> Rng:
        """The stream where row i has padding[i] more positions in front (second axis); at those the numbers are 0."""
        return Rng(*self.path, rows=[(self.row(i)[0], n) for i, n in enumerate(padding)])

    def uniform_rows(self, shape: tuple[int, ...], xp: ModuleType = np) -> Array:
        """float32 uniform [0, 1) of `shape`, row i of which depends on the path and on `row(i)` alone."""
        out = (xp.empty if self.rows is None else xp.zeros)(shape, xp.float32)

        def block(rows: slice) -> None:
            for i in range(rows.start, rows.stop):
                index, padding = self.row(i)
                seed = np.random.SeedSequence([*self.path, index])
                source = seed if xp is np else int(seed.generate_state(1, np.uint64)[0])
                own = out[i : i + 1, padding:] if padding else out[i : i + 1]  # [1, ...]
                own[...] = xp.random.default_rng(source).random(own.shape[1:], dtype=xp.float32)

        parallel_rows(xp, block, shape[0], int(np.prod(shape[1:])))
        return out


def as_rng(rng: Rng | int | None) -> Rng | None:
    """An `Rng` from what a caller may pass: None (no randomness), a seed, or a stream."""
    return rng if rng is None or isinstance(rng, Rng) else Rng(rng)
