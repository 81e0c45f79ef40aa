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
from ..experiments.rows import described, finder, read_rows
from . import protocol
from .protocol import SEEDS, Find, Gentle, Report, Search, Trial, search, tuned, untrained
from .register import IF, ROWS, UNTESTABLE, Experiment, Number, Verdict, graded, listed

NEAR = {"nll": 0.02, "right": 0.02, "cloze": 0.02}  # nats per token; shares
UNITS = {"nll": "nats per token", "right": "of the sentences", "cloze": "of the passages"}
KEYS = {"rewrite": "nll", "source": "right"}  # what a task is judged by


@dataclass(frozen=True)
class Searches(Experiment):
    """An experiment whose runs depend on the rows so far: each search tunes, then reports (`protocol`)."""

    searches: tuple[Search | Gentle, ...] = ()

    @classmethod
    def of(cls, name: str, searches: Iterable[Search | Gentle]) -> Searches:
        return cls(name, protocol.run, (), searches=tuple(searches))

    def rows(self, store: Any = ROWS) -> list[dict[str, Any]]:
        """The rows that are there, of today's base and of what is compared."""
        compared = {(of.start.task, of.start.method, of.start.examples) for of in self.searches}
        compared |= {(task, "base", 0) for task, _, _ in compared}
        rows = [row for row in read_rows(self.path(store)) if row.get("version") == protocol.version()]
        return [row for row in rows if (row["task"], row["method"], row["examples"]) in compared]

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[Trial]:
        """The trials that are needed next."""
        return protocol.wanted(finder(rows), self.searches)

    def compute(self, store: Any, executor: Any = 1, show: Callable[[str], None] | None = None) -> list[Any]:
        """All rows: those in `store`, and the others, computed and added there. Raises as `protocol.compute`."""
        return protocol.compute(self.searches, self.path(store), executor, **{} if show is None else {"show": show})


class Case(NamedTuple):
    """One task and number of examples."""

    task: str
    examples: int

    @property
    def name(self) -> str:
        return f"{self.task}, {self.examples} examples"


CASES = tuple(Case(task, n) for task in KEYS for n in protocol.PASSES)


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
    def interval(self) -> str:
        return f"{self.better.value:+.3f} [{self.better.low:+.3f}, {self.better.high:+.3f}]"

    @property
    def word(self) -> str:
        clear = "better" if self.clearly_better else "worse" if self.clearly_worse else ""
        return (
            f"{clear}, by less than {self.near:g}"
            if clear and self.equal
            else clear or ("equal" if self.equal else "not told apart")
        )


def compare(a: Report, b: Report, key: str) -> Difference:
    """How much better a is: a lower loss, a higher share."""
    found = protocol.difference(b, a) if key == "nll" else protocol.difference(a, b)
    return Difference(found, NEAR[key])


def reports(find: Find, case: Case, methods: Iterable[str], key: str = "", gentle: bool = False) -> dict[str, Report]:
    """The reports of those methods whose rows are all there; "base" is the base as it is. Of two `gentle` ones, each is the
    trial that forgets least of those that learn as much as the other."""
    key, methods = key or KEYS[case.task], list(methods)
    ways = {m: untrained(case.task) if m == "base" else search(case.task, m, case.examples) for m in methods}
    if gentle:
        a, b = methods
        ways = {a: Gentle(ways[a], ways[b]), b: Gentle(ways[b], ways[a])}
    found = {method: protocol.report(find, way, key) for method, way in ways.items()}
    return {method: one for method, one in found.items() if one is not None}


def best(find: Find, case: Case, methods: Iterable[str]) -> str:
    """The method with the lowest loss on validation, each at its tuned trial."""
    trials = {method: tuned(find, search(case.task, method, case.examples))[0] for method in methods}
    return min(trials, key=lambda method: find(described(trials[method]))["loss"])


def number(name: str, found: Difference, key: str) -> Number:
    """As the register shows it."""
    return Number(name, found.better.value, UNITS[key], found.better.low, found.better.high)


# ------------------------------------------------------------------------------------------------- what rules are made of


def not_clearly_worse(found: Difference) -> bool:
    """Whether a is better than b, or worse by less than NEAR at most, with the whole interval: not inferior."""
    return found.better.low > -found.near


class Pair(NamedTuple):
    """a beside b, each tuned in its case."""

    name: str
    a: str
    case: Case
    b: str
    other: Case | None = None  # b's, where it is not a's: it has the same task

    def compare(self, find: Find, key: str, gentle: bool = False) -> tuple[Difference, int] | str:
        """(the difference, the number of items), or the method that diverged."""
        if self.other is None:
            kept = reports(find, self.case, (self.a, self.b), key, gentle)
        else:
            kept = reports(find, self.case, (self.a,), key) | reports(find, self.other, (self.b,), key)
        missing = {self.a, self.b} - kept.keys()
        return min(missing) if missing else (compare(kept[self.a], kept[self.b], key), kept[self.a].values.shape[1])


def in_cases(a: str, cases: Iterable[Case], b: str, words: str = "") -> list[Pair]:
    """A pair in several cases."""
    return [Pair(f"{case.name}{words}", a, case, b) for case in cases]


def against(find: Find, a: str, others: Iterable[str], cases: Iterable[Case]) -> list[Pair]:
    """A method beside its rival in each case: the one of the others that is best on validation."""
    rivals = [(case, best(find, case, others)) for case in cases]
    return [Pair(f"{case.name}, {rival}", a, case, rival) for case, rival in rivals]


def judged(
    find: Find, pairs: Sequence[Pair], holds: Callable[[Difference], bool], key: str = "", gentle: bool = False
) -> Verdict:
    """The verdict on a statement that says something of each of these pairs; `holds` tells whether it is so of one."""
    outcome, words, numbers, items = {}, [], [], 0
    for pair in pairs:
        of = key or KEYS[pair.case.task]
        found = pair.compare(find, of, gentle)
        if isinstance(found, str):
            return Verdict(UNTESTABLE, f"{found} diverged under one of the seeds, tuned as it is ({pair.name}).")
        difference, items = found
        outcome[pair.name, pair.a, pair.b] = holds(difference)
        words.append(f"{pair.a} beside {pair.b}, {pair.name}: {difference.word} ({difference.interval})")
        numbers.append(number(f"{pair.a} over {pair.b}, {pair.name}", difference, of))
    tasks = listed(sorted({pair.case.task for pair in pairs}))
    return Verdict(
        graded(outcome), f"{'; '.join(words)}.", numbers[0], numbers[1:], len(SEEDS), items, "the shipped base", tasks
    )  # fmt: skip


def both(one: Verdict, other: Verdict) -> Verdict:
    """The verdict on two parts of a statement: the sentences and numbers of both."""
    if UNTESTABLE in (one.verdict, other.verdict):
        return one if one.verdict == UNTESTABLE else other
    numbers = [*one.evidence, *filter(None, [other.effect]), *other.evidence]
    return Verdict(
        one.verdict if one.verdict == other.verdict else IF, f"{one.because} {other.because}", one.effect, numbers,
        one.seeds, one.items, one.base, one.task,
    )  # fmt: skip
