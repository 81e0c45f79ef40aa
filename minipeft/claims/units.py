"""Can one read what a single unit of an adapter does?

The middle of a bottleneck adapter is a few numbers, each behind a ReLU: units that are on or off. LoRA has as few, but any
rotation of them is the same update: directions, not units. Both learn which of three books a sentence is from. Then

    read       the one unit of all adapters whose mean over a sentence tells its book best, by the nearest of the three books'
               means, on sentences of the validation split; its share of right books on those of the test split
    removed    the same unit, its column of W_up (of LoRA: of B) set to zero: by how much fewer answers are right

beside the best unit of the same adapter before it is trained, which reads what the base computes and no more.

Source of the question: Bau et al. 2017, Network Dissection (arXiv:1704.05796), which compares units with rotations of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import to_numpy
from ..experiments.rows import Row
from ..experiments.shipped import base
from ..peft.methods import METHODS
from . import data
from .comparison import Beside
from .components import LEAST, score
from .mechanisms import ByItem, best_rate, curve, loss_on, steps_of, train
from .protocol import SEEDS, TUNING, Report, version

TASK = "source"
PARTS = {"bottleneck": ("down_weight", "up_weight"), "lora": ("lora_A", "lora_B")}  # into the middle, and out of it
KEYS = "trained", "untrained", "whole", "without"


@dataclass(frozen=True)
class Units:
    """A cell: a method, and how many sentences are read, and answered without the unit."""

    method: str
    examples: int = 500
    epochs: float = 1
    batch_size: int = 8
    validation: int = 256
    tested: int = 768
    seeds: tuple[int, ...] = SEEDS
    base: str = field(default_factory=version)


def readings(model: Any, split: str, n: int) -> np.ndarray:
    """[sentences, units]: each unit's mean over the tokens of a sentence, the units of all adapters one after the other."""
    found: list[list[np.ndarray]] = []
    adapters, tokenizer = [part for _, part in model.parts("default")], base()[1]
    usual = [adapter.forward for adapter in adapters]

    def reading(adapter: Any, forward: Any) -> Any:
        def read(x: Any, inner: Any, **rest: Any) -> Any:
            h = inner(x)
            found[-1].append(middle(adapter, to_numpy((x if hasattr(adapter, "lora_A") else h).data)))
            return forward(x, inner=lambda _: h, **rest)

        return read

    for adapter, forward in zip(adapters, usual):
        adapter.forward = reading(adapter, forward)
    try:
        with no_grad():
            for question in data.asked(TASK, split, n):
                found.append([])
                model(np.array([tokenizer.encode(question.prompt)]))
    finally:
        for adapter in adapters:
            del adapter.forward
    return np.array([np.concatenate(of) for of in found])


def middle(adapter: Any, x: np.ndarray) -> np.ndarray:
    """[units], the mean over the tokens of x [1, tokens, width]."""
    if hasattr(adapter, "lora_A"):
        return (x[0] @ to_numpy(adapter.lora_A.data).T).mean(axis=0)
    return np.maximum(x[0] @ to_numpy(adapter.down_weight.data).T + to_numpy(adapter.down_bias.data), 0).mean(axis=0)


def books(split: str, n: int) -> np.ndarray:
    """[sentences], the number of the right book."""
    return np.array([q.choices.index(q.completion) for q in data.asked(TASK, split, n)])


def nearest(means: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The book [sentences, units] whose mean [books, units] is nearest to a unit's value [sentences, units]."""
    return abs(values[:, None] - means).argmin(axis=1)


def best_unit(model: Any, s: Units) -> tuple[int, list[int]]:
    """(the unit that tells the book best on validation, whether it is right on each test sentence)."""
    values, right = readings(model, "validation", s.validation), books("validation", s.validation)
    means = np.array([values[right == book].mean(axis=0) for book in np.unique(right)])
    unit = int((nearest(means, values) == right[:, None]).mean(axis=0).argmax())
    tested = readings(model, "test", s.tested)[:, [unit]]
    return unit, (nearest(means[:, [unit]], tested)[:, 0] == books("test", s.tested)).astype(int).tolist()


def remove(model: Any, method: str, unit: int) -> None:
    """Set the unit's column to zero, in place."""
    into, out = PARTS[method]
    for _, adapter in model.parts("default"):
        size = getattr(adapter, into).shape[0]
        if unit < size:
            getattr(adapter, out).data[:, unit] = 0
            return
        unit -= size


def run(s: Units) -> Row:
    """The row of a cell, each [seeds, sentences]: whether the best unit is right, trained and untrained, and whether the model
    is, whole and without the unit. A seed that diverged has None."""
    method, pad = METHODS[s.method], base()[1].pad_token_id
    steps, held_out = steps_of(s.examples, s.epochs, s.batch_size), data.encode(data.asked(TASK, "validation", 128))

    def learned(rate: float, seed: int) -> Any:
        model = method.prepare(base()[0], steps, seed)
        done = train(model, data.drawn(TASK, s.examples, seed), rate, steps, s.batch_size, seed, pad_token_id=pad)
        return None if done is None else model

    def loss(rate: float) -> float | None:
        model = learned(rate, TUNING)
        return None if model is None else loss_on(model, held_out, pad)

    rate, tried = best_rate(loss, method.learning_rate, LEAST)
    row: Row = {"rate": rate, "rates": curve(tried)} | {key: [] for key in KEYS}
    for seed in s.seeds:
        model = learned(rate, seed)
        row["untrained"].append(best_unit(method.prepare(base()[0], steps, seed), s)[1])
        unit, right = (None, None) if model is None else best_unit(model, s)
        row["trained"].append(right)
        row["whole"].append(None if model is None else score(model, TASK, s.tested))
        if model is not None:
            remove(model, s.method, unit)
        row["without"].append(None if model is None else score(model, TASK, s.tested))
    return row


EXPERIMENT = ByItem("units", run, lambda: [Units(method) for method in PARTS], tolerance=0.1)


def besides(rows: Sequence[Mapping[str, Any]]) -> list[Beside] | None:
    """What a unit of an adapter tells beside a direction of LoRA, and beside a unit before training; and what its removal costs
    beside nothing, and beside the removal of LoRA's. None where a seed diverged."""
    if any(None in row[key] for row in rows for key in ("trained", "whole", "without")):
        return None
    of = {row["method"]: {key: np.array(row[key], float) for key in KEYS} for row in rows}
    unit, direction = of["bottleneck"], of["lora"]
    cost, its_cost = (one["whole"] - one["without"] for one in (unit, direction))
    pairs = [
        ("read", "a unit", unit["trained"], "a direction of LoRA", direction["trained"]),
        ("read", "a unit", unit["trained"], "one before training", unit["untrained"]),
        ("removed", "a unit", cost, "none", 0 * cost),
        ("removed", "a unit", cost, "a direction of LoRA", its_cost),
    ]
    return [Beside(at, a, Report(None, one, None), b, Report(None, other, None), "right") for at, a, one, b, other in pairs]


def whole(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many answers of the models are right with all their units."""
    right = {row["method"]: np.mean(row["whole"]) for row in rows}
    return f"Whole, the adapters' models are right in {right['bottleneck']:.0%} of the answers and LoRA's in {right['lora']:.0%}."
