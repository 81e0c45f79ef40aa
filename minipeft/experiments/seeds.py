"""Runs that differ in their seed alone: the mean and its interval, and whether a difference is clear.

A difference, seed by seed, is clear where the 95 % confidence interval of its mean (Student's t) excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.intervals import mean
from .rows import Row, described, failed
from .rows import key as identity

SEEDS = (0, 1, 2)


def over_seeds(rows: Sequence[Row], settings: Any, key: str = "task_loss") -> np.ndarray:
    """The value of `key` in the rows of these settings, [seeds] in order ([seeds, n] of lists); NaN where training diverged.

    Raises ValueError where there is no such row.
    """
    same = [(name, identity(value)) for name, value in described(settings).items() if name != "seed"]
    mine = [row for row in rows if not failed(row) and all(name in row and identity(row[name]) == value for name, value in same)]
    found = {row["seed"]: row[key] for row in mine}
    if not found:
        raise ValueError(f"there is no row of {settings}")
    return np.array([found[seed] for seed in sorted(found)], float)  # None becomes NaN


def below(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether a < b (True), a > b (False), or neither clearly (None), compared seed by seed; both are [seeds].

    None also for one seed, whose difference has no interval, and where a run diverged (NaN).
    """
    difference, half_width = interval(b - a)
    return difference > 0 if abs(difference) > half_width else None


def spread(values: np.ndarray, digits: int = 3) -> str:
    """`mean ± half width` of the 95 % confidence interval of the mean of values [seeds]; of one value, itself."""
    value, half_width = interval(values)
    return f"{value:.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width) of the 95 % confidence interval of the mean (Student's t), from n independent values.

    mean ± t · s / √n, s the standard deviation: `evaluation.mean` of equal weights. NaN for the half width of a single
    value, and for both where there is no value or one is NaN.
    """
    if not len(values):
        return math.nan, math.nan
    value, _, high = mean(values)
    return value, math.nan if high is None else high - value
