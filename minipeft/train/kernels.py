"""How the optimizers walk over arrays: in pieces that fit the cache, spread over threads.

What costs in an update is memory traffic, so all passes over a piece run while it is in the cache. No result depends on
the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..backend import Array, split_rows, xp_of
from . import device
from .finite import Finite

ELEMENTS = 1 << 16  # of a piece, 256 KiB: smaller ones wait for the interpreter lock, larger ones leave the cache
DEVICE_ELEMENTS = 1 << 22  # of a piece on a device, where what costs is the launch of a kernel

Piece = tuple[int, int, int]  # (index of the array, start, stop): elements of a flattened array


Job = tuple[Callable[..., None], Sequence[Array]]  # what is called on pieces of which arrays


def in_pieces(jobs: Sequence[Job], block: int = 1) -> None:
    """Call each job's function on flat pieces of its equally shaped arrays, which it may write: on threads, or in turn.

    All must be contiguous in memory but a job's first, which is copied back if it is not. Pieces hold whole blocks of
    `block` elements (the last may end earlier); an array may also hold one number for each block.
    """
    if not jobs:
        return
    xp = xp_of(*[arrays[0] for _, arrays in jobs])
    step = (ELEMENTS if xp is np else DEVICE_ELEMENTS) // block
    flat = [[array.reshape(-1) for array in arrays] for _, arrays in jobs]
    calls: list[Job] = []
    for (fn, _), arrays in zip(jobs, flat):
        n = arrays[0].size
        sizes = [block if array.size == n else 1 for array in arrays]  # elements of a block
        for i in range(0, -(-n // block), step):
            calls.append((fn, [array[i * size : (i + step) * size] for array, size in zip(arrays, sizes)]))

    def run(part: slice) -> None:
        for fn, pieces in calls[part]:
            fn(*pieces)

    _on_threads(run, len(calls), sum(arrays[0].size for arrays in flat), xp)
    for (_, (first, *_)), (piece, *_) in zip(jobs, flat):
        if not first.flags.c_contiguous:  # `piece` is a copy then
            first[...] = piece.reshape(first.shape)


def _on_threads(run: Callable[[slice], None], n: int, work: int, xp: ModuleType) -> None:
    """Call `run` for parts of range(n), one a thread; for all of it on a device."""
    if xp is np:
        split_rows(run, n, work)
    else:
        run(slice(0, n))


def pack(sizes: Sequence[int], limit: int) -> list[list[Piece]]:
    """Cut arrays of these sizes, in order, into blocks of at most `limit` elements; small arrays share a block."""
    blocks: list[list[Piece]] = []
    room = 0
    for i, size in enumerate(sizes):
        if blocks and size <= room:
            blocks[-1].append((i, 0, size))
            room -= size
        else:
            for start in range(0, size, limit):
                stop = min(start + limit, size)
                blocks.append([(i, start, stop)])
                room = limit - (stop - start)
    return blocks


def scale(arrays: Sequence[Array], factor: float) -> None:
    """x *= factor, of all arrays."""

    def times(piece: Array) -> None:
        piece *= factor

    for found in _by_dtype(arrays):
        if device.fits(found):
            device.scale(found, factor)
        else:
            in_pieces([(times, [array]) for array in found])


def clip(arrays: Sequence[Array], finite: Finite, max_norm: float) -> None:
    """x *= max_norm / (norm + 1e-6), of all arrays, where their norm exceeds `max_norm`; norm² is the first number of `finite`.

    Nothing where that is not finite, and no wait for a device.
    """
    for found in _by_dtype(arrays):
        if device.fits(found):
            device.clip(found, finite, max_norm)
        elif finite and (reach := math.sqrt(finite.numbers[0]) + 1e-6) > max_norm:
            scale(found, max_norm / reach)


def sum_of_squares(arrays: Sequence[Array]) -> Array:
    """Σ x² over all elements of all arrays, float64 [], finite where all of them are, and their squares in float64.

    The squares of a block of `pack` are summed in its dtype, where that does not overflow, and the blocks in float64.
    """
    xp = xp_of(*arrays)
    if xp.__name__ == "cupy":
        first, *more = (device.sum_of_squares([xp.ascontiguousarray(a) for a in found]) for found in _by_dtype(arrays))
        return sum(more, first)
    flat = [array.reshape(-1) for array in arrays]
    blocks = pack([array.size for array in flat], ELEMENTS if xp is np else DEVICE_ELEMENTS)
    partial = xp.zeros(len(blocks), xp.float64)

    def run(part: slice) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(part.start, part.stop):
                pieces = [flat[i][start:stop] for i, start, stop in blocks[k]]
                x = pieces[0] if len(pieces) == 1 else xp.concatenate(pieces)
                partial[k] = (x * x if xp is np else xp.square(x, dtype=xp.float64)).sum()
                if xp is np and not math.isfinite(partial[k]):
                    partial[k] = np.square(x, dtype=np.float64).sum()

    _on_threads(run, len(blocks), sum(array.size for array in flat), xp)
    return partial.sum()


def _by_dtype(arrays: Sequence[Array]) -> list[list[Array]]:
    found: dict[Any, list[Array]] = {}
    for array in arrays:
        found.setdefault(array.dtype, []).append(array)
    return list(found.values())
