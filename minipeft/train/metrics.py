"""What a run measured: a line of JSON per record, a history in memory, and the picture of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import FileError, write_atomic


class Metrics:
    """Records in memory (`history`) and, given a path, one JSON line each in a file.

    `position` is the length in bytes of what an earlier run wrote and is to be kept: what lies beyond it, written after
    the checkpoint from which the run resumes, is cut off, so that no line is doubled. 0 begins anew.

    Raises FileError when the file is shorter than `position`, or holds anything but JSON lines up to there.
    """

    def __init__(self, path: Path | None, position: int = 0):
        self.history: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            raise FileError(
                f"{path}: has {size} bytes, but {position} when the checkpoint was written; put the file back"
            )
        self._file = open(path, "r+b" if path.exists() else "w+b")
        try:
            self.history = [json.loads(line) for line in self._file.read(position).splitlines()]
        except ValueError as error:
            self._file.close()
            raise FileError(f"{path}: the first {position} bytes are not lines of JSON ({error})") from error
        self._file.seek(position)
        self._file.truncate()

    def write(self, record: dict[str, Any]) -> None:
        """Add a record."""
        self.history.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()

    def position(self) -> int:
        """The length of the file, which is on the disk when this returns; 0 without a file."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def plot_loss(history: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write the loss curve, training and held out over steps, as a PNG file (atomically)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(r["step"], r[key]) for r in history if key in r]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1 if key == "loss" else 1.5, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150))
