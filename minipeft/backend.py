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
import math
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from . import cuda_kernels, philox
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

    Raises BackendError when the name is unknown, when CuPy is not installed, or when it cannot compute on a GPU.
    """
    name = name or os.environ.get("MINIPEFT_BACKEND") or "numpy"
    if name == "numpy":
        return np
    if name != "cupy":
        raise BackendError(f"unknown backend {name!r}; choose 'numpy' or 'cupy'")
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        raise BackendError(f"the backend 'cupy' was asked for but CuPy is not installed; {_GET_CUPY}") from error
    except ImportError as error:
        raise BackendError(f"the backend 'cupy' was asked for but CuPy cannot be imported: {error}") from error
    _check_device(cupy)
    return cupy


_GET_CUPY = (
    "install the extra of the GPU driver's CUDA (nvidia-smi says which): pip install 'minipeft[gpu]' for 12, "
    "'minipeft[gpu13]' for 13"
)


@functools.cache
def _check_device(cupy: ModuleType) -> None:
    """One kernel and one matrix product. Raises BackendError where there is no GPU, or CUDA's libraries are missing."""
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own CUDARuntimeError, or an import error of a missing driver library
        raise BackendError(f"CuPy is installed but finds no usable GPU: {error}") from error
    if devices == 0:
        raise BackendError("CuPy is installed but finds no GPU on this machine (or CUDA_VISIBLE_DEVICES hides it)")
    try:
        ones = cupy.ones((2, 2), "float32")
        (ones @ ones).get()
    except Exception as error:  # CuPy's wheels hold no CUDA: neither NVRTC, which compiles kernels, nor cuBLAS
        raise BackendError(f"CuPy finds a GPU but cannot compute on it: {error}; {_GET_CUPY}") from error


def to_numpy(array: Array) -> np.ndarray:
    """The array, of any shape, in host memory: itself if it is NumPy's, an explicit copy from the device otherwise."""
    return array if isinstance(array, np.ndarray) else array.get()


class Unread:
    """Small arrays, of any shapes, that are read together, as float64: one wait for their device, when somebody asks.

    `joined`    the arrays that are on a device, one behind the other, there; None where there is none
    `numbers`   all arrays in host memory: an explicit copy, made once
    """

    def __init__(self, *arrays: Array):
        self._arrays = arrays
        found = [a.reshape(-1) for a in arrays if _on_device(a)]
        self.joined = xp_of(*found).concatenate(found, dtype=np.float64) if found else None

    @functools.cached_property
    def numbers(self) -> list[np.ndarray]:
        sizes = [a.size for a in self._arrays if _on_device(a)]
        parts = iter(np.split(self.joined.get(), np.cumsum(sizes)[:-1]) if sizes else ())
        return [next(parts).reshape(a.shape) if _on_device(a) else np.asarray(a, np.float64) for a in self._arrays]


def _on_device(array: Any) -> bool:
    return _library(type(array)) not in (np, None)


def read(*arrays: Array) -> list[np.ndarray]:
    """The `numbers` of `Unread`, at once."""
    return Unread(*arrays).numbers


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


SHORT_RUN = 16  # rows of one target


def scatter_add(out: Array, ids: Array, rows: Array) -> None:
    """out[ids[i]] += rows[i] for every i, in order of i within one target row; ids [n], rows [n, ...], out [m, ...]."""
    if xp_of(out) is not np or ids.size == 0:
        return add_at(out, ids, rows)
    order = np.argsort(ids, kind="stable")  # sorted, each target's rows are one run
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.r_[True, sorted_ids[1:] != sorted_ids[:-1]])
    lengths = np.diff(starts, append=ids.size)
    by_length = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[by_length], lengths[by_length]
    total = rows[order[starts]]
    for k in range(1, min(lengths[0], SHORT_RUN)):  # the k-th row of every run that has one: whole arrays at a time
        n = np.count_nonzero(lengths > k)
        total[:n] += rows[order[starts[:n] + k]]
    for i in range(np.count_nonzero(lengths > SHORT_RUN)):
        total[i] += rows[order[starts[i] + SHORT_RUN : starts[i] + lengths[i]]].sum(axis=0)
    out[sorted_ids[starts]] += total


def add_at(out: Array, index: Any, values: Array) -> None:
    """out[index] += values, also where `index` names an element several times: `numpy.add.at`, in the same order.

    values: of the shape of out[index]. CuPy's `add.at` adds in an order that differs from run to run. Here a device
    sorts the places, and one thread adds up what goes to one of them. Nothing waits for the device; integer arrays as
    an index cost four launches.
    """
    xp = xp_of(out)
    if xp.__name__ != "cupy":
        xp.add.at(out, index, values)
    elif values.size:
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, xp.ndarray) and part.dtype.kind in "iu" for part in parts):
            places = cuda_kernels.places(len(parts))(*[x for part in zip(parts, out.shape) for x in part])
        else:
            parts, places = out.shape, xp.arange(out.size).reshape(out.shape)[index]
        n, width = places.size, math.prod(out.shape[len(parts) :])
        order = xp.argsort(places.reshape(-1), kind="stable")
        cuda_kernels.sum_runs(places.reshape(-1), order, values, n, width, out, size=n * width)


# ------------------------------------------------------------------------------------------------------------ blocks

BLOCK = 1 << 16  # elements a block works on at a time: 256 KiB of float32, so that a few blocks fit a core's L2 cache.
#                  Smaller ones would fit better, but each NumPy call hands the interpreter lock back and forth.
LARGE_PRODUCT = 1 << 25  # multiplications of a matrix product; with fewer, a thread that is woken comes too late
FEW_ROWS, LARGE_FACTOR = 64, 1 << 22  # see `matmul`


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
        """float32 uniform [0, 1) of `shape`; row i depends on the path and on `row(i)` alone (`philox`)."""
        if xp.__name__ == "cupy":
            return self._on_device(shape, xp.float32, xp)
        size, inner, key = math.prod(shape[1:]), math.prod(shape[2:]), philox.key_of(self.path)
        out = (np.empty if self.rows is None else np.zeros)(shape, np.float32)
        flat = out.reshape(shape[0], size)

        def block(part: slice) -> None:
            for i in range(part.start, part.stop):
                index, padding = self.row(i)
                philox.source().fill(flat[i, padding * inner :], key, index)

        parallel_rows(np, block, shape[0], size)
        return asarray(out, xp)

    def dropped(self, x: Array, p: float) -> Array:
        """x (CuPy's), 0 where `uniform_rows` of its shape is below p and x / (1 - p) elsewhere, in one launch."""
        xp = xp_of(x)
        return self._on_device(x.shape, x.dtype, xp, xp.ascontiguousarray(x), p)

    def _on_device(self, shape: tuple[int, ...], dtype: Any, xp: ModuleType, x: Array = None, p: float = 0.0) -> Array:
        n, size, inner = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
        out = (xp.empty if self.rows is None else xp.zeros)(shape, dtype)
        rows = self.rows and [(index, padding * inner) for index, padding in map(self.row, range(n))]
        rows = rows and xp.asarray(np.array(rows, np.int64))
        x = x if x is None else x.reshape(n, size)
        philox.fill_on_device(out.reshape(n, size), philox.key_of(self.path), self.first_row, rows, x, p)
        return out


def as_rng(rng: Rng | int | None) -> Rng | None:
    """An `Rng` from what a caller may pass: None (no randomness), a seed, or a stream."""
    return rng if rng is None or isinstance(rng, Rng) else Rng(rng)
