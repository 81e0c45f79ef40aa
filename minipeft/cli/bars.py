"""Numbers as a person reads them: bytes with a unit, a table, and a stacked bar of text; and where they are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from .streams import printable

WIDTH = 72
MARKS = "█▓▒░#=+-·:@%*&$?!/~^<>oxvOX"  # that differ without color: one for each line of a ledger
COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green", "bright_yellow", "white")


def size(nbytes: float) -> str:
    """Bytes in the unit (of powers of 1000) that leaves 1 to 999 before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def grid(first: str, *numbers: str, gap: int = 2) -> Any:
    """An empty table without lines: a column with this heading, and columns of numbers, `gap` blanks apart."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column(first, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def bar(parts: Mapping[str, int], show: Callable[[int], str] = "{:,}".format) -> Any:
    """One bar of all parts, and below it what is what; a part too small for a character has none."""
    from rich.text import Text

    total, text = sum(parts.values()), Text()
    edges = [round(WIDTH * n / max(1, total)) for n in accumulate(parts.values(), initial=0)]
    looks = [(MARKS[i % len(MARKS)], COLORS[i % len(COLORS)]) for i in range(len(parts))]
    for (mark, color), a, b in zip(looks, edges, edges[1:]):
        text.append(mark * (b - a), color)
    for (name, n), (mark, color) in zip(parts.items(), looks):
        text.append("\n").append(mark, color).append(f" {name} {show(n)}")
    return text


def console(**options: Any) -> Any:
    """The console of standard output: as wide as the terminal, or wide enough for every table where it is a file.

    It shows text as it is: brackets and colons are no markup, and control characters are no commands. The options are
    Rich's.
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    usual = {"highlight": False, "markup": False, "emoji": False, "width": None if sys.stdout.isatty() else 140}
    return Plain(**usual | options)


def print_json(record: Any) -> None:
    """A value as JSON, on standard output."""
    print(json.dumps(record, indent=1, ensure_ascii=False))
