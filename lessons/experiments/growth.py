"""How the cost of a training step grows: its time and peak memory, measured, next to theory.

    python lessons/experiments/growth.py [--rows lessons/results/growth.jsonl] [--tiny]      # two minutes

One shape of a Llama and of its batch, and from it one axis at a time, doubled: tokens of a sequence, width, depth,
sequences of a batch, words of the vocabulary, all by full fine-tuning; and LoRA's rank, on every linear layer.

    time      the best step;               theory: `step_flops`, products alone, drawn through the last point
    memory    two steps, the model's weights and AdamW's moments included, as tracemalloc counts arrays;
              theory: `memory_ledger`, in bytes, as it is

Where cost ~ x^n, n is the slope on logarithmic axes. It is taken between the last two points, where what does not
grow weighs least. Each point has a process of its own, with one thread. Points that the file of rows has are not measured
again; without the file all are.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.accounting import measure_peak, memory_ledger, step_flops
from minipeft.claims.timing import processor

BASE = {"method": "full", "tokens": 128, "width": 128, "depth": 2, "batch": 4, "vocabulary": 512, "rank": 8}
AXES = {  # axis: (its values, what else is other than BASE)
    "tokens": ((64, 128, 256, 512, 1024, 2048), {}),
    "width": ((64, 128, 256, 512, 1024), {}),
    "depth": ((1, 2, 4, 8, 16, 32), {}),
    "batch": ((1, 2, 4, 8, 16, 32, 64), {}),
    "vocabulary": ((512, 1024, 2048, 4096, 8192, 16384, 32768), {}),
    "rank": ((8, 16, 32, 64, 128, 256, 512), {"method": "lora", "width": 512}),  # no matrix has a larger one
}
COSTS = {"time": ("seconds", "flops"), "memory": ("peak", "ledger")}  # cost: (measured, theory)
SECONDS, STEPS = 1.5, 3  # steps are repeated for as long, and as often at least


def settings(axis: str, value: int) -> dict[str, Any]:
    return BASE | AXES[axis][1] | {axis: value}


def measure(method: str, tokens: int, width: int, depth: int, batch: int, vocabulary: int, rank: int) -> dict[str, Any]:
    """The row of a point: seconds of a step, bytes at the peak, and both in theory."""
    config = mp.TransformerConfig.llama(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64), max_position_embeddings=tokens, tie_word_embeddings=True,
    )  # fmt: skip
    lora = mp.LoraConfig(r=rank, target_modules="all-linear") if method == "lora" else None
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens))

    def training() -> Any:
        model = mp.Transformer(config, seed=0)
        model = mp.get_peft_model(model, lora) if lora else model
        optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            model.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    step, times = training(), []
    while len(times) < STEPS or sum(times) < SECONDS:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)

    def two_steps() -> None:
        again = training()
        again(), again()

    del step
    return {
        "seconds": min(times), "peak": measure_peak(two_steps), "processor": processor(),
        "flops": step_flops(config, lora, batch, tokens, checkpointing=False).total,
        "ledger": memory_ledger(config, lora, batch, tokens).total,
    }  # fmt: skip


def along(axis: str, rows: list[dict]) -> list[dict]:
    """The rows of an axis, in its order."""
    return [next(row for row in rows if settings(axis, value).items() <= row.items()) for value in AXES[axis][0]]


def exponent(axis: str, rows: list[dict], name: str) -> float:
    """n of value ~ x^n between the last two rows."""
    a, b = rows[-2:]
    return math.log(b[name] / a[name]) / math.log(b[axis] / a[axis])


def excess(axis: str, rows: list[dict]) -> list[float]:
    """By how much the exponent of time is above that of the FLOPs, from each point of an axis to its next."""
    pairs = [*pairwise(along(axis, rows))]
    return [exponent(axis, pair, "seconds") - exponent(axis, pair, "flops") for pair in pairs]


def table(rows: list[dict]) -> str:
    """In Markdown: for each axis the exponents of time and of memory, and the peak over the ledger at the last point."""
    head = "axis", "from", "to", "time ~ x^n", "FLOPs", "peak ~ x^n", "ledger", "peak / ledger"
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for axis in AXES:
        found = along(axis, rows)
        n = {name: exponent(axis, found, name) for names in COSTS.values() for name in names}
        figures = [f"{n[name]:.2f}" for names in COSTS.values() for name in names]
        figures += [f"{found[-1]['peak'] / found[-1]['ledger']:.3f}"]
        lines.append(f"| {' | '.join((axis, str(found[0][axis]), str(found[-1][axis]), *figures))} |")
    return "\n".join(lines)


def draw(rows: list[dict]) -> Any:
    """The figure: for three axes at a time their time, and below it their memory; points measured, lines theory."""
    figure, axes = plt.subplots(4, 3, sharey="row", figsize=(8, 10), layout="constrained")
    for above, below in zip(axes[:2, 0], axes[2:, 0]):
        below.sharey(above)
    columns = np.hstack(axes.reshape(2, 2, 3))  # [time and memory, axis]
    for column, axis in zip(columns.T, AXES):
        found = along(axis, rows)
        xs = [row[axis] for row in found]
        for panel, (measured, theory), unit in zip(column, COSTS.values(), (1e3, 1e-6)):
            scale = found[-1][measured] / found[-1][theory] if theory == "flops" else 1.0
            label = {"flops": "FLOPs, through the last point"}.get(theory, theory)
            panel.loglog(xs, [unit * scale * row[theory] for row in found], "-", color="0.6", label=label)
            panel.loglog(xs, [unit * row[measured] for row in found], "o", markersize=4, label="measured")
            slopes = exponent(axis, found, measured), exponent(axis, found, theory)
            name = {"rank": "rank of LoRA"}.get(axis, axis)
            panel.set_title("{}: $x^{{{:.2f}}}$, in theory $x^{{{:.2f}}}$".format(name, *slopes), fontsize=9)
            panel.set_xticks(xs, map(str, xs), fontsize=8, rotation=45)
            panel.minorticks_off()
    for panel, label in zip(axes[:, 0], ("ms a step", "MB at the peak") * 2):
        panel.set_ylabel(label)
    for panel in axes[:2, 0]:
        panel.legend(handles=panel.lines[::-1], fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parents[1] / "results" / "growth.jsonl")
    parser.add_argument("--tiny", action="store_true", help="the first three points of each axis, to try it")
    asked = parser.parse_args()
    if asked.tiny:
        AXES.update({axis: (values[:3], other) for axis, (values, other) in AXES.items()})
    points = [settings(axis, value) for axis, (values, _) in AXES.items() for value in values]
    os.environ.update(MINIPEFT_THREADS="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # the processes inherit them
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as executor:
        rows = mp.sweep(measure, points, executor, store=asked.rows)
    print(table(rows))


if __name__ == "__main__":
    main()
