"""What the experiments on mechanisms share: a tuned rate, a training run, the scores of a task, and how a verdict is made.

One row of these experiments is a whole cell: its rate is tuned on validation under the seed TUNING of the protocol, on
its lattice (rate x 2, to the best neighbor, until none is better), then the cell is measured under the seeds that its
settings name, of which no choice has been made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from ..evaluation import evaluate
from ..evaluation.intervals import Estimate, mean
from ..experiments.shipped import base
from ..text.datasets import MultipleChoice
from ..text.examples import Example
from ..train import Trainer, TrainingArguments, TrainingDiverged
from ..train.evaluation import example_losses
from ..train.trainer import TrainingResult
from . import data
from .protocol import climb
from .register import HOLDS as HOLDS
from .register import IF as IF
from .register import NOT as NOT
from .register import SPREADS, Experiment, Verdict, as_number
from .register import graded as graded
from .register import those as those


class ByItem(Experiment):
    """An experiment whose rows have values item by item, in lists and dictionaries. Computed again, their means may differ by
    the tolerance, as another processor adds in another order and an answer may change; and, as training magnifies the rest,
    by SPREADS of their standard deviations over the seeds of the row."""

    @property
    def allowed(self) -> str:
        return f"{self.tolerance:.0%}, and {SPREADS} standard deviations over the seeds"

    def check(self, row: Mapping[str, Any], rng: Random) -> list[str]:
        """A cell under one of its seeds, and its best rate under TUNING: what the other rates gave is taken from the row."""
        settings = self.settings_of(row)
        n = len(getattr(settings, "seeds", ()))
        seed = rng.randrange(max(1, n))
        one = replace(settings, seeds=settings.seeds[seed : seed + 1]) if n else settings
        _recorded[:] = curves(row)
        try:
            found = self.run(**one) if isinstance(one, Mapping) else self.run(one)
        finally:
            _recorded.clear()
        part = {key: row.get(key) if is_curve(key) else _of_seed(row.get(key), seed, n) for key in found}
        mine, other = _alike(part, found, spread(row))
        return super().differences([mine], [other])

    def differences(self, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[str]:
        """What differs by more, of the means of rows with all of their seeds."""
        pairs = [_alike(row, other, spread(row)) for row, other in zip(rows, others, strict=True)]
        return super().differences([row for row, _ in pairs], [other for _, other in pairs])


def spread(row: Mapping[str, Any]) -> dict[str, float]:
    """The standard deviation over a row's seeds of what has a value for each."""
    n, found = len(row.get("seeds", ())), {}
    for key, value in row.items():
        each = [_mean(_of_seed(value, seed, n)) for seed in range(n)]
        if n > 1 and key != "seeds" and not is_curve(key) and all(isinstance(one, float) for one in each):
            found[key] = float(np.std(each, ddof=1))
    return found


