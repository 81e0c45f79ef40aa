"""The register: statements, the rules that judge them, and the rows of the experiments that some rules read.

    statements.csv    id, section, statement, kind
    <section>.py      the section's rules, one a statement; a rule's docstring says when the statement holds
    rows/NAME.jsonl   what the experiment NAME measured (`experiments.rows`)

A rule computes its verdict: in place, from what the library counts and runs within a second or two, or from rows:

    @claim("lora-6", lesson="12_counting.py", section="1 · Parameters")
    def example() -> Verdict:
        \"\"\"Holds if ..., does not hold here if ...\"\"\"

    SPEED = Experiment("decoding", run, runs)

    @claim("lora-10", lesson="04_lora.py", section="8 · Merge: the detour disappears", experiment=SPEED)
    def merged(rows) -> Verdict:
        \"\"\"Holds if ..., does not hold here if ...\"\"\"

A statement without a rule, or whose rows are not all there, is not tried yet.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import math
import os
import random
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.intervals import Estimate

HOLDS, IF, NOT, UNTESTABLE, UNTRIED = VERDICTS = (
    "holds", "holds if", "does not hold here", "cannot be tested here", "not tried yet",
)  # fmt: skip
ROWS = Path(__file__).with_name("rows")
EXPERIMENTS = "knowledge", "intrinsic_dimension", "memorization", "speed"  # modules, each with its rule
SPREADS = 6  # standard deviations over a few seeds: how far luck may take a run that another processor computes again
UNCOMPARED = ("processor", "date", "qualname", "minipeft", "source_digest")  # of a row: what is no measurement


@dataclass(frozen=True)
class Statement:
    """What is taught. kind: count, equation, procedure, code, mechanism, measurement, comparison, advice, ..."""

    id: str
    section: str
    statement: str
    kind: str


@dataclass(frozen=True)
class Number:
    """A number and its 95 % confidence interval; without one it is exact, chosen, a single measurement, or a median or ratio of few."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None


def as_number(name: str, e: Estimate, unit: str = "") -> Number:
    """An estimate as the register shows it."""
    return Number(name, e.value, unit, e.low, e.high)


def figure(number: Number | None) -> str:
    """A number with its unit: "256 times"; "" for none."""
    return "" if number is None else f"{plain(number.value)} {number.unit}".strip()


def interval(number: Number | None) -> str:
    """Its interval: "[0.97, 1.02]"; "" of an exact one."""
    return "" if number is None or number.low is None else f"[{plain(number.low)}, {plain(number.high)}]"


