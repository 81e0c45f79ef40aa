"""What is learned against what is forgotten: methods over their learning rates, remedies, and the frontier of them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from minipeft.experiments import shipped
from minipeft.experiments.rows import Row
from minipeft.experiments.seeds import SEEDS, over_seeds
from minipeft.experiments.shipped import Rewriting

from .practice import RATES

FULL = Rewriting(learning_rate=1e-3)
LORA = Rewriting("lora", 3e-3)
REMEDIES = {
    "none": [FULL],
    "lower rate": [replace(FULL, learning_rate=rate) for rate in (1e-4, 3e-4)],
    "replay": [replace(FULL, replay=share) for share in (0.25, 1.0)],
    "weight decay": [replace(FULL, weight_decay=w) for w in (10.0,)],
    "dropout": [replace(FULL, dropout=p) for p in (0.1,)],
    "L2-SP": [replace(FULL, l2_start=alpha) for alpha in (0.3,)],
    "LoRA": [LORA],
    "LoRA, replay": [replace(LORA, replay=0.25)],
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


def point(rows: Sequence[Row], settings: Rewriting) -> tuple[float, float]:
    """(task loss, forgotten), means over the seeds."""
    return float(over_seeds(rows, settings).mean()), float(over_seeds(rows, settings, "forgotten").mean())
