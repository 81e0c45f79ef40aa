"""95 % intervals: of a mean over records that weigh differently, and of a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


class Estimate(NamedTuple):
    """A number and its 95 % interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(totals: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> Estimate:
    """The mean of units that come in records, as the tokens of texts: totals [n], weights [n] (default: 1 each).

        R = Σ_i y_i / Σ_i w_i          y_i: the total over record i,  w_i: the number of its units
        SE² = n / (n - 1) · Σ_i (y_i - R w_i)² / (Σ_i w_i)²          the interval is R ± 1.96 SE

    The n records are taken for a random sample; the units of a record may depend on each other. One record has no
    interval. Sources: Cochran 1977, Sampling Techniques, chapter 6 (the ratio estimator); the same, without n / (n - 1),
    is the clustered standard error of Miller 2024, Adding Error Bars to Evals (arXiv:2411.00640).
    """
    y = np.asarray(totals, np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    n, R = len(y), float(y.sum() / w.sum())
    if n < 2:
        return Estimate(R)
    error = Z * math.sqrt(n / (n - 1) * float(((y - R * w) ** 2).sum())) / float(w.sum())
    return Estimate(R, R - error, R + error)


def share(right: Any) -> Estimate:
    """The share of records that are right: booleans [n], with Wilson's score interval, which stays inside [0, 1].

        (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    n, p = len(right), float(np.mean(right))
    middle, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (middle - spread) / (1 + Z**2 / n), (middle + spread) / (1 + Z**2 / n)
    return Estimate(p, max(0.0, low) if p else 0.0, min(1.0, high) if p < 1 else 1.0)
