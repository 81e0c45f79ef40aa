"""Losses of test records one by one, so that an interval is over seeds and records together.

A row keeps, of each of n records, the nats that a model loses on it; how many tokens they are is the same in all rows.
`per_token` makes arrays [seeds, n] of these, whose mean is the loss in nats per token. They may be added and subtracted
as losses may; `crossed` of the result is the estimate with its interval.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from minipeft.claims.data import asked
from minipeft.claims.statistics import crossed
from minipeft.evaluation.intervals import Estimate
from minipeft.experiments import shipped
from minipeft.text.datasets import Completion
from minipeft.text.examples import Example, encode_examples
from minipeft.train.evaluation import example_losses

TEST = 512  # records of the test split


@cache
def test(task: str, n: int = TEST) -> list[Example]:
    """`n` records of a task's test split, evenly spaced, the same for every seed; of "rewrite", those of Lessons 3 to 6."""
    records = asked(task, "test", n) if task == "rewrite" else shipped.spaced(shipped.short(task, "test"), n)
    return encode_examples([Completion(r.prompt, r.completion) for r in records], shipped.base()[1], 512).examples


def nats(model: Any, examples: list[Example], digits: int = 2) -> list[float]:
    """What a model loses on each of them."""
    return example_losses(model, examples, 32, shipped.base()[1].pad_token_id)[0].round(digits).tolist()


def tokens(examples: list[Example]) -> np.ndarray:
    """How many tokens each of them is judged by."""
    return np.array([(np.asarray(e.labels)[1:] >= 0).sum() for e in examples])


def per_token(rows: Any, weights: np.ndarray) -> np.ndarray:
    """[seeds, n] from nats [seeds, n] and tokens [n]: μ + (y_si - μ w_i) / w̄, as `statistics` has it; linear in y."""
    y, w = np.asarray(rows, float), np.asarray(weights, float)
    mean = y.sum() / (len(y) * w.sum())
    return mean + (y - mean * w) / w.mean()


def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean of two losses, of two sets of records [seeds, n each], as one [seeds, 2 n]."""
    mean = (first.mean() + second.mean()) / 2
    return mean + np.concatenate([first - first.mean(), second - second.mean()], axis=1)


def ratio(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The ratio of two means of the same seeds and records, to first order (the delta method)."""
    value = a.mean() / b.mean()
    return crossed(value + (a - value * b) / b.mean())


def below(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> bool | None:
    """Whether a < b (True), a > b (False), or neither clearly (None)."""
    found = crossed(b - a, level=level)
    return True if found.low > 0 else False if found.high < 0 else None


def within(values: np.ndarray, most: float) -> bool:
    """Whether the whole interval is nearer to 0 than `most`."""
    found = crossed(values)
    return -most < found.low and found.high < most


def spread(values: np.ndarray | Estimate, digits: int = 3) -> str:
    """`mean [low, high]`."""
    e = values if isinstance(values, Estimate) else crossed(values)
    return f"{e.value:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"
