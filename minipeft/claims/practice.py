"""Advice: which data, epochs, batches, warm-up; what measures forgetting. Each side of a comparison is tuned for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.intervals import Estimate
from . import protocol
from .comparison import CASES, NEAR, SIZES, Case, Pair, better, both, judged, not_inferior, way
from .league import MAIN, league
from .protocol import SEEDS, Find, Seen, chosen, epochs_of, finder, search, untrained
from .register import HOLDS, IF, NOT, UNTESTABLE, Number, Verdict, claim, followed, listed, measured
from .searches import Searches
from .statistics import crossed

Rows = Sequence[Mapping[str, Any]]

METHODS = "full", "lora"
MIDDLE = [case for case in CASES if case.examples == SIZES[1]]
SOURCE = MIDDLE[1]
N = SIZES[1]


def differing(name: str, one: Mapping[str, Any], b: str, other: Mapping[str, Any], cases: Sequence[Case] = MIDDLE) -> list[Pair]:
    """Full fine-tuning and LoRA done in two ways, on both tasks. `examples` among what differs is another number."""

    def done(method: str, case: Case, fixed: Mapping[str, Any]) -> Any:
        n = fixed.get("examples", case.examples)
        return way(method, Case(case.task, n), **{key: value for key, value in fixed.items() if key != "examples"})

    pairs = [(method, case) for method in METHODS for case in cases]
    return [Pair(f"{method}, {case.name}", name, done(method, case, one), b, done(method, case, other)) for method, case in pairs]


def headed(words: str, found: Verdict) -> Verdict:
    """A verdict whose reason begins with what it is of."""
    return replace(found, because=f"{words}: {found.because[0].lower()}{found.because[1:]}")


KINDS = "random", "systematic", "off-topic"
NOISE = [
    pair
    for kind in KINDS for share in (0.25, 0.5)
    for pair in differing(
        f"{round((1 - share) * N)} clean", {"examples": round((1 - share) * N), "longer": 1 / (1 - share)},
        f"{N} with {share:.0%} {kind}", {"data": f"{kind}:{share}"},
    )
]  # fmt: skip


@claim("best-1", lesson="14_best_practices.py", section="6 · Few clean examples, or many with mistakes?", experiment=Searches.pairs("league", NOISE))
def clean_data(rows: Rows) -> Verdict:
    """Holds if training on the clean part alone clearly beats training on all 500 examples, of which a quarter or a half are spoiled
    (random: answers of other questions; systematic: a wrong answer by a rule, the verse as it is, or the next book; off-topic:
    records of another task), in every case; holds if in some; does not hold here if in none. Both may take as many steps."""
    found = judged(finder(rows), NOISE, better)
    numbers = [found.effect, *found.evidence] if found.effect else []
    of = {kind: [n for n in numbers if f" {kind}," in n.name] for kind in KINDS}
    counts = [f"{sum(n.low > 0 for n in each)} of {len(each)} with {kind} mistakes (worse in {sum(n.high < 0 for n in each)})" for kind, each in of.items()]
    return replace(found, because=followed(found.because, f"The clean part is clearly better in {listed(counts)}."))


SKEWED = differing("balanced", {}, "80 % of one class", {"data": "skewed:0.8"}, [SOURCE])
REPEATED = differing("80 % of one class, the others repeated", {"data": "oversampled:0.8"}, "80 % of one class", {"data": "skewed:0.8"}, [SOURCE])


@claim("best-2", lesson="14_best_practices.py", section="7 · A class that is rare", experiment=Searches.pairs("league", SKEWED + REPEATED))
def balance(rows: Rows) -> Verdict:
    """Holds if 500 balanced examples clearly beat 500 of which 80 % are of one class, Jane Austen's sentences, and repeating the rare
    ones clearly beats not repeating them, on a balanced test; holds if some of this is so; does not hold here if none is. (Not tried:
    weighting the loss.)
    """
    find, n, m = finder(rows), len(SKEWED), len(REPEATED)
    return both(judged(find, SKEWED, better, beside=m), judged(find, REPEATED, better, beside=n))


HARD = differing("easy and hard examples", {"data": "mixed"}, "easy ones", {"data": "easy"})
HARDER = differing("easy and hard examples", {"data": "mixed"}, "random ones", {})


@claim("best-3", lesson="14_best_practices.py", section="6 · Few clean examples, or many with mistakes?", experiment=Searches.pairs("league", HARD + HARDER))
def hard_examples(rows: Rows) -> Verdict:
    """Holds if 500 examples of which half are hard for the base clearly beat 500 easy ones, of one pool of 1,500, and clearly beat 500
    drawn at random, which are as hard as chance makes them, in every case; holds if in some; does not hold here if in none. The test
    has both kinds. (Not tried: hard ones alone, and a test of the easy and the hard apart.)
    """
    find, n, m = finder(rows), len(HARD), len(HARDER)
    easy, chance = judged(find, HARD, better, beside=m), judged(find, HARDER, better, beside=n)
    return both(headed("Beside easy ones", easy), headed("Beside random ones", chance))


RATE = {"axes": ("rate",)}
LARGE = [
    pair for small in (4, 16)
    for pair in differing("batches of 64", {"batch_size": 64, "axes": ("rate", "epochs")},
                          f"of {small}", {"batch_size": small, "axes": ("rate", "epochs")})
]  # fmt: skip
EQUAL_STEPS = differing("batches of 64, 62 steps", {"batch_size": 64, "epochs": 8, **RATE}, "of 8, 62 steps", {"batch_size": 8, "epochs": 1, **RATE})


@claim("best-5", lesson="14_best_practices.py", section="3 · The batch, whole or in parts", experiment=Searches.pairs("league", LARGE + EQUAL_STEPS))
def large_batches(rows: Rows) -> Verdict:
    """Holds if batches of 64 are not worse (interval above -0.02) than batches of 4 and of 16, each with its own rate and epochs, and
    not worse than batches of 8 for as many steps, in every case; holds if in some; does not hold here if in none. (Not compared at
    equal seconds: how long a step takes depends on the machine.)"""
    find = finder(rows)
    n, m = len(LARGE), len(EQUAL_STEPS)
    examples, steps = judged(find, LARGE, not_inferior, beside=m), judged(find, EQUAL_STEPS, not_inferior, beside=n)
    return both(headed("At equal examples", examples), headed("At equal steps", steps))


LONGEST = {50: 128.0, 500: 16.0}  # number of examples: the most epochs that are tried


def _advised(method: str, case: Case) -> Pair:
    most = LONGEST[case.examples]
    longer = most / epochs_of(case.examples)[1]
    searches = *(search(case.task, method, case.examples, epochs=n, longer=longer) for n in (1.0, 4.0, most)), search(case.task, method, case.examples)
    return Pair(f"{method}, {case.name}", "2 to 5 epochs", Seen(searches, 2, 5), "any number", Seen(searches))


ADVISED = [_advised(method, case) for case in CASES[:2] + CASES[3:5] for method in METHODS]


@claim("best-6", lesson="14_best_practices.py", section="4 · Epochs, and the gap", experiment=Searches.pairs("league", ADVISED))
def epochs(rows: Rows) -> Verdict:
    """Holds if the best setting of 2 to 5 epochs is not inferior (interval above -0.02) to the best of any number of epochs, each with a
    schedule of its own length, in every case of task, number of examples (50 and 500), and full fine-tuning or LoRA; holds if in
    some; does not hold here if in none. More than 128 epochs of 50 examples and 16 of 500 are not tried. The settings are those
    of four searches: from one epoch, from four, from the most, and the league's own."""
    find = finder(rows)
    found = judged(find, ADVISED, not_inferior)
    best = [Number(f"best number, {pair.where}", chosen(find, pair.other)[0].epochs, "epochs") for pair in ADVISED]
    return replace(found, evidence=[*found.evidence, *best])


