"""Is a difference between two methods more than the luck of the seeds and of the test items?

Both methods have run under the same S seeds and were measured on the same n items: x[s, i] is the difference of two
losses (or of two scores) on item i under seed s. Seeds and items are both samples of what could have been:

    x[s, i] = μ + α_s + β_i + ε_si              α: luck of the seed, β: of the item, ε: of both together
    SE² = (MS_α + MS_β - MS_ε) / (S n)          never below MS_β / (S n)
    μ ± t SE                                    t: Student's quantile (97.5 %), Satterthwaite's degrees of freedom;
                                                never less than ± t √(MS_α / (S n)), of the S means of the seeds alone

with the mean squares of the two-way analysis of variance

    MS_α = n Σ_s (x̄_s - x̄)² / (S - 1),   MS_β = S Σ_i (x̄_i - x̄)² / (n - 1),   MS_ε of what is left, (S - 1)(n - 1)

The last is what three or five seeds need: their variance may look like 0 by luck, and the degrees of freedom would then
be those of the items. Without it, in the cases that `tests/test_claims_protocol.py` draws, intervals of three seeds miss
the mean in 6 of 100 cases and not in 5, and where seven are to hold together in 2.8 and not in 0.7.

Where the items weigh differently, as texts of w_i tokens do, μ is the ratio Σ y_i / Σ w_i, and x is what it moves by
with each item: μ + (y_si - μ w_i) / w̄ (Cochran 1977, Sampling Techniques, chapter 6).

Source: Searle, Casella and McCulloch 1992, Variance Components, chapter 4. The usual alternative draws seeds and items
again with replacement (Owen 2007, The Pigeonhole Bootstrap, arXiv:0712.1111). The tests
compare the two; but with five seeds its percentiles are too near to each other: it knows nothing of Student's t.
"""

from __future__ import annotations

import math

import numpy as np

from ..evaluation.intervals import Estimate, student_t, wilson


def crossed(y: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95) -> Estimate:
    """The mean of y [seeds, items], with its confidence interval of that level over both.

    y        what a seed has on an item, in sum over the units of the item (nats of a text), or a difference of two such
    weights  [items], the units of each item (its tokens); by default 1

    One seed has no interval. Raises ValueError for other shapes, and for what is not finite.
    """
    y, w, mean = _influence(y, weights)
    (S, n), x = y.shape, mean + (y - mean * w) / w.mean()
    if S < 2 or n < 2:
        return Estimate(mean)
    seeds, items = x.mean(axis=1), x.mean(axis=0)
    rest = x - seeds[:, None] - items + mean
    a = n * ((seeds - mean) ** 2).sum() / (S - 1)
    b = S * ((items - mean) ** 2).sum() / (n - 1)
    e = (rest**2).sum() / ((S - 1) * (n - 1))
    total = a + b - e
    degrees = total**2 / (a**2 / (S - 1) + b**2 / (n - 1) + e**2 / ((S - 1) * (n - 1))) if total > 0 else 0.0
    if total < b:  # the seeds' component of variance is estimated below 0: it is taken for 0
        total, degrees = b, n - 1
    error = student_t(level, max(1, math.floor(degrees))) * math.sqrt(total / (S * n))
    error = max(error, student_t(level, S - 1) * math.sqrt(a / (S * n)))
    return Estimate(mean, mean - error, mean + error)


def right(y: np.ndarray) -> Estimate:
    """The share of y [seeds, items] that is right, with its interval; of a model without a seed, [1, items], and where all or none
    is right, over the items alone (Wilson's)."""
    if len(y) == 1 or not np.ptp(y):
        return wilson(float(np.mean(y)), y.shape[1])
    value, low, high = crossed(y)
    return Estimate(value, max(0.0, low), min(1.0, high))


def spreads(a: np.ndarray, b: np.ndarray) -> Estimate:
    """How many times the standard deviation of b that of a is, with its 95 % interval; both are [seeds], and a seed's two values
    may depend on each other: PPO starts from the SFT model of its seed (Pitman 1939, A Note on Normal Correlation)."""
    n, ratio, r = len(a), np.std(a, ddof=1) / np.std(b, ddof=1), np.corrcoef(a, b)[0, 1]
    K = 1 + 2 * (1 - r**2) * student_t(0.95, n - 2) ** 2 / (n - 2)
    low, high = (ratio * math.sqrt(K + sign * math.sqrt(K**2 - 1)) for sign in (-1, 1))
    return Estimate(float(ratio), float(low), float(high))


def _influence(y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    y = np.asarray(y, np.float64)
    w = np.ones(y.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    if y.ndim != 2 or w.shape != y.shape[1:] or not y.size:
        raise ValueError(f"crossed takes [seeds, items] and weights [items], got {y.shape} and {w.shape}")
    if not (np.isfinite(y).all() and np.isfinite(w).all() and (w > 0).all()):
        raise ValueError("crossed takes finite numbers, and weights above 0: a run that diverged has no mean")
    return y, w, float(y.sum() / (len(y) * w.sum()))
