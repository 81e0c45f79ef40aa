"""The main comparisons once more, on a real language model: SmolLM2-135M-Instruct, ninety times the shipped base.

    a row      a method learns the task "source" from `examples` records that the seed draws, once through, in batches of 8
    tuning     of the rate alone, by `mechanisms.best_rate`: from the power of 2 near the method's usual one at the model's width,
               by factors of 2 to the better neighbor, until none is better by LEAST; judged on validation under TUNING
    report     the best rate under the five SEEDS: the nats of each test answer, and of a token of each block of general text
    difference over seeds and items, as everywhere (`statistics.crossed`); above 0 the first is better, in nats per token
    seconds    of a step of each method, in turns, as `speed.paces` has them

So what `protocol` asks of the shipped base in two to six cases, with epochs and batches tuned too, is asked here in one, always
by losses in nats: also of `source`, which is judged there by right answers, and of what is forgotten, which is judged there by
general items, and for forget-5 at equal quality of the task. That is what hours on two cores allow: it says whether a
comparison comes out alike on a model that others have pretrained. No verdict rests on it but full-3's, whose law it tries.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..experiments.rows import Row
from ..experiments.shipped import rounded
from ..experiments.sweep import sweep
from ..peft.methods import at_width
from ..train.evaluation import example_losses
from . import data
from .comparison import NEAR, Difference
from .inputs import smollm2
from .mechanisms import ByItem, best_rate, curve, loss_on, steps_of, train
from .protocol import LEAST, SEEDS, TABLE, TUNING
from .register import Experiment, listed
from .speed import Pace, paces, paces_over_full, ratio
from .statistics import crossed
from .timing import where
from .width import vertex

METHODS = ("full", "lora", "lora-qv", "qlora", "prompt", "prefix")
QUESTIONS = {  # statements, and who is compared with whom in what
    "lora-12": [("lora", "full", "nll")],
    "lora-7": [("lora-qv", "lora", "nll")],
    "lora-8": [("lora", "lora-qv", "nll")],
    "qlora-5": [("qlora", "lora", "nll")],
    "soft-8": [("prompt", "lora", "nll"), ("prefix", "lora", "nll")],
    "forget-1": [(method, "base", "general") for method in METHODS],
    "forget-5": [(method, "full", key) for method in METHODS[1:4] for key in ("general", "nll")],
}


@dataclass(frozen=True)
class Large:
    """A cell: a method, or "base", the model as it is."""

    method: str
    task: str = "source"
    examples: int = 320
    batch_size: int = 8
    validation: int = 256
    items: int = 768
    blocks: int = 8  # of each of the four corpora of general text
    length: int = 128
    seeds: tuple[int, ...] = SEEDS
    base: str = "SmolLM2-135M-Instruct"


def runs() -> list[Large]:
    """All cells."""
    return [Large(method) for method in ("base", *METHODS)]


def run(settings: Large) -> Row:
    """The row of a cell: nll [seeds, items], general [seeds, blocks]; of "base" both have one row, and tokens [items] are
    those of the answers; of the others None for a seed whose training diverged, and rate, rates, trainable.

    Raises FileNotFoundError where the model is not on this machine."""
    s, (model, tokenizer) = settings, smollm2()
    test, validation = (
        data.encode(data.asked(s.task, *split), tokenizer) for split in (("test", s.items), ("validation", s.validation))
    )
    blocks = [block for corpus in data.general(s.blocks, s.length, tokenizer).values() for block in corpus]

    def scores(model: Any) -> tuple[Any, ...] | None:
        """nats of each answer, its tokens, nats per token of each block."""
        if model is None:
            return None
        try:
            (nll, tokens), (general, n) = (example_losses(model, of, 16, tokenizer.pad_token_id) for of in (test, blocks))
        except FloatingPointError:
            return None
        return nll.round(3).tolist(), tokens.tolist(), (general / n).round(4).tolist()

    if s.method == "base":
        nll, tokens, general = scores(model)
        return {"nll": [nll], "general": [general], "tokens": tokens}
    method, steps = TABLE[s.method], steps_of(s.examples, 1, s.batch_size)

    def fitted(rate: float, seed: int) -> Any:
        drawn, tuned = data.drawn(s.task, s.examples, seed, tokenizer=tokenizer), method.prepare(model, steps, seed)
        return train(tuned, drawn, rate, steps, s.batch_size, seed, pad_token_id=tokenizer.pad_token_id) and tuned

    def loss(rate: float) -> float | None:
        tuned = fitted(rate, TUNING)
        return None if tuned is None else loss_on(tuned, validation, tokenizer.pad_token_id)

    rate, tried = best_rate(loss, 2.0 ** round(math.log2(at_width(method.learning_rate, model))), LEAST)
    found = [scores(fitted(rate, seed)) for seed in s.seeds]
    trainable = sum(p.size for p in method.prepare(model, steps).parameters() if p.requires_grad)
    row = {"trainable": trainable, "nll": [one and one[0] for one in found], "general": [one and one[2] for one in found]}
    return rounded(row) | {"rate": rate, "rates": curve(tried)}


EXPERIMENT = ByItem("smollm2", run, runs)


@dataclass(frozen=True)
class Seconds(Pace):
    """A repeat, as in `speed`, on this model."""

    methods: tuple[str, ...] = METHODS
    task: str = "source"
    steps: int = 3
    rounds: int = 2
    base: str = "SmolLM2-135M-Instruct"


def seconds(settings: Seconds) -> Row:
    """The seconds of a step of every method, in turns. Raises FileNotFoundError where the model is not on this machine."""
    return paces(settings, smollm2)


PACE = Experiment("smollm2_speed", seconds, lambda: [*map(Seconds, SEEDS)], timed=True)


# ----------------------------------------------------------------------------------------------------------- statistics


def compared(rows: Sequence[Mapping[str, Any]], a: str, b: str, key: str) -> Difference | None:
    """How much lower a's losses are than b's; None where one diverged under some seed."""
    of = {row["method"]: row for row in rows}
    if None in of[a][key] or None in of[b][key]:
        return None
    one, other = (np.array(of[name][key], float) for name in (a, b))
    return Difference(crossed(other - one, np.array(of["base"]["tokens"], float) if key == "nll" else None), NEAR["nll"])


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{method: its best rate, between the lattice's}."""
    of = {row["method"]: row for row in rows if row["method"] != "base"}
    return {name: vertex({r: math.inf if x is None else x for r, x in row["rates"]}, row["rate"]) for name, row in of.items()}


