"""Seconds of the runs that the league's tuning chose, beside their FLOPs: steps × seconds a step, measured on a machine that
does nothing else. All methods of a task and a batch size take turns (`speed.paces`), so that what else slows the machine
meets all of them; still, differences of a tenth may be luck, and other machines differ.

The rows of the league itself keep no times: they may come from any machine, several runs at once.
"""

from __future__ import annotations

from functools import cache

from ..experiments.rows import read_rows
from . import speed
from .comparison import CASES
from .protocol import TABLE, Trial, finder, search, tuned
from .register import Experiment
from .searches import Searches
from .timing import where

ROUNDS = 7
LARGE = speed.Pace(0, ("full",), "rewrite", rounds=ROUNDS, batch_size=64)  # a large batch, which no search of the league chose


def runs() -> list[speed.Pace]:
    """For each task and batch size the methods whose searches ended there; and LARGE."""
    searches = [search(case.task, method, case.examples) for case in CASES for method in (*TABLE, "scratch")]
    find, groups = finder(Searches.of("league", searches).rows()), {}
    for best, unknown in (tuned(find, of) for of in searches):
        if not unknown:
            groups.setdefault((best.task, best.batch_size), {})[_method(best)] = None
    return [speed.Pace(0, (*of,), task, rounds=ROUNDS, batch_size=size) for (task, size), of in groups.items()] + [LARGE]


SECONDS = Experiment("seconds", speed.paces, runs, timed=True)


def _method(trial: Trial) -> str:
    """From random weights a step is full fine-tuning's."""
    return "full" if trial.method == "scratch" else trial.method


def seconds(trial: Trial) -> float | None:
    """Of the training steps of a trial; None where its pace was not measured."""
    found = measured().get((_method(trial), trial.task, trial.batch_size))
    return None if found is None else found * trial.steps


@cache
def measured() -> dict[tuple[str, str, int], float]:
    """{(method, task, batch size): seconds a step}."""
    rows = read_rows(SECONDS.path())
    return {(name, row["task"], row["batch_size"]): pace for row in rows for name, pace in row["seconds"].items()}


def measured_on() -> str:
    """The processor, the threads and the days of the measurements."""
    return where(read_rows(SECONDS.path()))
