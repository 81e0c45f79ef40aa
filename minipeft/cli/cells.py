"""What a comparison measured, as the texts of a table's cells: for the terminal and for the page."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from .bars import size

Rows = list[dict[str, Any]]  # those of compare.json, the first of them the frozen base


class Cell(NamedTuple):
    """A number, ` ± ` its deviation over the seeds or "", and whether it is the best of the methods."""

    text: str
    deviation: str = ""
    best: bool = False


def cells(row: dict[str, Any], rows: Rows) -> dict[str, Cell]:
    """The cells of a row by their keys; a dash where the frozen base has nothing to show."""
    base, *trained = rows

    def best(key: str, text: str) -> Cell:
        if row is base:
            return Cell(text if key in ("task_loss", "score") else "-")
        spread = plus_minus(row, key) if key in ("task_loss", "forgotten") else ""
        choose = max if key == "score" else min
        return Cell(text, spread, row[key] == choose(other[key] for other in trained))

    merged, seconds = row["latency_merged"], row["seconds_per_step"]
    return {
        "task_loss": best("task_loss", f"{row['task_loss']:.3f}"),
        "score": Cell("-") if row["score"] is None else best("score", f"{row['score']:.1f}"),
        "forgotten": best("forgotten", f"{row['forgotten']:+.3f}"),
        "general_loss": Cell(f"{row['general_loss']:.3f}"),
        "trainable": Cell(f"{row['trainable']:,}"),
        "share": Cell(f"{100 * row['trainable'] / row['parameters']:.2f}"),
        "storage": best("storage", size(row["storage"])),
        "measured": Cell(size(row["memory_measured"])),
        "predicted": Cell(size(row["memory_predicted"])),
        "step": best("seconds_per_step", f"{seconds or 0:.3f}"),
        "token": Cell(f"{1e3 * row['latency']:.2f}"),
        "merged": Cell("no" if merged is None else f"{1e3 * merged:.2f}"),
    }


def deviation(row: dict[str, Any], key: str) -> float | None:
    """The standard deviation over the seeds; None with fewer than two."""
    values = [run[key] for run in row.get("seeds", [])]
    return statistics.stdev(values) if len(values) > 1 else None


def plus_minus(row: dict[str, Any], key: str) -> str:
    """` ± 0.012`, or nothing with one seed."""
    s = deviation(row, key)
    return "" if s is None else f" ± {s:.3f}"