WARM = [pair for share in (0.05, 0.1) for pair in differing(f"{share:.0%} warm-up", {"warmup": share}, "none", {"warmup": 0.0})]
LONG = [
    pair for share in (0.05, 0.1)
    for pair in differing(f"{share:.0%} warm-up", {"warmup": share, "batch_size": 4, "epochs": 1, **RATE},
                          "none", {"warmup": 0.0, "batch_size": 4, "epochs": 1, **RATE}, CASES[2:3])
]  # fmt: skip


@claim("best-7", lesson="14_best_practices.py", section="5 · Warm-up", experiment=Searches.pairs("league", WARM + LONG))
def warm_up(rows: Rows) -> Verdict:
    """Holds if a warm-up of 5 % and one of 10 % of the steps clearly beat none, each with its own rate, epochs and batch size, in every
    case of 500 examples, and, with its own rate, in 1,250 steps of 4 examples on rewrite; holds if in some; does not hold here if in
    none. (AdamW; not tried: SGD and tens of thousands of steps.)
    """
    find = finder(rows)
    return both(judged(find, WARM, better, beside=len(LONG)), judged(find, LONG, better, beside=len(WARM)))


class Forgotten(NamedTuple):
    """What a tuned method has lost of general text [seeds], nats per token more than the base's, the mean over the corpora; and
    of general items [seeds, items], 1 where the base is right and it is not, and -1 the other way round."""

    text: np.ndarray
    items: np.ndarray

    def beyond(self, other: Forgotten, level: float = 0.95) -> tuple[Estimate, Estimate]:
        """How much more it has lost than the other, of text and of items."""
        text = np.tile((self.text - other.text)[:, None], 2)  # without luck of items: Student's interval over the seeds
        return crossed(text, level=level), crossed(self.items - other.items, level=level)


