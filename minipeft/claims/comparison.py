"""Comparisons of tuned methods as evidence: what differences say.

    a Choice ──────────────► Trial ──► Report ─────────► Difference ────► Verdict
    how one is chosen,       chosen    on test, of each  of a Pair of     of a rule, from
    mostly on validation               seed and item     reports          its pairs (`judged`)

    a case        one task and number of examples
    difference    b - a of losses, in nats per token, a - b of shares, so that above 0 a is better; on the test items under
                  the five seeds, with its 95 % interval (`protocol.difference`)
    clear         the interval excludes 0 (statistically significant at 5 %)
    equal         the interval lies within ±NEAR, a difference that nobody would notice (equivalent; NEAR is the margin)
    undecided     neither clear nor equal (inconclusive); the interval says how large it may be
    so            what a rule asks of a difference: True, False, or None where the interval is too wide to tell. A statement
                  that is so in no comparison does not hold here; but where one is not told, it cannot be tested here
    holds if      of k comparisons each is wrong once in twenty times; that the statement is so in some of them is said
                  only of those that are clear at the level 1 - 0.05 / k (Bonferroni). That it is so in all takes no more
                  than 95 % of each: all must be clear.

The rival of a method is chosen on validation among several, and compared on test: so that "better than all others" is
one comparison and not thirty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..evaluation.intervals import Estimate
from . import protocol
from .protocol import LEAST, SEEDS, Choice, Find, Gentle, Report, search, tuned, untrained
from .register import HOLDS, IF, NOT, UNTESTABLE, Number, Verdict, as_number, followed, itemized, listed

UNDECIDED = "undecided"
MANY = 6  # comparisons of a statement: of more, all are counted, and those unlike most are shown, if they are no more than this
NEAR = {"nll": 0.02, "right": 0.02, "cloze": 0.02, "answers": 0.02, "followed": 0.02}  # nats per token; shares
UNITS = {"nll": "nats per token", "right": "of the sentences", "cloze": "of the passages", "answers": "of the questions",
    "followed": "of the questions",
}  # fmt: skip
KEYS = {"rewrite": "nll", "source": "right"}  # what a task is judged by


class Case(NamedTuple):
    """One task and number of examples."""

    task: str
    examples: int

    @property
    def name(self) -> str:
        return f"{self.task}, {self.examples} examples"


SIZES = 50, 500, 5000
CASES = tuple(Case(task, n) for task in KEYS for n in SIZES)


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
    def turned(self) -> Difference:
        """How much better b is."""
        return Difference(Estimate(-self.better.value, -self.better.high, -self.better.low), self.near)

    @property
    def interval(self) -> str:
        return f"{self.better.value:+.3f} [{self.better.low:+.3f}, {self.better.high:+.3f}]"

    @property
    def sign(self) -> str:
        """ "+" better, "-" worse, "=" equal, "+=" and "-=" clear and equal, "?" undecided."""
        return "+" * self.clearly_better + "-" * self.clearly_worse + "=" * self.equal or "?"

    @property
    def word(self) -> str:
        clear = "better" if self.clearly_better else "worse" if self.clearly_worse else ""
        return (
            f"{clear}, by less than {self.near:g}" if clear and self.equal else clear or ("equal" if self.equal else UNDECIDED)
        )


def compare(a: Report, b: Report, key: str, level: float = 0.95) -> Difference:
    """How much better a is: a lower loss, a higher share."""
    found = protocol.difference(b, a, level) if key == "nll" else protocol.difference(a, b, level)
    return Difference(found, NEAR[key])


def way(method: str, case: Case, **fixed: Any) -> Choice:
    """A method in a case, with what is not the protocol's default; "base" is the base as it is."""
    return untrained(case.task) if method == "base" else search(case.task, method, case.examples, **fixed)


def best(find: Find, case: Case, methods: Iterable[str], worst: bool = False) -> str:
    """The method with the lowest loss on validation, or the highest, each at its tuned trial."""
    trials = {method: tuned(find, search(case.task, method, case.examples))[0] for method in methods}
    losses = {method: find(trial)["loss"] for method, trial in trials.items()}
    return (max if worst else min)(losses, key=lambda method: math.inf if losses[method] is None else losses[method])


def number(name: str, found: Difference, key: str) -> Number:
    """As the register shows it."""
    return as_number(name, found.better, UNITS[key])


# ------------------------------------------------------------------------------------------------- what rules are made of

Question = Callable[[Difference], bool | None]  # see above: so


def above(least: float, found: Difference) -> bool | None:
    """Whether a is better than b by more than `least`."""
    return True if found.better.low > least else False if found.better.high < least else None


def better(found: Difference) -> bool | None:
    """Whether a is better than b: clearly, and not equal to it."""
    return False if found.equal else above(0.0, found)


