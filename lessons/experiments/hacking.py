"""What Lesson 11 draws."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np


def runs_picture(curves):
    """Proxy, gold and what else is watched over the square root of the KL, a line a seed: (columns [seeds, updates], style) each."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    titles = {"proxy": "Proxy: optimized", "gold": "Gold: only watched", "distinct_2": "Distinct bigrams", "second": "Gold × distinct bigrams"}
    for axis, (key, title) in zip(axes, titles.items()):
        for columns, style in curves:
            for d, y in zip(np.sqrt(columns["kl"]), columns[key]):
                axis.plot(d, y, linewidth=1.4, **style)
        axis.set(title=title, xlabel="sqrt(KL)")
        axis.spines[["top", "right"]].set_visible(False)
    seeds = len(curves[0][0]["kl"])
    axes[0].legend(handles=axes[0].lines[::seeds], frameon=False, fontsize=7)  # the colors are the same in all
    return figure


def chain_picture(judged, along):
    """Proxy and gold of PPO over the square root of the KL, a line a seed, and of the best of n, dashed, for each judge.

    judged: {(size, comparisons): (rows of PPO, rows of the best of n)}; along: gives of a row of PPO the curve of a key.
    """
    figure, panels = plt.subplots(1, len(judged), figsize=(22, 4.2), sharey=True, layout="constrained")
    for axis, ((size, n), (runs, many)) in zip(panels, judged.items()):
        for key, color in (("proxy", "C3"), ("gold", "C2")):
            for i, row in enumerate(runs):
                axis.plot(*along(row, key), color=color, linewidth=1.2, label=None if i else key)
            best = [np.mean([[row["best_of"][m][name] for row in many] for name in ("kl", key)], axis=1) for m in many[0]["best_of"]]
            axis.plot(*np.transpose([(math.sqrt(kl), value) for kl, value in best]), "--", color=color, linewidth=2)
        axis.set(title=f"{size}, {n} comparisons", xlabel="sqrt(KL)")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    return figure
