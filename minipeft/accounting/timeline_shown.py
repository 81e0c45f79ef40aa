"""A timeline as a picture, and as a trace: what `Timeline.plot` and `Timeline.to_chrome` write.

Events are drawn equally wide, in the order in which they happen, whatever time they take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Array

if TYPE_CHECKING:
    from .timelines import Timeline

COLORS = {
    "frozen weights": "#8d99ae", "trained weights": "#5b6b8a", "adapters": "#2f4b7c", "master copies": "#b8a9c9",
    "gradients": "#59a14f", "optimizer states": "#8cd17d", "running averages": "#d4e6a5", "activations": "#f28e2b",
    "logits": "#ffbe7d", "working memory": "#e15759",
}  # fmt: skip
COLUMNS = 500  # of a picture: as many events as can be told apart in it, each the largest of its neighbors


def runs(values: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """(value, begin, end) of each stretch of equal values."""
    start = 0
    for value, equal in groupby(values):
        end = start + len(list(equal))
        yield value, start, end
        start = end


def block_of(path: str) -> str:
    """The block that a module's path lies in, model.layers.3 of model.layers.3.mlp.up_proj; "" for none."""
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found[0] if found else ""


def chrome(timeline: Timeline) -> dict[str, Any]:
    """The object that `Timeline.to_chrome` writes."""
    where = {"pid": 1, "tid": 1}
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", **where, "args": {"name": f"{timeline.name}: a step of minipeft's engine"}},
        {"ph": "M", "name": "thread_name", **where, "args": {"name": "ops, each drawn as a microsecond"}},
    ]

    def span(name: str, kind: str, start: int, end: int, **more: Any) -> None:
        trace.append({"ph": "X", "name": name, "cat": kind, "ts": start, "dur": end - start, **where, **more})

    for phase, start, end in timeline.phases():
        span(phase, "phase", start, end)
        blocks = [block_of(event.path) for event in timeline.events[start:end]]
        for block, first, after in runs(blocks):
            if block:
                name = ".".join(block.split(".")[-2:])  # layers.3
                span(name, "block", start + first, start + after, args={"module": block})
            for i in range(start + first, start + after):
                op, path, _, pullback = timeline.events[i]
                span(f"{op} (pullback)" if pullback else op, "op", i, i + 1, args={"module": path})
    counters = {"live bytes": [dict(zip(timeline.lines, row)) for row in timeline.live.tolist()]}
    counters["live bytes, sum"] = [{"bytes": n} for n in timeline.total.tolist()]
    if timeline.measured is not None:
        counters["live bytes, measured"] = [{"bytes": n} for n in timeline.measured.tolist()]
    for name, rows in counters.items():
        before = None
        for i, row in enumerate(rows):
            if row != before:
                trace.append({"ph": "C", "name": name, "ts": i, **where, "args": row})
            before = row
    at, event = int(timeline.total.argmax()), timeline.at_peak
    op, module, phase, pullback = event
    what = {"bytes": timeline.peak, "op": op, "module": module, "phase": phase, "pullback": pullback}
    name = f"peak: {timeline.peak:,} bytes, {event}"
    trace.append({"ph": "i", "s": "g", "name": name, "cat": "peak", "ts": at, **where, "args": what})
    other = {"peak": what, "lines at the peak": timeline.lines_at_peak}
    return {"traceEvents": trace, "displayTimeUnit": "ns", "otherData": other}


def draw(axes: Any, timeline: Timeline, columns: int = COLUMNS, top: int | None = None, words: bool = True) -> None:
    """Bytes by line over the events, the phases, and the peak; black: measured. The optimizer's step is drawn wider.

    `top`: bytes that the axis has room for, by default the peak. Without `words` the phases have no names.
    """
    n, total = len(timeline.events), timeline.total
    wide = max(1, n // 25)  # of one event among thousands nothing would be seen
    begins = np.unique(np.linspace(0, n - 1, min(columns, n - 1) + 1).astype(int))
    ends = np.append(begins[1:], n)
    x = np.append(begins, n - 1 + wide)
    scale, unit = _unit(top or timeline.peak)

    def tops(values: Array) -> Array:
        """The event with the most, of those that share a column."""
        found = [a + int(values[a:b].argmax()) for a, b in zip(begins, ends)]
        return np.array([*found, n - 1])

    rows = timeline.live[tops(total)].T / scale
    seen = [i for i in range(len(rows)) if timeline.live[:, i].any()]
    axes.stackplot(
        x, rows[seen], step="post", labels=[timeline.lines[i] for i in seen], linewidth=0,
        colors=[COLORS[timeline.lines[i]] for i in seen],
    )  # fmt: skip
    if timeline.measured is not None:
        measured = timeline.measured[tops(timeline.measured)] / scale
        axes.step(x, measured, where="post", color="black", linewidth=1, label="measured")
    for phase, start, end in timeline.phases():
        if start:
            axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
        if words:
            at = (start + (n - 1 + wide if end == n else end)) / 2
            axes.text(at, -0.02, phase, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9)
    axes.plot(int(total.argmax()) + 0.5, timeline.peak / scale, "v", color="black", markersize=6, clip_on=False)
    axes.set(xlim=(0, n - 1 + wide), ylim=(0, 1.06 * (top or timeline.peak) / scale), ylabel=unit, xticks=[])


def _unit(nbytes: int) -> tuple[int, str]:
    units = ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes"))
    return next((10**power, unit) for power, unit in units if nbytes >= 10**power)
