"""Is training with fewer parameters faster: by the step, and to the same loss on held-out text?

    seconds to a loss = steps to it × seconds a step,     FLOPs to it = steps to it × FLOPs a step

Steps to a loss are read from the held-out curve of a run, measured every few steps, on straight lines between them. The
losses are fixed by full fine-tuning's own curve: where it has half, and nine tenths, of what it gains in the whole run.
Each method has the rate that is best for the mean of its curve (what is fast is low early), and a constant rate after
warming up: a schedule that ends would make the steps depend on where it ends. FLOPs are `accounting.step_flops` of a batch of
the mean padded length, without checkpointing; seconds are a median of steps, the methods in turn, in a run of its own, on
a machine that does nothing else. So the curves are the same everywhere, and the seconds are a machine's.

Sources: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.2: 25 % faster on GPT-3 175B; Biderman et al. 2024, LoRA
Learns Less and Forgets Less (arXiv:2405.09673), for learning per example. Departures: a CPU, small models, and float32
throughout; no time for reading data or for saving. The rates are chosen on validation; the curves that are compared are
of test records, under other seeds. The records' luck, which all methods share, is in no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..accounting import architecture, step_flops
from ..evaluation.intervals import Estimate
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..text.examples import Example
from ..train import Trainer, TrainingArguments
from . import data
from .mechanisms import best_rate, curve, geometric, graded, judged, loss_on, those, train
from .protocol import LEAST, SEEDS, TABLE, TUNING
from .register import Experiment, Verdict, claim
from .timing import machine, where

METHODS = ("full", "head", "ia3", "prompt", "prefix", "bottleneck", "lora", "lora-qv")
SHARES = (0.5, 0.9)  # of full fine-tuning's gain


@dataclass(frozen=True)
class Curve:
    """A cell: how a method's loss falls, step by step."""

    method: str
    task: str = "rewrite"
    steps: int = 240
    every: int = 12
    batch_size: int = 8
    validation: int = 256
    items: int = 512
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Pace:
    """A repeat: seconds a step of all methods, in turn; `rounds` times, `steps` steps each."""

    repeat: int
    methods: tuple[str, ...] = METHODS
    task: str = "rewrite"
    steps: int = 8
    rounds: int = 3
    batch_size: int = 8


def runs() -> list[Curve | Pace]:
    """All cells: the curves, and the seconds."""
    return [*(Curve(method) for method in METHODS), *map(Pace, SEEDS)]


def run(settings: Curve | Pace) -> Row:
    """The row of a cell: of a curve or of seconds."""
    return falls(settings) if isinstance(settings, Curve) else paces(settings)


def falls(s: Curve) -> Row:
    """trainable, flops (of a step), rate, rates ([[rate, mean of the curve], ...]), before (the loss on test of the model as
    it is), and curves [seeds][steps / every]: the losses on test; None for a seed whose training diverged."""
    model, tokenizer = base()
    method = TABLE[s.method]
    validation, test = (data.encode(data.asked(s.task, *of)) for of in (("validation", s.validation), ("test", s.items)))

    def losses(rate: float, seed: int, held_out: list[Example]) -> list[float] | None:
        trained, examples = method.prepare(model, s.steps, seed), data.drawn(s.task, s.steps * s.batch_size, seed)
        found = train(
            trained, examples, rate, s.steps, s.batch_size, seed,
            pad_token_id=tokenizer.pad_token_id, held_out=held_out, every=s.every, schedule="constant",
        )  # fmt: skip
        return None if found is None else [loss for _, loss in found.losses("eval_loss")]

    def score(rate: float) -> float | None:
        found = losses(rate, TUNING, validation)
        return None if found is None else statistics.mean(found)

    rate, tried = best_rate(score, method.learning_rate, LEAST)
    examples = data.drawn(s.task, s.steps * s.batch_size, TUNING)
    lengths = [max(len(e.input_ids) for e in examples[i : i + s.batch_size]) for i in range(0, len(examples), s.batch_size)]
    prepared, arch = method.prepare(model, s.steps), architecture(model.config)
    flops = step_flops(arch, method.config(s.steps), s.batch_size, round(statistics.mean(lengths)), checkpointing=False)
    return {
        "trainable": sum(p.size for p in prepared.parameters() if p.requires_grad), "flops": flops.total, "rate": rate,
        "rates": curve(tried), "before": rounded(loss_on(model, test, tokenizer.pad_token_id)),
        "curves": rounded([losses(rate, seed, test) for seed in s.seeds]),
    }  # fmt: skip


