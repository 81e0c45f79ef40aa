"""Random numbers without a state: number j of row i is a function of (key, i, j), on the CPU and on a device the same.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3) stirs a counter x of four
64-bit words, under a key k of two, in ten rounds. With (high, low) the halves of a 128-bit product, a round is

    (h0, l0) = 0xD2E7470EE14C6C93 x0        x <- (h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0)
    (h1, l1) = 0xCA5A826395121157 x2        k <- (k0 + 0x9E3779B97F4A7C15, k1 + 0xBB67AE8584CAA73B)

Here counter (b + 1, i, 0, 0) gives numbers 8b to 8b + 7 of row i: of each word the low 32 bits, then the high; the
upper 24 of them are a float32 in [0, 1). So does NumPy's generator of this name, which computes on the CPU: row i is
`Generator(Philox(key=key, counter=[0, i, 0, 0])).random(n, np.float32)`.
"""

from __future__ import annotations

import functools
import threading
from hashlib import blake2b
from typing import Any

import numpy as np

from .cuda_kernels import draw

PIECE = 1 << 16  # numbers drawn at a time: 256 KiB, which stay in a core's cache
THREADS = 128  # of a block on a device


def key_of(path: tuple[int, ...]) -> np.ndarray:
    """The key, uint64 [2], of a path of integers: 128 bits of its hash, so that no two paths have one key."""
    return np.frombuffer(blake2b(repr(path).encode(), digest_size=16).digest(), "<u8")


class Source(threading.local):
    """NumPy's generator, one in each thread."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(0)
        self.start = self.generator.state

    def fill(self, out: np.ndarray, key: np.ndarray, row: int) -> None:
        """out [n], float32 and contiguous, becomes the first n numbers of a row: uniform in [0, 1)."""
        self.start["state"] = {"key": key, "counter": np.array([0, row, 0, 0], np.uint64)}  # it counts before it draws
        self.generator.state = self.start
        for j in range(0, out.size, PIECE):
            piece = out[j : j + PIECE]
            bits = self.generator.random_raw((piece.size + 1) // 2).view(np.uint32)[: piece.size]
            bits >>= 8
            np.multiply(bits.view(np.int32), np.float32(2**-24), out=piece, dtype=np.float32, casting="unsafe")


@functools.cache
def source() -> Source:
    """The generators of all threads."""
    return Source()


def fill_on_device(
    out: Any, key: np.ndarray, first_row: int, rows: Any = None, x: Any = None, p: float = 0.0
) -> None:
    """out [n, size], contiguous, on a device: row i becomes row first_row + i, in one launch.

    With int64 `rows` [n, 2] it becomes row rows[i, 0], from position rows[i, 1] on; what is before stays. With x, of out's
    shape and dtype, out becomes dropout of x instead: 0 where the number is below p, x / (1 - p) elsewhere.
    """
    n, size = out.shape
    blocks = (size + 7) // 8
    if out.size:
        pointers = [0 if a is None else a for a in (rows, x)]
        options = first_row, n, size, blocks, np.float32(p), out.dtype.type(1 / (1 - p)), out
        draw(out, out.dtype, -(-n * blocks // THREADS), 0, *key, *pointers, *options, threads=THREADS)
