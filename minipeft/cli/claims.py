"""What textbooks teach about fine-tuning, on trial: 86 statements, each with the verdict of a rule.

A rule says when its statement holds, and computes the verdict: from counts, equations and code that it runs, or from the
rows of an experiment that ship with the package. The verdicts: holds; holds if (a condition); does not hold here; cannot be
tested here; not tried yet. Of an ID it prints the statement, the rule, the reason, and the evidence; of some, beside the
verdict, what the same comparison gives on SmolLM2-135M. The effect is a rule's first number; where it compares, that of the first
comparison that is as stated with every comparison counted, if one is. A number without an interval (null in JSON) is counted
or computed, was chosen, or is a single measurement, or a median or a ratio over few seeds.

--run computes an experiment's rows again, in a directory of yours, and goes on where it was stopped; the exit status
is 1 where they disagree with the shipped ones. Times depend on the machine, so of them the verdict alone is compared,
and they are taken one by one, whatever --executor says. --run all does so for all rows: those that decide statements,
those that are quoted beside them, and, in a checkout, the lessons', as each lesson's --full does (but for two files of times
that have commands of their own: lessons/experiments/growth.py, tests/benchmarks). By estimate (rows
have no seconds) that takes sixty hours of one core, of which the league takes nearly forty; --executor 16 divides them
among 16 processes: some six hours, as SmolLM2-135M's rows in Lesson 13 wait for each other.

--recompute does so for a few rows drawn at random, each of another file, in one to three minutes of a core each: where a row is a
whole cell, with its tuning and five seeds, for one of the seeds, at the rate that was tuned. Left out are times, which no two
machines share, and what takes longer: trials that see more than 8,000 examples, SmolLM2-135M, and the chain's own tuning.

--league has the methods of the package but two: BitFit, as the base has no bias to train, and TrainableTokens, for new
words, as the tasks bring none. With 50 and 5,000 examples it has six of them. Beside them is a model from random weights.

examples:
  minipeft claims                                  the table of all
  minipeft claims lora-6 lora-9                    two of them in full
  minipeft claims lora-10 --picture merged.png     its numbers with their intervals, as a picture
  minipeft claims --run soft-7 --store my-rows     its rows, computed again
  minipeft claims --run all --executor 16          all rows, in 16 processes
  minipeft claims --recompute 3 --seed 7           three of the shipped rows, computed again
  minipeft claims --league source --examples 500   the table of all methods, tuned on 500 examples of a task
  minipeft claims --league source --pairs          each of them beside each other, as signs (--json: with the intervals)
  minipeft claims --json
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from ..book.rows import OfLesson, of_lessons
from ..claims import chain_tuning, large
from ..claims.league import AT_ONE_SETTING, FROM_SECOND_START
from ..claims.register import (
    HOLDS,
    ROWS,
    VERDICTS,
    Experiment,
    Number,
    Rule,
    Statement,
    Verdict,
    experiments,
    figure,
    filled,
    interval,
    judge,
    recomputed,
    rule_of,
    statements,
)
from ..claims.seconds import SECONDS
from ..directory import locked
from ..experiments.rows import failed
from ..experiments.sweep import executor_of
from ..hub.smollm2 import HOW_TO_GET, find_smollm2
from .arguments import Arguments, Common, Parser, nearest
from .bars import console, grid, print_json
from .outputs import check_file

COLUMNS = 140  # of the table where standard output is no terminal


def add_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="statements, as lora-6 (default: a table of all)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the numbers of one statement; where some have intervals, these")
    parser.add_argument("--run", dest="again", metavar="ID", help="compute the rows of one statement again, or all rows")
    parser.add_argument("--league", metavar="TASK", help="the methods side by side on a task, rewrite or source")
    parser.add_argument("--examples", type=int, metavar="N", help="of --league: how many to learn from (default: 500)")
    parser.add_argument("--pairs", action="store_true", help="of --league: which of each two methods is better, on test")
    parser.add_argument("--recompute", type=int, metavar="N", help="compute N of the shipped rows again, drawn at random")
    parser.add_argument("--seed", type=int, metavar="S", help="of --recompute (default: 0)")
    store = "where --run keeps its rows (default: minipeft/claims in your data directory, ~/.local/share)"
    parser.add_argument("--store", metavar="DIR", help=store)
    parser.add_argument(
        "--executor", type=executor_of, default=1, metavar="N|ADDRESS", help="of --run: processes, or a Dask scheduler (default: 1)"
    )
    parser.options(Common, "json")


def run(args: Arguments) -> int:
    check(args)
    if args.league:
        return league(args)
    if args.recompute:
        return recompute(args)
    if args.again:
        return compute_again(args)
    found = [(statements()[id], rule_of(id), judge(id)) for id in dict.fromkeys(args.ids or statements())]
    if args.picture:
        return picture(*found[0], args.picture)
    if args.json:
        print_json([as_json(*one) for one in found])
    elif args.ids:
        for i, one in enumerate(found):
            print("\n" * (i > 0), end="")
            show(*one)
    else:
        table(found)
    return 0


def check(args: Arguments) -> None:
    """ValueError for an unknown ID, and for options that do not go together."""
    for id in (*(args.ids or ()), *({args.again} - {None, "all"})):
        if id not in statements():
            near = nearest(id, statements()) or "; `minipeft claims` lists all"
            raise ValueError(f"there is no statement {id!r}{near}")
    if args.league:
        args.refuse(("picture", "again", "recompute"), "with --league")
        if args.league not in ("rewrite", "source"):
            raise ValueError(f"--league {args.league}: the tasks are rewrite and source")
        if args.ids:
            raise ValueError(f"--league shows methods, not statements: leave {' '.join(args.ids)} out")
    else:
        args.refuse(("examples", "pairs"), "without --league")
    if args.recompute is None:
        args.refuse(("seed",), "without --recompute")
    elif args.recompute < 1:
        raise ValueError(f"--recompute must be at least 1, got {args.recompute}")
    elif args.ids:
        raise ValueError(f"--recompute draws from all statements: leave {' '.join(args.ids)} out")
    else:
        args.refuse(("picture", "json", "again"), "with --recompute")
    if args.again:
        args.refuse(("picture", "json"), "with --run")
        if args.ids:
            raise ValueError(f"--run has its own statement: leave {' '.join(args.ids)} out")
    else:
        args.refuse(("store", "executor"), "without --run")
    if args.picture:
        args.refuse(("json",), "with --picture")
        if len(args.ids or ()) != 1:
            raise ValueError("--picture draws one statement: give its ID")
        if not args.picture.endswith(".png"):
            raise ValueError(f"--picture writes a PNG file: {args.picture} must end in .png")
        check_file(args, Path(args.picture), "--picture")


# ------------------------------------------------------------------------------------------------------------ showing


def table(found: list[tuple[Statement, Rule | None, Verdict]]) -> None:
    """All in two or three lines each, what was found, how the reason begins where a statement does not simply hold, and where it
    is from; and how many of each verdict."""
    headings = ("id", "verdict", "effect", "95 % interval", "seeds", "items", "statement")
    rows = [
        (s.id, v.verdict, figure(v.effect), interval(v.effect), text(v.seeds), text(v.items)) for s, _, v in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    before = sum(widths) + 2 * len(widths)
    columns = max(before + 20, shutil.get_terminal_size().columns if sys.stdout.isatty() else COLUMNS)
    out = console(width=columns)

    def line(cells: Sequence[str], last: str) -> str:
        aligned = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return "  ".join([*aligned, textwrap.shorten(last, columns - before, placeholder=" ...")])

    out.print(line(headings, headings[-1]), style="bold")
    for row, (statement, rule, verdict) in zip(rows, found):
        out.print(line(row, statement.statement))
        source = [rule and f"{rule.lesson}: {rule.section}", rule and rule.experiment and rule.experiment.path().name, verdict.base, verdict.task]
        because = "" if verdict.verdict == HOLDS else verdict.because.replace("\n- ", " ")
        for below in (because, "; ".join(filter(None, source))):
            if below:
                out.print(" " * (widths[0] + 2) + textwrap.shorten(below, columns - widths[0] - 2, placeholder=" ..."), style="dim")
    counts = Counter(verdict.verdict for *_, verdict in found)
    out.print(f"\n{len(found)} statements: " + ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]))
    out.print("Below each: how the reason begins, where it does not simply hold; lesson, rows, base, task. `minipeft claims ID` says all of it.")


def show(statement: Statement, rule: Rule | None, verdict: Verdict) -> None:
    """One in full."""
    out = console()
    out.print(f"{statement.id} ({statement.section}, {statement.kind})", style="bold")
    lines = {"statement": statement.statement, "rule": rule.words if rule else "none"}
    lines |= {"verdict": verdict.verdict, "because": verdict.because, "SmolLM2": large.told(statement.id)}
    if verdict.effect:
        between = interval(verdict.effect)
        lines["effect"] = f"{verdict.effect.name}: {figure(verdict.effect)}" + f", 95 % interval {between}" * bool(between)
    for name in ("base", "task", "seeds", "items"):
        lines[name] = text(getattr(verdict, name))
    if rule:
        lines["lesson"] = f"{rule.lesson}, {rule.section}"
        if rule.experiment:
            lines["rows"] = f"{rule.experiment.path().name}, {len(rule.experiment.rows())} rows"
    lines["picture"] = f"minipeft claims {statement.id} --picture FILE.png draws the numbers, where some have intervals these" * bool(drawn(verdict))
    for name, line in lines.items():
        if line:
            out.print(filled(line, 100, f"{name:10}", 10 * " "))
    if verdict.evidence:
        numbers = grid("evidence", "", "95 % interval")
        for number in verdict.evidence:
            numbers.add_row(number.name, figure(number), interval(number))
        out.print("", numbers, sep="\n")


def as_json(statement: Statement, rule: Rule | None, verdict: Verdict) -> dict[str, Any]:
    """One as an object of JSON."""
    effect, experiment = verdict.effect, rule and rule.experiment
    return vars(statement) | {
        "verdict": verdict.verdict, "because": verdict.because, "rule": rule.words if rule else None,
        "effect": finite(effect.value) if effect else None, "effect_name": effect.name if effect else None,
        "unit": effect.unit if effect else None, "interval": bounds(effect) if effect else None, "seeds": verdict.seeds,
        "test_size": verdict.items, "smollm2": large.told(statement.id) or None, "base": verdict.base, "task": verdict.task,
        "lesson": rule.lesson if rule else None, "lesson_section": rule.section if rule else None,
        "rows": experiment.path().name if experiment else None,
        "number_of_rows": len(experiment.rows()) if experiment else None,
        "evidence": [
            {"name": n.name, "value": finite(n.value), "unit": n.unit, "interval": bounds(n)} for n in verdict.evidence
        ],
    }  # fmt: skip


def text(value: Any) -> str:
    return "" if value is None else str(value)


def finite(value: float | None) -> float | None:
    """JSON has no number that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def bounds(number: Number) -> list[float | None] | None:
    return None if number.low is None else [finite(number.low), finite(number.high)]


