"""A comparison as one HTML page that holds everything it shows: no script, no network; light, dark and for print.

`rendered` makes such a page of any template that extends page.html.jinja.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .bars import size
from .cells import Rows, cells, deviation, plus_minus
from .plots import panel_svg
from .report import Sample

# Figure -> its caption; how its description begins, from the base's row; and what that says of a method, from its row.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], str], Callable[[dict[str, Any]], str]]] = {
    "learning": (
        "Loss on held-out examples of the task while learning; dashed, the base as it is.",
        lambda base: f"Curves of the task loss over the steps, from {base['task_loss']:.2f}",
        lambda row: f"{row['title']} ends at {row['task_loss']:.2f}",
    ),
    "trade": (
        "To the right (with a loss, to the left) is better at the task, down is less forgotten. Small marks are single seeds.",
        lambda base: f"Points of {base['scored'] or 'task loss'} and rise of the loss on general text",
        lambda row: f"{row['title']} {row['score' if row['scored'] else 'task_loss']:.2f} and {row['forgotten']:+.2f}",
    ),
    "memory": (
        "Peak memory of a training step, weights and optimizer included; pale bars are predicted.",
        lambda base: "Bars of peak memory",
        lambda row: f"{row['title']} {size(row['memory_measured'])}",
    ),
}
HEADINGS = {
    "task_loss": "Task loss", "score": "Answers: {scored}", "forgotten": "Forgotten", "general_loss": "General loss",
    "trainable": "Trained parameters", "share": "Share, %", "storage": "Storage", "measured": "Memory",
    "predicted": "predicted", "step": "Step, s", "token": "Token, ms", "merged": "merged",
}  # fmt: skip


def write_page(path: Path, settings: dict[str, Any], rows: Rows, shown: Sequence[Sample]) -> None:
    """Write the page; `rows` and `settings` are those of compare.json, `shown` are answers of models."""
    base, *trained = rows
    figures = [
        (encoded(panel_svg(name, rows)), f"{opening(base)}: {'; '.join(map(of, trained))}.", caption)
        for name, (caption, opening, of) in FIGURES.items()
    ]
    page = rendered(
        "report.html.jinja",
        title=f"Fine-tuning methods compared on {settings['data']}", settings=settings, conclusions=conclusions(rows),
        headings={key: title.format(**base) for key, title in HEADINGS.items() if key != "score" or base["scored"]},
        table=[(row["title"], cells(row, rows)) for row in rows], figures=figures, shown=shown,
    )  # fmt: skip
    write_text(path, page)


def rendered(template: str, **values: Any) -> str:
    """The page that a template of this directory makes of the values; one that it lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)


def encoded(picture: bytes) -> str:
    """A picture as text that a page can hold."""
    return base64.b64encode(picture).decode()


def conclusions(rows: Rows) -> list[str]:
    """What the rows say: who learned most, who is as good and smaller, who forgot least, who needs least memory."""
    base, *trained = rows
    best = min(trained, key=lambda row: row["task_loss"])
    start, gain = f"the base's task loss of {base['task_loss']:.3f}", base["task_loss"] - best["task_loss"]
    if gain <= 0:
        return [f"No method got below {start}: more steps or another learning rate are needed."]
    end = f"{best['task_loss']:.3f}{plus_minus(best, 'task_loss')}"
    lines = [f"{best['title']} learned most: it brought {start} down to {end}."]
    near = [row for row in trained if row["task_loss"] <= best["task_loss"] + margin(row, best) and row is not best]
    small = min(near, key=lambda row: row["storage"], default=best)
    if small["storage"] < best["storage"]:
        lines.append(
            f"{small['title']} comes as close as the seeds can distinguish ({small['task_loss']:.3f}), and keeps "
            f"{size(small['storage'])} a task instead of {size(best['storage'])}."
        )
    useful = [row for row in trained if base["task_loss"] - row["task_loss"] >= gain / 2]
    kind, lean = min(useful, key=lambda row: row["forgotten"]), min(useful, key=lambda row: row["memory_measured"])
    forgot = f"{kind['forgotten']:+.3f} on general text, {best['title']} {best['forgotten']:+.3f}"
    lines.append(f"Of those that learned at least half as much, {kind['title']} forgot least: {forgot}.")
    lines.append(f"Of the same, {lean['title']} needs the least memory: {size(lean['memory_measured'])} at the peak of a step.")
    return lines


def margin(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The sum of two standard deviations of the task loss: what the seeds cannot distinguish. 0 with one seed."""
    return sum(deviation(row, "task_loss") or 0.0 for row in (a, b))
