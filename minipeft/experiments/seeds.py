"""Runs that differ in their seed alone: the mean and its spread, and whether a difference counts.

A difference counts where it has the same sign under every seed and is large beside its own spread over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

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


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of the interval that holds the true mean with this probability, from n independent values.

    mean ± t · s / √n, s the standard deviation and t Student's quantile for n - 1 degrees of freedom. NaN for the half
    width of a single value, and for both where there is no value or one is NaN.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float(values[0]) if n else math.nan, math.nan
    return float(values.mean()), student_t(level, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)


def student_t(level: float, degrees: int) -> float:
    """t such that |T| < t with probability `level`, T of Student's distribution with so many degrees of freedom.

    The probability is a finite sum in the angle arctan(t / √degrees) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4),
    which grows with the angle: bisection finds the angle.
    """

    def probability(angle: float) -> float:
        odd, cos2, term, total = degrees % 2, math.cos(angle) ** 2, 1.0, 0.0
        for k in range(1 + odd, degrees + odd, 2):  # Σ of (1·3···(k-2)) / (2·4···(k-1)) cos^(k-1), or the odd form
            total += term
            term *= k / (k + 1) * cos2
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
