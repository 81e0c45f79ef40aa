"""The pictures of a comparison: how each method learns, what it gains against what it forgets, what memory it takes.

`rows` are always those of compare.json, the first of them the frozen base.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..train.metrics import panels, save_png
from .cells import Rows


def plot_comparison(rows: Rows, path: Path) -> None:
    """Three panels as one PNG, with the names at the ends of the curves, at the points, and beside the bars with color and marker."""
    figure, axes = panels(3, 14, 4.2)
    for ax, panel in zip(axes, PANELS.values()):
        panel(ax, rows)
    name_points(axes[1], rows)
    save_png(figure, path)


def panel_svg(name: str, rows: Rows) -> bytes:
    """One of PANELS as an SVG file of its own, with all names; the same rows give the same bytes."""
    figure, (axes,) = panels(1, 6, 4.4)
    PANELS[name](axes, rows)
    if name == "trade":
        name_points(axes, rows)
    return svg(figure, name)


def svg(figure: Any, name: str) -> bytes:
    """A figure as an SVG file; the same figure under the same name gives the same bytes."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def styled(rows: Rows) -> list[tuple[dict[str, Any], Any, str]]:
    """The rows, each with its color and its marker; the base's are grey. The first twelve colors and markers differ."""
    hues = [f"C{i}" for i in range(10) if i != 7] + ["black", "navy", "goldenrod"]  # without grey
    looks = [("grey", "o"), *((hues[i % 12], "sD^vP*X<>phd8"[i % 13]) for i in range(len(rows) - 1))]
    return [(row, *look) for row, look in zip(rows, looks)]


def plot_learning(axes: Any, rows: Rows) -> None:
    """Loss on the task over the steps, where the held-out examples were measured; each method's name at its end."""
    start = rows[0]["task_loss"]
    for row, color, marker in styled(rows)[1:]:
        axes.plot(*zip((0, start), *row["held_out_curve"]), marker + "-", color=color, markersize=5)
    ends = sorted(((row["held_out_curve"][-1], row["title"], color) for row, color, _ in styled(rows)[1:]), key=lambda end: end[0][1])
    for i, (end, title, color) in enumerate(ends):  # in the order of the ends, at even distances: no two names meet
        name_in_margin(axes, title, color, end, (i + 0.5) / len(ends))
    axes.axhline(start, color="grey", linestyle="--", linewidth=1)
    if start > 10 * min(row["task_loss"] for row in rows):
        axes.set_yscale("log")
    axes.set(title="Learning the task (held-out examples)", xlabel="step", ylabel="loss on the task")
    axes.locator_params(axis="x", integer=True)


def name_in_margin(axes: Any, title: str, color: Any, point: tuple[float, float], height: float) -> None:
    """A name to the right of a panel, at a share of its height, with a line to its point."""
    way = {"arrowstyle": "-", "color": color, "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 0}
    axes.annotate(title, point, (MARGIN, height), textcoords="axes fraction", va="center", fontsize=9, arrowprops=way)


def plot_trade(axes: Any, rows: Rows) -> None:
    """What was learned (by the answers, where they are judged, else by the loss) against what was forgotten; where there are several seeds, small points are single ones."""
    axes.axhline(0, color="grey", linestyle="--", linewidth=1)
    scored = rows[0]["scored"]
    learned = "score" if scored else "task_loss"
    for row, color, marker in styled(rows):
        seeds = row.get("seeds", [])
        if len(seeds) > 1:
            points = [(run[learned], run["forgotten"]) for run in seeds]
            axes.scatter(*zip(*points), s=14, color=color, marker=marker, alpha=0.5, linewidths=0)
        hollow = {"facecolors": "none", "edgecolors": [color], "linewidths": 1.5}  # what lies on another hides little of it
        axes.scatter(row[learned], row["forgotten"], s=70, marker=marker, zorder=3, **hollow)
    axes.margins(0.2, 0.12)
    learned = f"held-out answers: {scored}" if scored else "held-out loss on the task"
    axes.set(title="Learned and forgotten", xlabel=learned, ylabel="rise of the general loss")


def name_points(axes: Any, rows: Rows) -> None:
    """The names of the points of `plot_trade`, once its figure holds all else: beside a point that has room, the others in the margin."""
    from matplotlib.transforms import Bbox

    points = [(row["score" if rows[0]["scored"] else "task_loss"], row["forgotten"]) for row in rows]
    for _ in range(2):  # the second time in a panel that is as narrow as the names in the margin make it
        for text in list(axes.texts):
            text.remove()
        axes.figure.get_layout_engine().execute(axes.figure)
        (left, _), (right, _) = axes.bbox.get_points()
        places, (_, zero) = axes.transData.transform(points), axes.transData.transform((0, 0))
        marks = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in places]
        taken, crowded = [*marks, Bbox.from_extents(left, zero, right, zero)], []
        for point, place, mark, (row, color, _) in zip(points, places, marks, styled(rows)):
            for side, (x, y) in SIDES.items() if mark.count_overlaps(marks) == 1 else ():
                align = {"ha": side if x else "center", "va": side if y else "center"}
                text = axes.annotate(row["title"], point, (x, y), textcoords="offset points", fontsize=9, **align)
                box = text.get_window_extent()
                if left <= box.x0 and box.x1 <= right and not box.count_overlaps(taken):
                    taken.append(box)
                    break
                text.remove()
            else:
                crowded.append((*axes.transAxes.inverted().transform(place), row["title"], color, point))
        step = 1 / max(17, len(crowded))
        start = sum(y for _, y, *_ in crowded) / max(1, len(crowded)) - step * len(crowded) / 2  # level with their points
        heights = [min(max(0, start), 1 - step * len(crowded)) + step * (i + 0.5) for i in range(len(crowded))]
        for height in heights:  # from below, each the name of the point that its line meets first: no two lines cross
            lowest = min(crowded, key=lambda end: (end[1] - height) / (MARGIN - end[0]))
            crowded.remove(lowest)
            name_in_margin(axes, *lowest[2:], height)


def plot_memory(axes: Any, rows: Rows) -> None:
    """Peak memory of a step, as bars in MB: predicted (pale) and measured."""
    longest = max(row["memory_predicted"] for row in rows) / 1e6
    for i, (row, color, marker) in enumerate(styled(rows)):
        axes.barh(i - 0.2, row["memory_predicted"] / 1e6, 0.38, color=color, alpha=0.45)
        axes.barh(i + 0.2, row["memory_measured"] / 1e6, 0.38, color=color)
        axes.plot(-0.04 * longest, i, marker, color=color, markersize=7)
    axes.set_xlim(left=-0.08 * longest)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set(title="Peak memory (pale: predicted)", xlabel="MB in a step, weights included")


MARGIN = 1.08  # where names begin, in widths of the panel
SIDES = {"left": (9, 0), "right": (-9, 0), "bottom": (0, 8), "top": (0, -8)}  # of a name that is at its point, and how far, in points
PANELS: dict[str, Callable[[Any, Rows], None]] = {"learning": plot_learning, "trade": plot_trade, "memory": plot_memory}
