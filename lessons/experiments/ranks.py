"""What Lesson 18 draws."""

from __future__ import annotations

import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


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
