"""How far a run is, on stderr: a bar on a terminal; elsewhere (a notebook, a log file) a line every ten seconds.

step 120/600  loss 2.314  3,120 tokens/s  0.52 s/step  0:04:10 left
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

EVERY = 10  # seconds between two lines


@contextmanager
def progress(wanted: bool, unit: str, step: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """`advance(step, text)` says how far a run is that begins after `step`; it does nothing where it is not `wanted`."""
    if not wanted or sys.stderr is None:
        yield lambda step, text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        count, text = f"{unit} {{task.completed}}/{{task.total}}", "{task.fields[text]}  left"
        with Progress(count, BarColumn(), text, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", completed=step, total=total, text="")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        yield _lines(unit, step, total)


def _lines(unit: str, first: int, total: int) -> Callable[[int, str], None]:
    began = shown = monotonic()

    def advance(step: int, text: str) -> None:
        nonlocal shown
        now = monotonic()
        if now - shown < EVERY or step == first:
            return
        shown, pace = now, (now - began) / (step - first)
        left = timedelta(seconds=round(pace * (total - step)))
        print(f"{unit} {step}/{total}  {text}  {pace:.2f} s/{unit}  {left} left", file=sys.stderr, flush=True)

    return advance
