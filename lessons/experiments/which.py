"""What Lesson 16 draws, its tables, and comparisons beside them."""

from __future__ import annotations

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np

from minipeft.accounting import Loop, architecture, count_parameters, pytorch_ledger, step_flops
from minipeft.claims.comparison import CASES, KEYS, Case, compare
from minipeft.claims.inputs import SIZES
from minipeft.claims.league import FROM_SECOND_START, MIDDLE, SECOND_START, league
from minipeft.claims.protocol import finder, report, search
from minipeft.claims.register import plain
from minipeft.peft.methods import METHODS


def by_examples_picture(table, names, start):
    """What methods learn, and what they forget, over the number of examples.

    table: {case: {method: its Standing}}; names: {method: its name}; start: {task: what the base has}.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for (above, below), task in zip(axes.T, KEYS):
        for k, (method, name) in enumerate(names.items()):
            lines = [table[case][method] for case in CASES if case.task == task]
            x = [line.trial.examples * 1.06 ** (k - 2.5) for line in lines]  # beside each other, to be told apart
            for axis, found in ((above, [line.right or line.loss for line in lines]), (below, [line.cloze for line in lines])):
                y = np.array([(e.value, e.value - e.low, e.high - e.value) for e in found]).T
                y *= 1 if found[0] is lines[0].loss else 100  # shares in percent
                axis.errorbar(x, y[0], y[1:], marker="o", markersize=4, capsize=2, linewidth=1.2, label=name, color=f"C{k}")
        above.axhline(start[task] * (1 if KEYS[task] == "nll" else 100), color="0.5", linestyle=":", label="the base")
        above.set_title(f"{task}: nats a token, less is better" if KEYS[task] == "nll" else f"{task}: right, %")
        below.axhline(0, color="0.5", linestyle=":")
        below.set(title="general items right, points beside the base's", xlabel="examples to learn from", xscale="log")
        below.set_xticks([50, 500, 5000], ["50", "500", "5,000"])
        below.minorticks_off()
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Each method tuned for every point; 95 % intervals over 5 seeds and the test items")
    return figure


def to_nine_tenths(evidence):
    """Of the numbers of peft-3 {what a method takes to nine tenths of full fine-tuning's gain: in what that takes}; printed."""
    end = " to 90% of the gain"
    found = {n.name.removesuffix(end): n for n in evidence if n.name.endswith(end)}
    print("to nine tenths of full fine-tuning's gain, times what that takes:")
    for name, n in found.items():
        print(f"  {name:16s} {n.value:.2f} ({n.low:.2f} to {n.high:.2f})")
    return found


def by_gain(learned, task):
    """Methods in the order of what 5,000 examples bring beside 50, in the mean, the least first.

    learned: {case: {method: how well it does the task}}.
    """
    few, many = (learned[Case(task, n)] for n in (50, 5000))
    return sorted(few, key=lambda m: abs(many[m].value - few[m].value))


ELSEWHERE = ("adalora", "lora"), ("dora", "lora"), ("lora", "full"), ("qlora", "full")  # searched from another start, too


def adalora(comparisons):
    """AdaLoRA beside LoRA, and DoRA beside it, each at the level at which `comparisons` intervals hold together; AdaLoRA beside
    LoRA of rank 32, and ELSEWHERE, at 95 %. On `rewrite` with 500 examples; printed."""
    find = finder([*league(("lora", "lora-r32", "adalora", "dora"), MIDDLE).rows(), *FROM_SECOND_START.rows()])
    of = {m: report(find, search("rewrite", m, 500), "nll") for m in ("lora", "lora-r32", "adalora", "dora")}
    ada, dora = (compare(of[m], of["lora"], "nll", level=1 - 0.05 / comparisons) for m in ("adalora", "dora"))
    higher = compare(of["adalora"], of["lora-r32"], "nll")
    again = {m: report(find, start, "nll") for m, start in SECOND_START.items()}
    again = {(m, rival): compare(again[m], again[rival], "nll") for m, rival in ELSEWHERE}
    print("searched from another start:", ", ".join(f"{m} beside {rival} {found.interval}" for (m, rival), found in again.items()))
    assert all(found.clearly_better for found in again.values())
    print(f"rewrite, where all intervals are to hold together: adalora {ada.interval}, dora {dora.interval}")
    print(f"rewrite, adalora beside LoRA of rank 32: {higher.interval}")
    return ada, dora, higher


def signs(found, methods):
    """{(a, b): the sign of a beside b in each case} of each two methods; found: {case: {(a, b): their Difference}}."""
    return {pair: [of[pair].sign for of in found.values()] for pair in combinations(methods, 2)}


def signs_table(signs, names):
    """The same as text, a line a pair."""
    lines = ["".ljust(24) + "".join(f"{case.task} {case.examples}".rjust(14) for case in CASES)]
    lines += [f"  {names[a]} beside {names[b]}".ljust(24) + "".join(f"{sign:>14s}" for sign in row) for (a, b), row in signs.items()]
    return "\n".join(lines)


def large(here, methods, names):
    """{(size, method or "base"): (GB of a step, MB a task, TFLOPs of a step)}, counted of the shape `here` and at 7B and 70B, and
    printed; of "base" the forward pass alone."""
    shapes, found = {"here": architecture(here), **SIZES}, {}
    print("\nbfloat16, checkpointing, a step of 480 tokens" + "".join(f"{size:>10s}: GB  MB a task  TFLOPs" for size in shapes))
    for m in ("base", *methods):
        config = "frozen" if m == "base" else METHODS[m].config()
        mode, loop = "evaluate" if m == "base" else "train", Loop(quantization="nf4" if m == "qlora" else None)
        for size, shape in shapes.items():
            held, flops = pytorch_ledger(shape, config, 1, 480, loop, mode=mode).total, step_flops(shape, config, 1, 480)
            stored = 0 if m == "base" else count_parameters(shape, config).stored
            found[size, m] = held / 1e9, 2 * stored / 1e6, (flops.forward if m == "base" else flops.total) / 1e12
        cells = ["{:>14s} {:>10s} {:>7s}".format(*map(plain, found[size, m])) for size in shapes]
        print(f"{names.get(m, 'base, forward alone'):45s}" + "".join(cells))
    return found
