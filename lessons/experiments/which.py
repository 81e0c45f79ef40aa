"""What Lesson 16 draws."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from minipeft.claims.comparison import CASES, KEYS


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
