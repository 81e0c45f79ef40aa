"""Executors: where work is computed, in processes of this machine, on a Dask cluster, or wherever a pool says.

An executor is anything whose `submit(function, *arguments)` returns a future of `concurrent.futures`. What goes to a
process is pickled by cloudpickle, which sends a function by value where it has no module to be imported from. It goes
through pipes and sockets to processes that the caller started or named, never through a file.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import cloudpickle

from .lazy import extra


class ExecutorLost(RuntimeError):
    """An executor takes no more runs: its pool is broken, or its cluster is gone."""


class ProcessDied(RuntimeError):
    """The process that computed a run has ended before the run did."""


@contextmanager
def opened(executor: Any) -> Iterator[Any]:
    """An executor for the length of a `with`, from what a caller may give.

    A number of processes gives LocalProcesses, the address of a Dask scheduler its cluster, a `distributed.Client` its
    own; anything with `submit` is used as it is, and stays open. Raises ValueError for a number below 1 and an address
    that is none, ExecutorLost where no scheduler answers, TypeError for anything else.
    """
    if type(executor) is int:
        if executor < 1:
            raise ValueError(f"executor, a number of processes, must be at least 1, not {executor}")
        with LocalProcesses(executor) as processes:
            yield processes
    elif isinstance(executor, str):
        with _dask_client(executor) as client:
            yield client.get_executor(pure=False)
    elif hasattr(executor, "get_executor"):  # a distributed.Client
        yield executor.get_executor(pure=False)
    elif hasattr(executor, "submit"):
        yield executor
    else:
        raise TypeError(f"executor must be a number of processes, an address, or have submit(), not {executor!r}")


class LocalProcesses:
    """An executor of `n` processes, each of which computes one run at a time.

    A process that dies takes no other run with it. Its run is tried once more, in a new process; then it has failed,
    with ProcessDied. The processes end with this one, however it ends.

    (A ProcessPoolExecutor gives up all runs when one process dies, and cannot say which run it was. And its processes
    import the main module, so that a script that starts one must be written for it.)
    """

    def __init__(self, n: int):
        self._max_workers = n
        self.deaths: list[str] = []  # how each process that died did: "SIGKILL", or "exit status 1"
        self._threads = ThreadPoolExecutor(n)  # each waits for a process of its own
        self._mine = threading.local()
        self._lock, self._processes, self._closed = threading.Lock(), set(), False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The future of function(*arguments), computed in one of the processes."""
        return self._threads.submit(self._compute, function, arguments)

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; what they compute is lost."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()  # closes the pipes

    def _compute(self, *task: Any) -> Any:
        sent = cloudpickle.dumps(task)
        for _ in range(2):
            process = getattr(self._mine, "process", None) or self._start()
            try:
                pickle.dump(sent, process.stdin)
                process.stdin.flush()
                found = pickle.load(process.stdout)
                break
            except (OSError, EOFError, pickle.UnpicklingError):
                status, self._mine.process = process.wait(), None
                if self._closed:
                    raise CancelledError from None
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                self.deaths.append(how)
        else:
            raise ProcessDied(f"the process of this run died twice ({how}); where memory ran out, use fewer processes")
        result, error = pickle.loads(found)
        if error is not None:
            raise error
        return result

    def _start(self) -> subprocess.Popen:
        code = "import sys; sys.path[:] = sys.argv[1:]; from minipeft.executors import _serve; _serve()"
        with self._lock:
            if self._closed:
                raise CancelledError
            self._mine.process = subprocess.Popen(
                [sys.executable, "-c", code, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._processes.add(self._mine.process)
        return self._mine.process


def _serve() -> None:
    """What a process of LocalProcesses does: (function, arguments) come in, results go out, until the input ends.

    Both go as bytes within a pickle, so that one that cannot be opened leaves the stream where it should be.
    """
    tasks, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a run prints is no result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to the parent too
    asked: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                asked.put(pickle.load(tasks))
        finally:
            os._exit(0)  # in the middle of a run, too: nobody waits for it

    threading.Thread(target=receive, daemon=True).start()
    while True:
        task = asked.get()
        try:
            function, arguments = pickle.loads(task)
            found = pickle.dumps((function(*arguments), None))
        except Exception as error:  # also of a module that is not found here
            found = _sendable(error)
        except SystemExit as error:  # which would end the process that waits
            found = _sendable(RuntimeError(f"it called sys.exit({error.code!r})"))
        pickle.dump(found, results)
        results.flush()


def _sendable(error: Exception) -> bytes:
    """(None, the error) as bytes; one that cannot be sent becomes a RuntimeError of its type and text."""
    try:
        found = pickle.dumps((None, error))
        pickle.loads(found)
        return found
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _dask_client(address: str) -> Any:
    """A client of the Dask scheduler at an address, as a context manager."""
    if "://" not in address:
        raise ValueError(f"executor must be the address of a Dask scheduler, such as tcp://host:8786, not {address!r}")
    distributed = extra("distributed", "cluster", "a Dask cluster")
    try:
        return distributed.Client(address, set_as_default=False, timeout="10s")
    except OSError as error:
        raise ExecutorLost(f"no Dask scheduler answers at {address}") from error
