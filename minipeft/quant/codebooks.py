"""The numbers that a code of four or eight bits can stand for, each set built from its definition.

A block of weights is divided by its largest magnitude, so every code book lives in [-1, 1]. What differs is where its
points lie. A trained weight matrix is close to normal, so NF4 puts its points at quantiles of the normal distribution,
dense where the weights are (its codes are not used equally often: Lesson 7, section 2); FP4 spaces them as a float does,
dense near zero; int4 evenly.

All are float32, computed in float32 where bitsandbytes does, and equal to its tables bit for bit.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np


def _read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """n evenly spaced float32 numbers, as torch.linspace has them: a float32 step, from both ends inwards, rounded once."""
    a, b, i = np.float32(start), np.float32(stop), np.arange(n)
    step = float((b - a) / np.float32(n - 1))
    return np.where(i < n // 2, float(a) + step * i, float(b) - step * (n - 1 - i)).astype(np.float32)


@cache
def nf4_code() -> np.ndarray:
    """NormalFloat, [16] ascending: quantiles of N(0, 1), divided by the largest (QLoRA, appendix E).

    Eight positive points at the probabilities 0.5 + i (p - 0.5) / 8 and seven negative ones at a seventh's steps, so that
    zero is a point of its own. The outermost probability p is the mean of 1 - 1/32 and 1 - 1/30, half a bin inside the
    ends of 16 and of 15 equal bins, as neither 0 nor 1 has a quantile; published as 0.9677083.
    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    p = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(q)) for q in _linspace(p, 0.5, 9)[:-1]]
    negative = [-quantile(float(q)) for q in _linspace(p, 0.5, 8)[:-1]]
    values = np.sort(np.array([*negative, 0.0, *positive], np.float32))
    return _read_only(values / values[-1])


@cache
def fp4_code() -> np.ndarray:
    """A float of four bits, [16] by bit pattern s e e m, divided by the largest.

    Its exponent counts downwards: (1 + m/2) 2^(4 - e) for e = 1, 2, 3, and the subnormal m 2^-4 for e = 0, where both
    signs of zero are +0. Source: bitsandbytes, `get_4bit_type("fp4")`.
    """
    positive = [(1 + m / 2) * 2.0 ** (4 - e) if e else m * 2.0**-4 for e in range(4) for m in range(2)]
    values = np.array([*positive, *[0 - v for v in positive]], np.float32)
    return _read_only(values / values.max())


@cache
def int4_code() -> np.ndarray:
    """k / 7 for the two's complement k of four bits, [16] by bit pattern: evenly spaced, for comparison.

    -8/7 lies outside of [-1, 1] and is never chosen.
    """
    k = np.arange(16)
    return _read_only((np.where(k < 8, k, k - 16) / 7).astype(np.float32))


@cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The dynamic tree of eight bits, [256] ascending (Dettmers 2016, arXiv:1511.04561; bitsandbytes).

    A code is a sign, k zeros that name the decade 10^-k, a one, and a linear fraction in the 6 - k bits left: 2^(6-k)
    midpoints of [0.1, 1] times 10^-k, for k = 0..6. Relative precision is highest near 1, and six decades are covered. With
    0 and 1 the 254 become 256. Without a sign, for what is never negative, the fraction has one bit more.
    """
    values = [0.0, 1.0]
    for k in range(7):
        edges = _linspace(0.1, 1.0, 2 ** (6 - k + (not signed)) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0**-k)
        values += [*means, *(-means if signed else ())]
    return _read_only(np.sort(np.array(values, np.float32)))


CODES_4BIT = {"nf4": nf4_code, "fp4": fp4_code, "int4": int4_code}


@cache
def thresholds(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """([15] float32, the midpoints between adjacent points, ascending; [16] uint8, the code of the point at each rank).

    The number of midpoints below x is the rank of the point nearest to x; of two points at the same distance it is the
    lower.
    """
    code = CODES_4BIT[quant_type]()
    order = np.argsort(code, kind="stable")
    ascending = code[order]
    midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2)
    return _read_only(midpoints), _read_only(order.astype(np.uint8))
