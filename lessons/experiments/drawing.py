"""What the lessons' pictures share."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

COLORS = "#666666", "#D55E00", "#E69F00", "#0072B2"  # of parts


def one_plot(size: tuple[float, float] = (7.2, 4.2)) -> tuple[Any, Any]:
    """A figure, and its one plot, with the axes at the left and below alone."""
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def stacked(bars: dict[str, dict[str, int]], title: str) -> Any:
    """A bar for each name, made of its parts in bytes, one on the other."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, parts in enumerate(bars.values()):
        bottom = 0.0
        for (part, size), color in zip(parts.items(), COLORS):
            axis.bar(i, size / 2**20, 0.6, bottom=bottom, color=color, label=part if i == 0 else None)
            bottom += size / 2**20
    axis.set_xticks(range(len(bars)), list(bars))
    axis.set(ylabel="MiB", title=title)
    axis.margins(y=0.3)
    axis.legend(fontsize=9, ncols=2, loc="upper right")
    return figure
