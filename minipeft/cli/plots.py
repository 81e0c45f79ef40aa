"""The picture of a comparison: how each method learns, what it gains against what it forgets, what memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_atomic


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels as one PNG; `rows` are those of compare.json, the first of them the frozen base.

    The panels share one legend: the names beside the bars, each with the color and the marker of its method.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, trained = rows[0], rows[1:]
    hues = [colormaps["tab10"](i) for i in range(10) if i != 7]  # without grey, which is the base's
    colors = {row["method"]: hues[i % len(hues)] for i, row in enumerate(trained)}
    markers = {row["method"]: "osD^vP*X<>ph"[i % 12] for i, row in enumerate(trained)}
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    learning, trade, memory = figure.subplots(1, 3)

    for row in trained:
        color = colors[row["method"]]
        learning.plot(*zip(*smooth(row["curve"])), color=color, alpha=0.4, linewidth=0.8)
        held_out = [(0, base["task_loss"]), *row["held_out_curve"]]
        learning.plot(*zip(*held_out), markers[row["method"]] + "-", color=color, markersize=5)
    learning.axhline(base["task_loss"], color="grey", linestyle="--", linewidth=1)
    learning.set(title="Learning the task", xlabel="step", ylabel="loss on the task (thin: training, marked: held out)")

    trade.axhline(0, color="grey", linestyle="--", linewidth=1)
    trade.scatter(base["task_loss"], 0, s=70, color="grey", marker="o", zorder=3)
    for row in trained:
        point = (row["task_loss"], row["forgotten"])
        trade.scatter(*point, s=70, color=colors[row["method"]], marker=markers[row["method"]], zorder=3)
    trade.margins(0.12)
    trade.set(
        title="Learned and forgotten", xlabel="held-out loss on the task", ylabel="rise of the loss on general text"
    )

    for shift, key, alpha in ((-0.2, "memory_predicted", 0.45), (0.2, "memory_measured", 1.0)):
        for i, row in enumerate(rows):
            memory.barh(i + shift, (row[key] or 0) / 1e6, 0.38, color=colors.get(row["method"], "grey"), alpha=alpha)
    longest = max(row["memory_predicted"] for row in rows) / 1e6
    for i, row in enumerate(rows):
        memory.plot(-0.04 * longest, i, markers.get(row["method"], "o"), color=colors.get(row["method"], "grey"), markersize=7)
    memory.set_xlim(left=-0.08 * longest)
    memory.set_yticks(range(len(rows)), [row["title"] for row in rows])
    memory.invert_yaxis()
    memory.set(title="Peak memory of a step (pale: predicted)", xlabel="MB, weights included")

    for axes in (learning, trade, memory):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=130, metadata={"Software": None}))


def smooth(curve: list[tuple[int, float]], width: int = 10) -> list[tuple[int, float]]:
    """(step, value) points as means of `width` neighbours (of fewer where there are few): a noisy line made readable."""
    width = max(1, min(width, len(curve) // 4))
    return [
        (curve[i + width // 2][0], sum(value for _, value in curve[i : i + width]) / width)
        for i in range(len(curve) - width + 1)
    ]