# ------------------------------------------------------------------------------------------------------------ drawing


def drawn(verdict: Verdict) -> dict[str, list[Number]]:
    """{unit: its numbers}: the effect and the evidence; where some have intervals, these alone."""
    found: dict[str, list[Number]] = {}
    numbers = [*dict.fromkeys(n for n in (verdict.effect, *verdict.evidence) if n and finite(n.value) is not None)]
    for number in [n for n in numbers if n.low is not None] or numbers:
        found.setdefault(number.unit, []).append(number)
    return found


def picture(statement: Statement, rule: Rule | None, verdict: Verdict, path: str) -> int:
    """A forest plot: each number of `drawn` as a point and its interval as a line, the numbers of a unit together."""
    units = drawn(verdict)
    if not units:
        print(f"{statement.id}: nothing to draw, for there is no number")
        return 0
    from ..train.metrics import panels, save_png

    sizes = [*map(len, units.values())]
    figure, panel = panels(len(sizes), 7, 0.5 + 0.7 * len(sizes) + 0.26 * sum(sizes), sizes)
    for axes, (unit, numbers) in zip(panel, units.items()):
        intervals = [(n.value, n.value) if n.low is None else (n.low, n.high) for n in numbers]
        least, most = min(low for low, _ in intervals), max(high for _, high in intervals)
        for y, (n, ends) in enumerate(zip(numbers, intervals)):
            axes.plot(ends, [y, y], color="tab:blue", linewidth=1.5)
            axes.plot(n.value, y, "s", color="tab:blue", markersize=5)
        counted = numbers[0].low is None
        if least > 0 and (most > 100 * least if counted else unit in ("times", "rate", "numbers")):  # compared by their ratio
            axes.set_xscale("log", base=10 if counted else 2)
            if not counted:
                axes.xaxis.set_major_formatter("{x:.3g}")
        if unit not in ("rate", "numbers") and not counted:
            axes.axvline(float(unit == "times"), color="grey", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(numbers)), [textwrap.fill(n.name, 60) for n in numbers], fontsize=8)
        axes.set_ylim(len(numbers) - 0.4, -0.6)
        axes.set_xlabel((unit or "without a unit") + ", with 95 % intervals" * (not counted))
    panel[0].set_title(textwrap.fill(f"{statement.id}: {verdict.verdict}", 60), fontsize=10)
    with locked(Path(path).parent, Path(path).name):
        save_png(figure, path)
    print(f"{path}: {sum(sizes)} number{'s' * (sum(sizes) > 1)}" + " with their intervals" * (not counted))
    if lost := [n.name for n in (verdict.effect, *verdict.evidence) if n and finite(n.value) is None]:
        print(f"not drawn, for they are not finite: {', '.join(lost)}")
    return 0


