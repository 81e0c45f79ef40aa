"""What a run measured: records in memory and as lines of JSON, the loss curve; and chrF, the quality of its texts."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import naming, write_atomic, write_text
from ..lazy import extra


class Metrics:
    """Records in memory (`history`) and, given a path, one JSON line each in a file (`lines`).

    `lines` are those that the checkpoint knows from which the run resumes. The file is written anew with them: what was
    recorded after the checkpoint is recorded again, and what has become of the file meanwhile does not matter.
    """

    def __init__(self, path: Path | None, lines: str = ""):
        self.lines = lines.splitlines(keepends=True)
        self.history: list[dict[str, Any]] = [json.loads(line) for line in self.lines]
        self._file = None
        if path is not None:
            write_text(path, lines)
            self._file = open(path, "a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; NumPy's numbers become Python's, and one that is not finite, which JSON does not have, None."""
        record = {k: v.item() if isinstance(v, np.generic) else v for k, v in record.items()}
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.history.append(record)
        if self._file is not None:
            self.lines.append(json.dumps(record, allow_nan=False) + "\n")
            with naming(self._file.name):
                self._file.write(self.lines[-1])
                self._file.flush()

    def close(self) -> None:
        """Close the file, which is on the disk then."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def chrf(hypotheses: Sequence[str], references: Sequence[str], char_order: int = 6, beta: float = 2.0) -> float:
    """How similar texts are to their references, by the n-grams of characters that they share: 0 to 100.

    chrF = 100 (1 + β²) P R / (β² P + R)

    P is the share of the hypotheses' n-grams that are found in their references, and R the share of the references'
    n-grams that are found in the hypotheses, each averaged over n = 1 to `char_order`. White space does not count.
    sacreBLEU (extra `hub`) computes it, for all texts together. Raises ValueError where the numbers of texts differ or
    are 0, and ImportError without sacreBLEU.

    Source: Popović 2015, chrF: character n-gram F-score for automatic MT evaluation (W15-3049), with β = 2 (W16-2341).
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"chrF compares texts in pairs: {len(hypotheses)} hypotheses, {len(references)} references")
    library = extra("sacrebleu.metrics.chrf", "hub", "computing chrF")
    return library.CHRF(char_order=char_order, beta=beta).corpus_score(list(hypotheses), [list(references)]).score


def panels(n: int, width: float, height: float, heights: Sequence[float] | None = None) -> tuple[Any, Sequence[Any]]:
    """(figure, its n axes side by side), empty, without a frame above and on the right; the sizes are in inches. With
    `heights`, to each other, the axes are one below the other.

    A notebook shows the figure as a picture where it is the last line of a cell, also while pyplot is not imported.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(*((n, 1) if heights else (1, n)), squeeze=False, height_ratios=heights).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure._repr_png_ = partial(png, figure)  # matplotlib's own has none
    return figure, axes


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def save_png(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file, atomically; the same figure gives the same bytes."""
    write_atomic(path, lambda file: file.write(png(figure)))


@contextmanager
def picture(path: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """Inside, the path's picture is drawn; where it cannot be, that is a warning, and what was trained is not lost."""
    try:
        yield path
    except Exception as error:  # matplotlib raises anything, of any type, from its import on
        warnings.warn(f"{path} was not drawn: {error}", stacklevel=3)


def plot_loss(history: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write the loss curve, training and held out over steps, as a PNG file (atomically)."""
    figure, (axes,) = panels(1, 6, 3.6)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(r["step"], r[key]) for r in history if key in r]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1 if key == "loss" else 1.5, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    if axes.lines:
        axes.legend(frameon=False)
    save_png(figure, path)
