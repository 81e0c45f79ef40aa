"""95 % confidence intervals: of a mean over records that weigh differently, and of a share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


class Estimate(NamedTuple):
    """A number and its 95 % confidence interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(totals: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> Estimate:
    """The mean of units that come in records, as the tokens of texts: totals [n], weights [n] (default: 1 each).

        R = Σ_i y_i / Σ_i w_i          y_i: the total over record i,  w_i: the number of its units
        SE² = n / (n - 1) · Σ_i (y_i - R w_i)² / (Σ_i w_i)²
        R ± t SE          t: Student's 97.5 % quantile for n - 1 degrees of freedom (`student_t`)

    The n records are taken for a random sample; the units of a record may depend on each other. The blocks that one
    running text is cut into depend on each other, so their interval is too narrow. For records of equal weight that are
    normally distributed the interval is exact; for a few of very different weights it is narrow. One record has no
    interval. Sources: Cochran 1977, Sampling Techniques, chapter 6 (the ratio estimator); the same, without n / (n - 1),
    is the clustered standard error of Miller 2024, Adding Error Bars to Evals (arXiv:2411.00640).
    """
    y = np.asarray(totals, np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    n, R = len(y), float(y.sum() / w.sum())
    if n < 2:
        return Estimate(R)
    error = student_t(0.95, n - 1) * math.sqrt(n / (n - 1) * float(((y - R * w) ** 2).sum())) / float(w.sum())
    return Estimate(R, R - error, R + error)


def share(right: Any) -> Estimate:
    """The share of records that are right: booleans [n], with Wilson's score interval, which stays inside [0, 1].

        (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    return wilson(float(np.mean(right)), len(right))


def wilson(p: float, n: int) -> Estimate:
    """Wilson's interval (see `share`) of a share p of n records."""
    middle, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (middle - spread) / (1 + Z**2 / n), (middle + spread) / (1 + Z**2 / n)
    return Estimate(p, max(0.0, low) if p else 0.0, min(1.0, high) if p < 1 else 1.0)


@functools.cache
def student_t(level: float, degrees: int) -> float:
    """t such that |T| < t with probability `level`, T of Student's distribution with `degrees` of freedom.

    The probability is a finite sum in the angle arctan(t / √degrees) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4),
    which grows with the angle: bisection finds the angle.
    """
    odd = degrees % 2
    k = np.arange(1 + odd, degrees + odd, 2)
    ratios = k[:-1] / (k[:-1] + 1)

    def probability(angle: float) -> float:
        # Σ of (1·3···(k-2)) / (2·4···(k-1)) cos^(k-1), or the odd form
        terms = np.cumprod(np.append(1.0, ratios * math.cos(angle) ** 2))
        total = float(terms[: len(k)].sum())
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