# ---------------------------------------------------------------------------------------------------- computing again


def compute_again(args: Arguments) -> int:
    """The rows of a statement's experiment in --store, or of all, held against the shipped ones; 1 where they disagree."""
    store = Path(args.store) if args.store else user_directory()
    if store.resolve() == ROWS.resolve():
        raise ValueError(f"--store {store} holds the shipped rows; choose another")
    rule, executor = rule_of(args.again) if args.again != "all" else None, args.executor
    if args.again == "all":
        rules = [rule for id in statements() if (rule := rule_of(id)) and rule.experiment]
        found = [*(again(rule.experiment, store, executor, rule) for rule in rules), *(again(one, store, executor) for one in beside())]
        with ThreadPoolExecutor(executor if isinstance(executor, int) else 1) as lessons:  # each has a process of its own
            return max([*found, *lessons.map(lambda one: again(one, store, 1), of_checkout())])
    if rule is None or rule.experiment is None:
        what = "no rule judges it" if rule is None else "its rule computes its numbers each time that it is asked"
        raise ValueError(f"{args.again} has no rows to compute again: {what}")
    return again(rule.experiment, store, executor, rule)


def again(experiment: Experiment, store: Path, executor: Any, rule: Rule | None = None) -> int:
    """The rows of an experiment, and the verdict of a rule from them; 1 where they disagree with the shipped ones, or are not whole."""
    shipped, rows = experiment.rows(), experiment.compute(store, executor)
    if lost := sum(map(failed, rows)):
        print(f"{rule.id if rule else experiment.name}: {lost} of {len(rows)} runs failed, so nothing is compared\nrows: {experiment.path(store)}")
        return 1
    verdict = rule and rule.judge(rows)
    print(f"{rule.id}: {verdict.verdict}. {verdict.because}" if rule else experiment.name)
    print(f"rows: {experiment.path(store)}")
    if len(shipped) < len(rows):
        print(f"there are {len(shipped)} of these {len(rows)} rows already: there is nothing to compare with")
        return 0
    differing = experiment.differences(shipped, rows)
    for line in differing[:10]:
        print(line)
    if differing:
        print(f"{len(differing)} numbers differ by more than {experiment.allowed} from the shipped rows")
    elif experiment.comparable:
        print(f"all {len(rows)} rows agree with the shipped ones within {experiment.allowed}")
    if rule is None:
        return 1 if differing else 0
    before = rule.judge(shipped)
    same = verdict.verdict == before.verdict
    print(f"the verdict is {'the same' if same else f'another: with the shipped rows it {before.verdict}'}")
    return 0 if same and not differing else 1


