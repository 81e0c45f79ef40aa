"""Boxes, arrows and words on a sheet as wide as a phone shows it without zooming: 4 inches, letters of 8 points and more.

A sheet is white, so that it reads the same on a dark page. Its unit is a tenth of an inch; x goes right and y goes down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, SMALL = 40, 8.5  # units; points
INK, GREY, ORANGE = "#222222", "#666666", "#B34700"
FILLS = {"plain": "#FFFFFF", "frozen": "#DDE9F3", "trained": "#FBD3B4", "4bit": "#DCD0EA", "absent": "#FFFFFF"}
Point = tuple[float, float]


def sheet() -> Any:
    """The axes of an empty sheet, WIDTH units wide. A notebook shows it after the cell."""
    import matplotlib.pyplot as plt

    axes = plt.figure(facecolor="white", dpi=200).add_axes((0, 0, 1, 1))
    axes.axis("off")
    return axes


def cut(axes: Any, height: float, title: str, alt: str) -> Any:
    """The sheet's figure, cut off at `height` units, with a title in its first three. `alt` says what it shows to those who hear it."""
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.figure.set_size_inches(WIDTH / 10, height / 10)
    axes.figure.suptitle(title, x=0.5, y=1 - 1 / height, fontsize=11, fontweight="bold", color=INK, va="top")
    axes.figure.alt = alt
    return axes.figure


def words(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """A text centered at (x, y), or as `style` says."""
    usual = {"ha": "center", "va": "center_baseline", "fontsize": SMALL, "color": INK, "linespacing": 1.25}
    axes.text(x, y, text, **usual | style)


def box(axes: Any, x: float, y: float, width: float, height: float, text: str = "", kind: str = "plain", **style: Any) -> None:
    """A box whose upper left corner is (x, y), and a text in its middle. `kind`: one of FILLS."""
    from matplotlib.patches import FancyBboxPatch

    edge = {"ls": "--", "ec": "#AAAAAA"} if kind == "absent" else {"ec": ORANGE if kind == "trained" else GREY}
    shape = {"boxstyle": "round,pad=0,rounding_size=0.5", "lw": 0.9, "fc": FILLS[kind], **edge}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **shape | style))
    words(axes, x + width / 2, y + height / 2, text, color=GREY if kind == "absent" else INK)


def line(axes: Any, points: Sequence[Point], head: bool = True, **style: Any) -> None:
    """A line through points, with an arrow's head at its end."""
    style = {"color": GREY, "lw": 1.1} | style
    axes.plot(*zip(*points), solid_joinstyle="round", **style)
    if head:
        arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8, **style}
        axes.annotate("", points[-1], points[-2], arrowprops=arrow)
