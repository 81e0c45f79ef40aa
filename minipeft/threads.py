"""How the CPU computes: with how many threads, which of them multiply matrices, and what becomes of freed memory.

NumPy releases the interpreter lock while it computes, so threads of Python share the work of one operation:
`split_rows` gives each thread one part. BLAS has threads of its own; inside `one_blas_thread` it uses one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import pairwise
from typing import Any


class BackendError(RuntimeError):
    """The array library or device that was asked for cannot be used, or arrays of two libraries were mixed."""


SPLIT = 1 << 18  # with fewer elements, waking a thread costs more than it saves

_lock = threading.Lock()
_threads = 0  # 0: not decided yet
_pool: ThreadPoolExecutor | None = None
_blas: list | None = None  # threadpoolctl's controllers of the BLAS that NumPy calls
_inside = threading.local()  # .pool: this thread has one of several tasks
_regions = 0  # how many callers are inside `one_blas_thread`
_blas_threads: list[int] = []  # what BLAS used before the first of them


def get_num_threads() -> int:
    """How many threads the CPU operations use (default: the environment variable MINIPEFT_THREADS, or every core).

    Raises BackendError where the variable is no integer of at least 1.
    """
    global _threads
    if not _threads:
        asked = os.environ.get("MINIPEFT_THREADS")
        if not asked:
            _threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        elif asked.isdecimal() and int(asked) > 0:
            set_num_threads(int(asked))
        else:
            raise BackendError(f"MINIPEFT_THREADS={asked!r} is not a number of threads; give an integer of at least 1")
    return _threads


def set_num_threads(n: int) -> None:
    """Use `n` threads in every CPU operation from now on, BLAS products included. Raises BackendError unless n >= 1."""
    global _threads, _pool, _blas_threads
    if not isinstance(n, int) or n < 1:
        raise BackendError(f"the number of threads must be an integer of at least 1, not {n!r}")
    with _lock:
        _threads = n
        _pool = None  # not shut down: another thread may be about to use it, and it ends when nobody holds it
        if _regions:  # somebody is inside `one_blas_thread`: this is what they will go back to
            _blas_threads = [n] * len(_blas_controllers())
        else:
            for blas in _blas_controllers():
                blas.set_num_threads(n)


def _blas_controllers() -> list:
    global _blas
    if _blas is None:
        import numpy  # noqa: F401  (brings its BLAS, of which there is nothing to find before)
        from threadpoolctl import ThreadpoolController

        found = [c for c in ThreadpoolController().lib_controllers if c.user_api == "blas"]
        _blas = [c for c in found if "numpy" in c.filepath] or found
    return _blas


class one_blas_thread:
    """Inside, each BLAS product runs in its calling thread, for work that is itself spread over threads; then as before."""

    def __enter__(self) -> None:
        global _regions, _blas_threads
        with _lock:
            _regions += 1
            if _regions == 1:
                _blas_threads = [blas.num_threads for blas in _blas_controllers()]
                _set_blas_threads([1] * len(_blas_threads))

    def __exit__(self, *error: Any) -> None:
        global _regions
        with _lock:
            _regions -= 1
            if _regions == 0:
                _set_blas_threads(_blas_threads)


class one_thread(one_blas_thread):
    """Inside, the calling thread computes alone: for work so small that others would only wait for the interpreter lock."""

    def __enter__(self) -> None:
        self.before, _inside.pool = getattr(_inside, "pool", False), True
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _inside.pool = self.before


def _set_blas_threads(threads: list[int]) -> None:
    """So many for each BLAS, which has one thread or `_blas_threads`."""
    for blas, n, before in zip(_blas_controllers(), threads, _blas_threads):
        if before != 1:
            blas.set_num_threads(n)


def _after_fork() -> None:
    """A forked process has none of its parent's threads, and perhaps a lock that one of them held."""
    global _pool, _lock, _regions
    _pool, _lock, _regions = None, threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_tasks(tasks: list[Callable[[], None]]) -> None:
    """Run each task in a thread, and return when all have ended; the first exception, in task order, is raised.

    `numpy.errstate` of the caller holds in every task. A task's own tasks run in its thread: every other one has its task,
    and if they waited for a free thread, threads that wait for each other could use up the pool.
    """
    global _pool
    if len(tasks) == 1 or getattr(_inside, "pool", False):
        for task in tasks:
            task()
        return
    workers = max(1, get_num_threads() - 1)
    with _lock:
        pool = _pool = _pool or ThreadPoolExecutor(workers, "minipeft", setattr, (_inside, "pool", True))
    futures = [pool.submit(copy_context().run, task) for task in tasks[1:]]
    _inside.pool = True
    try:
        tasks[0]()
    finally:
        _inside.pool = False
        for future in futures:
            future.exception()  # wait, also when the first task failed: the others write into shared arrays
    for future in futures:
        future.result()


def split_rows(run: Callable[[slice], None], rows: int, work: int) -> None:
    """Call `run(slice)` for one contiguous part of `range(rows)` a thread; on one thread when `work` elements are few."""
    n = max(1, min(get_num_threads(), rows)) if work >= SPLIT else 1
    cuts = [rows * i // n for i in range(n + 1)]
    run_tasks([lambda a=a, b=b: run(slice(a, b)) for a, b in pairwise(cuts)])


def _keep_freed_memory() -> None:
    """Ask glibc to reuse freed arrays instead of returning their pages to the kernel.

    A training step frees and takes the same arrays over and over; having each page zeroed and mapped again costs a
    tenth of the step. Arrays above 32 MiB (the most that glibc allows here) are still returned at once.
    """
    if sys.platform == "linux":
        import ctypes

        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library
            return
        for option, value in ((-1, 1 << 30), (-3, 32 << 20), (-2, 64 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


_keep_freed_memory()
