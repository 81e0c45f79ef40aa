"""Two updates of four numbers, merged: their sum, and the three steps of TIES (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..peft.combine import Combination
from .drawing import GREY, ORANGE, box, cut, line, sheet, words


def ties_steps(first: Sequence[float], second: Sequence[float], density: float) -> dict[str, np.ndarray]:
    """name -> numbers [n] of what TIES computes on the way, by the library's rule."""
    how = Combination("ties", density=density)
    a, b = (how.thin("ties", np.float32(t)) for t in (first, second))
    return {"trim 1": a, "trim 2": b, "sign": np.where(a + b >= 0, 1, -1), "mean": how.combine([np.float32(first), np.float32(second)], [1, 1])}


def ties(first: Sequence[float], second: Sequence[float], density: float = 0.5) -> Any:
    """A figure of two updates with four numbers each, their sum, and TIES step by step."""
    steps = ties_steps(first, second, density)
    axes = sheet()
    left, width, gap, said = 12.5, 6.0, 0.6, []
    rows: list[tuple[float, str, Any, str]] = [
        (5.0, "adapter 1", first, "frozen"), (8.6, "adapter 2", second, "frozen"),
        (13.6, "their sum", np.add(first, second), "plain"),
        (20.0, "1 · trim", steps["trim 1"], "frozen"), (23.6, f"keep {density:.0%}", steps["trim 2"], "frozen"),
        (28.6, "2 · elect", steps["sign"], "plain"), (33.6, "3 · mean", steps["mean"], "trained"),
    ]  # fmt: skip
    for y, name, numbers, kind in rows:
        words(axes, 11.5, y + 1.5, name, ha="right", color=ORANGE if kind == "trained" else GREY)
        numbers = np.add(numbers, 0.0)  # which makes -0 a 0
        texts = [("+" if value > 0 else "-") if name == "2 · elect" else f"{value:g}" for value in numbers]
        for i, (value, text) in enumerate(zip(numbers, texts)):
            box(axes, left + i * (width + gap), y, width, 3, text, "absent" if value == 0 else kind)
        said.append(f"{name}: {', '.join(texts)}")
    middle = left + 2 * width + 1.5 * gap
    for above, below in ((11.6, 13.6), (26.6, 28.6), (31.6, 33.6)):
        line(axes, [(middle, above), (middle, below)])
    words(axes, 20, 38.4, "the mean of those that have the elected sign", color=GREY)
    return cut(axes, 40.2, "Two updates, added and by TIES", f"{'; '.join(said)}, the mean of those that have the elected sign.")
