"""Are adapters components? Two tasks are learned apart, one after the other, on one base; then they are used in turn, together,
and not at all.

    base ─► + "rewrite", trained ─► + "source", trained, while "rewrite" is there and not in use

    alone      one in use: is it, bit for bit, what it was before the other one came?
    together   both in use, one around the other: does each task keep what its adapter alone can do?
    removed    neither there: is the model, bit for bit, the base?

LoRA stands beside bottleneck adapters: what it can do as well is no reason to choose them. How long a swap takes, and what an
adapter takes on the disk, is measured elsewhere (adapter-5, peft-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..autograd.tensor import no_grad
from ..backend import to_numpy
from ..evaluation import evaluate
from ..experiments.rows import Row
from ..experiments.shipped import base
from ..peft.methods import METHODS
from ..peft.model import get_peft_model
from ..text.datasets import MultipleChoice
from ..train.evaluation import example_losses
from . import data
from .comparison import KEYS, Beside, not_inferior, number, told
from .inputs import batch
from .mechanisms import ByItem, best_rate, curve, loss_on, steps_of, train
from .protocol import SEEDS, TUNING, Report, version
from .register import HOLDS, IF, NOT, UNTESTABLE, Verdict, listed

TASKS = "rewrite", "source"
LEAST = 0.01  # nats per token: a rate that is better by less is not better


@dataclass(frozen=True)
class Components:
    """A cell: a method, and from how many examples each task is learned."""

    method: str
    examples: int = 500
    epochs: float = 1
    batch_size: int = 8
    tested: int = 768  # items of the test split, of each task: all that "source" has
    validation: int = 128
    seeds: tuple[int, ...] = SEEDS
    base: str = field(default_factory=version)


def learn(model: Any, s: Components, task: str, rate: float, seed: int) -> bool:
    """Train what is in use; whether it did not diverge."""
    steps, pad = steps_of(s.examples, s.epochs, s.batch_size), base()[1].pad_token_id
    return train(model, data.drawn(task, s.examples, seed), rate, steps, s.batch_size, seed, pad_token_id=pad) is not None


def score(model: Any, task: str, n: int) -> list[float]:
    """[items] of the test split: the nats of an answer; of a task with choices, whether the right one is the likeliest."""
    asked, tokenizer = data.asked(task, "test", n), base()[1]
    if KEYS[task] == "nll":
        return example_losses(model, data.encode(asked), 32, tokenizer.pad_token_id)[0].round(2).tolist()
    items = [MultipleChoice(q.prompt, list(q.choices), q.choices.index(q.completion)) for q in asked]
    found = evaluate(model, tokenizer, items, batch_size=64).details
    return [int(np.argmax(one["logprobs"]) == one["answer"]) for one in found]


def logits(model: Any) -> np.ndarray:
    with no_grad():
        return to_numpy(model(batch(8, 32)).data)


def measure(s: Components, rates: Mapping[str, float], seed: int) -> dict[str, Any] | None:
    """Scores by task, alone and together, and the greatest differences of logits; None where a training diverged."""
    config, (first, second) = METHODS[s.method].config(), TASKS
    model = get_peft_model(base()[0], config, first, seed=seed)
    if not learn(model, s, first, rates[first], seed):
        return None
    before = logits(model)
    model.add_adapter(second, config, seed=seed)
    model.set_adapter(second)
    if not learn(model, s, second, rates[second], seed):
        return None
    found: dict[str, Any] = {"alone": {second: score(model, second, s.tested)}}
    model.set_adapter([first, second])
    found["together"] = {task: score(model, task, s.tested) for task in TASKS}
    model.set_adapter(first)
    found["alone"][first] = score(model, first, s.tested)
    found["swapped"] = float(abs(logits(model) - before).max())
    for task in TASKS:
        model.delete_adapter(task)
    found["removed"] = float(abs(logits(model) - logits(base()[0])).max())
    return found


def run(s: Components) -> Row:
    """The row of a cell: scores {use: {task: [seeds, items]}}, tokens [items] of rewrite's answers; the greatest differences of
    logits, swapped and removed [seeds]; by task the rate, and [[rate, loss on validation], ...]. A seed that diverged has None."""
    pad, rates, tried = base()[1].pad_token_id, {}, {}
    for task in TASKS:
        held_out = data.encode(data.asked(task, "validation", s.validation))

        def loss(rate: float, task: str = task, held_out: Any = held_out) -> float | None:
            model = METHODS[s.method].prepare(base()[0], 1, TUNING)
            return loss_on(model, held_out, pad) if learn(model, s, task, rate, TUNING) else None

        rates[task], losses = best_rate(loss, METHODS[s.method].learning_rate, LEAST)
        tried[task] = curve(losses)
    found = [measure(s, rates, seed) for seed in s.seeds]
    tokens = [int((example.labels >= 0).sum()) for example in data.encode(data.asked("rewrite", "test", s.tested))]
    scores = {"base": {task: [score(base()[0], task, s.tested)] for task in TASKS}} | {
        use: {task: [None if one is None else one[use][task] for one in found] for task in TASKS}
        for use in ("alone", "together")
    }
    exact = {key: [None if one is None else one[key] for one in found] for key in ("swapped", "removed")}
    return {"rate": rates, "rates": tried, "tokens": tokens, "scores": scores} | exact


EXPERIMENT = ByItem("components", run, lambda: [Components(method) for method in ("bottleneck", "lora")], tolerance=0.1)


# ----------------------------------------------------------------------------------------------------------- statistics


def besides(row: Mapping[str, Any], a: str, b: str) -> list[Beside]:
    """One use beside another, on each task."""
    found = []
    for task, key in KEYS.items():
        weights = np.array(row["tokens"], float) if key == "nll" else None
        one, other = (Report(None, np.array(row["scores"][use][task], float), weights) for use in (a, b))
        found.append(Beside(task, f"{row['method']} {a}", one, b, other, key))
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Of bottleneck adapters, whether they are components in three senses: swapped and removed, bit for bit, and together not
    worse than alone, on both tasks, which each must have learned. LoRA's figures stand
    beside them, and what each has learned alone."""
    cases, told_of, learned = {}, {}, []
    for row in rows:
        if None in row["swapped"]:
            return Verdict(UNTESTABLE, f"{row['method']} diverged under one of the seeds, tuned as it is.")
        gained = [one.difference() for one in besides(row, "alone", "base")]
        told_of[row["method"]] = both = told(besides(row, "together", "alone"), not_inferior, listed(TASKS))
        kept = both.verdict if all(one.clearly_better for one in gained) else UNTESTABLE  # what was not learned is not kept
        cases[row["method"]] = {"swapped": max(row["swapped"]) == 0, "removed": max(row["removed"]) == 0, "together": kept}
        learned += [number(f"{row['method']} alone over the base, {task}", one, KEYS[task]) for task, one in zip(TASKS, gained)]
    own, other = cases["bottleneck"], told_of["lora"]
    exact = [own["swapped"], own["removed"]]
    verdict = HOLDS if all(exact) and own["together"] == HOLDS else NOT if not any(exact) and own["together"] == NOT else IF
    words = {method: listed([name for name, found in of.items() if found in (True, HOLDS)]) for method, of in cases.items()}
    return replace(
        told_of["bottleneck"], verdict=verdict,
        evidence=[*told_of["bottleneck"].evidence, other.effect, *other.evidence, *learned],
        because=f"Adapters are components in these senses: {words['bottleneck']}; LoRA's in these: {words['lora']}. "
        f"{told_of['bottleneck'].because} {other.because}",
    )  # fmt: skip
