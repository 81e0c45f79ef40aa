"""The exercises of lesson 19: merging."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..peft.combine import Combination
from .foundations import normal
from .kinds import Code, Number

trim_elect_mean = Code(
    "TIES",
    "ties(tau, density)",
    lambda tau, density: Combination("ties", density=density).combine(np.float32(tau), np.ones(len(tau))),
    lambda: {
        "the lesson's four numbers": (np.array([[4, 1, -5, 0.5], [-1, 2, 3, 0.5]]), 0.5),
        "two tasks of eight numbers": (normal(2, 8), 0.25),
        "three tasks, nothing trimmed": (normal(3, 5), 1.0),
        "a sum of zero": (np.array([[1.0, 2.0], [-1.0, 3.0]]), 1.0),
        "a quarter of three numbers, which is none": (normal(2, 3), 0.25),
        "two against one": (np.array([[1.0, 2.0], [1.5, -3.0], [-2.0, 2.5]]), 1.0),
    },
)
noise = Number(
    "How long is the noise?",
    lambda: 2 * math.sqrt(0.9 / 0.1),
    lambda right: {
        "that is for an update of length 1": right / 2,
        "that is the square of it": right**2,
        "that is how long the whole draw is, the update in it": 2 * math.sqrt(1 / 0.1),
        "one in ten is kept, nine in ten are dropped": 2 * math.sqrt(0.1 / 0.9),
    },
)


def cat(A: list[Any], B: list[Any], s: list[float], w: list[float]) -> tuple[Any, Any]:
    return np.concatenate([a * x * y for a, x, y in zip(A, s, w)]), np.concatenate(B, axis=1)


def product(function: Any, A: list[Any], B: list[Any], s: list[float], w: list[float]) -> Any:
    """What the factors of a function's adapter make together; they may be scaled in any way."""
    merged_A, merged_B = function(A, B, s, w)
    return np.asarray(merged_B) @ np.asarray(merged_A)


side_by_side = Code(
    "Side by side",
    "cat(A, B, s, w)",
    cat,
    lambda: {
        "two of rank 2": ([normal(2, 5), normal(2, 5, seed=1)], [normal(4, 2), normal(4, 2, seed=1)], [1.0, 1.0], [1.0, 1.0]),
        "different ranks and scalings": ([normal(1, 5), normal(3, 5)], [normal(4, 1), normal(4, 3)], [2.0, 0.5], [1.0, 1.0]),
        "a weight is negative": ([normal(2, 5), normal(2, 5, seed=1)], [normal(4, 2), normal(4, 2, seed=1)], [2.0, 2.0], [1.0, -0.5]),
    },
    product,
)


def share_that_jumps() -> tuple[float, float]:
    """Of weights that lie anywhere, by counting them; of weights on their codes."""
    anywhere = (np.arange(1000) + 0.5) / 1000
    jumps = [np.round(w + 0.1) != np.round(w) for w in (anywhere, np.zeros(1))]
    return float(jumps[0].mean()), float(jumps[1].mean())


tenth_of_a_gap = Number(
    "A tenth of a gap",
    share_that_jumps,
    lambda right: {
        "on its code a weight needs half a gap to reach another": (0.1, 0.1),
        "the first is of weights that lie anywhere, the second of those on their codes": (0, 0.1),
        "some of those that lie anywhere are near the middle between two codes": (0, 0),
    },
)

EXERCISES = {19: [trim_elect_mean, noise, side_by_side, tenth_of_a_gap]}
