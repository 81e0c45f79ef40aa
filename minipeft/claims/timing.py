"""Times for rows: alternatives taken in turns in one process, so that what else the machine does meets all of them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .register import Number


def in_turns(alternatives: Mapping[str, Callable[[], Any]], seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Seconds of each alternative: the least over rounds of all of them, after one that is not counted; for at least `least`
    rounds, and for at least `seconds`."""
    for call in alternatives.values():
        call()
    best, rounds, began = dict.fromkeys(alternatives, float("inf")), 0, time.perf_counter()
    while rounds < least or time.perf_counter() - began < seconds:
        rounds += 1
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def machine() -> dict[str, Any]:
    """The processor, the threads and the day, which belong to a time."""
    from ..backend import get_num_threads

    return {"processor": processor(), "threads": get_num_threads(), "date": time.strftime("%Y-%m-%d")}


def where(rows: Iterable[Mapping[str, Any]]) -> str:
    """The processor and the day of the rows."""
    return "; ".join(
        sorted({f"{row['processor']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, {row['date']}" for row in rows})
    )


def processor() -> str:
    """Its name, family and model, by which a virtual machine's can be told; of a system without /proc, what it says."""
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = (line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        found = {name.strip(): value.strip() for name, value in lines}
    parts = [found.get("model name", platform.machine())]
    return ", ".join(parts + [f"{name} {found[name]}" for name in ("cpu family", "model") if name in found])


def steady(numbers: Iterable[Number]) -> bool:
    """Whether the intervals are narrow enough to say something: within 10 % of the mean."""
    return all(n.low is not None and n.high - n.low < 0.2 * n.value for n in numbers)