def plain(value: float) -> str:
    """Three digits, or all before the point."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Verdict:
    """What a rule found.

    verdict    one of VERDICTS
    because    from the numbers, the reason or the condition: a sentence or two, and comparisons as a list (`itemized`)
    effect     the number that decided
    evidence   the numbers beside it
    seeds      runs that differ in their seed alone, or repeats of a measurement
    items      of the test set, or of validation where the task says so; where comparisons have their own, the fewest
    base, task what was trained or measured, and on what
    """

    verdict: str
    because: str
    effect: Number | None = None
    evidence: tuple[Number, ...] = ()
    seeds: int | None = None
    items: int | None = None
    base: str = ""
    task: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, not {self.verdict!r}")
        object.__setattr__(self, "because", re.sub(r"\s*\n\n\s*", "\n\n", self.because).strip())
        object.__setattr__(self, "evidence", tuple(self.evidence))


@dataclass(frozen=True)
class Experiment:
    """Runs whose rows ship with the package.

    name       of the file in rows/
    run        computes a row from settings, as `experiments.sweep` takes it
    runs       the settings of all runs, or a function that gives them
    timed      whether the rows are times: they are taken one by one, as beside other runs they would be of a busy machine, and
               on another machine only verdicts can agree
    varied     whether rows differ otherwise from machine to machine, so that only verdicts can agree
    tolerance  relative, of a number that is computed again on another machine
    """

    name: str
    run: Callable[..., Mapping[str, Any]]
    runs: Sequence[Any] | Callable[[], Sequence[Any]]
    timed: bool = False
    varied: bool = False
    tolerance: float = 0.02

    @property
    def settings(self) -> list[Any]:
        """The settings of all runs."""
        return list(self.runs() if callable(self.runs) else self.runs)

    @property
    def version(self) -> str | None:
        """Of the base, as rows have it; None where the settings name it."""
        from .protocol import version

        return None if any(hasattr(one, "base") for one in self.settings) else version()

    @property
    def comparable(self) -> bool:
        """Whether rows of another machine agree."""
        return not (self.timed or self.varied)

    @property
    def allowed(self) -> str:
        """By how much a number may differ that is computed again."""
        return f"{self.tolerance:.0%}"

    def path(self, store: str | os.PathLike = ROWS) -> Path:
        """The file of its rows."""
        return Path(store) / f"{self.name}.jsonl"

    def rows(self, store: str | os.PathLike = ROWS) -> list[dict[str, Any]]:
        """The rows that are there, in the order of the runs. Raises FileError for a file that holds no rows."""
        from ..experiments.rows import described, finder, read_rows

        find = finder(read_rows(self.path(store)))
        found = (find(described(one, self.run)) for one in self.settings)
        return [row for row in found if row is not None]

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The settings of the runs that are not among the rows."""
        from ..experiments.rows import described, finder

        find = finder(rows)
        return [one for one in self.settings if find(described(one, self.run)) is None]

    def compute(self, store: str | os.PathLike, executor: Any = 1, show: Callable[[str], None] | None = None) -> list[Any]:
        """All rows: those in `store`, and the others, computed and added there. Raises as `experiments.sweep`."""
        from ..experiments.sweep import sweep

        shown = {} if show is None else {"show": show}
        return sweep(self.run, self.settings, 1 if self.timed else executor, self.path(store), self.version, **shown)

    def affordable(self, row: Mapping[str, Any]) -> bool:
        """Whether `check` takes a minute of a core, or little more."""
        return self.comparable

    def settings_of(self, row: Mapping[str, Any]) -> Any:
        """What a row is the result of."""
        from ..experiments.rows import described, finder

        find = finder([dict(row)])
        return next(one for one in self.settings if find(described(one, self.run)))

    def check(self, row: Mapping[str, Any], rng: random.Random) -> list[str]:
        """What differs where a row is computed again; of one that takes too long, a part that `rng` draws."""
        settings = self.settings_of(row)
        return self.differences([row], [{**row, **(self.run(**settings) if isinstance(settings, Mapping) else self.run(settings))}])

    def differences(self, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[str]:
        """What differs by more than the tolerance between rows of the same runs, where they are comparable."""
        if not self.comparable:
            return []
        found = []
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            for name in sorted({*row, *other} - {*UNCOMPARED}):
                if not _close(row.get(name), other.get(name), self.tolerance):
                    found.append(f"run {i}, {name}: {other.get(name)}, and {row.get(name)} in the package")
        return found


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        both = isinstance(a, (int, float)) and isinstance(b, (int, float))
        return both and (math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-4) or (a != a and b != b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b))
    return a == b


@dataclass(frozen=True)
class Rule:
    """How a statement is judged: `function()`, or `function(rows)` where there is an experiment."""

    id: str
    lesson: str
    section: str
    function: Callable[..., Verdict]
    experiment: Experiment | None = None

    @property
    def words(self) -> str:
        """The rule, as its docstring states it."""
        return " ".join((self.function.__doc__ or "").split())

    def judge(self, rows: Sequence[Mapping[str, Any]] | None = None) -> Verdict:
        """The verdict, from `rows` (default: the shipped ones) where the rule reads rows."""
        if self.experiment is None:
            return self.function()
        rows = self.experiment.rows() if rows is None else rows
        if missing := len(self.experiment.missing(rows)):
            return Verdict(UNTRIED, f"{self.experiment.path().name} has {len(rows)} runs, and lacks {missing}.")
        return self.function(rows)


RULES: dict[str, Rule] = {}  # of the sections that are imported


def claim(
    id: str, *, lesson: str, section: str, experiment: Experiment | None = None
) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Make a function the rule of a statement. Its docstring states the rule in words: "Holds if ...".

    Args:
        lesson, section: the file in lessons/ and the heading in it that teach the statement.
        experiment: whose rows the function takes; without one it takes nothing.

    Raises ValueError for a statement that is unknown or of another module's section, for a second rule, and for a rule
    that is not stated.
    """
    if id not in statements():
        raise ValueError(f"there is no statement {id!r}")

    def register(function: Callable[..., Verdict]) -> Callable[..., Verdict]:
        if id in RULES and RULES[id].function.__qualname__ != function.__qualname__:
            raise ValueError(f"{id} has a rule already: {RULES[id].function.__qualname__}")
        if not (function.__doc__ or "").startswith("Holds if"):
            raise ValueError(f"the rule of {id} must state itself: a docstring that begins with 'Holds if'")
        if function.__module__.startswith(__package__) and function.__module__ not in _modules(statements()[id].section):
            raise ValueError(f"the rule of {id} belongs into {' or '.join(_modules(statements()[id].section))}")
        RULES[id] = Rule(id, lesson, section, function, experiment)
        return function

    return register


@cache
def statements() -> dict[str, Statement]:
    """id -> statement, in the textbook's order."""
    text = files(__package__).joinpath("statements.csv").read_text("utf-8")
    return {row["id"]: Statement(**row) for row in csv.DictReader(io.StringIO(text))}


