"""The graph of a tensor as text and as a picture: every op that a backward pass will go through, once.

    >>> print((F.relu(x @ W) * x).sum().graph({"x": x, "W": W}))
    1  matmul  [4, 3]  x, W
    2  relu    [4, 3]  1
    3  mul     [4, 3]  2, x
    4  sum     []      3

A line is an op with the shape of its result, and the inputs that receive gradients, by line number or name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..files import write_atomic
from .tensor import AutogradError, Tensor, nodes_below

MOST_BOXES = 60  # in a picture


class Step(NamedTuple):
    """One op: its name, the shape of its result, and its inputs: places in `Graph.steps`, or names of leaves."""

    op: str
    shape: tuple[int, ...]
    inputs: tuple[int | str, ...]


class Graph:
    """What a tensor was computed by, in the order of computation; a copy, which keeps nothing of the graph alive.

    Args:
        tensor: the result. A model's loss, for example.
        names: of leaves: a model, whose parameters have names, or {name: tensor}. Others go by their shapes.

    Raises AutogradError for a tensor that requires no gradient, and for a graph that a backward pass has freed.
    """

    def __init__(self, tensor: Tensor, names: Any = None):
        if not tensor.requires_grad:
            raise AutogradError("the tensor does not require gradients, so there is no graph of it")
        if names is not None and not isinstance(names, Mapping):
            names = dict(names.named_parameters())
        known = {id(leaf): name for name, leaf in (names or {}).items()}
        if tensor._node is None:
            raise AutogradError("the tensor is a leaf: no op made it, so there is no graph of it")
        nodes = nodes_below(tensor._node)
        places = {id(node): i for i, node in enumerate(nodes)}
        shapes = {places[id(parent)]: shape for n in nodes for parent, _, shape, _ in n.edges if id(parent) in places}
        self.steps: list[Step] = []
        for i, node in enumerate(nodes):
            inputs = [
                places[id(x)] if id(x) in places else known.get(id(x), f"{type(x).__name__} {list(shape)}")
                for x, _, shape, _ in node.edges
            ]
            self.steps.append(Step(node.op, shapes.get(i, tensor.shape), tuple(inputs)))

    def __repr__(self) -> str:
        rows = [
            (
                str(i),
                step.op,
                str(list(step.shape)),
                ", ".join(str(x + 1) if isinstance(x, int) else x for x in step.inputs),
            )
            for i, step in enumerate(self.steps, 1)
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            f"{number:>{widths[0]}}  {op:{widths[1]}}  {shape:{widths[2]}}  {inputs}"
            for number, op, shape, inputs in rows
        )

    def plot(self, path: str | os.PathLike) -> None:
        """Write a PNG file: the result on top, below each op its inputs.

        Raises ValueError for a graph of more ops and leaves than are legible.
        """
        boxes: dict[Any, str] = {i: f"{step.op}\n{list(step.shape)}" for i, step in enumerate(self.steps)}
        for i, step in enumerate(self.steps):
            boxes |= {(i, x): x for x in step.inputs if isinstance(x, str)}  # a leaf stands beside each of its readers
        if len(boxes) > MOST_BOXES:
            raise ValueError(
                f"a picture shows {MOST_BOXES} ops and leaves at most, and this graph has {len(boxes)}: print it instead, "
                "or take a smaller model"
            )
        arrows = [(x if isinstance(x, int) else (i, x), i) for i, step in enumerate(self.steps) for x in step.inputs]
        _draw(boxes, arrows, path)


def _draw(boxes: dict[Any, str], arrows: list[tuple[Any, Any]], path: str | os.PathLike) -> None:
    """`arrows` go from a box to one that comes after it: each box stands below all those that it points to."""
    from matplotlib.figure import Figure

    readers: dict[Any, list[Any]] = {box: [] for box in boxes}
    for source, target in arrows:
        readers[source].append(target)
    level: dict[Any, int] = {}
    for box in sorted(boxes, key=lambda box: box if isinstance(box, int) else -1, reverse=True):  # results first
        level[box] = 1 + max((level[r] for r in readers[box]), default=-1)
    rows: list[list[Any]] = [[box for box in boxes if level[box] == i] for i in range(max(level.values()) + 1)]
    x: dict[Any, float] = {}
    for row in rows:  # each box as near as possible to below its readers
        wish = {box: sum(x[r] for r in readers[box]) / max(len(readers[box]), 1) for box in row}
        row.sort(key=wish.__getitem__)
        for left, box in zip([None, *row], row):
            x[box] = wish[box] if left is None else max(wish[box], x[left] + 1)
        shift = sum(wish[box] - x[box] for box in row) / len(row)
        x |= {box: x[box] + shift for box in row}
    width, height = 2.3 * (max(x.values()) - min(x.values()) + 1), 0.8 * len(rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(min(x.values()) - 0.5, max(x.values()) + 0.5), ylim=(0.5 - len(rows), 0.5))
    axes.axis("off")
    for source, target in arrows:
        bend = 0.0 if level[source] == level[target] + 1 else 0.25  # around the boxes in between
        style = {
            "arrowstyle": "-|>",
            "color": "0.5",
            "shrinkA": 12,
            "shrinkB": 13,
            "connectionstyle": f"arc3,rad={bend}",
        }
        axes.annotate("", (x[target], -level[target]), (x[source], -level[source]), arrowprops=style)
    for box, text in boxes.items():
        leaf = not isinstance(box, int)
        if leaf and len(text) > 24:  # a long name in two lines
            middle = text.find(".", len(text) // 2 - 6) + 1
            text = f"{text[:middle]}\n{text[middle:]}"
        face = {"boxstyle": "round", "facecolor": "#dcebf7" if leaf else "white", "edgecolor": "0.5"}
        axes.text(x[box], -level[box], text, ha="center", va="center", fontsize=8, bbox=face)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata={"Software": None}))
