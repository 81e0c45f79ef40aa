"""Runs that differ in their seed alone: the mean and its spread, and whether a difference counts.

A difference counts where it has the same sign under every seed and is large beside its own spread over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..evaluation.intervals import mean
from .rows import Row, is_of

SEEDS = (0, 1, 2)
CLEAR = 2.5  # standard deviations of a difference: over three seeds, Student's t-test at 5 %


def over_seeds(rows: Sequence[Row], settings: Any, key: str = "task_loss") -> np.ndarray:
    """The value of `key` in the rows of these settings, [seeds] in order; NaN where training diverged.

    Raises ValueError where there is no such row.
    """
    found = {row["seed"]: row[key] for row in rows if is_of(row, replace(settings, seed=row["seed"]))}
    if not found:
        raise ValueError(f"there is no row of {settings}")
    return np.array([found[seed] for seed in sorted(found)], float)  # None becomes NaN


def below(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether a < b (True), a > b (False), or neither (None), compared seed by seed; both are [seeds].

    The difference must have one sign under every seed, and a mean of more than CLEAR times its standard deviation.
    """
    difference = b - a
    sign = np.sign(difference[0])
    alike = (sign * difference > 0).all()  # false where a run diverged: NaN
    if not alike or (len(difference) > 1 and abs(difference.mean()) <= CLEAR * difference.std(ddof=1)):
        return None
    return bool(sign > 0)


def spread(values: np.ndarray, digits: int = 3) -> str:
    """`mean ± standard deviation` of values [seeds]."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width) of the 95 % confidence interval of the mean (Student's t), from n independent values.

    mean ± t · s / √n, s the standard deviation: `evaluation.mean` of equal weights. NaN for the half width of a single
    value, and for both where there is no value or one is NaN.
    """
    if not len(values):
        return math.nan, math.nan
    value, _, high = mean(values)
    return value, math.nan if high is None else high - value
