"""What Lesson 18 draws, tables of the league's rows, and a rank beside that of noise."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from minipeft.claims.comparison import KEYS, compare
from minipeft.claims.intrinsic_dimension import rank_at
from minipeft.claims.league import MIDDLE, league
from minipeft.claims.protocol import finder, report, search, tuned

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def beside(methods, rival):
    """How much better each method is than the rival, each tuned, with 500 examples; printed: {task: {method: its Difference}}.

    All intervals, of both tasks, are to hold together: each is one of 1 - 0.05 / their number.
    """
    find, others, found = finder(league([*methods, rival], MIDDLE).rows()), [m for m in methods if m != rival], {}
    level = 1 - 0.05 / (len(KEYS) * len(others))
    for task, key in KEYS.items():
        print(f"\n{task}: how much better than {rival} (all {len(KEYS) * len(others)} intervals hold together 19 times in 20)")
        of = {m: report(find, search(task, m, 500), key) for m in [*others, rival]}
        found[task] = {m: compare(of[m], of[rival], key, level=level) for m in others}
        for m, difference in found[task].items():
            print(f"  {m:12s} {difference.interval}  {difference.word}; at 95 %: {compare(of[m], of[rival], key).word}")
    return found


def rates(methods):
    """The rates that methods were tuned to, with 500 examples: {task: [a rate each]}."""
    find = finder(league(methods, MIDDLE).rows())
    return {task: [tuned(find, search(task, m, 500))[0].rate for m in methods] for task in KEYS}


def beside_noise(updates, part):
    """How many directions hold 90 % of the energy of the median matrix whose name has `part`, over how many of noise; printed.

    updates: {name: (U, s, Vt) of the matrix's change}.
    """
    rng, found = np.random.default_rng(0), []
    for U, s, Vt in (of for name, of in updates.items() if part in name):
        noise = np.linalg.svd(rng.standard_normal((len(U), Vt.shape[1])), compute_uv=False)
        found.append((rank_at(s), rank_at(noise)))
    own, random = np.median(found, axis=0)
    print(f"90 % of the energy, the median matrix of {part}: {own:g} directions, of noise {random:g}")
    return own / random


def print_update(ranks, spectra, chance, worth):
    """What `update_picture` draws, as a table."""
    print("energy of the first r directions of the full fine-tune's update     gain that they keep")
    print("   r    attention (random)      MLP (random)")
    for i, r in enumerate(ranks):
        row = "".join(f"{spectra[g][i]:12.0%} ({chance[g][i]:6.0%})" for g in spectra)
        print(f"{r:4d} {row}        {worth[r]:12.0%}" if r in worth else f"{r:4d} {row}")


def update_picture(ranks, spectra, chance, worth):
    """Shares of the energy of an update by rank {group: shares}, of a random one, and of its worth for the task {rank: share}."""
    figure, axis = plt.subplots(figsize=(5.8, 4.4), layout="constrained")
    for group, color in (("attention", ORANGE), ("MLP", GREEN)):
        axis.plot(ranks, spectra[group], "-", color=color, lw=1.5, label=f"energy, {group}")
        axis.plot(ranks, chance[group], ":", color=color, lw=1.2, label=f"energy, random, {group}")
    axis.plot(list(worth), list(worth.values()), "o-", color=BLUE, lw=3, label="worth for the task")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, ranks)
    axis.set(xlabel="directions kept, r", ylabel="share of the energy, of the gain", title="What a full fine-tune's update is made of")
    axis.legend(fontsize=9)
    return figure


def steps_picture(ranks, steps_in_w):
    """The first step in W by rank {rule of scaling: sizes}, in units of the rate."""
    figure, axis = plt.subplots(figsize=(5.8, 4.4), layout="constrained")
    for (label, sizes), color, style in zip(steps_in_w.items(), (BLUE, GREEN, ORANGE), ("o-", "^-", "s--")):
        axis.plot(ranks, sizes, style, color=color, label=label)
    axis.axhline(1, color=GREY, lw=1, ls=":", label="full fine-tuning")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, ranks)
    axis.set(xlabel="rank r", ylabel="move of a weight, in units of the rate", yscale="log", title="The first step in W, by rank")
    axis.legend(fontsize=9)
    return figure
