"""LoRA's three matrices: W [d, k], a square that is read alone, and two strips, B [d, r] and A [r, k], that are trained."""

from __future__ import annotations

from typing import Any

from .drawing import GREY, INK, ORANGE, WIDTH, box, cut, sheet, words

SIDE = 13  # of the longer side of W, in units


def low_rank(out_features: int, in_features: int, r: int) -> Any:
    """A figure of W [out_features, in_features] beside B A of rank r: who is stored where, in how many numbers.

    Lengths are to scale; a strip thinner than a line is drawn thicker, and the figure says so.
    """
    unit = SIDE / max(out_features, in_features)
    height, width, thin = out_features * unit, in_features * unit, r * unit
    strip, top, left, right = max(thin, 1.0), 6.0, 4.0, 22.5
    axes = sheet()
    box(axes, left, top, width, height, "W", "frozen")
    words(axes, left + width + 2.2, top + height / 2, "+", fontsize=16)
    box(axes, right, top, strip, height, "", "trained")
    words(axes, right - 1.2, top + height / 2, "B", color=ORANGE)
    box(axes, right + strip + 1, top, width, strip, "", "trained")
    words(axes, right + strip + 1 + width / 2, top + strip + 1.5, "A", color=ORANGE)
    square, strips = out_features * in_features, r * (out_features + in_features)
    y = top + height + 2.5
    for x, shapes, stored, n, color in (
        (10.5, f"W: {out_features:,} x {in_features:,}", "stored once", square, INK),
        (29.5, f"B: {out_features:,} x {r}   A: {r} x {in_features:,}", "stored for each task", strips, ORANGE),
    ):
        words(axes, x, y, shapes, color=color)
        words(axes, x, y + 2.2, stored, color=GREY)
        words(axes, x, y + 4.5, f"{n:,} numbers", color=color, fontweight="bold")
    words(axes, WIDTH / 2, y + 7.5, f"The square has {square / strips:,.0f} times as many numbers as the strips.")
    if strip > thin:
        times = max(out_features, in_features) / r
        words(axes, WIDTH / 2, y + 9.7, f"To scale, a strip would be 1/{times:,.0f} as thick as it is long.", color=GREY)
    alt = (
        f"W of {out_features:,} x {in_features:,}, {square:,} numbers, is stored once. Beside it stand two strips, stored for each task: "
        f"B of {out_features:,} x {r} and A of {r} x {in_features:,}, {strips:,} numbers, {square / strips:,.0f} times fewer."
    )
    return cut(axes, y + 11.5, "A square, and two strips beside it", alt)