def worse(found: Difference) -> bool | None:
    """Whether a is worse than b: clearly, and not equal to it."""
    return better(found.turned)


def much_better(found: Difference) -> bool | None:
    """Whether a is better by more than NEAR, with the whole interval."""
    return above(found.near, found)


def much_worse(found: Difference) -> bool | None:
    """Whether a is worse by more than NEAR, with the whole interval."""
    return above(found.near, found.turned)


def not_inferior(found: Difference) -> bool | None:
    """Whether a is better than b, or worse by less than NEAR, with the whole interval."""
    return above(-found.near, found)


class Pair(NamedTuple):
    """a beside b. Their names stand in tables: a method's, or that of what is done otherwise."""

    where: str
    a: str
    one: Choice
    b: str
    other: Choice

    @property
    def task(self) -> str:
        return self.one.start.task


def in_cases(a: str, cases: Iterable[Case], b: str, **fixed: Any) -> list[Pair]:
    """Two methods in several cases."""
    return [Pair(case.name, a, way(a, case, **fixed), b, way(b, case, **fixed)) for case in cases]


def at_equal_quality(a: str, cases: Iterable[Case], b: str) -> list[Pair]:
    """The same, each as it forgets least within ROOM of the weaker's best loss on the task."""
    ways = [(case.name, way(a, case), way(b, case)) for case in cases]
    return [Pair(name, a, Gentle(one, two), b, Gentle(two, one)) for name, one, two in ways]


def against(find: Find, a: str, others: Iterable[str], cases: Iterable[Case]) -> list[Pair]:
    """A method beside its rival in each case: the one of the others that is best on validation."""
    rivals = [(case, best(find, case, others)) for case in cases]
    return [Pair(case.name, a, way(a, case), rival, way(rival, case)) for case, rival in rivals]


class Beside(NamedTuple):
    """Two reports on the same items under the same seeds, where each comes from, and what is measured.

    limit      said where more epochs may change the difference: the worse of the two, or both, stopped at the most allowed, and
               twice as many are better on validation
    learned    the losses on the task of two that are compared in something else, at equal quality of the task
    """

    where: str
    a: str
    one: Report
    b: str
    other: Report
    key: str
    limit: str = ""
    learned: tuple[Report, Report] | None = None

    def difference(self, level: float = 0.95) -> Difference:
        return compare(self.one, self.other, self.key, level)

    def so(self, holds: Question, level: float = 0.95) -> bool | None:
        """What the rule asks, of this difference. At equal quality of the task nobody's advantage may be that it learned
        less: where the rule asks whether a is better, and it is so, a must not be inferior on the task; else b."""
        found = holds(self.difference(level))
        if self.learned is None or found is None:
            return found
        task = compare(*self.learned, "nll", level)
        return found if not_inferior(task if found else task.turned) else None

    @property
    def told(self) -> str:
        found, task = self.difference(), ""
        if self.learned is not None:
            learned = compare(*self.learned, "nll")
            task = f"; the task {learned.word}, {learned.interval}"
        return f"{self.a} beside {self.b}, {self.where}: {found.word} ({found.interval}{task}){self.limit}"


def judged(
    find: Find, pairs: Sequence[Pair], holds: Question, key: str = "", beside: int = 0, apart: Sequence[str] = ()
) -> Verdict:  # fmt: skip
    """The verdict on a statement that says something of each of these pairs; `holds` tells of a difference whether it is so.
    `beside` is how many comparisons the statement has elsewhere (see `both`); `apart`, why others are not told."""
    found, failed = [], [*apart]
    for pair in pairs:
        of = key or KEYS[pair.task]
        one, other = protocol.report(find, pair.one, of), protocol.report(find, pair.other, of)
        if one is None or other is None:
            diverged = listed([name for name, of in ((pair.a, one), (pair.b, other)) if of is None])
            failed.append(f"{pair.a} beside {pair.b}, {pair.where}: {diverged} diverged under one of the seeds")
            continue
        learned = None
        if isinstance(pair.one, Gentle):
            learned = protocol.report(find, pair.one), protocol.report(find, pair.other)
        limit = "" if key else _limit(find, pair, one, other, of)
        found.append(Beside(pair.where, pair.a, one, pair.b, other, of, limit, learned))
    return told(found, holds, listed(sorted({pair.task for pair in pairs})), failed, beside)


def _limit(find: Find, pair: Pair, one: Report, other: Report, key: str) -> str:
    """ ", within 4 epochs (8: 0.010 better on validation)" where the worse one, and it alone, stopped early; or of both."""
    a, b, found = _ended(find, pair.one, one), _ended(find, pair.other, other), compare(one, other, key)
    if a and b:
        return f", the first within {a}, the other within {b}"
    behind = a if found.clearly_worse else b if found.clearly_better else ""
    return f", within {behind}" * bool(behind)