def rule_of(id: str) -> Rule | None:
    """The rule of a statement, whose section's module is imported; None where there is none. KeyError as `judge`."""
    for module in _modules(statements()[id].section):
        if module not in sys.modules and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return RULES.get(id)


def judge(id: str, rows: Sequence[Mapping[str, Any]] | None = None) -> Verdict:
    """The verdict on a statement, from `rows` in place of the shipped ones where its rule reads rows.

    What an extra of the package is needed for and not installed cannot be tested. Raises KeyError for an unknown id.
    """
    rule = rule_of(id)
    if rule is None:
        return Verdict(UNTRIED, "No rule judges it.")
    try:
        return rule.judge(rows)
    except ImportError as error:
        return Verdict(UNTESTABLE, f"{error}.")


def experiments() -> list[Experiment]:
    """Those whose rows decide statements."""
    rules = [rule_of(id) for id in statements()]
    return [rule.experiment for rule in rules if rule and rule.experiment]


def recomputed(among: Sequence[Experiment], n: int, seed: int) -> list[tuple[str, list[str]]]:
    """(the experiment, what differs) of n shipped rows that are computed again. They are drawn at random, each of another file
    as long as there are others, from all that are affordable."""
    files: dict[str, list[Experiment]] = {}
    for one in among:
        files.setdefault(one.name, []).append(one)
    rng, found = random.Random(seed), []
    names = rng.sample(sorted(files), len(files))
    while names and len(found) < n:
        name = names.pop(0)
        pool = {id(row): (one, row) for one in files[name] for row in one.rows() if one.affordable(row)}
        if pool:  # several rules may read one row
            experiment, row = rng.choice([*pool.values()])
            found.append((name, experiment.check(row, rng)))
            names.append(name)
    return found


def _modules(section: str) -> tuple[str, ...]:
    """Where the rules of a section are: in its own module, or in one of an experiment."""
    names = (section.replace(" ", "_"), "league", "forgetting", "chain_rules", *EXPERIMENTS)
    return tuple(f"{__package__}.{name}" for name in names)


# ------------------------------------------------------------------------------------------------- what rules share


def graded(cases: Mapping[str, bool]) -> str:
    """The verdict where a statement is tried in several cases: it holds in all, in some (then it holds if), or in none."""
    return HOLDS if all(cases.values()) else IF if any(cases.values()) else NOT


def those(cases: Mapping[str, bool], value: bool = True) -> str:
    """The cases that came out so: "7B and 70B"."""
    return listed([name for name, found in cases.items() if found == value])


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "none" of no names."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "none"


def itemized(items: Sequence[str]) -> str:
    """Parts of a reason: up to two in a sentence, more as a list in Markdown."""
    if len(items) > 2:
        return "\n\n" + "\n".join(f"- {item}." for item in items) + "\n\n"
    return f"{items[0][0].upper()}{'; '.join(items)[1:]}."


def followed(because: str, more: str) -> str:
    """A reason and what is said behind it, apart from a list."""
    listed_last = because.rstrip("\n").rpartition("\n")[2].startswith("- ")
    return because.rstrip("\n") + ("\n\n" if listed_last else " ") + more


def filled(text: str, width: int, first: str = "", rest: str = "") -> str:
    """Paragraphs and lists as lines of at most a width, the first line of all behind `first`, the others behind `rest`."""
    lines: list[str] = []
    for line in text.splitlines():
        begin, indent = rest if lines else first, rest + "  " * line.startswith("- ")
        lines += textwrap.wrap(line, width, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False) or [begin.rstrip()]
    return "\n".join(lines)


def measured(name: str, values: Sequence[float], unit: str = "") -> Number:
    """The mean of independent values, seeds or repeats, with its interval (Student's t)."""
    from ..experiments.seeds import interval

    mean, half = interval(values)
    return Number(name, mean, unit, *(None, None) if math.isnan(half) else (mean - half, mean + half))