def forgotten(find: Find, method: str, case: Case) -> Forgotten | None:
    """Of a tuned method in a case; None where it diverged under a seed."""
    of, start = search(case.task, method, case.examples), find(untrained(case.task))
    found, before = (protocol.report(find, each, "cloze") for each in (of, untrained(case.task)))
    if found is None:
        return None
    rows = [find(replace(found.trial, seed=seed, split="test")) for seed in SEEDS]
    text = [np.mean([row["general"][name] - loss for name, loss in start["general"].items()]) for row in rows]
    return Forgotten(np.array(text), before.values - found.values)


def _sign(found: Estimate) -> int:
    """1 where it is clearly above 0, -1 where clearly below, else 0."""
    return (found.low > 0) - (found.high < 0)


def _ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


@claim("best-9", lesson="15_forgetting.py", section="1 · Two numbers", experiment=league(MAIN))
def general_tasks(rows: Rows) -> Verdict:
    """Holds if some tuned method clearly answers fewer of the 640 general items right than the base, and the loss on general text, which
    costs less to measure, would mislead: of two methods in a case the items clearly show that one forgets more, and the loss that the
    other does; or items are clearly lost, and the loss has not moved (its interval lies within 0.02). Holds if items are lost and the
    loss misleads nowhere: then the items contradict it nowhere. Does not hold here if every method loses less than 0.02 of the items, with the whole
    interval; cannot be tested here if an interval is too wide to tell. (On the shipped base; not tried on a larger model.)
    """
    find, correlations, lost, misled, told, agree, kept = finder(rows), [], [], [], 0, 0, True
    level = 1 - 0.05 / (len(CASES) * (len(MAIN) + len(MAIN) * (len(MAIN) - 1) // 2))
    for case in CASES:
        of = {method: forgotten(find, method, case) for method in MAIN}
        if None in of.values():
            return Verdict(UNTESTABLE, f"A method diverged under one of the seeds, tuned as it is ({case.name}).")
        base = Forgotten(np.zeros(len(SEEDS)), np.zeros_like(of[MAIN[0]].items))
        for method, own in of.items():
            kept &= own.beyond(base)[1].high < NEAR["cloze"]
            if _sign(own.beyond(base, level)[1]) > 0:
                lost.append(f"{method}, {case.name}")
                text = own.beyond(base)[0]
                misled += [f"{lost[-1]}: items alone"] * (max(abs(text.low), abs(text.high)) < NEAR["nll"])
        for a, b in combinations(MAIN, 2):
            text, items = map(_sign, of[a].beyond(of[b], level))
            told, agree = told + abs(items), agree + (items != 0 and text == items)
            misled += [f"{a} beside {b}, {case.name}"] * (text * items < 0)
        falls = [[own.text.mean(), own.items.mean()] for own in of.values()]
        correlations.append(float(np.corrcoef(*(_ranks(column) for column in zip(*falls)))[0, 1]))
    order = measured("rank correlation, over the methods of a case, of what is lost of text and of items", correlations)
    order = replace(order, high=min(1.0, order.high))
    return Verdict(
        HOLDS if misled else IF if lost else NOT if kept else UNTESTABLE,
        f"Items are clearly lost in {len(lost)} of {len(CASES) * len(MAIN)} runs ({len(MAIN)} methods in {len(CASES)} cases). Of {told} pairs of methods that "
        f"the items clearly tell apart, the loss on text clearly tells {agree} the same way; it clearly misleads in: {listed(misled)}. The ranks "
        f"of methods by the two correlate at {order.value:.2f} ({order.low:.2f} to {order.high:.2f}).",
        order, [Number("pairs apart by items", told), Number("of these by loss as well", agree), Number("misled", len(misled))],
        len(SEEDS), 640, "the shipped base", "rewrite and source",
    )  # fmt: skip
