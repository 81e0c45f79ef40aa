"""The experiment whose runs depend on the rows so far: searches that tune, then report (`protocol`), over one file of rows.

`minipeft claims --recompute` computes rows again, on any processor: how far two rows of one trial may lie apart is said
here, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..experiments.rows import read_rows
from . import protocol
from .comparison import Pair
from .protocol import Choice, Trial, finder, trial_of
from .register import ROWS, SPREADS, Experiment

AFFORDABLE = 8000  # examples, each as often as it is seen: a minute of a core, or little more
ALONE = 0.05  # nats, or of a share: the same where no row tells the spread over seeds
MEASURED = "loss", "train_loss", "accuracy", "general", "nll", "right", "cloze"


@dataclass(frozen=True)
class Searches(Experiment):
    """An experiment whose runs depend on the rows so far: each search tunes, then reports (`protocol`)."""

    searches: tuple[Choice, ...] = ()

    @classmethod
    def of(cls, name: str, searches: Iterable[Choice]) -> Searches:
        return cls(name, protocol.run, (), searches=tuple(searches))

    @classmethod
    def pairs(cls, name: str, pairs: Iterable[Pair]) -> Searches:
        """What these pairs need."""
        ways = dict.fromkeys(way for pair in pairs for way in (pair.one, pair.other))
        return cls.of(name, ways)

    def rows(self, store: Any = ROWS) -> list[dict[str, Any]]:
        """The rows that are there, of today's base and of what is compared."""
        compared = {_kind(vars(of.start)) for of in self.searches}
        compared |= {(task, "base", 0) for task, _, _ in compared}
        path = self.path(store)
        rows = _of_today(path, path.stat().st_mtime_ns) if path.exists() else []
        return [row for row in rows if _kind(row) in compared]

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
        """The trials that are needed next."""
        return protocol.wanted(finder(rows), self.searches)

    @property
    def allowed(self) -> str:
        return f"{SPREADS} standard deviations over the seeds of its kind, or {ALONE} where there are none"

    def affordable(self, row: Mapping[str, Any]) -> bool:
        """Not where more than AFFORDABLE examples are learned from."""
        trial = trial_of(row)
        return trial.rate is None or trial.steps * trial.batch_size <= AFFORDABLE

    def settings_of(self, row: Mapping[str, Any]) -> Trial:
        """The trial of a row."""
        return trial_of(row)

    def differences(self, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[str]:
        """What differs between the rows of trials that both have, in what MEASURED names, means over items and
        corpora. Another processor adds in another order, and training magnifies the rest: each may differ by SPREADS
        of the standard deviations over seeds of the same method, task and number of examples, or, as long as none of
        these has several seeds, by ALONE. Of a setting that the tuning alone has tried, which may lie near divergence,
        by a twentieth at least, and it may diverge."""
        find, alike, found = finder(others), {}, []
        for row in self.rows():
            alike.setdefault(_kind(row), []).append(row)
        pairs = [(trial, row, other) for row in rows if (other := find(trial := trial_of(row)))]
        for name in MEASURED:
            for trial, row, other in pairs:
                usual = SPREADS * spread(alike.get(_kind(row), []), name) or ALONE
                a, b = measure(row, name), measure(other, name)
                tuning = trial.split == "validation"
                near = max(usual, abs(a) / 20) if tuning and a is not None else usual
                if a != b and (not tuning if a is None or b is None else abs(a - b) > near):
                    found.append(f"{trial}, {name}: {b}, and {a} in the package; {near:.4f} may be luck")
        return found

    def compute(self, store: Any, executor: Any = 1, show: Callable[[str], None] | None = None) -> list[Any]:
        """All rows: those in `store`, and the others, computed and added there. Raises as `protocol.compute`."""
        protocol.compute(self.searches, self.path(store), executor, **{} if show is None else {"show": show})
        return self.rows(store)


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["method"], row["examples"]


@lru_cache(maxsize=2)
def _of_today(path: Path, changed: int) -> list[dict[str, Any]]:
    """The rows of a file that are of today's base: many statements read one file."""
    return [row for row in read_rows(path) if row.get("version") == protocol.version()]


def measure(row: Mapping[str, Any], name: str) -> float | None:
    """A loss, a share, or the mean over items or corpora, as far as the row has it."""
    value = row.get(name)
    return value if value is None else float(np.mean([*value.values()] if isinstance(value, Mapping) else value))


def spread(rows: Sequence[Mapping[str, Any]], name: str = "loss") -> float:
    """The standard deviation of a measure over the seeds of a trial, pooled over those reported; 0 where none is."""
    groups: dict[Trial, list[float]] = {}
    for row in rows:
        if row["split"] == "test" and row["rate"] is not None and (value := measure(row, name)) is not None:
            groups.setdefault(replace(trial_of(row), seed=0), []).append(value)
    variances = [statistics.variance(losses) for losses in groups.values() if len(losses) > 1]
    return math.sqrt(statistics.mean(variances)) if variances else 0.0
