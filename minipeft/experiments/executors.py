"""The runs of a sweep on an executor: what goes there, what comes back, and what is done about runs that fail.

Functions go by cloudpickle, which sends them by value where they have no module to be imported from: notebooks, and
scripts without `if __name__ == "__main__"`, need nothing special.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, ThreadPoolExecutor, as_completed
from typing import Any

from ..executors import ExecutorLost, opened
from ..threads import get_num_threads, set_num_threads

Outcome = dict[str, Any] | str  # what a run measured, or its "error" and "traceback"; a text: why it can be no row


def computed(
    run: Callable[[Any], Outcome], tasks: Mapping[Hashable, Any], executor: Any, runs: int, show: Callable[[str], None]
) -> Iterator[tuple[Hashable, Outcome]]:
    """(key, outcome) of `run(task)` for each task, which are by key, as soon as it is known.

    `executor` is as `sweep` takes it. By default the threads are divided by the number of runs of the whole sweep,
    `runs`, so that one that goes on after an interruption computes with as many threads, and to the same bytes. `show`
    gets a line where a process has died, the first time.

    Raises as `sweep`.
    """
    threads = get_num_threads()
    if executor is None:
        executor = max(1, min(runs, threads))
    if not tasks:
        return
    if type(executor) is int and executor == 1:
        for key, task in tasks.items():
            yield key, _outcome(run, task)
        return
    with opened(executor) as executor:
        workers = getattr(executor, "_max_workers", None)  # of pools on this machine; others do not say
        here, share = isinstance(executor, ThreadPoolExecutor), workers and max(1, threads // workers)
        function = None if here else _pickled(run)
        futures: dict[Future, Hashable] = {}
        rest, lost, told = dict(tasks), None, False
        try:
            try:
                for key, task in tasks.items():
                    call = (_outcome, run, task) if here else (_received, function, _pickled(task), share)
                    futures[executor.submit(*call)] = key
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
                if (deaths := getattr(executor, "deaths", ())) and not told:
                    told = True
                    again = "its run is tried once more; where memory ran out, use fewer processes"
                    show(f"a process died ({deaths[0]}): {again}")
                del rest[futures[future]]
                yield futures[future], outcome
        finally:
            for future in futures:
                future.cancel()
    if rest:
        why = "a worker of the executor has died, or its cluster is gone"
        kept = "rows in a store are kept, and the same call with a new executor goes on"
        other = "executor=N, a number of processes, loses only the run whose process dies"
        raise ExecutorLost(f"{len(rest)} runs are not done: {why}; {kept}; {other}") from lost


def _pickled(value: Any) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # whatever the value's own methods raise
        why = f"cannot be sent to another process ({error})"
        raise TypeError(f"{value!r} {why}; executor=1 computes all runs in this one") from error


def _received(function: bytes, task: bytes, share: int | None) -> Outcome:
    """The outcome of a run that has come to another process, with its share of the threads (default: one)."""
    if share or "MINIPEFT_THREADS" not in os.environ:
        set_num_threads(share or 1)
    return _outcome(lambda sent: pickle.loads(function)(pickle.loads(sent)), task)  # which may lack a module


def _outcome(function: Callable[[Any], Outcome], task: Any) -> Outcome:
    try:
        return function(task)
    except (Exception, SystemExit) as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)  # without this function
        return _failure(error, "".join(lines))


def _failure(error: BaseException, lines: str | None = None) -> Outcome:
    return {"error": f"{type(error).__name__}: {error}", "traceback": lines}
