"""Tables and plots of the rows of a sweep: means over the seeds, with their 95 % confidence intervals.

    rows = read_rows("rows.jsonl")                   # or what `sweep` returned
    print(table(rows, "loss"))                       # one line for each r and lr
    plot(rows, "loss", x="lr", by="r")               # a matplotlib figure: a line for each r, with a band

    r  lr     loss            n
    4  0.001  2.314 ± 0.024   5
    4  0.003  2.206 ± 0.019   5

`±` is the half width of the 95 % confidence interval of the mean (Student's t, `seeds.interval`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from .rows import Row, failed, key
from .seeds import interval

Names = str | Sequence[str]


class Group(NamedTuple):
    """The runs of one combination of settings: of each value the numbers [runs], NaN where training diverged."""

    settings: Row
    numbers: dict[str, list[float]]
    n: int
    failed: int  # runs that have no numbers


def means(rows: Sequence[Row], value: Names, by: Names | None = None) -> list[Row]:
    """One row for each combination of the settings `by`: these settings; of each `value`, its mean and half width; `n`,
    the number of runs, and `failed`, the number of those that failed, which are in no mean.

        means(rows, "loss", by="r")  ->  [{"r": 4, "loss": 2.314, "loss ±": 0.024, "n": 5, "failed": 0}, ...]

    By default `by` is all settings but the seed that have several values. None (training diverged) counts as NaN.
    Raises ValueError for a name that the rows do not have, for "n" and "failed", and where a seed occurs twice in a
    mean: the runs then differ in another setting, too. And for a value that is no number, as a curve is.
    """
    found = []
    for group in _with_counts(_groups(rows, _names(value), by)):
        mean = dict(group.settings)
        for name, numbers in group.numbers.items():
            mean[name], mean[f"{name} ±"] = interval(numbers)
        found.append(mean | {"n": group.n, "failed": group.failed})
    return found


def _groups(rows: Sequence[Row], values: list[str], by: Names | None) -> list[Group]:
    """The groups, in the order of their settings. Raises as `means`."""
    by = _varying(rows) if by is None else _names(by)
    done = [row for row in rows if not failed(row)]
    for some, names in ((rows, by), (done, values)):
        for name in names:
            if lacking := [row for row in some if name not in row]:
                first = ", ".join(lacking[0])
                raise ValueError(f"{len(lacking)} of {len(some)} rows have no {name!r}; the first has {first}")
    ordered = sorted(rows, key=lambda row: [_order(row[name]) for name in by])
    found = []
    for group in _equal(lambda row: [row[name] for name in by], ordered):
        settings = {name: group[0][name] for name in by}
        runs = [row for row in group if not failed(row)]
        seeds = [key(row["seed"]) for row in runs if "seed" in row]
        if len(seeds) > len(set(seeds)):
            others = ", ".join(n for n in _varying(group) if n not in by) or "the version or the function"
            hint = "give by= all settings that differ, or only some of the rows"
            raise ValueError(f"the mean at {settings} has a seed twice: the runs differ in {others}; {hint}")
        numbers = {name: [_number(row, name) for row in runs] for name in values}
        found.append(Group(settings, numbers, len(group), len(group) - len(runs)))
    return found


def _with_counts(groups: list[Group]) -> list[Group]:
    """Groups for a table, which has their counts in columns. Raises ValueError for a setting or value with their names."""
    for name in {"n", "failed"} & {name for group in groups for name in (*group.settings, *group.numbers)}:
        raise ValueError(f"the tables have a column {name!r} of their own: give the rows' {name!r} another name")
    return groups


def _number(row: Row, name: str) -> float:
    """The value in a row; NaN for None. Raises ValueError for what is no number."""
    if row[name] is None:
        return math.nan
    if not isinstance(row[name], Real):
        settings = {setting: row[setting] for setting in row.get("settings", ())} or row["run"]
        value = f"a {type(row[name]).__name__}: {reprlib.repr(row[name])}"
        raise ValueError(f"a mean is over numbers, and {name!r} of the row {settings} is {value}")
    return float(row[name])


def table(rows: Sequence[Row], value: Names, by: Names | None = None) -> str:
    """`means` as text: one line for each combination of settings; a column for failures where there are any.

    A mean that is NaN says in how many runs the value is a number: "nan (4 of 5)". Raises as `means`.
    """
    groups, lines = _with_counts(_groups(rows, _names(value), by)), []
    for group in groups:
        cells = {name: _cell(v) for name, v in group.settings.items()}
        for name, numbers in group.numbers.items():
            cells[name] = with_interval(*interval(numbers))
            if 0 < (finite := sum(map(math.isfinite, numbers))) < len(numbers):
                cells[name] += f" ({finite} of {len(numbers)})"
        cells["n"] = str(group.n)
        if any(other.failed for other in groups):
            cells["failed"] = str(group.failed)
        lines.append(cells)
    if not lines:
        return ""
    columns = [[name, *(line[name] for line in lines)] for name in lines[0]]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in zip(*columns))


def plot(rows: Sequence[Row], value: str, x: str, by: str | None = None) -> Any:
    """A matplotlib figure: the mean of `value` over the setting `x`, a line for each `by`; bars and bands are intervals.

    Where some runs failed, or the value is not finite, the mean is over the others, its marker is hollow, and the title
    counts them. The axis is logarithmic where the values of `x` are positive and span a factor of three. Raises as
    `means`.
    """
    from ..train.metrics import panels

    groups = _groups(rows, [value], [by, x] if by else [x])
    places = [group.settings[x] for group in groups]
    numeric = all(type(place) in (int, float) and math.isfinite(place) for place in places)
    figure, (axes,) = panels(1, 6, 3.6)
    for line in _equal(lambda group: group.settings.get(by), groups):
        finite = [[number for number in group.numbers[value] if math.isfinite(number)] for group in line]
        xs = [group.settings[x] if numeric else _cell(group.settings[x]) for group in line]
        mean, half = np.array([interval(numbers) for numbers in finite]).T
        half = np.nan_to_num(half)
        (drawn,) = axes.plot(xs, mean, "o-", markersize=4, label=f"{by} {_cell(line[0].settings.get(by))}")
        axes.fill_between(xs, mean - half, mean + half, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.errorbar(xs, mean, half, fmt="none", ecolor=drawn.get_color(), elinewidth=1)  # a lone point has no band
        if hollow := [i for i, group in enumerate(line) if len(finite[i]) < group.n]:
            marker = {"markersize": 7, "markerfacecolor": "white", "color": drawn.get_color(), "label": "_"}
            axes.plot([xs[i] for i in hollow], mean[hollow], "o", **marker)
    n, failures = sum(group.n for group in groups), sum(group.failed for group in groups)
    infinite = sum(not math.isfinite(number) for group in groups for number in group.numbers[value])
    counts = (failures, f"{failures} of {n} runs failed"), (infinite, f"{value} is not finite in {infinite} of {n}")
    if missing := ", ".join(said for count, said in counts if count):
        axes.set_title(f"hollow (or missing): {missing}", fontsize="small")
    if numeric and 0 < 2.99 * min(places, default=0) <= max(places):  # 3 * 1e-4 is more than 3e-4
        axes.set_xscale("log")
    if numeric and len(ticks := sorted(set(places))) <= 10:  # of more, the labels would meet
        axes.set_xticks(ticks, [_cell(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=x, ylabel=value)
    if by:
        axes.legend(frameon=False)
    return figure


def with_interval(mean: float, half_width: float) -> str:
    """`2.314 ± 0.024`: the half width with two digits, the mean with as many decimals; four digits for one run."""
    if math.isnan(half_width):
        return f"{mean:.4g}"
    if half_width in (0, math.inf):
        return f"{mean:.4g} ± {half_width:g}"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{mean:.{decimals}f} ± {half_width:.{decimals}f}"


def _equal(of: Callable[[Any], Any], items: Iterable[Any]) -> list[list[Any]]:
    """The items in lists of those for which `of` is equal, in the order of the first of each."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(of(item)), []).append(item)
    return list(found.values())


def _names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _varying(rows: Sequence[Row]) -> list[str]:
    """The settings but the seed that have several values in the rows, in the rows' order."""
    names = dict.fromkeys(name for row in rows for name in row if name in row.get("settings", ()) and name != "seed")
    if rows and not all("settings" in row for row in rows):
        raise ValueError("the settings of these rows were a dataclass: name those that the table is to tell apart, by=")
    return [name for name in names if len({key(row.get(name)) for row in rows}) > 1]


def _order(value: Any) -> Any:
    """Numbers by size, before texts by the alphabet."""
    return (0, value, "") if isinstance(value, (int, float)) and value == value else (1, 0, str(value))


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
