"""What is learned against what is forgotten: methods over their learning rates, remedies, and the frontier of them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from . import shipped
from .practice import RATES as PRACTICE_RATES
from .practice import SEEDS
from .shipped import Rewriting

RATES = {
    **PRACTICE_RATES,
    "bottleneck": (3e-3, 1e-2, 3e-2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "prompt": (1e-2, 3e-2, 1e-1),
}
FULL = Rewriting(learning_rate=1e-3)
LORA = Rewriting("lora", 3e-3)
REMEDIES = {
    "none": [FULL],
    "lower rate": [replace(FULL, learning_rate=rate) for rate in (1e-4, 3e-4)],
    "replay": [replace(FULL, replay=share) for share in (0.25, 1.0)],
    "weight decay": [replace(FULL, weight_decay=w) for w in (10.0,)],
    "dropout": [replace(FULL, dropout=p) for p in (0.1,)],
    "L2-SP": [replace(FULL, l2_start=alpha) for alpha in (0.3, 3.0)],
    "LoRA": [LORA],
    "LoRA, replay": [replace(LORA, replay=0.5)],
}


def methods(seeds: tuple[int, ...] = SEEDS) -> list[Rewriting]:
    """Each method over its rates."""
    return [Rewriting(method, rate, seed=seed) for method in RATES for rate in RATES[method] for seed in seeds]


def remedies(seeds: tuple[int, ...] = SEEDS) -> list[Rewriting]:
    """Full fine-tuning at its usual rate, with each remedy in several strengths; and LoRA."""
    return [replace(s, seed=seed) for several in REMEDIES.values() for s in several for seed in seeds]


RUNS = sorted(methods() + remedies(), key=lambda s: s.seed)
run = shipped.run


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates (smaller is better), by the first: the Pareto frontier."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
