"""Learning-rate schedules: functions from a step (counted from 0) to the factor that multiplies the learning rate.

All rise linearly from 0 over the warm-up, as Hugging Face's `get_{constant,linear,cosine}_schedule_with_warmup`, whose
values these are up to `total_steps`. After it the factor stays what it was there (their cosine would rise again).
"""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(step: int, warmup_steps: int, total_steps: int) -> float:
    """step / warmup_steps during the warm-up, then 1."""
    return step / warmup_steps if step < warmup_steps else 1.0


def linear(step: int, warmup_steps: int, total_steps: int) -> float:
    """Warm-up, then (total_steps - step) / (total_steps - warmup_steps): a straight line down to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Warm-up, then (1 + cos(π · progress)) / 2, down to 0 (Loshchilov & Hutter, arXiv:1608.03983, no restarts)."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
