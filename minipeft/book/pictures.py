"""What a figure shows, in words, computed from the figure itself: its alternative text.

    Figure with 2 panels. Panel 1, "Loss": nats a token against step; full: 3.9 at 1 to 3.1 at 8, ...

In a kernel, the words become the figure's text/plain form, which a notebook keeps beside its picture.
"""

from __future__ import annotations

from typing import Any

FEW = 8  # lines, bars or words that are named one by one


def register(shell: Any) -> None:
    """In an IPython shell, show figures as sharp as the lessons save them, with their description as text."""
    shell.config.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "dpi": 130}
    shell.enable_matplotlib("inline")  # which forgets how figures are shown: first
    text = shell.display_formatter.formatters["text/plain"]
    text.for_type_by_name("matplotlib.figure", "Figure", lambda figure, printer, _: printer.text(describe(figure)))


def describe(figure: Any) -> str:
    """The figure's title, and of each panel title, axes, and what is drawn in it."""
    panels = [text for axes in figure.axes if not hasattr(axes, "_colorbar") and (text := _panel(axes))]
    heading = figure.get_suptitle()
    start = f'Figure "{_words(heading)}"' if heading else "Figure"
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
    """Each labeled line by its ends; the others as a number."""
    named, others = [], 0
    for line in axes.lines:
        x, y = line.get_data()
        shown = [(_number(a), _number(b)) for a, b in zip(x, y) if _number(b) != "nan"]
        if len(shown) > 2 and line.get_linestyle() == "None" and (label := _label(line)):
            named.append(f"{label}: {len(shown)} points, {_span([b for b in y if _number(b) != 'nan'])}")
        elif len(shown) > 1 and (label := _label(line)):
            named.append(f"{label}: {shown[0][1]} at {shown[0][0]} to {shown[-1][1]} at {shown[-1][0]}")
        elif len(shown) == 1 and (label := _label(line)):
            named.append(f"{label}: {shown[0][1]} at {shown[0][0]}")
        else:
            others += len(shown) > 1
    more = len(named) - 2 * FEW
    rest = [f"{more} more"] if more > 0 else []
    return named[: 2 * FEW] + rest + ([f"{others} {'other ' * bool(named)}line{'s' * (others > 1)}"] if others else [])


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
    return " ".join(text.replace("$", "").split())