def _ended(find: Find, of: Choice, found: Report) -> str:
    """The most epochs allowed, where a search for the best number of them ended there and would go on; else ""."""
    for trial in protocol.beyond(of, found.trial):
        allowed, (row, best) = f"{found.trial.epochs:g} epochs", map(find, (trial, found.trial))
        if row is None:
            return allowed
        if row["loss"] is not None and (gain := best["loss"] - row["loss"]) > LEAST:
            return f"{allowed} ({trial.epochs:g}: {gain:.3f} better on validation)"
    return ""


def told(
    found: Sequence[Beside], holds: Question, tasks: str, failed: Sequence[str] = (), beside: int = 0
) -> Verdict:  # fmt: skip
    """The same of reports. `failed`: of pairs that cannot be compared, why; they are not told."""
    so: list[bool | None] = [each.so(holds) for each in found] + [None] * len(failed)
    surely = [one is True and each.so(holds, 1 - 0.05 / (len(so) + beside)) is True for each, one in zip(found, so)]
    words = [each.told + ", not told" * (one is None) for each, one in zip(found, so)] + [*failed]
    if not found:
        return Verdict(UNTESTABLE, itemized(words))
    undecided = None in so or any(one and not sure for one, sure in zip(so, surely))
    verdict = HOLDS if all(so) else IF if True in surely else UNTESTABLE if undecided else NOT
    items = min(each.one.values.shape[1] for each in found)
    answers = [(so.count(answer), answer, word) for answer, word in ((True, "as stated"), (False, "not"), (None, "not told"))]
    parts = [f"{n} {'is' if n == 1 else 'are'} {word}" for n, answer, word in answers if n or answer]
    counts, shown, level = f"Of {len(so)} comparisons", words, ""
    if len(so) + beside > MANY:
        alike, notes = Counter([each.difference().word for each in found] + ["not compared"] * len(failed)), []
        if ended := sum(bool(each.limit) for each in found):
            notes.append(f"{ended} where the worse, or both, would take more epochs than allowed")
        usual, n = Counter(so).most_common(1)[0]
        shown = [word for word, one in zip(words, so) if one is not usual] if 2 * n > len(so) and len(so) - n <= MANY else []
        if verdict == IF and not shown and surely.count(True) <= MANY:
            shown, level = [word for word, sure in zip(words, surely) if sure], f". At the level for {len(so) + beside}"
        unsure = [(each, word) for each, word in zip(found, words) if each.difference().word == UNDECIDED]
        if all(word in shown for _, word in unsure):
            unsure = []
        ends: dict[str, list[float]] = {}
        for each, _ in unsure:
            ends.setdefault("nats" if each.key == "nll" else "of items", []).extend(each.difference().better[1:])
        within = ", ".join(f"[{min(x):+.2f}, {max(x):+.2f}] {unit}" for unit, x in ends.items())
        order = sorted(alike.most_common(), key=lambda one: one[0] == UNDECIDED)
        notes = [listed([f"{k} {word}" for word, k in order]) + f" within {within}" * bool(within), *notes]
        counts += f" ({'; '.join(notes)})"
    counts += f" {listed(parts)}"
    listing = (": " if level or len(shown) > 2 else ". ") + itemized(shown) if shown else "."
    because = f"{counts}{level}{listing}" if len(so) > 2 else itemized(words)
    if True in so and True not in surely and verdict != HOLDS:
        because = followed(because, f"At the level 1 - 0.05 / {len(so) + beside} none is as stated.")
    numbers = [number(f"{each.a} over {each.b}, {each.where}", each.difference(), each.key) for each in found]
    learned = [(each, compare(*each.learned, "nll")) for each in found if each.learned]
    numbers += [number(f"{each.a} over {each.b}, {each.where}, the task", task, "nll") for each, task in learned]
    first = surely.index(True) if True in surely else 0  # of what holds in some, one in which it does
    effect = numbers.pop(first)
    return Verdict(verdict, because, effect, numbers, len(SEEDS), items, "the shipped base", tasks)


def both(one: Verdict, other: Verdict) -> Verdict:
    """The verdict on two parts of a statement, each judged `beside` the other: the sentences and numbers of both. Where one
    part cannot be tested, what is found of the other is all that is known: it holds if, or cannot be tested either."""
    parts = {one.verdict, other.verdict}
    verdict = one.verdict if len(parts) == 1 else UNTESTABLE if parts == {UNTESTABLE, NOT} else IF
    so = [part.verdict in (HOLDS, IF) for part in (one, other)]  # the effect is of one that holds
    first, second = (other, one) if one.effect is None or so == [False, True] else (one, other)
    numbers = [*first.evidence, *filter(None, [second.effect]), *second.evidence]
    items = min(filter(None, [one.items, other.items]), default=None)
    return Verdict(verdict, followed(one.because, other.because), first.effect, numbers, first.seeds, items, first.base, first.task)
