"""The league table of a task: each method as the protocol tuned and reported it, beside what that took.

    rate, epochs, batch    what the tuning chose, on validation
    FLOPs                  of one such run (`accounting.step_flops`, at the examples' mean length)
    seconds                of its steps, on one machine (`seconds`)
    loss, right            on test, over seeds and items: nats per token; the share of right choices
    forgets, cloze         against the base: what the loss on held-out general text rose by (mean of the corpora, over the
                           seeds); the share of the general items answered right, less the base's

Beside the table `pairs`: each method with each other, on the same items under the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from ..accounting.flops import step_flops
from ..evaluation.intervals import Estimate, mean
from ..hub.base import BASE
from . import data, protocol
from .comparison import KEYS, NEAR, UNITS, Case, Difference, compare
from .protocol import TABLE, finder, untrained
from .searches import Searches
from .seconds import seconds


class Standing(NamedTuple):
    """One line of the table; `right` is None of a task without choices."""

    method: str
    trainable: int
    storage: int
    trial: protocol.Trial
    flops: float
    seconds: float | None
    loss: Estimate
    right: Estimate | None
    forgets: Estimate
    cloze: Estimate


def standings(case: Case, methods: Iterable[str] | None = None, rows: Any = None) -> list[Standing]:
    """The methods (default: all) whose rows are there, the best first; a method that lacks rows is left out.

    The best is the one with the highest share of right choices, of a task without choices with the lowest loss.
    """
    searches, find = _league(case, methods, rows)
    found = [line for method, search in searches.items() if (line := _standing(find, case, method, search))]
    return sorted(found, key=lambda line: line.loss.value if line.right is None else -line.right.value)


def _league(case: Case, methods: Iterable[str] | None, rows: Any) -> tuple[dict[str, protocol.Search], protocol.Find]:
    searches = {method: protocol.search(case.task, method, case.examples) for method in methods or (*TABLE, "scratch")}
    return searches, finder(Searches.of("league", searches.values()).rows() if rows is None else rows)


def _standing(find: protocol.Find, case: Case, method: str, search: protocol.Search) -> Standing | None:
    loss, before = protocol.report(find, search), untrained(case.task)
    if loss is None or (base := find(before)) is None:
        return None
    rows = [find(replace(loss.trial, seed=seed, split="test")) for seed in protocol.SEEDS]
    risen = [float(np.mean([row["general"][name] - base["general"][name] for name in base["general"]])) for row in rows]
    cloze, kept = protocol.report(find, search, "cloze"), protocol.report(find, before, "cloze")
    right = protocol.report(find, search, "right").mean if KEYS[case.task] == "right" else None
    config = None if method == "scratch" else TABLE[method].config(loss.trial.steps)
    return Standing(
        method, rows[0]["trainable"], rows[0]["storage"], loss.trial, flops(config, loss.trial), seconds(loss.trial),
        loss.mean, right, mean(risen), compare(cloze, kept, "cloze").better,
    )  # fmt: skip


def pairs(case: Case, methods: Iterable[str] | None = None, rows: Any = None) -> dict[tuple[str, str], Difference]:
    """{(a, b): how much better a is than b on test} of all methods of the table, in its order, each with its own 95 %
    interval: these do not all hold at once."""
    searches, find = _league(case, methods, rows)
    key, names = KEYS[case.task], [line.method for line in standings(case, methods, rows)]
    reports = {name: protocol.report(find, searches[name], key) for name in names}
    return {(a, b): compare(reports[a], reports[b], key) for a, b in permutations(names, 2)}


def matrix(case: Case, found: Mapping[tuple[str, str], Difference]) -> str:
    """Pairs as text: the row's method beside the column's, a sign each (`Difference.sign`), and what the signs say."""
    names, key = [*dict.fromkeys(a for a, _ in found)], KEYS[case.task]
    wide = max(map(len, names)) + 4
    lines = [" " * wide + "".join(f"{i:3d}" for i, _ in enumerate(names, 1))]
    for i, a in enumerate(names, 1):
        lines.append(f"{i:2d}  {a:{wide - 4}s}" + "".join(f"{found[a, b].sign if a != b else '.':>3s}" for b in names))
    return "\n".join(lines) + f"""

{case.name}, on test: the row's method beside the column's is + better, - worse, = equal (within
{NEAR[key]:g} {UNITS[key]}; += and -=: clear, and no larger), ? undecided. {len(found) // 2} comparisons,
each by its own 95 % interval: one in twenty may be clear by luck."""


def flops(config: Any, trial: protocol.Trial) -> float:
    """Of the training steps of a trial."""
    step = step_flops(str(BASE), config, 1, tokens(trial.task), checkpointing=False)
    return step.total * trial.steps * trial.batch_size


@cache
def tokens(task: str) -> int:
    """The mean length of an example."""
    return round(float(np.mean([len(example.input_ids) for example in data.drawn(task, 200, 0)])))


def so_far(methods: Iterable[str], examples: int = 500, rows: Any = None) -> str:
    """What a lesson prints: of each task the base, the table of the methods whose rows are there, and who lacks rows."""
    said, methods = [], [*methods]
    for case in (Case(task, examples) for task in KEYS):
        _, find = _league(case, methods, rows)
        before = protocol.report(find, protocol.untrained(case.task))
        right = protocol.report(find, protocol.untrained(case.task), "right") if before and KEYS[case.task] == "right" else None
        base = f"the base: loss {before.mean.value:.3f}" + (f", right {right.mean.value:.1%}" if right else "") if before else ""
        lines = standings(case, methods, rows)
        missing = sorted({*methods} - {line.method for line in lines}, key=methods.index)
        said += [f"{case.name}{f' ({base})' * bool(base)}", *[as_text(lines)] * bool(lines)]
        said += [f"rows still to come: {', '.join(missing)}"] * bool(missing) + [""]
    return "\n".join(said[:-1])


def as_text(lines: Sequence[Standing]) -> str:
    """Standings as a table, a line each."""
    with_right = any(line.right for line in lines)
    head = ["method", "trained", "bytes", "rate", "epochs", "batch", "TFLOPs", "seconds", "loss", *["right, %"] * with_right, "forgets", "cloze, %"]
    cells = [head]
    for one in lines:
        t = one.trial
        cells.append([
            one.method, f"{one.trainable:,}", f"{one.storage:,}", f"{t.rate:.1e}", f"{t.epochs:g}", f"{t.batch_size}",
            f"{one.flops / 1e12:.2f}", "" if one.seconds is None else f"{one.seconds:.3g}", shown(one.loss, 3), *([shown(one.right, 1, 100)] if with_right else []), shown(one.forgets, 3),
            shown(one.cloze, 1, 100),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in cells
    )


def shown(estimate: Estimate, digits: int, times: float = 1) -> str:
    """ "2.314 ± 0.020": the mean and half the width of its interval."""
    value, half = times * estimate.value, times * (estimate.high - estimate.low) / 2
    return f"{value:.{digits}f} ± {half:.{digits}f}"
