"""The rows in lessons/results, each computed by its lesson: by the lesson's beginning, up to the cell that --full is for.

    python 17_precision.py --full    in a directory of its own, in the place of lessons/

So this runs the command that lessons tell their readers to run. Rows that are in that directory's results/ are kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..claims.register import ROWS, SPREADS, UNCOMPARED, Experiment
from ..experiments.rows import Row, add_row, key, read_rows
from .lessons import PACKAGE, REDUCED, LessonError, find_lessons

FEW = 5  # seeds: a standard deviation over fewer may be small by luck
FULL = re.compile(r'^if "--full" in sys\.argv:\n(?:    .*\n)+', re.MULTILINE)


@dataclass(frozen=True)
class OfLesson(Experiment):
    """The rows of a lesson. Computed again, the mean of what a row has under a name may differ by SPREADS of its standard
    deviations over the seeds of its settings, or, where these are fewer than FEW, pooled over the file; and at least by
    the tolerance."""

    run: Any = None
    runs: Any = ()
    lesson: Path = Path()

    @property
    def allowed(self) -> str:
        return f"{SPREADS} standard deviations over the seeds, and {self.tolerance:.0%}"

    def path(self, store: str | os.PathLike = ROWS) -> Path:
        return (self.lesson.parent if store == ROWS else Path(store)) / "results" / f"{self.name}.jsonl"

    def rows(self, store: str | os.PathLike = ROWS) -> list[Row]:
        return read_rows(self.path(store))

    def compute(self, store: str | os.PathLike, executor: Any = 1, show: Callable[[str], None] | None = None) -> list[Row]:
        """All rows: those in `store`, and the others, computed and added there, in a process. LessonError where it fails."""
        text, script = self.lesson.read_text(encoding="utf-8"), Path(store) / self.lesson.name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text[: FULL.search(text).end()], encoding="utf-8")
        environment = {"MINIPEFT_THREADS": "1"} | {k: v for k, v in os.environ.items() if k != REDUCED}
        modules = os.pathsep.join(map(str, (self.lesson.parent, PACKAGE.parent)))
        environment |= {"PYTHONPATH": modules, "MINIPEFT_LESSONS_OUT": str(script.parent / "out"), "MPLBACKEND": "Agg"}
        if subprocess.run([sys.executable, script, "--full"], env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise LessonError(f"{script} --full failed")
        return self.rows(store)

    def affordable(self, row: Mapping[str, Any]) -> bool:
        """Not those of a larger model than the shipped base, which they name."""
        return "base" not in row

    def check(self, row: Mapping[str, Any], rng: Random) -> list[str]:
        """What differs where the lesson lacks this row alone, and computes it."""
        with TemporaryDirectory() as store:
            self.path(store).parent.mkdir()
            for other in self.rows():
                if other != row:
                    add_row(self.path(store), other)
            now = [one for one in self.compute(store) if parts(one)[0] == parts(row)[0]]
            return self.differences([row], now) if now else [f"{parts(row)[0]}: the lesson does not compute it"]

    def differences(self, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[str]:
        """What differs by more between rows of the same settings, as far as there are both."""
        again, groups, found = {key(parts(row)[0]): row for row in others}, by_settings(self.rows()), []
        pooled = spread([*groups.values()])
        both = [(*parts(row), again[same]) for row in rows if (same := key(parts(row)[0])) in again]  # a search may go elsewhere
        for settings, before, other in both:
            now, own = parts(other)[1], groups.get(_but_seed(settings), [])
            spreads = pooled if len(own) < FEW else pooled | spread([own])
            for name in sorted({*before, *now}):
                a, b = before.get(name), now.get(name)
                if a is None or b is None or abs(a - b) > max(SPREADS * spreads.get(name, 0.0), self.tolerance * abs(a), 1e-4):
                    found.append(f"{settings}, {name}: {b}, and {a} in lessons/results")
        return found


def of_lessons() -> list[OfLesson]:
    """Of all lessons that have rows. FileNotFoundError where there are no lessons."""
    found = [OfLesson(path.stem, tolerance=0.05, lesson=path) for path in find_lessons().values()]
    return [one for one in found if one.path().exists()]


def parts(row: Mapping[str, Any]) -> tuple[Row, dict[str, float]]:
    """(the settings of a row, which stand before its "qualname"; the mean of the numbers under each name that it measured)."""
    at = [*row].index("qualname")
    measured = {name: value for name, value in [*row.items()][at:] if name not in (*UNCOMPARED, "cpu_seconds")}
    return dict([*row.items()][:at]), means(measured)


def means(value: Any, name: str = "") -> dict[str, float]:
    """{name within dictionaries: the mean of the numbers there}; texts, and what is None, are left out."""
    if isinstance(value, Mapping):
        return {inner: mean for one, part in value.items() for inner, mean in means(part, f"{name} {one}".strip()).items()}
    if isinstance(value, list):
        each = [x for part in value for x in means(part).values()]
        return {name: float(np.mean(each))} if each else {}
    return {name: float(value)} if isinstance(value, (int, float)) else {}


def by_settings(rows: Sequence[Mapping[str, Any]]) -> dict[Any, list[dict[str, float]]]:
    """The means of rows that differ in their seed alone."""
    groups: dict[Any, list[dict[str, float]]] = {}
    for row in rows:
        settings, measured = parts(row)
        groups.setdefault(_but_seed(settings), []).append(measured)
    return groups


def _but_seed(settings: Row) -> Any:
    return key(settings | {"seed": 0})


def spread(groups: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """The standard deviation over seeds of each name's mean, pooled over groups of rows."""
    variances: dict[str, list[float]] = {}
    for group in groups:
        for name in {name: None for one in group for name in one}:  # a row of the tuning may measure less
            values = [one[name] for one in group if name in one]
            if len(values) > 1:
                variances.setdefault(name, []).append(float(np.var(values, ddof=1)))
    return {name: float(np.sqrt(np.mean(several))) for name, several in variances.items()}