def _alike(row: Mapping[str, Any], other: Mapping[str, Any], spreads: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The means of two rows, those of the other that luck may explain replaced by the first's."""
    a, b = ({key: _mean(value) for key, value in one.items()} for one in (row, other))
    for key, one in spreads.items():
        if isinstance(a.get(key), float) and isinstance(b.get(key), float) and abs(a[key] - b[key]) <= SPREADS * one:
            b[key] = a[key]
    return a, b


def _of_seed(value: Any, seed: int, n: int) -> Any:
    """The part of a value that is of one of n seeds: of each list of n that stands in no other list."""
    if isinstance(value, dict):
        return {key: _of_seed(one, seed, n) for key, one in value.items()}
    return value[seed : seed + 1] if isinstance(value, list) and len(value) == n > 1 else value


def _mean(value: Any) -> Any:
    """Lists and dictionaries of numbers as their mean; what has texts, or None where a run diverged, as it is."""
    if not isinstance(value, (list, dict)):
        return value
    means = [_mean(one) for one in (value.values() if isinstance(value, dict) else value)]
    return float(np.mean(means)) if means and all(isinstance(one, (int, float)) for one in means) else means


def judged(
    verdict: str, because: str, name: str, effect: Estimate, unit: str, evidence: Mapping[str, Mapping[str, Estimate]],
    items: int | None, task: str,
) -> Verdict:  # fmt: skip
    """A verdict of five seeds on the shipped base: `name` and `unit` are of the number that decided; beside it stands `evidence`,
    {unit: {name: number}}."""
    numbers = [as_number(key, e, one) for one, of in evidence.items() for key, e in of.items()]
    return Verdict(verdict, because, as_number(name, effect, unit), numbers, 5, items, "the shipped base", task)


def geometric(logs: Sequence[float], base: float = 2.0) -> Estimate:
    """The geometric mean of base^logs, with its interval (Student's t on the logarithms)."""
    return Estimate(*(None if x is None else base**x for x in mean(logs)))


def best_rate(loss: Callable[[float], float | None], rate: float, least: float = 0.0) -> tuple[float, dict[float, float]]:
    """(the best rate, {rate tried: its loss}): from `rate` by factors of 2 to the best neighbor, while it is better by more
    than `least`; so the best lies inside what was tried. None, of a run that diverged, counts as infinite."""

    def of(r: float) -> float:
        value = loss(r)
        return math.inf if value is None or not math.isfinite(value) else value

    known = _recorded.pop(0) if _recorded else {}
    recorded = {*known}
    while True:
        at, unknown = climb(known.get, rate, lambda r: [[r / 2, r * 2]], least)
        if not unknown:
            break
        known |= {r: of(r) for r in unknown}
    if at in recorded:
        known[at] = of(at)
    return at, dict(sorted(known.items()))


_recorded: list[dict[float, float]] = []  # what `best_rate` has to try no more, the next search first: see `ByItem.check`


def is_curve(key: str) -> bool:
    """Whether a row has the rates of a search, or of several, under this name."""
    return key.endswith("rates")


def curves(row: Mapping[str, Any]) -> list[dict[float, float]]:
    """The searches of a row in their order, {rate: loss}."""
    found = [value for key, value in row.items() if is_curve(key)]
    lists = [one for value in found for one in (value.values() if isinstance(value, dict) else [value])]
    return [{rate: math.inf if loss is None else loss for rate, loss in one} for one in lists]


def curve(tried: Mapping[float, float]) -> list[list[float | None]]:
    """The tried rates as a row has them, [[rate, loss to five decimals], ...]; None where training diverged."""
    return [[rate, round(loss, 5) if math.isfinite(loss) else None] for rate, loss in tried.items()]


@np.errstate(over="ignore", invalid="ignore")  # of what diverges
def train(
    model: Any, examples: Sequence[Example], rate: float, steps: int, batch_size: int, seed: int, *, pad_token_id: int,
    held_out: Sequence[Example] | None = None, every: int | None = None, schedule: str = "cosine", optimizer: Any = None,
    packing: bool = False,
) -> TrainingResult | None:  # fmt: skip
    """Train a model in place by AdamW, 5 % of the steps warming up; None where it diverged.

    every      steps between measurements of the loss on `held_out`
    optimizer  in the place of AdamW at this rate
    packing    whether examples share rows
    """
    arguments = TrainingArguments(
        learning_rate=rate, max_steps=steps, per_device_train_batch_size=batch_size, per_device_eval_batch_size=32,
        lr_scheduler_type=schedule, warmup_ratio=0.05, eval_steps=every, seed=seed, packing=packing, progress=False,
    )  # fmt: skip
    trainer = Trainer(model, examples, held_out, arguments, pad_token_id, optimizer=optimizer)
    try:
        return trainer.train()
    except TrainingDiverged:
        return None


def steps_of(examples: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of a number of epochs."""
    return max(1, round(examples * epochs / batch_size))


def loss_on(model: Any, examples: Sequence[Example], pad_token_id: int) -> float | None:
    """Nats per label token; None where it is not finite."""
    try:
        nll, tokens = example_losses(model, examples, 32, pad_token_id)
    except FloatingPointError:
        return None
    return float(nll.sum() / tokens.sum())


def accuracy(model: Any, task: str, split: str, n: int) -> float:
    """The share of n records of a checked task whose right choice has the highest log-probability."""
    asked = data.asked(task, split, n)
    items = [MultipleChoice(q.prompt, list(q.choices), q.choices.index(q.completion)) for q in asked]
    found = evaluate(model, base()[1], items, batch_size=64).details
    return float(np.mean([np.argmax(one["logprobs"]) == one["answer"] for one in found]))
