"""What a figure shows, in words, computed from the figure itself: its alternative text.

    Figure with 2 panels. Panel 1: "Loss"; nats a token against step; full: 3.9 at 1 to 3.1 at 8; ...

A diagram, whose words mean little without their places, brings its own: the attribute `alt` of its figure.

In a kernel, the words become the figure's text/plain form, which a notebook keeps beside its picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

FEW = 16  # lines, points, bars or words that are named one by one


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
    parts = [f'"{title}"' if title else "", against, *_lines(axes), *_bars(axes), *_stairs(axes)]
    parts += [f"a grid of {a.shape[0]} by {a.shape[1]} values, {_span(a)}" for a in (i.get_array() for i in axes.images)]
    for points in axes.collections:
        if (label := _label(points)) and len(points.get_offsets()) > 1:
            parts.append(f"{label}: {len(points.get_offsets())} points")
    words = [w for t in axes.texts if (w := _words(t.get_text()))]
    if words:
        parts.append("labeled " + _few(words))
    return "; ".join(filter(None, parts))


def _axis(axes: Any, name: str) -> str:
    label, scale = _words(getattr(axes, f"get_{name}label")()), getattr(axes, f"get_{name}scale")()
    return f"{label}{' (logarithmic)' if scale == 'log' else ''}" if label else ""


def _lines(axes: Any) -> list[str]:
    """Each labeled line by its ends and what it reaches between them, of several with one label the first.

    Points on an axis of names by these. Of other lines without a label those that cross the panel; and the one more, or how many.
    """
    errors = {group[0]: group for group in axes.containers if hasattr(group, "has_yerr")}  # which bear their lines' labels
    labels = {line: _label(line) for line in axes.lines} | {line: _label(group) for line, group in errors.items()}
    caps = {cap for group in errors.values() for cap in group[1]}
    alike, named, unnamed, others = Counter(labels.values()), {}, [], []
    for line in (line for line in axes.lines if line not in caps):
        x, y = line.get_data()
        heights = (axes.transScale + axes.transLimits).transform(line.get_xydata())[:, 1]  # 0 to 1 in the panel
        shown = [(_number(a), _number(b), height) for a, b, height in zip(x, y, heights) if _number(b) != "nan"]
        error, scattered = errors.get(line), len(shown) > 1 and line.get_linestyle() == "None"
        text = _few(_at_names(axes, line.get_xydata(), error)) if scattered else _crossing(axes, line)
        if not (label := labels[line]) and text:
            unnamed.append(f"points: {text}" if scattered else f"a line at {text}")
        elif not label or label in named or not shown:
            others += [_course(shown)] if len(shown) > 1 else []
        elif scattered and len(shown) > 2 and not text:
            level = (error is not None and not error.has_yerr) or len({b for _, b, _ in shown}) == 1
            rises = not level and all(a < b for a, b in pairwise(x))
            named[label] = _course(shown) if rises else f"{len(shown)} points, {_span(x if level else y)}"
        else:
            named[label] = text if scattered and text else _course(shown)
    texts = [f"{label}{f', one of {alike[label]}' * (alike[label] > 1)}: {text}" for label, text in named.items()]
    more = len(texts) - FEW
    texts[FEW:] = [f"{more} more"] if more > 0 else []
    texts += dict.fromkeys(unnamed)
    if len(others) == 1:
        return [*texts, f"{'another' if texts else 'a'} line: {others[0]}"]
    return texts + ([f"{len(others)} {'other ' * bool(texts)}lines"] if others else [])


def _crossing(axes: Any, line: Any) -> str:
    """Where a line crosses the whole panel: x = 2, or y = 2."""
    of_data = line.get_transform().contains_branch_seperately(axes.transData)
    return "" if all(of_data) else ", ".join(f"{n} = {_number(v[0])}" for n, v, own in zip("xy", line.get_data(), of_data) if own)


def _at_names(axes: Any, points: Any, error: Any = None) -> list[str]:
    """Points (x, y) by the words that an axis has in place of numbers, with their error bars; none where neither axis has any."""
    for value, axis in ((1, axes.xaxis), (0, axes.yaxis)):
        names = {at: _words(tick.get_text()) for at, tick in zip(axis.get_majorticklocs(), axis.get_ticklabels())}
        if all(re.fullmatch(r"(mathdefault|[-−+.,^%e\d ])*", name) for name in names.values()):  # numbers, as _words has them
            continue
        places = [min(names, key=lambda at: abs(at - point[1 - value])) for point in points]
        texts = [f"{names[at]} is {_number(point[value])}".removeprefix(" is ") for at, point in zip(places, points)]
        if error and (error.has_yerr if value else error.has_xerr):
            ends = [sorted(end[value] for end in segment) for segment in error[2][-value].get_segments()]
            texts = [f"{text} [{', '.join(map(_number, span))}]" if len(span) == 2 else text for text, span in zip(texts, ends, strict=True)]
        return [text for text in texts if not text.endswith("nan")]
    return []


def _course(shown: Sequence[tuple[str, str, float]]) -> str:
    """A line of points (x, y, height) by its ends, and by a lowest and a highest point that lie visibly beyond both."""
    (x, first, _), (u, last, _) = shown[0], shown[-1]
    if len(shown) == 1:
        return f"{first} at {x}"
    if len({y for _, y, _ in shown}) == 1:
        return f"{first} throughout"
    if len({x for x, _, _ in shown}) == 1:
        return f"x = {x}"
    text, ends = f"{first} at {x} to {last} at {u}", (shown[0][2], shown[-1][2])
    for name, choose, sign in (("lowest", min, -1), ("highest", max, 1)):
        at, most, height = choose(shown, key=lambda point: point[2])
        if sign * height > sign * choose(ends) + 0.05:
            text += f", {name} {most} at {at}"
    return text


def _bars(axes: Any) -> list[str]:
    """The bars of each label, and of its color, by their values, or by their span where there are many; those without gaps as a histogram."""
    shapes, groups, of_color = [], {}, {}
    for group in axes.containers:
        if not (orientation := getattr(group, "orientation", "")) or not len(group):  # error bars and the like
            continue
        color, label, upright = group[0].get_facecolor(), _label(group), orientation == "vertical"
        label = of_color.setdefault(color, label) if label else of_color.get(color, "")
        values = [bar.get_height() if upright else bar.get_width() for bar in group]
        ends = [box.intervalx if upright else box.intervaly for box in (bar.get_bbox() for bar in group)]
        if len(group) > FEW and all(abs(b - c) < (b - a) / 100 for (a, b), (c, _) in pairwise(ends)):
            shapes.append((label, _shape(values, [*(a for a, _ in ends), ends[-1][1]])))
            continue
        points = [((a + b) / 2, value)[:: 1 if upright else -1] for (a, b), value in zip(ends, values)]
        texts = _at_names(axes, points, group.errorbar) or [*map(_number, values)]
        for kept, new in zip(groups.setdefault(label, ([], [])), (values, texts)):
            kept += new
    other = "other " * (len(groups) > 1) + "bars"
    for label, (values, texts) in groups.items():
        many = f"{len(values)} {'bars' if label else other}, {_span(values)}"
        shapes.append((label or other, ", ".join(texts)) if len(texts) <= FEW else (label, many))
    return [f"{label}: {text}".removeprefix(": ") for label, text in shapes]


def _stairs(axes: Any) -> list[str]:
    """Each histogram that is drawn as one outline."""
    found = [(_label(patch), patch.get_data()) for patch in axes.patches if hasattr(patch, "get_data")]
    return [f"{label}: {_shape(data.values, data.edges)}".removeprefix(": ") for label, data in found]


def _shape(values: Any, edges: Any) -> str:
    """A histogram by its peak, and by where most of its area is."""
    import numpy as np

    area = np.append(0, np.cumsum(values * np.diff(edges)))
    low, high = np.interp([0.05, 0.95], area / area[-1], edges)
    peak = (edges[np.argmax(values)] + edges[np.argmax(values) + 1]) / 2
    return f"a histogram, highest at {_number(peak)}, nine tenths of it from {_number(low)} to {_number(high)}"


def _label(artist: Any) -> str:
    label = _words(str(artist.get_label() or ""))
    return "" if label.startswith("_") else label


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:FEW]) + (" and others" if len(texts) > FEW else "")


def _span(values: Any) -> str:
    import numpy as np

    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return f"from {_number(finite.min())} to {_number(finite.max())}" if finite.size else "none of them finite"


def _number(value: Any) -> str:
    try:
        return f"{float(value):,.0f}" if 1e3 <= abs(float(value)) < 1e6 else f"{float(value):.3g}"
    except (TypeError, ValueError):  # a category
        return str(value)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[$\\{}]", "", text).split())  # of a formula, without its marks