def told(id: str, rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """What the rows (default: those shipped) say of what a statement is about, or that they say nothing; "" of a statement
    that they are not about."""
    if id in ("peft-3", "qlora-4"):
        return (faster if id == "peft-3" else dequantized)(PACE.rows() if rows is None else rows)
    if id not in (*QUESTIONS, "best-4"):
        return ""
    rows = EXPERIMENT.rows() if rows is None else rows
    needed = {name for a, b, _ in QUESTIONS.get(id, ()) for name in (a, b)} or {*METHODS}
    if lacking := (needed | {"base"}) - {row["method"] for row in rows}:
        return f"On SmolLM2-135M: nothing is said; not computed so far: {listed(sorted(lacking))}."
    n, rates = rows[0]["examples"], best_rates(rows)
    if id == "best-4":
        others = [f"{name} {rate / rates['full']:.1f}" for name, rate in rates.items() if name != "full"]
        return f"The best rate of full fine-tuning is {rates['full']:.1e}; times this, the others': {listed(others)}."
    lines = []
    for a, b, key in QUESTIONS[id]:
        found, what = compared(rows, a, b, key), f"loss on {4 * rows[0]['blocks']} blocks of general text, each at its best rate, " * (key == "general")
        said = f"{found.word} ({found.interval})" if found else "one diverged under some seed"
        lines.append(f"{a} beside {b}, {what}{n} examples of source: {said}")
    return "; ".join(lines) + "."


def faster(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the seconds of a step say of methods that train fewer parameters."""
    if len(rows) < 2:
        return "On SmolLM2-135M: nothing is said; no seconds were measured so far."
    each = listed([f"{name} {x.value:.2f} [{x.low:.2f}, {x.high:.2f}]" for name, x in paces_over_full(rows).items()])
    full = statistics.mean(row["seconds"]["full"] for row in rows)
    usual = f"A step of full fine-tuning takes {full:.2f} seconds on {rows[0]['batch_size']} examples of source"
    return f"{usual}; the others take of that: {each} ({where(rows)})."


def dequantized(rows: Sequence[Mapping[str, Any]]) -> str:
    """What they say of LoRA on a base in four bits."""
    if len(rows) < 2:
        return "On SmolLM2-135M: nothing is said; no seconds were measured so far."
    found = ratio(*([row["seconds"][name] for row in rows] for name in ("qlora", "lora")))
    return f"A step of QLoRA takes {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times LoRA's ({where(rows)})."


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the rows, in hours; what is there already is not computed again, method by method."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.claims.large", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where smollm2.jsonl and smollm2_speed.jsonl are, or are made")
    which, cells = parser.add_mutually_exclusive_group(), ("base", *METHODS)
    which.add_argument("--seconds", action="store_true", help="only the seconds of a step, on a machine that does nothing else")
    which.add_argument("--methods", nargs="+", choices=cells, default=cells, metavar="METHOD", help="default: all")
    args = parser.parse_args(argv)
    if args.seconds:
        PACE.compute(args.directory)
    else:
        sweep(run, [Large(method) for method in args.methods], 1, EXPERIMENT.path(args.directory))


if __name__ == "__main__":
    main()