def beside() -> list[Experiment]:
    """Those beside the statements': adapters at one setting, searches from a second start, the league's seconds, the rates of the chain, and SmolLM2-135M, where it
    is on this machine."""
    if find_smollm2() is None:
        print(HOW_TO_GET, file=sys.stderr)
    return [AT_ONE_SETTING, FROM_SECOND_START, SECONDS, chain_tuning.TUNED, *([] if find_smollm2() is None else [large.EXPERIMENT, large.PACE])]


def of_checkout() -> list[OfLesson]:
    """The rows of the lessons, of SmolLM2-135M's where that is on this machine; none in an installed package."""
    try:
        return [one for one in of_lessons() if find_smollm2() or all(map(one.affordable, one.rows()))]
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return []


def league(args: Arguments) -> int:
    """The league table of a task, or the pairs of its methods."""
    from ..claims.comparison import KEYS, SIZES, UNITS, Case
    from ..claims.seconds import measured_on
    from ..claims.standings import as_text, matrix, pairs, standings

    examples = 500 if args.examples is None else args.examples
    if examples not in SIZES:
        raise ValueError(f"--examples must be one of {', '.join(map(str, SIZES))}, what the methods were tried on; got {examples}")
    case = Case(args.league, examples)
    lines, beside = ([], pairs(case)) if args.pairs else (standings(case), {})
    if not lines and not beside:
        raise ValueError(f"no method has all of its rows of {args.league} with {examples} examples yet: `python -m "
                         "minipeft.claims.protocol` computes them")  # fmt: skip
    if args.json and args.pairs:
        unit = UNITS[KEYS[case.task]]
        print_json([
            {"method": a, "beside": b, "word": d.word, "difference": d.better.value, "interval": d.better[1:], "unit": unit}
            for (a, b), d in beside.items()
        ])  # fmt: skip
    elif args.json:
        print_json([as_object(line) for line in lines])
    else:
        print(matrix(case, beside) if args.pairs else f"{as_text(lines)}\n\nseconds: {measured_on()}")
    return 0


def as_object(value: Any) -> Any:
    """A line of the league table as an object of JSON."""
    if is_dataclass(value):
        return vars(value)
    return {name: as_object(part) for name, part in value._asdict().items()} if hasattr(value, "_asdict") else value


def recompute(args: Arguments) -> int:
    """Some of the shipped rows, computed again; 1 where one differs."""
    found = recomputed([*experiments(), *of_checkout()], args.recompute, args.seed or 0)
    differing = [line for _, lines in found for line in lines]
    names = ", ".join(name for name, _ in found)
    print("\n".join([*differing, f"{len(found)} rows were computed again ({names}), {len(differing) or 'none'} of their numbers differ"]))
    return 1 if differing else 0


def user_directory() -> Path:
    """Where a user's data are kept (XDG base directory specification)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "minipeft" / "claims"
