"""How far a run is, on stderr: a bar on a terminal and in a notebook; elsewhere (a log file) a line every ten seconds.

step 120/600  loss 2.314  3,120 tokens/s  0.52s/step  04:10 left
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

EVERY = 10  # seconds between two lines
LINE = "{unit} {n_fmt}/{total_fmt}  {desc}  {rate_inv_fmt}  {remaining} left"


class Bar(tqdm):
    """tqdm's, without a thread that looks after it: each step may show itself."""

    monitor_interval = 0


@contextmanager
def progress(wanted: bool, unit: str, step: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """`advance(step, text)` says how far a run is that begins after `step`; it does nothing where not `wanted`."""
    wanted = wanted and sys.stderr is not None
    live = wanted and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    if live:
        shape = {"bar_format": "{bar} " + LINE}
    else:
        shape = {"bar_format": LINE, "mininterval": EVERY, "delay": EVERY, "position": 0}
    bar = Bar(total=total, initial=step, unit=unit, miniters=1, disable=not wanted, **shape)
    if not live:
        bar.sp = partial(print, file=sys.stderr, flush=True)  # what shows it

    def advance(step: int, text: str) -> None:
        bar.set_description_str(text, refresh=False)
        bar.update(step - bar.n)

    try:
        yield advance
    finally:
        bar.disable = bar.disable or not live  # lines have no end that would be written
        bar.close()
