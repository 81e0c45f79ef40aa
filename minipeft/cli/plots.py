"""The picture of a comparison: how each method learns, what it gains against what it forgets, what memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_atomic


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels as one PNG; `rows` are those of compare.json, the first of them the frozen base."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, trained = rows[0], rows[1:]
    colors = {row["method"]: colormaps["tab10" if len(trained) <= 10 else "tab20"](i) for i, row in enumerate(trained)}
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    learning, trade, memory = figure.subplots(1, 3)

    for row in trained:
        color = colors[row["method"]]
        learning.plot(*zip(*smooth(row["curve"])), color=color, alpha=0.4, linewidth=0.8)
        held_out = [(0, base["task_loss"]), *row["held_out_curve"]]
        learning.plot(*zip(*held_out), "o-", color=color, markersize=4, label=row["title"])
    learning.axhline(base["task_loss"], color="grey", linestyle="--", linewidth=1, label=base["title"])
    learning.set(title="Learning the task", xlabel="step", ylabel="loss on the task (thin: training, dots: held out)")
    learning.legend(frameon=False)

    trade.axhline(0, color="grey", linestyle="--", linewidth=1)
    middle = (min(row["task_loss"] for row in rows) + max(row["task_loss"] for row in rows)) / 2
    for row, color in [(base, "grey"), *((row, colors[row["method"]]) for row in trained)]:
        point, left = (row["task_loss"], row["forgotten"]), row["task_loss"] < middle
        trade.scatter(*point, s=60, color=color, zorder=3)
        side = {"xytext": (7, 5), "ha": "left"} if left else {"xytext": (-7, 5), "ha": "right"}
        trade.annotate(row["title"], point, textcoords="offset points", **side)
    trade.margins(0.25)
    trade.set(
        title="Learned and forgotten", xlabel="held-out loss on the task", ylabel="rise of the loss on general text"
    )

    for shift, key, alpha in ((-0.2, "memory_predicted", 0.45), (0.2, "memory_measured", 1.0)):
        for i, row in enumerate(rows):
            memory.bar(i + shift, (row[key] or 0) / 1e6, 0.38, color=colors.get(row["method"], "grey"), alpha=alpha)
    memory.set_xticks(range(len(rows)), [row["title"] for row in rows], rotation=20 if len(rows) > 4 else 0)
    memory.set(title="Peak memory of a step (pale: predicted)", ylabel="MB, weights included")

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
