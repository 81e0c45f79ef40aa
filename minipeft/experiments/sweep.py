"""A sweep: runs with their settings, whose rows go to a file one by one, so that a kill loses only what was running.

    def run(r, lr, seed):
        ...
        return {"loss": loss}

    rows = mp.sweep(run, mp.grid(r=[4, 8], lr=[1e-3, 3e-3], seed=range(5)), store="rows.jsonl")

What is in the file already is not computed again. A run that fails is a row too, with its error; the next call tries it
again. `rows` says what a row is, `tables` makes tables and plots of them.

A module with RUNS, a list of settings, and `run` is a sweep for the command line; the working directory is searched for
it:

    python -m minipeft.experiments.sweep my_sweep rows.jsonl --executor 2
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import os
import reprlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..options import reader
from .executors import computed
from .rows import FIELDS, Row, add_row, described, failed, finder, key, plain, qualname, read_rows, source_digest


def grid(**axes: Any) -> list[Row]:
    """All combinations of the axes' values, as dictionaries; the last axis varies fastest.

    An axis is a list, range or array of values, or one value, the same in all. The result is a list: add two grids, or
    leave settings out by a comprehension.

        grid(r=[4, 8], seed=range(2))  ->  [{"r": 4, "seed": 0}, {"r": 4, "seed": 1}, {"r": 8, "seed": 0}, ...]

    Raises ValueError for an axis without values.
    """
    values = {}
    for name, axis in axes.items():
        alone = isinstance(axis, (str, bytes, Mapping)) or not isinstance(axis, Iterable)
        values[name] = [axis] if alone else list(axis)
        if not values[name]:
            raise ValueError(f"the axis {name!r} of the grid has no values")
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sweep(
    run: Callable[..., Row],
    grid: Iterable[Any],
    executor: Any = None,
    store: str | os.PathLike | None = None,
    version: str | None = None,
    show: Callable[[str], None] = _to_standard_error,
) -> list[Row]:
    """The rows of the runs of `grid`, in its order: those that stand in `store`, and the others, computed and added.

    Args:
        run: gets the settings by name, `run(r=8, lr=1e-3, seed=0)`, or whole where they are a dataclass; returns what
            it measured, by name: numbers, texts, None, lists and dictionaries of them, NumPy's too, and NaN. It may be
            defined in a notebook. The globals that it names are sent with it: let it load a large model itself.
        grid: settings, dictionaries (as of `grid`) or frozen dataclasses; settings that occur twice are one run.
        executor: where the runs are computed:
            None            in processes of this machine, as many as threads (`MINIPEFT_THREADS`, or every core)
            an integer      in this number of processes, which share the threads; 1: in this process, one by one
            an Executor     of `concurrent.futures`, or what has its `submit`. The threads are divided among the
                            processes of a pool; the runs of a ThreadPoolExecutor share those of this process.
            "tcp://..."     the address of a Dask scheduler, or a `distributed.Client` (extra `cluster`). A run has one
                            thread, unless MINIPEFT_THREADS says otherwise where the workers are.
        store: the JSONL file, in a directory that is made where it is missing. A row is appended as soon as it is
            known, and none is ever taken out. Several sweeps may write to it at once; each computes all that was not
            there when it began.
        version: to be changed where `run`, what a partial has bound, or the data change: rows of another version, or of
            none, are not used.
        show: gets a line after each run; one before the first where rows are in the store already; and one where a
            process has died.

    A row has in "qualname" the file and the name of its function, "my_sweep.run", and is used for this one alone; a
    row without that field, as of older stores, is used for any. So a lambda, which has no name, is stored with a
    version only. "minipeft" is the version of this package that computed the row; any other uses it, too. A row without
    a version has in "source_digest" what the source of `run` was; where `run` is edited, its rows are used still, with
    one warning. What `run` calls is not in it.

    A run may return its settings again; where it returns another value of one, or no dictionary, no run of it can be a
    row: the sweep stops with TypeError at the first, and the rows so far are kept.

    A run that raises is a row with "error" and "traceback", and the sweep goes on; a warning at the end says how many
    failed, and the next call computes them again. A run whose process dies is tried once more, then it has failed.

    Raises, before anything is computed, ValueError and TypeError for settings that are no row or that `run` does not
    take, and for a `run` that cannot be sent to another process; FileError as `read_rows`, and OSError where the store
    cannot be written. Raises ExecutorLost where an executor takes no more runs.
    """
    if isinstance(grid, Mapping):
        raise ValueError("the grid must be a list of settings, one a run; mp.grid(r=[4, 8], seed=range(5)) makes it")
    of_version = {} if version is None else {"version": version}
    settings = list(grid)
    wanted = [described(one, run) | of_version for one in settings]
    _check_taken(run, settings)
    function = qualname(run)
    package = sys.modules["minipeft"].__version__  # to import it would be to import the layers below, too
    if store is not None and version is None and function.endswith("<lambda>"):
        raise ValueError("a lambda has no name that tells its rows in a store: define it by def, or give version=")
    if store is not None and version is None and isinstance(run, partial) and (run.args or run.keywords):
        raise ValueError("rows do not say what a partial has bound: make it a setting, or give version=")
    source = source_digest(run) if version is None else None
    of_source = {} if source is None else {"source_digest": source}
    there = [] if store is None else read_rows(store)
    find = finder(row for row in there if row.get("version") == version and row.get("qualname", function) == function)
    keys = [key(row) for row in wanted]
    begun = dict(zip(keys, wanted))
    rows = {k: find(row) for k, row in begun.items()}
    tasks = {k: one for k, one in zip(keys, settings) if rows[k] is None}

    if store is not None:
        _make_room(Path(store).parent)

    differing = {name for row in wanted for name in row if key(row[name]) != key(wanted[0].get(name))}
    if len(tasks) < len(rows):
        show(f"{len(rows) - len(tasks)} of {len(rows)} rows are in the store")
    if old := sum(bool(source and row) and row.get("source_digest", source) != source for row in rows.values()):
        edited = f"{old} of the {len(rows)} rows are of {function} before it was edited, and are read from {store}"
        warnings.warn(f"{edited}: to compute them anew, give another store, or version=", stacklevel=2)
    failures, began = [], time.perf_counter()
    with closing(computed(partial(measured, run), tasks, executor, len(rows), show)) as outcomes:
        for number, (k, outcome) in enumerate(outcomes, start=1):
            if isinstance(outcome, str):
                raise TypeError(outcome)
            rows[k] = {**begun[k], "qualname": function, "minipeft": package, **of_source, **outcome}
            if store is not None:
                add_row(store, rows[k])
            varied = ", ".join(f"{name} {value}" for name, value in begun[k].items() if name in differing)
            line = f"{number} of {len(tasks)} runs, {time.perf_counter() - began:.0f} s" + f": {varied}" * bool(varied)
            if failed(rows[k]):
                failures.append(outcome["error"])
                line += f": {outcome['error']}"
            show(line)
    if failures:
        first = f"the first with {failures[0]}; the traceback is in the row, and the same call tries them again"
        warnings.warn(f"{len(failures)} of {len(tasks)} runs failed, {first}", stacklevel=2)
    return [rows[k] for k in keys]


def _check_taken(run: Callable[..., Row], grid: list[Any]) -> None:
    """Raise TypeError where `run` is no function of the settings, as far as its signature says."""
    if not callable(run):
        raise TypeError(f"run must be a function of the settings, not {run!r}")
    try:
        signature = inspect.signature(run)
    except ValueError:  # of some functions in C
        return
    for settings in grid:
        try:
            signature.bind(**settings) if isinstance(settings, Mapping) else signature.bind(settings)
        except TypeError as error:
            raise TypeError(f"{qualname(run)}{signature} cannot be called with {settings!r}: {error}") from None


def _make_room(directory: Path) -> None:
    """Make the directory where it is missing. Raises OSError where no file can be written there."""
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"no row can be stored in {directory}: it is not writable")


def measured(run: Callable[..., Row], settings: Any) -> Row | str:
    """What a run measures, in JSON's types, without settings that it repeats; or, as a text, why it can be no row.

    Raises TypeError for a value that is not one of JSON.
    """
    found = run(**settings) if isinstance(settings, Mapping) else run(settings)
    if not isinstance(found, Mapping):
        return f"a run must return a dictionary of what it measured, not {reprlib.repr(found)}"
    found, known = plain(found), described(settings)
    for name in found:
        if name in FIELDS or (name in known and key(found[name]) != key(known[name])):
            has = f"{known[name]!r}, its setting" if name not in FIELDS else "a field of every row"
            value = reprlib.repr(found[name])
            return f"what a run measured cannot be called {name!r}, which is {has}: it returned {value}"
    return {name: value for name, value in found.items() if name not in known}


def executor_of(text: str) -> int | str:
    """`sweep`'s executor from a command line: a number of processes, or an address."""
    return text if "://" in text else reader(int, {"least": 1})(text)


def main() -> None:
    """The command line."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minipeft.experiments.sweep", description=about)
    parser.add_argument("module", help="the sweep, as in an import statement")
    parser.add_argument("path", help="the JSONL file that the rows are added to")
    parser.add_argument(
        "--executor", type=executor_of, default=1, metavar="N|ADDRESS",
        help="processes (default: this one), or a Dask scheduler",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        module = importlib.import_module(args.module)
    except (Exception, SystemExit) as error:  # whatever a foreign module can raise
        parser.error(f"cannot import {args.module} ({type(error).__name__}: {error})")
    if lacking := [name for name in ("run", "RUNS") if not hasattr(module, name)]:
        parser.error(f"{args.module} has no {lacking[0]}; a sweep is a module with RUNS, a list of settings, and run")
    sweep(module.run, module.RUNS, args.executor, args.path)


if __name__ == "__main__":
    main()
