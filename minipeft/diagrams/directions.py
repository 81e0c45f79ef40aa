"""A row of W as an arrow, and what LoRA's update makes of it in LoRA and in DoRA (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .drawing import GREY, INK, ORANGE, Point, cut, line, sheet, words

START, REACH, BLUE = (5.5, 25.5), 20.0, "#3E6C9E"  # where arrows begin; the row's length in units


def dora_row(row: Point, update: Point) -> tuple[Any, Any]:
    """(the row [2] after an update in LoRA, in DoRA), the latter as long as the row was."""
    lora = np.add(row, update)
    return lora, np.linalg.norm(row) * lora / np.linalg.norm(lora)


def dora(row: Point = (12, 5), update: Point = (-7, 3)) -> Any:
    """A figure of a row of two numbers, its update, and the row after it in LoRA and in DoRA; to scale."""
    axes, m, (lora, turned) = sheet(), float(np.linalg.norm(row)), dora_row(row, update)

    def at(point: Any, x: float = 0, y: float = 0) -> Point:
        return START[0] + REACH / m * point[0] + x, START[1] - REACH / m * point[1] + y

    line(axes, [at((m * np.cos(a), m * np.sin(a))) for a in np.linspace(0, np.pi / 2, 60)], head=False, ls=":")
    line(axes, [at((0, 0)), at(turned)], color=ORANGE, lw=3)
    line(axes, [at((0, 0)), at(row)], color=BLUE, lw=2)
    line(axes, [at(row), at(lora)], color=INK, ls="--")
    line(axes, [at((0, 0)), at(lora)], color=INK, lw=1.6)
    words(axes, *at(row, 0.8, -0.6), "a row of W,\nof length m", ha="left", color=BLUE)
    words(axes, *at(np.add(row, lora) / 2, -2.6, 1.9), "LoRA's update")
    words(axes, *at(lora, -0.9, -0.6), "LoRA: the sum", ha="right")
    words(axes, *at(turned, 0.9, -0.8), "DoRA: the sum's\ndirection, length m", ha="left", color=ORANGE)
    words(axes, 20, START[1] + 2.5, "dotted: rows of length m, which is trained, too", color=GREY)
    alt = (
        f"an arrow for a row of W, of length m, and LoRA's update at its tip. LoRA's row goes to the sum, {np.linalg.norm(lora) / m:.2f} m "
        "long. DoRA's has the sum's direction, and length m, a number that is trained, too."
    )
    return cut(axes, START[1] + 4.2, "The update turns the row; m is its length", alt)
