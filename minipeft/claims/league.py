"""The league: every method tuned by one protocol on the same tasks, and the statements that it decides.

The rows of all of these stand in one file. Each rule names the part of them that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from ..experiments.seeds import interval
from . import protocol
from .comparison import (
    CASES,
    KEYS,
    SIZES,
    UNITS,
    Beside,
    Case,
    Pair,
    against,
    at_equal_quality,
    best,
    better,
    both,
    in_cases,
    judged,
    much_better,
    much_worse,
    not_inferior,
    told,
    way,
    worse,
)
from .protocol import SHOTS, TABLE, VALIDATION, At, Fits, alike, chosen, finder, reported, search, tuned, untrained
from .register import Number, Verdict, as_number, claim, graded, listed, measured, those
from .searches import Searches
from .standings import flops

Rows = Sequence[Mapping[str, Any]]

MAIN = ("full", "lora", "qlora", "bottleneck", "prefix", "prompt")
OTHERS = tuple(name for name in TABLE if name not in ("full", "head") and not name.startswith(("lora-", "bottleneck-")))
FEW, MIDDLE, MANY = ([case for case in CASES if case.examples == n] for n in SIZES)
RANKS = {1: "lora-r1", 2: "lora-r2", 4: "lora-r4", 8: "lora", 16: "lora-r16", 32: "lora-r32", 64: "lora-r64"}
ALPHAS = ("lora-alpha4", "lora-alpha64")
TARGETS = ("lora-q", "lora-v", "lora-qkvo", "lora-mlp", "lora")


def league(methods: Iterable[str], cases: Iterable[Case] = CASES) -> Searches:
    """The experiment in which methods are tuned and reported in cases."""
    return Searches.of("league", [search(case.task, method, case.examples) for case in cases for method in methods])


# adapters at one setting, that of the first: in another place, bent by another function (Lesson 5)
AT_ONE_SETTING = Searches.of(
    "league",
    [
        At(method, search(task, "bottleneck", 500))
        for task in KEYS
        for method in ("bottleneck", "pfeiffer", "parallel", "bottleneck-gelu", "bottleneck-silu")
    ],
)
# begun elsewhere, at half of LoRA's or of full fine-tuning's tuned rate: does who is ahead depend on where a search began? (Lesson 16)
SECOND_START = {m: search("rewrite", m, 500, rate=1.5e-3, batch_size=1) for m in ("lora", "qlora", "dora", "adalora")}
SECOND_START["full"] = search("rewrite", "full", 500, rate=2.5e-4, batch_size=1)
FROM_SECOND_START = Searches.of("league", SECOND_START.values())
UNTRAINED = Searches.of("league", [untrained(task, n) for task in KEYS for n in (0, *SHOTS)])  # the base, asked


# ------------------------------------------------------------------------------------------------------------- overview


PRETRAINED = [
    Pair(f"{few.task}, {few.examples} and {many.examples} examples", "full", way("full", few), "scratch", way("scratch", many))
    for fewer, more in ((FEW, MIDDLE), (FEW, MANY), (MIDDLE, MANY))
    for few, many in zip(fewer, more)
]


@claim(
    "start-1",
    lesson="03_full_finetuning.py",
    section="The league: how methods are compared",
    experiment=Searches.of("league", [*Searches.pairs("league", PRETRAINED).searches, *(way("scratch", case) for case in FEW)]),
)
def pretrained(rows: Rows) -> Verdict:
    """Holds if the base tuned on 50 examples is not inferior (interval above -0.02) to the same shape trained from random weights on
    500, and on 5,000, and tuned on 500 not to that trained on 5,000, on both tasks; holds if in some of these six cases; does not
    hold here if in none. Both have their own rate, epochs and batch size, and every weight is trained. (What 50 examples bring from
    random weights is in the evidence, and decides nothing.)"""
    find, curves = finder(rows), []
    found = judged(find, PRETRAINED, not_inferior)
    for case, method in product(CASES, ("full", "scratch")):
        if (of := protocol.report(find, way(method, case), KEYS[case.task])) is not None:
            curves.append(as_number(f"{method}, {case.name}", of.mean, UNITS[KEYS[case.task]]))
    spent = [flops(TABLE["full"].config(1), tuned(find, of)[0]) for pair in PRETRAINED for of in (pair.other, pair.one)]
    more = listed([f"{scratch / few:.0f}" for scratch, few in zip(spent[::2], spent[1::2])])
    because = f"{found.because}\n\nThe training from random weights took {more} times the FLOPs."
    return replace(found, because=because, evidence=[*found.evidence, *curves])


# ----------------------------------------------------------------------------------------------------- full fine-tuning


ALL = Searches.of("league", [*league(("full", *OTHERS), MIDDLE).searches, *league(MAIN, FEW + MANY).searches])


@claim("full-5", lesson="16_which_method.py", section="3 · The table", experiment=ALL)
def best_quality(rows: Rows) -> Verdict:
    """Holds if full fine-tuning clearly beats its rival, the other method that is best on validation, in every case of task and number of
    examples; holds if in some; does not hold here if in none. The others are all, with 500 examples; with 50 and with 5,000 LoRA,
    QLoRA, adapters, prefix and prompt."""
    find = finder(rows)
    pairs = [pair for case in CASES for pair in against(find, "full", OTHERS if case in MIDDLE else MAIN[1:], [case])]
    return judged(find, pairs, better)


@claim("full-10", lesson="15_forgetting.py", section="1 · Two numbers", experiment=league(("full",)))
def forgetting(rows: Rows) -> Verdict:
    """Holds if full fine-tuning, tuned for its task, answers fewer of the 640 general items right than the base, by more than 0.02 with the
    whole interval, in every case; holds if in some; does not hold here if in none."""
    return judged(finder(rows), in_cases("full", CASES, "base"), much_worse, "cloze")


# ----------------------------------------------------------------------------------------------------------------- LoRA


@claim("lora-2", lesson="18_lora_questioned.py", section="2 · Which rank?", experiment=league(RANKS.values(), MIDDLE))
def ranks(rows: Rows) -> Verdict:
    """Holds if the best rank of 8 to 64 clearly beats the best of 1, 2 and 4, both chosen on validation, on both tasks; holds if on one;
    does not hold here otherwise. Every rank has its own rate, epochs and batch size."""
    find, pairs = finder(rows), []
    for case in MIDDLE:
        large, small = (best(find, case, [m for r, m in RANKS.items() if (r >= 8) is usual]) for usual in (True, False))
        pairs.append(Pair(case.name, large, way(large, case), small, way(small, case)))
    return judged(find, pairs, better)


@claim("lora-7", lesson="18_lora_questioned.py", section="3 · Which layers?", experiment=league((*TARGETS, "lora-qv", "lora-qv-r43"), MIDDLE))
def query_and_value(rows: Rows) -> Verdict:
    """Holds if q and v are clearly better than their best rival of q, v, qkvo, the MLP and all layers at rank 8, and, with rank 43, than all
    layers with as many parameters, on both tasks; holds if some of these four are so; does not hold here if none is."""
    find, n = finder(rows), len(MIDDLE)
    equal_rank = judged(find, against(find, "lora-qv", TARGETS, MIDDLE), better, beside=n)
    return both(equal_rank, judged(find, in_cases("lora-qv-r43", MIDDLE, "lora"), better, beside=n))


@claim("lora-8", lesson="18_lora_questioned.py", section="3 · Which layers?", experiment=league(("lora", "lora-qv", "lora-qv-r43"), MIDDLE))
def all_linear(rows: Rows) -> Verdict:
    """Holds if LoRA on all linear layers clearly beats q and v, at rank 8 and with as many parameters, on both tasks; holds if in some
    of these four cases; does not hold here if in none."""
    pairs = in_cases("lora", MIDDLE, "lora-qv") + in_cases("lora", MIDDLE, "lora-qv-r43")
    return judged(finder(rows), pairs, better)


@claim("lora-12", lesson="18_lora_questioned.py", section="5 · LoRA against full fine-tuning", experiment=league(("full", "lora")))
def lora_against_full(rows: Rows) -> Verdict:
    """Holds if LoRA loses less than a trifle to full fine-tuning (the interval of the difference stays above -0.02) in every case of
    task and number of examples; holds if in some; does not hold here if in none."""
    return judged(finder(rows), in_cases("lora", CASES, "full"), not_inferior)


AXES = {"rank": [*RANKS.values()], "layers": [*TARGETS, "lora-qv"], "alpha": ["lora", *ALPHAS]}


@claim(
    "lora-13",
    lesson="18_lora_questioned.py",
    section="4 · Which α, and which rate?",
    experiment=league({m for axis in AXES.values() for m in axis}, MIDDLE),
)
def hyperparameters(rows: Rows) -> Verdict:
    """Holds if each of rank (1 to 64), layers, and alpha (4 to 64 at rank 8) matters: its worst value, chosen on validation, clearly loses to its
    best by more than 0.02 at least, on both tasks, rate, epochs and batch size tuned for each; holds if some do; does not hold here if
    none does."""
    find, pairs = finder(rows), []
    for axis, methods in AXES.items():
        for case in MIDDLE:
            high, low = best(find, case, methods), best(find, case, methods, worst=True)
            pairs.append(Pair(f"{axis}, {case.name}", high, way(high, case), low, way(low, case)))
    return judged(find, pairs, much_better)


# ------------------------------------------------------------------------------------------- adapters and soft prompts


@claim("adapter-6", lesson="16_which_method.py", section="3 · The table", experiment=league(("full", "bottleneck")))
def adapters_against_full(rows: Rows) -> Verdict:
    """Holds if adapters lose less than a trifle to full fine-tuning (the interval stays above -0.02) in every case; holds if in some;
    does not hold here if in none."""
    return judged(finder(rows), in_cases("bottleneck", CASES, "full"), not_inferior)


@claim(
    "adapter-8",
    lesson="05_adapters.py",
    section="6 · The league so far",
    experiment=league(("lora", "lora-r1", "bottleneck-m37", "bottleneck-m4"), MIDDLE),
)
def adapters_against_lora(rows: Rows) -> Verdict:
    """Holds if LoRA clearly beats adapters of as many parameters (ranks 8 and 1) on both tasks; holds if in some of these four
    cases; does not hold here if in none."""
    pairs = in_cases("lora", MIDDLE, "bottleneck-m37") + in_cases("lora-r1", MIDDLE, "bottleneck-m4")
    return judged(finder(rows), pairs, better)


AS_SMALL = [pair for method in ("lora-r1", "bottleneck-m4") for pair in in_cases(method, MIDDLE, "prefix-direct")]  # 14 to 15 thousand numbers
SOFT = [*league(("lora", "bottleneck", "prompt", "prefix")).searches, *Searches.pairs("league", AS_SMALL).searches]


@claim("soft-8", lesson="16_which_method.py", section="3 · The table", experiment=Searches.of("league", SOFT))
def soft_prompts(rows: Rows) -> Verdict:
    """Holds if a prompt and a prefix clearly lose to the better (on validation) of LoRA and adapters in every case; holds if in some;
    does not hold here if in none. (On the shipped base; what SmolLM2-135M gives decides nothing, nor what LoRA of rank 1 and adapters
    of m = 4 gain over a prefix of as many numbers, which is in the evidence.)
    """
    find = finder(rows)
    pairs = [pair for method in ("prompt", "prefix") for pair in against(find, method, ("lora", "bottleneck"), CASES)]
    found, as_small = judged(find, pairs, worse), judged(find, AS_SMALL, better)
    return replace(found, evidence=[*found.evidence, as_small.effect, *as_small.evidence])


STARTS = [
    pair
    for one, other in (("prompt", "prompt-random"), ("prompt", "prompt-small"), ("prompt-small", "prompt-random"))
    for pair in in_cases(one, MIDDLE, other)
]


@claim("soft-9", lesson="06_soft_prompts.py", section="4 · The start, and the rate", experiment=Searches.pairs("league", STARTS))
def start_of_a_prompt(rows: Rows) -> Verdict:
    """Holds if each two of three starts of a prompt clearly differ on both tasks: words of the vocabulary, random numbers of deviation 1,
    and these cut to the size of embeddings; holds if in some of these six cases; does not hold here if in none. Each start has its own
    rate, epochs and batch size."""
    return judged(finder(rows), STARTS, lambda d: better(d) or worse(d))


@claim("qlora-5", lesson="07_qlora.py", section="6 · Train", experiment=league(("lora", "qlora")))
def four_bits(rows: Rows) -> Verdict:
    """Holds if QLoRA loses less than a trifle to LoRA (the interval stays above -0.02) in every case; holds if in some; does not hold
    here if in none."""
    return judged(finder(rows), in_cases("qlora", CASES, "lora"), not_inferior)


# ------------------------------------------------------------------------------------------------ practice, forgetting


@claim("best-4", lesson="14_best_practices.py", section="2 · The learning rate", experiment=league(MAIN))
def rates(rows: Rows) -> Verdict:
    """Holds if the best rate of full fine-tuning lies between 1e-5 and 5e-5 in every case, and the best rate of each other method is
    above it (the interval over the cases of its ratio to full's); holds if some of this is so; does not hold here if nothing is. A
    search starts at the method's usual rate, and ends where neither twice nor half as much is better. (Each best rate is of one search
    under one seed, on validation; the interval is over cases, not over seeds. What width does to rates: full-3.)"""
    find = finder(rows)
    best = {(case, m): tuned(find, search(case.task, m, case.examples))[0].rate for case in CASES for m in MAIN}
    full, numbers = [best[case, "full"] for case in CASES], []
    for method in MAIN[1:]:
        middle, half = interval([np.log2(best[case, method] / best[case, "full"]) for case in CASES])
        ratio, low, high = (float(2 ** (middle + sign * half)) for sign in (0, -1, 1))
        numbers.append(Number(f"best rate of {method}, over full's", ratio, "times", low, high))
    outcome = {"full between 1e-5 and 5e-5": all(1e-5 <= rate <= 5e-5 for rate in full)}
    outcome |= {f"{m} above it": n.low > 1 for m, n in zip(MAIN[1:], numbers)}
    ratios = listed([f"{n.value:.1f} for {m} ({n.low:.1f} to {n.high:.1f})" for m, n in zip(MAIN[1:], numbers)])
    return Verdict(
        graded(outcome), f"The best rates of full fine-tuning are {min(full):.0e} to {max(full):.0e}; of the other methods they are higher "
        f"by a factor of {ratios}. It is so for: {those(outcome)}; not for: {those(outcome, False)}.", numbers[0],
        [*numbers[1:], *(Number(f"{m}, {case.name}", rate, "rate") for (case, m), rate in best.items())],
        1, VALIDATION, "the shipped base", f"rewrite and source, {VALIDATION} validation records",
    )  # fmt: skip


BLIND = {case: [(way(method, case), Fits(way(method, case))) for method in MAIN] for case in CASES}


@claim(
    "best-8",
    lesson="14_best_practices.py",
    section="1 · What is a run, and when is a difference one?",
    experiment=Searches.of("league", [choice for ways in BLIND.values() for both in ways for choice in both]),
)
def selection(rows: Rows) -> Verdict:
    """Holds if in every case of task and number of examples the settings chosen on validation clearly have a lower loss on test than those
    with the lowest training loss, and the two are not equal; holds if in some; does not hold here if in none. Both are of the trials
    that the searches saw; a case is the mean over six methods, and is not told where one of them diverges under some seed. (What is said
    of the gap and of diverse examples is not judged.)"""
    find, found, failed = finder(rows), [], []
    for case, ways in BLIND.items():
        one, other = ([protocol.report(find, choice) for choice in choices] for choices in zip(*ways))
        if diverged := [m for m, *of in zip(MAIN, one, other) if None in of]:
            failed.append(f"{case.name}: {listed(diverged)} diverged under one of the seeds")
            continue
        means = [protocol.Report(None, np.mean([report.values for report in of], axis=0), of[0].weights) for of in (one, other)]
        found.append(Beside(case.name, "validation", means[0], "training loss", means[1], "nll"))
    return told(found, better, listed(sorted(KEYS)), failed)


@claim("forget-1", lesson="15_forgetting.py", section="1 · Two numbers", experiment=league(MAIN, MIDDLE))
def abilities(rows: Rows) -> Verdict:
    """Holds if every method, tuned for its task, clearly answers fewer of the 640 general items right than the base; holds if some
    do; does not hold here if none does."""
    pairs = [pair for method in MAIN for pair in in_cases(method, MIDDLE, "base")]
    return judged(finder(rows), pairs, worse, "cloze")


EQUAL = [pair for method in ("lora", "bottleneck") for pair in at_equal_quality(method, MIDDLE, "full")]


@claim("forget-5", lesson="15_forgetting.py", section="3 · Methods and rates", experiment=Searches.pairs("league", EQUAL))
def less_by_peft(rows: Rows) -> Verdict:
    """Holds if LoRA and adapters clearly answer more of the 640 general items right than full fine-tuning, on both tasks, each at its
    gentlest setting that learns the task as well as the other does; holds if in some of these four cases; does not hold here if in
    none."""
    return judged(finder(rows), EQUAL, better, "cloze")


FITTED = [
    Pair(f"{where}, {case.name}", "lora", lora, "full", Fits(way("full", case), lora))
    for case in FEW + MIDDLE
    for where, lora in (("at its best", way("lora", case)), ("at its lowest training loss", Fits(way("lora", case))))
]


@claim("peft-4", lesson="14_best_practices.py", section="4 · Epochs, and the gap", experiment=Searches.pairs("league", FITTED))
def overfitting(rows: Rows) -> Verdict:
    """Holds if LoRA clearly has a lower loss on test than full fine-tuning with the same training loss, and the two are not equal, in
    eight cases: LoRA's setting that is best on validation, or has the lowest training loss, with 50 or 500 examples of either task;
    holds if in some; does not hold here if in none. Full fine-tuning's is the setting with the nearest training loss of those that its
    search saw, for as many epochs (from a half to its search's most) as make the two equal under the tuning seed; where the means over
    the five seeds differ by 0.02 nats, or by a factor of 2, they are not compared. (A training loss is the mean of a run's last quarter.)"""
    find, fitted, apart, fits = finder(rows), [], [], []
    for pair in FITTED:
        seeds = [[find(trial) for trial in reported(chosen(find, of)[0])] for of in (pair.one, pair.other)]
        if any(row["loss"] is None for of in seeds for row in of):
            fitted.append(pair)  # `judged` says which has diverged
            continue
        losses = [[row["train_loss"] for row in of] for of in seeds]
        fits += [measured(f"training loss of {m}, {pair.where}", of, "nats per token") for m, of in zip(("lora", "full"), losses)]
        lora, full = (float(np.mean(of)) for of in losses)
        if alike(lora, full):
            fitted.append(pair)
        else:
            apart.append(f"lora beside full, {pair.where}: their training losses are {lora:.3g} and {full:.3g}")
    found = judged(find, fitted, better, "nll", apart=apart)
    return replace(found, evidence=[*found.evidence, *fits])


# -------------------------------------------------------------------------------------------------------- which method?


@claim("which-1", lesson="16_which_method.py", section="4 · Let the table decide", experiment=league(MAIN))
def full_for_quality(rows: Rows) -> Verdict:
    """Holds if in every case full fine-tuning is not inferior (interval above -0.02) to its rival, the best on validation of LoRA, QLoRA,
    adapters, prefix and prompt; holds if in some; does not hold here if in none. Memory and storage are said to be no object."""
    find = finder(rows)
    return judged(find, against(find, "full", MAIN[1:], CASES), not_inferior)


@claim("which-2", lesson="16_which_method.py", section="4 · Let the table decide", experiment=league(MAIN))
def lora_for_balance(rows: Rows) -> Verdict:
    """Holds if in every case LoRA clearly beats each method that stores less, and is not inferior (interval above -0.02) to each that
    stores as much or more; holds if in some; does not hold here if in none."""
    find = finder(rows)
    size = {m: find(tuned(find, search("source", m, SIZES[1]))[0])["storage"] for m in MAIN}
    less, more = ([m for m in MAIN if m != "lora" and (size[m] < size["lora"]) is smaller] for smaller in (True, False))
    lighter, others = ([pair for m in methods for pair in in_cases("lora", CASES, m)] for methods in (less, more))
    smaller = judged(find, lighter, better, beside=len(others))
    return both(smaller, judged(find, others, not_inferior, beside=len(lighter)))