def paces(s: Pace, of: Callable[[], tuple[Any, Any]] = base) -> Row:
    """seconds: the least over the rounds of the median of a round's steps, by method; the first step of a round is left out.
    Beside it the processor, the threads and the day. `of` loads the model and its tokenizer."""
    model, tokenizer = of()
    examples = data.drawn(s.task, (s.steps + 1) * s.batch_size, 0, tokenizer=tokenizer)
    medians: dict[str, list[float]] = {name: [] for name in s.methods}
    for _ in range(s.rounds):
        for name, found in medians.items():
            arguments = TrainingArguments(
                max_steps=s.steps + 1, per_device_train_batch_size=s.batch_size, learning_rate=1e-5, progress=False
            )
            trainer = Trainer(TABLE[name].prepare(model, s.steps), examples, None, arguments, tokenizer.pad_token_id)
            found.append(statistics.median([seconds for _, seconds in trainer.train().losses("seconds")][1:]))
    return {"seconds": {name: min(found) for name, found in medians.items()}} | machine()


# ----------------------------------------------------------------------------------------------------------- statistics


def steps_to(losses: Sequence[float] | None, target: float, every: int, before: float) -> float:
    """Steps until a curve, measured after each `every` steps from `before` on, is first at `target`; infinite where it never is."""
    if before <= target:
        return 0.0
    last = before
    for i, loss in enumerate(losses or ()):
        if loss <= target:
            return every * (i + (last - target) / (last - loss))
        last = loss
    return math.inf


def targets(full: Mapping[str, Any]) -> dict[float, float]:
    """{share of the gain: the held-out loss at which full fine-tuning has it}: of its best loss, in the mean over seeds."""
    best = statistics.mean(min(one) for one in full["curves"] if one)
    return {share: full["before"] - share * (full["before"] - best) for share in SHARES}


def ratio(mine: Sequence[float], full: Sequence[float]) -> Estimate | None:
    """The geometric mean of mine / full, pair by pair, with its interval; None where one is infinite."""
    logs = np.log2(np.asarray(mine, float)) - np.log2(np.asarray(full, float))
    return geometric(logs) if np.isfinite(logs).all() else None


def paces_over_full(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate | None]:
    """{method: the seconds of a step, over those of full fine-tuning}, of the rows of `paces` among these."""
    times = [row["seconds"] for row in rows if "seconds" in row]
    names = [name for name in times[0] if name != "full"]
    return {name: ratio([one[name] for one in times], [one["full"] for one in times]) for name in names}


EXPERIMENT = Experiment("speed", run, runs, timed=True)


@claim("peft-3", lesson="16_which_method.py", section="2 · What it costs on this machine", experiment=EXPERIMENT)
def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Holds if every method that trains fewer parameters is clearly faster than full fine-tuning, in seconds a step and in seconds to
    two fixed losses; holds if clearly faster in some of these; does not hold here if in none. A method that never reaches a loss
    is not faster to it."""
    curves = {row["method"]: row for row in rows if "curves" in row}
    full, evidence, pace = curves["full"], {}, paces_over_full(rows)
    cases: dict[str, dict[str, bool]] = {}
    for name, row in curves.items():
        if row["trainable"] >= full["trainable"]:
            continue
        faster = [evidence.setdefault(f"{name}: seconds a step", pace[name])]
        evidence[f"{name}: FLOPs a step"] = Estimate(row["flops"] / full["flops"])
        for share, target in targets(full).items():
            steps = ratio(*([steps_to(one, target, r["every"], r["before"]) for one in r["curves"]] for r in (row, full)))
            if steps is None:
                faster.append(None)
                continue
            evidence[f"{name}: steps to {share:.0%} of the gain"] = steps
            evidence[f"{name}: FLOPs to {share:.0%} of the gain"] = Estimate(*(x and x * row["flops"] / full["flops"] for x in steps))
            evidence[f"{name}: seconds to {share:.0%} of the gain"] = both = product(steps, pace[name])
            faster.append(both)
        for what, found in zip(("a step", *(f"to {share:.0%} of the gain" for share in SHARES)), faster):
            cases.setdefault(what, {})[name] = found is not None and found.high is not None and found.high < 1
    if not cases:
        raise ValueError("there is no row of a method that trains fewer parameters than full fine-tuning")
    slowest = max((x for name, x in evidence.items() if name.endswith("seconds a step")), key=lambda x: x.value)
    told = [f"{what}: {those(of)}" + f" (not {those(of, False)})" * (len({*of.values()}) > 1) for what, of in cases.items()]
    because = f"Clearly faster than full fine-tuning are, of {len(curves) - 1} methods, in {'; '.join(told)}."
    effect = "seconds a step of the slowest, over full fine-tuning's", slowest, "times"
    every = {f"{name} {what}": so for what, of in cases.items() for name, so in of.items()}
    task = f"rewrite, {full['items']} test records; {where([row for row in rows if 'seconds' in row])}"
    return judged(graded(every), because, *effect, {"times": evidence}, full["items"], task)


def product(a: Estimate, b: Estimate) -> Estimate:
    """The product of two independent positive estimates, with its interval: the half widths of their logarithms add in squares."""
    value = a.value * b.value
    if None in (*a, *b):
        return Estimate(value)
    half = math.hypot(*(math.log(x.high / x.low) / 2 for x in (a, b)))
    return Estimate(value, value * math.exp(-half), value * math.exp(half))
