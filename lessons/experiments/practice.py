"""What Lesson 14 computes beside the league, and its pictures.

Controls that no statement of the register asks for: batches of 64 beside 4, clean examples seen as often as beside spoiled
ones, and random examples at the setting that the search found for others (THERE). They follow the league's protocol
(`minipeft.claims.protocol`): but for THERE each side is tuned on validation under a seed of its own, and all are reported on
512 test verses under five others. A trial is the league's, too: what is in its rows is not computed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from minipeft.claims import protocol
from minipeft.claims.comparison import Case, Difference, Pair, compare
from minipeft.claims.protocol import Choice, Find, Search, Trial, search
from minipeft.claims.searches import Searches
from minipeft.experiments.rows import Row, read_rows

from . import sweep


def near(examples: int = 500, **fixed: Any) -> Search:
    """Full fine-tuning on `rewrite` for 2 epochs in steps of 4 verses. The rate alone is tuned, from the best of the league's search
    over rates, epochs and batches of 500 examples."""
    return search("rewrite", "full", examples, axes=("rate",), longer=500 / examples, rate=5e-4, epochs=2.0, batch_size=4, **fixed)


def _batches(size: int) -> Search:
    return search("rewrite", "full", 500, axes=("rate", "epochs"), batch_size=size)


CASE = "full, rewrite, 500 examples"
BATCHES = Pair(CASE, "batches of 64", _batches(64), "batches of 4", _batches(4))
AS_OFTEN = near(250)  # the clean half of 500 examples, each seen as often as in all 500
THERE = Trial("rewrite", "lora", 500, rate=1.5e-3, epochs=2.0, batch_size=1)  # random ones, as the search tuned easy and hard ones
SEARCHES: list[Choice] = [BATCHES.one, BATCHES.other, AS_OFTEN, THERE]


def learned(trial: Trial) -> int:
    """The examples that a trial learns from, each as often as it is seen. An epoch's last batch is what is left."""
    epochs, steps = divmod(trial.steps, -(-trial.examples // trial.batch_size))
    return epochs * trial.examples + steps * trial.batch_size


def searched(find: Find, cases: Iterable[Case], methods: Iterable[str]) -> dict[tuple[Case, str], tuple[Trial, dict[Trial, float]]]:
    """{(case, method): (the trial that its search chose, {all that it saw: the loss on validation})}."""
    found: dict[tuple[Case, str], tuple[Trial, dict[Trial, float]]] = {}
    for case, method in product(cases, methods):
        chosen, _ = protocol.tuned(find, search(case.task, method, case.examples), seen := {})
        found[case, method] = chosen, seen
    return found


def along(axis: str, at: Trial, seen: Mapping[Trial, float]) -> dict[Any, float]:
    """{value of an axis: the loss}, in order, of what was seen and differs from a trial in this alone."""
    line = {getattr(t, axis): loss for t, loss in seen.items() if t == replace(at, **{axis: getattr(t, axis)})}
    return dict(sorted(line.items()))


def mixed_at_one_setting(find: Find) -> Difference:
    """How much better easy and hard examples are than random ones, both at the setting that the search found for the former."""
    mixed, random = (protocol.report(find, search("rewrite", "lora", 500, **of)) for of in ({"data": "mixed"}, {}))
    assert replace(mixed.trial, data=THERE.data) == THERE, f"it is {mixed.trial}"
    found = compare(mixed, protocol.report(find, THERE), "nll")
    print(f"easy and hard ones beside random ones, lora, rewrite: {compare(mixed, random, 'nll').interval}, "
          f"both at the former's setting {found.word} ({found.interval})")
    return found


def known(searches: Iterable[Choice], store: str | os.PathLike) -> list[Row]:
    """The rows that there are for these searches, of today's base: the league's, and those of the store."""
    own = [row for row in read_rows(store) if row["run"] == "Trial" and row.get("version") == protocol.version()]
    return [*Searches.of("league", searches).rows(), *own]


def compute(searches: Sequence[Choice], store: str | os.PathLike) -> None:
    """All rows that are missing, computed in this process and added to the store, round by round."""
    while trials := protocol.wanted(protocol.finder(known(searches, store)), searches):
        sweep(protocol.run, trials, store)


# ------------------------------------------------------------------------------------------------------------- pictures

COLORS = {"full": "#0072B2", "lora": "#D55E00"}


def bars(axis, names, found, shift=0.0, **style):
    """Estimates with their intervals, from the top."""
    values, low, high = np.array([(x.value, x.low, x.high) for x in found]).T
    axis.errorbar(values, np.arange(len(found)) + shift, xerr=(values - low, high - values), fmt="o", capsize=3, markersize=5, **style)
    axis.set_yticks(range(len(found)), names, fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.grid(alpha=0.25)


def noise_picture(found):
    """How much better the clean part is {(method, task), ("500 with 25% random"): Difference}: a panel for each kind of mistake."""
    kinds = list(dict.fromkeys(spoiled.split()[-1] for _, spoiled in found))
    figure, axes = plt.subplots(1, len(kinds), figsize=(11, 3.2), layout="constrained", sharey=True)
    for axis, kind in zip(axes, kinds):
        for share, color, shift in (("25%", "#0072B2", -0.12), ("50%", "#D55E00", 0.12)):
            line = {where: each for (where, spoiled), each in found.items() if spoiled == f"500 with {share} {kind}"}
            bars(axis, list(line), [each.better for each in line.values()], shift, color=color, label=f"{share} of 500")
        axis.axvline(0, color="grey")
        axis.set(title=kind, xlabel="clean part better by, nats or share")
    axes[0].legend(fontsize=8)
    return figure


def intervals_picture(found, label):
    """Differences {name: Difference}, with their 95 % intervals over seeds and test records, beside 0."""
    figure, axis = plt.subplots(figsize=(7.2, 0.8 + 0.3 * len(found)), layout="constrained")
    bars(axis, list(found), [one.better for one in found.values()], color="#333333")
    axis.axvline(0, color="grey")
    axis.set_xlabel(label)
    return figure


def rates_picture(curves, beside):
    """The loss over the rate {(case, method): {rate: loss}}, and LoRA beside full fine-tuning {case: Difference}."""
    figure, (axis, differences) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, ((_, method), line) in enumerate(curves.items()):
        least = min(line.values())
        axis.plot(
            list(line), [loss - least for loss in line.values()], "o-", markersize=3, color=COLORS[method], alpha=0.8,
            label=method if i < 2 else None,
        )  # fmt: skip
    axis.set(xscale="log", ylim=(-0.01, 0.3), xlabel="learning rate", ylabel="loss on validation, above the best one's")
    axis.set_title("Each method has its U (six cases)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    bars(differences, list(beside), [one.better for one in beside.values()], color="#333333")
    differences.axvline(0, color="grey")
    differences.set(xlabel="better than full on test, nats or share", title="LoRA beside full fine-tuning")
    return figure


def epochs_picture(over_epochs):
    """Both losses of `rewrite` over the epochs {(case, method): {epochs: (validation, training)}}, with 50 and 500 examples."""
    figure, axis = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for (case, method), line in over_epochs.items():
        if case.task == "rewrite" and case.examples < 5000:
            for i, style in enumerate(("-", "--")):
                label = f"{method}, {('validation', 'training')[i]}" if case.examples == 50 else None
                losses = [both[i] for both in line.values()]
                axis.plot(list(line), losses, "o" + style, markersize=4, color=COLORS[method], label=label)
    axis.text(1, 2.55, "500 examples", fontsize=8)
    axis.text(12, 2.8, "50 examples", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axis.set(xlabel="epochs", ylabel="loss", ylim=(0.1, 2.95), title="rewrite: one falls on, one turns")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def recalls_picture(recalls):
    """The share of each book's sentences that is found {(method, training set): [Austen, Basic English, King James]}."""
    figure, axis = plt.subplots(figsize=(7.2, 3.3), layout="constrained")
    for i, (kind, color) in enumerate((("Austen", "#999999"), ("Basic English", "#56B4E9"), ("King James", "#CC79A7"))):
        bars(axis, [", ".join(key) for key in recalls], [each[i] for each in recalls.values()], color=color, label=kind)
    axis.set(xlabel="share of its test sentences that is found", title="A rare class, and a remedy")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
