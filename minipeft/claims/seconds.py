"""Seconds of the runs that the league's tuning chose, beside their FLOPs: steps × seconds a step, measured on a machine that
does nothing else, each method at its own batch size (`speed.paces`). They are that machine's alone.

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


def pace(trial: Trial) -> speed.Pace:
    """The measurement of a trial's steps. From random weights a step is full fine-tuning's."""
    method = "full" if trial.method == "scratch" else trial.method
    return speed.Pace(0, (method,), trial.task, rounds=2, batch_size=trial.batch_size)


def runs() -> list[speed.Pace]:
    """Of every search of the league that has ended."""
    searches = [search(case.task, method, case.examples) for case in CASES for method in (*TABLE, "scratch")]
    find = finder(Searches.of("league", searches).rows())
    ended = (best for best, unknown in (tuned(find, of) for of in searches) if not unknown)
    return [*dict.fromkeys(map(pace, ended))]


SECONDS = Experiment("seconds", speed.paces, runs, timed=True)


def seconds(trial: Trial) -> float | None:
    """Of the training steps of a trial; None where its pace was not measured."""
    one = pace(trial)
    found = _measured().get((*one.methods, one.task, one.batch_size))
    return None if found is None else found * trial.steps


@cache
def _measured() -> dict[tuple[str, str, int], float]:
    return {(*row["methods"], row["task"], row["batch_size"]): min(row["seconds"].values()) for row in read_rows(SECONDS.path())}


def measured_on() -> str:
    """The processor, the threads and the days of the measurements."""
    return where(read_rows(SECONDS.path()))
