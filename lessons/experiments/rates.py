"""The pictures of Lesson 3: which tokens are learned (Lesson 8 has it, too); what each learning rate buys, and what it costs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from minipeft.diagrams.drawing import box, cut, line, sheet, words

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def labels_drawing(tokens, labels):
    """What the model is to predict at each of some tokens but the last: the next token, with its label."""
    axes, step, said = sheet(), 38 / (len(tokens) - 1), []
    tokens = [token.strip() for token in tokens]
    box(axes, 1, 13, 38, 3.6, "model")
    for k, (token, following, label) in enumerate(zip(tokens, tokens[1:], labels[1:])):
        x, ignored = 1 + k * step, bool(label == -100)
        box(axes, x + 0.4, 6.8, step - 0.8, 3.4, token)
        line(axes, [(x + step / 2, 10.2), (x + step / 2, 13)])
        line(axes, [(x + step / 2, 16.6), (x + step / 2, 19.4)])
        box(axes, x + 0.4, 19.4, step - 0.8, 5.2, f"{following}\n{label}", "absent" if ignored else "trained")
        said.append(f"at {token} it is to predict {following}, whose label is {label}{': ignored' * ignored}")
    words(axes, 20, 5.2, "the tokens that it has read", color=GREY)
    words(axes, 20, 26.2, "the next token, which it is to predict, and its label", color=GREY)
    words(axes, 20, 28.2, "orange: learned.   dashed: ignored.", color=GREY)
    return cut(axes, 29.6, "Which predictions count", "; ".join(said) + ".")


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
