"""What Lesson 0 draws."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np

from .drawing import one_plot

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def losses_picture(losses):
    """How many tokens have which loss: losses [tokens]."""
    mean = losses.mean()
    figure, axis = one_plot((6.4, 3.6))
    axis.hist(losses, bins=np.arange(0, losses.max() + 0.5, 0.5), weights=np.full(losses.size, 1 / losses.size), color=BLUE, alpha=0.85)
    axis.axvline(mean, color=ORANGE, lw=2)
    axis.text(mean + 0.2, 0.15, f"mean {mean:.2f} nats:\nas one of {math.exp(mean):.0f} tokens", color=ORANGE)
    axis.set(xlabel="loss of a token, -ln p (nats)", ylabel="share of the tokens", title="Held-out text: easy tokens and hard ones")
    return figure


def walks_picture(walks, needed):
    """The walk of each method through the valley {method: [steps + 1, 2]}; needed: {method: (steps in all, rate)}."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, (method, walk), color in zip(axes, walks.items(), (GREY, BLUE, ORANGE)):
        axis.plot(*walk.T, "o-", color=color, ms=2.5, lw=0.8, label=f"the first {len(walk) - 1} steps")
        axis.plot(0, 0, "k+", ms=11, mew=1.5)
        axis.set(title=f"{method.__name__}: {needed[method][0]} steps needed", xlabel="$w_1$, gentle", xticks=[-0.5, 0, 0.5, 1])
    axes[0].set(ylabel="$w_2$, steep", ylim=(-1.7, 2.4))
    axes[0].text(0, -0.4, "minimum", ha="center", fontsize=10)
    descent = next(iter(walks.values()))
    near = axes[0].inset_axes([0.08, 0.66, 0.6, 0.27])
    near.plot(*descent.T, "o-", color=GREY, ms=1.5, lw=0.5)
    near.set(xticks=[], yticks=[])
    near.set_title("the same, stretched", fontsize=9)
    return figure


def schedules_picture(schedules, curves):
    """The factors of each schedule {name: [steps]}, and the losses above the entropy {name: [seeds, steps]}."""
    figure, (a, b) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    for (name, factors), color in zip(schedules.items(), ("0.7", GREEN, ORANGE, BLUE)):
        steps, warm = np.arange(1, len(factors) + 1), "warm" in name
        a.plot(steps, factors, "--" if warm else "-", color=color, lw=1.5 if warm else 3, label=name)
        b.semilogy(steps, curves[name].T, color=color, lw=0.7 if warm else 1.3, label=name)
    a.set(xlabel="step", ylabel="factor of the rate", title="The schedules", ylim=(-0.05, 1.1))
    b.set(xlabel="step", ylabel="loss above the entropy (nats)", title="The losses, a line for each seed")
    a.legend(fontsize=10, loc=(0.09, 0.04))
    return figure


def overfit_picture(losses, chosen):
    """The losses of each split {split: [steps]}; chosen: the step with the least validation loss, counted from 0."""
    figure, axis = one_plot((6.4, 3.8))
    for (split, values), color in zip(losses.items(), (BLUE, ORANGE, GREEN)):
        axis.plot(np.arange(1, len(values) + 1), values, color=color, label=split)
    axis.axvline(chosen + 1, color=GREY, ls=":", lw=1.5)
    axis.text(chosen + 8, 2.3, f"stop here:\nstep {chosen + 1}", color=GREY, va="bottom")
    axis.set(xlabel="step", ylabel="loss (nats a letter)", title="500 letters: the table overfits")
    axis.legend(fontsize=10, loc="upper right")
    return figure
