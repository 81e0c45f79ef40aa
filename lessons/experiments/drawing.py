"""What the lessons' pictures share."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt


def one_plot(size: tuple[float, float] = (7.2, 4.2)) -> tuple[Any, Any]:
    """A figure, and its one plot, with the axes at the left and below alone."""
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis
