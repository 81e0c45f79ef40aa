"""A loss of three numbers, L = (w x - t)², as a graph: each value is computed on the way down, each gradient on the way up."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd.tensor import Tensor
from .drawing import GREY, ORANGE, Point, box, cut, line, sheet, words


def gradients(x: float, w: float, t: float) -> dict[str, tuple[float, float]]:
    """name -> (value, gradient of L) of w, x, p = w x, t, e = p - t and L = e e; the gradients by the engine."""
    p, e = w * x, w * x - t
    starts = {  # name -> (its value, e as a function of it)
        "w": (w, lambda w: w * x - t), "x": (x, lambda x: w * x - t), "p": (p, lambda p: p - t),
        "t": (t, lambda t: p - t), "e": (e, lambda e: e),
    }  # fmt: skip
    found = {}
    for name, (value, error) in starts.items():
        leaf = Tensor(np.asarray(value, np.float64), requires_grad=True)
        (error(leaf) * error(leaf)).backward()
        found[name] = (float(value), float(leaf.grad))
    return found | {"L": (float(e * e), 1.0)}


def scalar_graph(x: float = 2.0, w: float = 3.0, t: float = 4.0, backward: bool = True) -> Any:
    """A figure of L = (w x - t)² with its values and, where the way `backward` is drawn, the gradients of L."""
    nodes = gradients(x, w, t)
    axes = sheet()
    corners = {"w": (3, 6.5), "x": (25, 6.5), "p": (14, 17.5), "t": (26.8, 17.5), "e": (14, 28.5), "L": (14, 39.5)}
    formulas = {"p": "p = w x", "e": "e = p - t", "L": "L = e e"}
    for name, (left, top) in corners.items():
        box(axes, left, top, 12, 4.6, f"{formulas.get(name, name)}\n{nodes[name][0]:g}", "trained" if name == "w" else "plain")
    ways: dict[str, tuple[Point, Point, Point, str]] = {  # from the box above to the one below; the gradient's place
        "w": ((9, 11.1), (16.5, 17.5), (11, 15.2), "right"), "x": ((31, 11.1), (23.5, 17.5), (29.4, 14.2), "left"),
        "p": ((20, 22.1), (20, 28.5), (18.6, 25.3), "right"), "t": ((32.8, 22.1), (24.5, 28.5), (31.2, 26.4), "left"),
    }  # fmt: skip
    uses = [((20 + shift, 33.1), (20 + shift, 39.5)) for shift in (-2.5, 2.5)]  # of e, in e e
    values = ", ".join(f"{formulas.get(name, name)} is {value:g}" for name, (value, _) in nodes.items())
    words(axes, 2, 46.8, "grey: values go down", color=GREY, ha="left")
    if not backward:
        for above, below in (*(way[:2] for way in ways.values()), *uses):
            line(axes, [above, below])
        alt = f"down go the values: {values}. From each number a line leads to what is made from it; e is used twice."
        return cut(axes, 48.5, "Each number is made from those above it", alt)
    for name, (above, below, place, side) in ways.items():
        _both_ways(axes, above, below)
        words(axes, *place, f"∂L/∂{name} = {nodes[name][1]:g}", color=ORANGE, ha=side)
    value, gradient = nodes["e"]
    for (above, below), left, side in zip(uses, (16, 24), ("right", "left")):
        _both_ways(axes, above, below)
        words(axes, left, 36.3, f"{value:g}", color=ORANGE, ha=side)
    words(axes, 27, 36.3, f"two uses of e:\n∂L/∂e = {value:g} + {value:g} = {gradient:g}", color=ORANGE, ha="left")
    words(axes, 38, 46.8, "orange: gradients go up", color=ORANGE, ha="right")
    found = ", ".join(f"∂L/∂{name} = {nodes[name][1]:g}" for name in "eptxw")
    alt = f"down go the values: {values}. Up go the gradients: {found}. e has two uses, whose gradients add up."
    return cut(axes, 48.5, "One number down, one gradient up", alt)


def _both_ways(axes: Any, above: Point, below: Point) -> None:
    (x, y), (u, v) = above, below
    line(axes, [(x - 0.5, y), (u - 0.5, v)])
    line(axes, [(u + 0.5, v), (x + 0.5, y)], color=ORANGE)
