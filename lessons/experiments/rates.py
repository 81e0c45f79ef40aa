"""The picture of Lesson 3: what each learning rate buys, and what it costs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def picture(grid, curve, before, at, title):
    """The losses over the rates of the grid, and one against the other.

    curve   [rates, 2]: held-out loss on the task, and on general text; before: the base's two; at: of the best rate
    """
    figure, (a, b) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    a.semilogx(grid, curve[:, 0], "o-", color=BLUE, label="the task: King James to plain English")
    a.semilogx(grid, curve[:, 1], "s-", color=ORANGE, label="general text: what is forgotten")
    for level, color in zip(before, (BLUE, ORANGE)):
        a.axhline(level, color=color, ls=":", lw=1.2)
    a.plot([], [], ":", color=GREY, label="the base, before")
    a.set(xlabel="learning rate", ylabel="held-out loss (nats per token)", ylim=(min(curve[at]) - 0.4, max(before) + 2.2))
    a.set_title(title)
    a.legend(loc="upper left", fontsize=9)
    shown = curve[:, 0] < before[0] + 1.0
    b.plot(*np.vstack([before, curve[shown]]).T, "o-", color=GREY, mfc="white", mec=BLUE, ms=8, lw=1)
    b.plot(*before, "D", color="black", ms=8, label="the base")
    b.plot(*curve[at], "o", color=BLUE, ms=8, label="the best rate for the task")
    for rate, point in zip(np.array(grid)[shown], curve[shown]):
        place = {"xytext": (-9, 4), "ha": "right"} if rate >= grid[at] else {"xytext": (5, 7), "ha": "left"}
        b.annotate(f"{rate:.0e}", point, textcoords="offset points", fontsize=9, **place)
    b.set(title="What each rate buys, and what it costs", xlabel="task loss (left is better)", ylabel="general loss (down is better)")
    b.legend(loc="upper left" if len(grid) > 3 else "upper right", fontsize=9)
    b.margins(0.15)
    return figure
