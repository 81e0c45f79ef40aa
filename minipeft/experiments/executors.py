"""Where the runs of a sweep are computed: in this process, in processes of this machine, or wherever an executor says.

An executor is anything whose `submit(function, *arguments)` returns a future of `concurrent.futures`. What goes to
another process is pickled by cloudpickle, which sends a function by value where it has no module to be imported from:
notebooks, and scripts without `if __name__ == "__main__"`, need nothing special.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from ..lazy import extra
from ..threads import get_num_threads, set_num_threads

Outcome = dict[str, Any]  # what a run measured, or its "error" and "traceback"


class ExecutorLost(RuntimeError):
    """An executor takes no more runs: its pool is broken, or its cluster is gone."""


class ProcessDied(RuntimeError):
    """The process that computed a run has ended before the run did."""


def computed(
    run: Callable[[Any], Outcome], tasks: Mapping[Hashable, Any], executor: Any, runs: int
) -> Iterator[tuple[Hashable, Outcome]]:
    """(key, outcome) of `run(task)` for each task, which are by key, as soon as it is known.

    `executor` is as `sweep` takes it. By default the threads are divided by the number of runs of the whole sweep,
    `runs`, so that one that goes on after an interruption computes with as many threads, and to the same bytes. Where a
    ProcessPoolExecutor breaks, LocalProcesses compute the rest, unless it prepared its processes by an initializer.

    Raises as `sweep`.
    """
    threads = get_num_threads()
    if executor is None:
        executor = max(1, min(runs, threads))
    if type(executor) is int and executor < 1:
        raise ValueError(f"executor, a number of processes, must be at least 1, not {executor}")
    if not tasks:
        return
    if type(executor) is int and executor == 1:
        for key, task in tasks.items():
            yield key, _outcome(run, task)
        return
    with ExitStack() as stack:
        if type(executor) is int:
            executor = stack.enter_context(LocalProcesses(executor))
        elif isinstance(executor, str):
            executor = stack.enter_context(_dask_client(executor))
        if hasattr(executor, "get_executor"):  # a distributed.Client
            executor = executor.get_executor(pure=False)
        if not hasattr(executor, "submit"):
            raise TypeError(f"executor must be a number of processes, an address, or have submit(), not {executor!r}")
        workers = getattr(executor, "_max_workers", None)  # of pools on this machine; others do not say
        here = isinstance(executor, ThreadPoolExecutor)
        send = (lambda value: value) if here else _pickled
        function, share = send(run), workers and max(1, threads // workers)
        futures: dict[Future, Hashable] = {}
        stack.callback(lambda: [future.cancel() for future in futures])
        rest, lost = dict(tasks), None
        try:
            for key, task in tasks.items():
                futures[executor.submit(_received, function, send(task), share, here)] = key
        except BrokenExecutor as error:
            lost = error
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except (BrokenExecutor, CancelledError) as error:
                lost = error
                continue
            except Exception as error:  # not the run's, of which `_outcome` makes an outcome
                outcome = _failure(error)
            del rest[futures[future]]
            yield futures[future], outcome
        if rest and (not isinstance(lost, BrokenProcessPool) or getattr(executor, "_initializer", None)):
            raise ExecutorLost(
                f"{len(rest)} runs are not done: a worker of the executor has died, or its cluster is gone; all rows "
                "so far are kept, and the same call with a new executor goes on"
            ) from lost
        if rest:
            yield from computed(run, rest, stack.enter_context(LocalProcesses(workers)), runs)


class LocalProcesses:
    """An executor of `n` processes, each of which computes one run at a time.

    A process that dies takes no other run with it. Its run is tried once more, in a new process; then it has failed,
    with ProcessDied. The processes end with this one, however it ends.

    (A ProcessPoolExecutor gives up all runs when one process dies, and cannot say which run it was. And its processes
    import the main module, so that a script that starts one must be written for it.)
    """

    def __init__(self, n: int):
        self._max_workers = n
        self._threads = ThreadPoolExecutor(n)  # each waits for a process of its own
        self._mine = threading.local()
        self._lock, self._processes, self._closed = threading.Lock(), set(), False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
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
        for _ in range(2):
            process = getattr(self._mine, "process", None) or self._start()
            try:
                pickle.dump(task, process.stdin)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                status, self._mine.process = process.wait(), None
                if self._closed:
                    raise CancelledError from None
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise ProcessDied(f"the process of this run died twice ({how}); where memory ran out, use fewer processes")

    def _start(self) -> subprocess.Popen:
        code = "import sys; sys.path[:] = sys.argv[1:]; from minipeft.experiments.executors import _serve; _serve()"
        with self._lock:
            if self._closed:
                raise CancelledError
            self._mine.process = subprocess.Popen(
                [sys.executable, "-c", code, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._processes.add(self._mine.process)
        return self._mine.process


def _serve() -> None:
    """What a process of LocalProcesses does: (function, arguments) come in, results go out, until the input ends."""
    tasks, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a run prints is no result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to the parent too
    asked: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                asked.put(pickle.load(tasks))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)  # in the middle of a run, too: nobody waits for it

    threading.Thread(target=receive, daemon=True).start()
    while True:
        function, arguments = asked.get()
        pickle.dump(function(*arguments), results)
        results.flush()


def _dask_client(address: str) -> Any:
    """A client of the Dask scheduler at an address, as a context manager."""
    if "://" not in address:
        raise ValueError(f"executor must be the address of a Dask scheduler, such as tcp://host:8786, not {address!r}")
    distributed = extra("distributed", "cluster", "a Dask cluster")
    try:
        return distributed.Client(address, set_as_default=False, timeout="10s")
    except OSError as error:
        raise ExecutorLost(f"no Dask scheduler answers at {address}") from error


def _pickled(value: Any) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # whatever the value's own methods raise
        raise TypeError(
            f"{value!r} cannot be sent to another process ({error}); executor=1 computes all runs in this one"
        ) from error


def _received(function: Any, task: Any, share: int | None, here: bool) -> Outcome:
    """The outcome of a run. Where it has come to another process, with its share of the threads (default: one)."""
    if here:
        return _outcome(function, task)
    if share or "MINIPEFT_THREADS" not in os.environ:
        set_num_threads(share or 1)
    try:
        function, task = pickle.loads(function), pickle.loads(task)
    except Exception as error:  # a module that is not there, another version of a class
        return _failure(error)
    return _outcome(function, task)


def _outcome(function: Callable[[Any], Outcome], task: Any) -> Outcome:
    try:
        return function(task)
    except (Exception, SystemExit) as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)  # without this function
        return _failure(error, "".join(lines))


def _failure(error: BaseException, lines: str | None = None) -> Outcome:
    return {"error": f"{type(error).__name__}: {error}", "traceback": lines}
