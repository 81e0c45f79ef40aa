"""What Lesson 7 draws."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from .drawing import one_plot

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def books_picture(scaled, books, errors):
    """The weights over their block's scale, and the points of each code book {name: points} with its error."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.hist(scaled.reshape(-1), bins=101, range=(-1, 1), density=True, color="0.85")
    places = np.linspace(0.9, 0.1, len(books)) * axis.get_ylim()[1]
    names = [f"{name}, error {errors[name]:.3f}" for name in books]
    for i, (name, points, y) in enumerate(zip(names, books.values(), places)):
        inside = points[np.abs(points) <= 1]
        axis.plot(inside, np.full(inside.size, y), "|", ms=15, mew=2, color=f"C{i}", label=name)
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set(title="The weights of the base, and the points of the code books", xlabel="weight over its block's scale")
    return figure


def sizes_picture(sizes, errors, bits, doubly):
    """The error of each size of a block over its bits; doubly: that of blocks of 64 with `bits` by double quantization."""
    figure, axis = one_plot((6.4, 4))
    axis.plot([4 + 32 / size for size in sizes], errors, "o-", color=BLUE, label="scales of 32 bits")
    for size, error in zip(sizes, errors):
        axis.annotate(str(size), (4 + 32 / size, error), textcoords="offset points", xytext=(6, 4), fontsize=9)
    axis.plot([bits], [doubly], "*", color=ORANGE, ms=14, label="64, doubly quantized")
    axis.annotate("64", (bits, doubly), textcoords="offset points", xytext=(-18, -4), fontsize=9)
    axis.set(title="Error and bits, by the size of a block", xlabel="bits a weight", ylabel="relative error")
    axis.legend(fontsize=9)
    return figure


def losses_picture(losses, differences, steps):
    """The loss of each model {name: loss}, and differences of them {name: (mean, low, high)}."""
    figure, (a, b) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained")
    bars = a.barh(list(losses), list(losses.values()), color=[GREY] * 3 + [BLUE] * 3)
    a.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    a.set(title=f"Held-out loss, before and after {steps} steps", xlabel="nats a token", xlim=(0, 1.18 * max(losses.values())))
    value, low, high = np.transpose(list(differences.values()))
    b.barh(list(differences), value, xerr=[value - low, high - value], color=BLUE, ecolor="0.2", capsize=3, alpha=0.6)
    b.axvline(0, color=GREY, lw=1)
    b.set(title="Differences, and their 95 % intervals", xlabel="nats a token (below 0: the first is better)")
    for axis in (a, b):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    return figure
