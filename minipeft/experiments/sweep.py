"""A sweep: runs with their settings, whose rows go to a JSONL file one by one, so that a kill loses one run at most.

    python -m minipeft.experiments.sweep lessons.experiments.practice lessons/results/14_best_practices.jsonl
    python -m minipeft.experiments.sweep my_sweep rows.jsonl --processes 2

A sweep is a module with RUNS, a list of settings (frozen dataclasses), and `run(settings) -> row`; the working
directory is searched for it. What is in the file already is not computed again. MINIPEFT_THREADS gives the threads of
each process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import FileError, write_text

Row = dict[str, Any]


def described(settings: Any) -> Row:
    """Settings as the part of a row that identifies it: the class and all its fields."""
    return {"run": type(settings).__name__, **dataclasses.asdict(settings)}


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a JSONL file; none where there is no file. Raises FileError, naming the line, for what is no row."""
    path, rows = Path(path), []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FileError(f"{path}, line {number}: not valid JSON: {error.msg}") from error
        if not isinstance(row, dict) or "run" not in row:
            raise FileError(f"{path}, line {number}: not a row of a sweep: an object with the field 'run'")
        rows.append(row)
    return rows


def is_of(row: Row, settings: Any) -> bool:
    """Whether a row is the result of these settings."""
    return all(key in row and row[key] == value for key, value in described(settings).items())


def complete(rows: Sequence[Row], runs: Sequence[Any]) -> tuple[list[Row], list[int]]:
    """(rows, seeds) of those seeds of which every run is there, so that means are over the same seeds everywhere."""
    seeds = sorted({s.seed for s in runs})
    whole = [seed for seed in seeds if all(any(is_of(row, s) for row in rows) for s in runs if s.seed == seed)]
    return [row for row in rows if row["seed"] in whole], whole


def sweep(
    runs: Sequence[Any],
    run: Callable[[Any], Row],
    path: str | os.PathLike | None = None,
    processes: int = 1,
    show: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """The rows of `runs`, in their order: those that stand in the file at `path`, and the others, computed and added.

    Each row is the settings and what `run` measured (which may not have a setting's name), and is in the file, which is
    replaced in one step, as soon as it is known. With more than one process, `run` must be a function of a module.
    Raises as `read_rows`.
    """
    found = [] if path is None else read_rows(path)
    missing = [s for s in dict.fromkeys(runs) if not any(is_of(row, s) for row in found)]
    began = time.perf_counter()
    for number, (settings, measured) in enumerate(_computed(missing, run, processes), start=1):
        found.append({**described(settings), **measured})
        if path is not None:
            write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in found))
        show(f"{number} of {len(missing)} runs, {time.perf_counter() - began:.0f} s: {settings}")
    return [next(row for row in found if is_of(row, s)) for s in runs]


def _computed(runs: Sequence[Any], run: Callable[[Any], Row], processes: int) -> Iterator[tuple[Any, Row]]:
    if processes == 1 or len(runs) < 2:
        yield from map(partial(_measured, run), runs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # forking would copy locked thread pools
        yield from pool.imap_unordered(partial(_measured, run), runs)


def _measured(run: Callable[[Any], Row], settings: Any) -> tuple[Any, Row]:
    return settings, run(settings)


def main() -> None:
    """The command line."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minipeft.experiments.sweep", description=about)
    parser.add_argument("module", help="the sweep, as in an import statement")
    parser.add_argument("path", help="the JSONL file that the rows are added to")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    args = parser.parse_args()
    module = importlib.import_module(args.module)
    sweep(module.RUNS, module.run, args.path, args.processes, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
