"""Comparisons of tuned methods as evidence: an experiment made of searches, and what differences say.

    a case        one task and number of examples
    difference    a - b on the test items under the five seeds, with its 95 % interval (`protocol.difference`);
                  of losses in nats per token, of choices in shares; in its direction, so that above 0 a is better
    clear         the interval excludes 0
    equal         the interval lies within ±NEAR: a difference that nobody would notice
    neither       no clear difference; the interval says how large it may be

The rival of a method is chosen on validation among several, and compared on test: so that "better than all others" is
one comparison and not thirty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..evaluation.intervals import Estimate
from .protocol import PASSES, SEEDS, Report, Search, Trial, compute, difference, report, search, tuned, version, wanted
from .register import ROWS, Experiment, Number

NEAR = {"nll": 0.02, "right": 0.02, "cloze": 0.02}  # nats per token; shares
UNITS = {"nll": "nats per token", "right": "of the sentences", "cloze": "of the passages"}
KEYS = {"rewrite": "nll", "source": "right"}  # what a task is judged by


@dataclass(frozen=True)
class Searches(Experiment):
    """An experiment whose runs depend on the rows so far: each search tunes, then reports (`protocol`)."""

    searches: tuple[Search, ...] = ()

    @classmethod
    def of(cls, name: str, searches: Iterable[Search]) -> Searches:
        from .protocol import run

        return cls(name, run, (), searches=tuple(searches))

    def rows(self, store: Any = ROWS) -> list[dict[str, Any]]:
        """The rows that are there, of today's base."""
        from ..experiments.rows import read_rows

        return [row for row in read_rows(self.path(store)) if row.get("version") == version()]

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
        """The trials that are needed next."""
        return wanted(rows, self.searches)

    def compute(self, store: Any, executor: Any = 1, show: Callable[[str], None] | None = None) -> list[Any]:
        """All rows: those in `store`, and the others, computed and added there. Raises as `protocol.compute`."""
        return compute(self.searches, self.path(store), executor, **({} if show is None else {"show": show}))


class Case(NamedTuple):
    """One task and number of examples."""

    task: str
    examples: int

    @property
    def name(self) -> str:
        return f"{self.task}, {self.examples} examples"


CASES = tuple(Case(task, n) for task in KEYS for n in PASSES)


class Difference(NamedTuple):
    """How much better a is than b on test."""

    better: Estimate
    near: float

    @property
    def clearly_better(self) -> bool:
        return self.better.low > 0

    @property
    def clearly_worse(self) -> bool:
        return self.better.high < 0

    @property
    def equal(self) -> bool:
        return -self.near < self.better.low and self.better.high < self.near

    @property
    def word(self) -> str:
        clear = "better" if self.clearly_better else "worse" if self.clearly_worse else ""
        return f"{clear}, by less than {self.near:g}" if clear and self.equal else clear or ("equal" if self.equal else "not told apart")


def compare(a: Report, b: Report, key: str) -> Difference:
    """How much better a is: a lower loss, a higher share."""
    found = difference(b, a) if key == "nll" else difference(a, b)
    return Difference(found, NEAR[key])


def reports(rows: Sequence[Mapping[str, Any]], case: Case, methods: Iterable[str], key: str = "") -> dict[str, Report]:
    """The reports of those methods whose rows are all there."""
    key = key or KEYS[case.task]
    found = {method: report(rows, search(case.task, method, case.examples), key) for method in methods}
    return {method: one for method, one in found.items() if one is not None}


def best(rows: Sequence[Mapping[str, Any]], case: Case, methods: Iterable[str]) -> str:
    """The method with the lowest loss on validation, each at its tuned trial."""
    losses = {}
    for method in methods:
        trial, unknown = tuned(rows, search(case.task, method, case.examples))
        if not unknown:
            losses[method] = next(r["loss"] for r in rows if _is(r, trial))
    return min(losses, key=losses.__getitem__)


def _is(row: Mapping[str, Any], trial: Trial) -> bool:
    return all(row.get(name) == value for name, value in vars(trial).items())


def number(name: str, found: Difference, key: str) -> Number:
    """As the register shows it."""
    return Number(name, found.better.value, UNITS[key], found.better.low, found.better.high)


def shared(found: Mapping[str, Report]) -> dict[str, Any]:
    """What a verdict says of the evidence: seeds, items, base."""
    one = next(iter(found.values()))
    return {"seeds": len(SEEDS), "items": one.values.shape[1], "base": "the shipped base"}
