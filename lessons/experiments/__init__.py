"""The experiments behind the lessons: what is run, and what the rows say. Lesson code, beside its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from minipeft.experiments.rows import Row


def sweep(run: Callable[..., Row], runs: Iterable[Any], store: str | os.PathLike) -> list[Row]:
    """The rows of runs, as `minipeft.experiments.sweep` computes and stores them: one after the other, and each with the version of
    the shipped base. A row of another base is computed again."""
    from minipeft.claims.protocol import version
    from minipeft.experiments.sweep import sweep

    return sweep(run, runs, 1, store, version())
