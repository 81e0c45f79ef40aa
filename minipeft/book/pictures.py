"""What a figure shows, in words, computed from the figure itself: its alternative text.

    Figure with 2 panels. Panel 1: "Loss"; nats a token against step; full: 3.9 at 1 to 3.1 at 8; ...

A diagram, whose words mean little without their places, brings its own: the attribute `alt` of its figure.

In a kernel, the words become the figure's text/plain form, which a notebook keeps beside its picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

FEW = 8  # lines, bars or words that are named one by one


def register(shell: Any) -> None:
    """In an IPython shell, show figures as sharp as the lessons save them, with their description as text."""
    shell.config.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "dpi": 130}
    shell.enable_matplotlib("inline")  # which forgets how figures are shown: first
    text = shell.display_formatter.formatters["text/plain"]
    text.for_type_by_name("matplotlib.figure", "Figure", lambda figure, printer, _: printer.text(describe(figure)))


def describe(figure: Any) -> str:
    """The figure's title, and its own words; where it has none, of each panel title, axes, and what is drawn in it."""
    heading = figure.get_suptitle()
    start = f'Figure "{_words(heading)}"' if heading else "Figure"
    if hasattr(figure, "alt"):
        return f"{start}: {figure.alt}"
    panels = [text for axes in figure.axes if not hasattr(axes, "_colorbar") and (text := _panel(axes))]
    if len(panels) == 1:
        return f"{start}: {panels[0]}."
    return f"{start} with {len(panels)} panels. " + " ".join(f"Panel {i}: {text}." for i, text in enumerate(panels, 1))


def _panel(axes: Any) -> str:
    title = _words(axes.get_title() or axes.get_title("left"))
    x, y = (_axis(axes, name) for name in "xy")
    against = f"{y} against {x}" if x and y else x or y
    parts = [f'"{title}"' if title else "", against, *_lines(axes), *_bars(axes)]
    parts += [f"a grid of {a.shape[0]} by {a.shape[1]} values, {_span(a)}" for a in (i.get_array() for i in axes.images)]
    for points in axes.collections:
        if (label := _label(points)) and len(points.get_offsets()) > 1:
            parts.append(f"{label}: {len(points.get_offsets())} points")
    words = [w for t in axes.texts if (w := _words(t.get_text()))]
    if words:
        parts.append("labeled " + ", ".join(words[: 2 * FEW]) + (" and others" if len(words) > 2 * FEW else ""))
    return "; ".join(filter(None, parts))


def _axis(axes: Any, name: str) -> str:
    label, scale = _words(getattr(axes, f"get_{name}label")()), getattr(axes, f"get_{name}scale")()
    return f"{label}{' (logarithmic)' if scale == 'log' else ''}" if label else ""


def _lines(axes: Any) -> list[str]:
    """Each labeled line by its ends and what it reaches between them, of several with one label the first; the others as a number."""
    errors = [group for group in axes.containers if hasattr(group, "has_yerr")]  # which bear their lines' labels
    labels = {line: _label(line) for line in axes.lines} | {group[0]: _label(group) for group in errors}
    caps, level = {cap for group in errors for cap in group[1]}, {group[0] for group in errors if not group.has_yerr}
    alike, named, others = Counter(labels.values()), {}, 0
    for line in (line for line in axes.lines if line not in caps):
        x, y = line.get_data()
        heights = (axes.transScale + axes.transLimits).transform(line.get_xydata())[:, 1]  # 0 to 1 in the panel
        shown = [(_number(a), _number(b), height) for a, b, height in zip(x, y, heights) if _number(b) != "nan"]
        if not (label := labels[line]) or label in named or not shown:
            others += len(shown) > 1
        elif len(shown) > 2 and line.get_linestyle() == "None":
            values = x if line in level or len({b for _, b, _ in shown}) == 1 else y
            named[label] = f"{len(shown)} points, {_span(values)}"
        else:
            named[label] = _course(shown)
    texts = [f"{label}{f', one of {alike[label]}' * (alike[label] > 1)}: {text}" for label, text in named.items()]
    more = len(texts) - 2 * FEW
    rest = [f"{more} more"] if more > 0 else []
    return texts[: 2 * FEW] + rest + ([f"{others} {'other ' * bool(named)}line{'s' * (others > 1)}"] if others else [])


def _course(shown: Sequence[tuple[str, str, float]]) -> str:
    """A line of points (x, y, height) by its ends, and by a lowest and a highest point that lie visibly beyond both."""
    (x, first, _), (u, last, _) = shown[0], shown[-1]
    if len(shown) == 1:
        return f"{first} at {x}"
    if len({y for _, y, _ in shown}) == 1:
        return f"{first} throughout"
    text, ends = f"{first} at {x} to {last} at {u}", (shown[0][2], shown[-1][2])
    for name, choose, sign in (("lowest", min, -1), ("highest", max, 1)):
        at, most, height = choose(shown, key=lambda point: point[2])
        if sign * height > sign * choose(ends) + 0.05:
            text += f", {name} {most} at {at}"
    return text


def _bars(axes: Any) -> list[str]:
    """Each labeled group of bars by its values, or by their span where there are many; the others together."""
    named, others = [], []
    for group in axes.containers:
        if not (orientation := getattr(group, "orientation", "")):  # error bars and the like
            continue
        upright = orientation == "vertical"
        values = [float(bar.get_height() if upright else bar.get_width()) for bar in group]
        ticks = [_words(t.get_text()) for t in (axes.get_xticklabels() if upright else axes.get_yticklabels())]
        names = ticks if len(ticks) == len(values) and all(ticks) else [""] * len(values)
        if (label := _label(group)) or any(names):
            each = ", ".join(f"{name} {_number(value)}".strip() for name, value in zip(names, values))
            named.append(f"{label or 'bars'}: {each if len(values) <= FEW else f'{len(values)} bars, {_span(values)}'}")
        else:
            others += values
    return [*named, f"{len(others)} {'other ' * bool(named)}bars, {_span(others)}"] if others else named


def _label(artist: Any) -> str:
    label = _words(str(artist.get_label() or ""))
    return "" if label.startswith("_") else label


def _span(values: Any) -> str:
    import numpy as np

    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return f"from {_number(finite.min())} to {_number(finite.max())}" if finite.size else "none of them finite"


def _number(value: Any) -> str:
    try:
        return f"{float(value):.3g}"
    except (TypeError, ValueError):  # a category
        return str(value)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[$\\{}]", "", text).split())  # of a formula, without its marks
