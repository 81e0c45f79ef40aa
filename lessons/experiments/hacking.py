"""What Lesson 11 reads off its runs, and draws."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np


def smooth(values):
    """Means over five updates of [seeds, updates]: [seeds, updates - 4]."""
    return np.lib.stride_tricks.sliding_window_view(values, 5, axis=1).mean(axis=2)


def ends(columns):
    """({name: mean of each seed's first five updates}, ... of its last five)."""
    return tuple({k: smooth(v)[:, at] for k, v in columns.items()} for at in (0, -1))


def at_kl(columns, kl):
    """{name: mean of five updates where each seed's run first has its KL of [seeds]}."""
    at = (smooth(columns["kl"]) >= kl[:, None]).argmax(axis=1)
    return {k: smooth(v)[np.arange(len(at)), at] for k, v in columns.items()}


def three_errors(runs):
    """Three standard errors of the difference of two means over five updates, from the scatter of all runs [runs, updates]."""
    bends = np.diff(runs, 2, axis=1)  # of noise alone: six times its variance
    return 3 * math.sqrt((bends**2).mean() / 6 * 2 / 5)


def verdict(means, clear):
    """What the means of a run do: turn, where the best is clearly above start and end, or climb, fall or stay."""
    start, best, end = means[0], means.max(), means[-1]
    if best - max(start, end) > clear:
        return "turns"
    return "climbs" if end - start > clear else "falls" if end - start < -clear else "stays"


def runs_picture(priced, weak):
    """Proxy, gold and what else is watched over the square root of the KL, a line a seed.

    priced: {price: columns [seeds, updates]}; weak: those of judges that saw less.
    """
    curves = [(columns, {"color": color, "label": f"β = {beta:g}"}) for (beta, columns), color in zip(priced.items(), ("C3", "C1", "C0"))]
    curves.append((weak, {"color": "black", "linestyle": "--", "label": "β = 0, 300 rankings"}))
    curves = [({name: smooth(values) for name, values in columns.items()}, style) for columns, style in curves]
    figure, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained")
    titles = {"proxy": "Proxy: optimized", "gold": "Gold: only watched", "distinct_2": "Distinct bigrams", "second": "Gold × distinct bigrams"}
    for axis, (key, title) in zip(axes.flat, titles.items()):
        for columns, style in curves:
            for d, y in zip(np.sqrt(columns["kl"]), columns[key]):
                axis.plot(d, y, linewidth=1.4, **style)
        axis.set(title=title, xlabel="sqrt(KL)")
        axis.spines[["top", "right"]].set_visible(False)
    seeds = len(curves[0][0]["kl"])
    axes[0, 0].legend(handles=axes[0, 0].lines[::seeds], frameon=False, fontsize=9)  # the colors are the same in all
    return figure


def chain_picture(judged, along):
    """Proxy and gold of PPO over the square root of the KL, a line a seed, and of the best of n, dashed, for each judge.

    judged: {(size, comparisons): (rows of PPO, rows of the best of n)}; along: gives of a row of PPO the curve of a key.
    """
    figure, panels = plt.subplots((len(judged) + 2) // 2, 2, figsize=(8, 9), sharey=True, layout="constrained")
    first, *_, empty = panels.flat  # one panel more than judges, for the legend
    for axis, ((size, n), (runs, many)) in zip(panels.flat, judged.items()):
        for key, color in (("proxy", "C3"), ("gold", "C2")):
            for i, row in enumerate(runs):
                axis.plot(*along(row, key), color=color, linewidth=1.2, label=None if i else key)
            best = [np.mean([[row["best_of"][m][name] for row in many] for name in ("kl", key)], axis=1) for m in many[0]["best_of"]]
            axis.plot(*np.transpose([(math.sqrt(kl), value) for kl, value in best]), "--", color=color, linewidth=2, label=f"{key}, best of n")
        axis.set(title=f"{size}, {n} comparisons", xlabel="sqrt(KL)")
        axis.spines[["top", "right"]].set_visible(False)
    empty.axis("off")
    empty.legend(*first.get_legend_handles_labels(), frameon=False, loc="center")
    return figure
