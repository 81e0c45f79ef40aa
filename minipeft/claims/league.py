"""The league: every method tuned by one protocol on the same tasks, and the statements that it decides.

The rows of all of these stand in one file. Each rule names the part of them that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..experiments.rows import described, finder
from ..experiments.seeds import interval
from .comparison import (
    CASES,
    NEAR,
    SIZES,
    Case,
    Pair,
    Searches,
    against,
    at_equal_quality,
    best,
    both,
    in_cases,
    judged,
    not_clearly_worse,
    way,
)  # fmt: skip
from .protocol import SEEDS, TABLE, search, tuned
from .register import HOLDS, NOT, UNTESTABLE, Number, Verdict, claim, graded, measured

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


def above_zero(nats: Number) -> str:
    """The verdict on what is said to be more than nothing."""
    return HOLDS if nats.low > 0 else NOT if nats.high < NEAR["nll"] else UNTESTABLE


# ------------------------------------------------------------------------------------------------------------- overview


@claim("start-1", lesson="03_full_finetuning.py", section="The league: how methods are compared", experiment=league(("full", "scratch")))
def pretrained(rows: Rows) -> Verdict:
    """Holds if the base tuned on 50 examples clearly beats the same shape trained from random weights on 5,000, on both tasks; holds
    if so on one; does not hold here otherwise. Both have their own rate, epochs and batch size, and every weight is trained."""
    pairs = [
        Pair(f"{few.task}, {few.examples} and {many.examples} examples", "full", way("full", few), "scratch", way("scratch", many))
        for few, many in zip(FEW, MANY)
    ]
    return judged(finder(rows), pairs, lambda d: d.clearly_better)


# ----------------------------------------------------------------------------------------------------- full fine-tuning


@claim("full-5", lesson="16_which_method.py", section="3 · The table", experiment=league(("full", *OTHERS), MIDDLE))
def best_quality(rows: Rows) -> Verdict:
    """Holds if full fine-tuning clearly beats its rival, the other method that is best on validation, on both tasks; holds if it
    does on one of them; does not hold here otherwise."""
    find = finder(rows)
    return judged(find, against(find, "full", OTHERS, MIDDLE), lambda d: d.clearly_better)


@claim("full-10", lesson="15_forgetting.py", section="1 · Two numbers", experiment=league(("full",)))
def forgetting(rows: Rows) -> Verdict:
    """Holds if full fine-tuning, tuned for its task, clearly answers fewer of the 640 general items right than the base, in every
    case; holds if in some; does not hold here if in none."""
    return judged(finder(rows), in_cases("full", CASES, "base"), lambda d: d.clearly_worse, "cloze")


# ----------------------------------------------------------------------------------------------------------------- LoRA


@claim("lora-2", lesson="18_lora_questioned.py", section="2 · Which rank?", experiment=league(RANKS.values(), MIDDLE))
def ranks(rows: Rows) -> Verdict:
    """Holds if rank 8 loses to no rank by more than a trifle (its interval stays above -0.02), and rank 1 clearly loses to it, on both
    tasks; holds if some of these four are so; does not hold here otherwise. Every rank has its own rate, epochs and batch size."""
    find = finder(rows)
    found = judged(find, against(find, "lora", [m for m in RANKS.values() if m != "lora"], MIDDLE), not_clearly_worse)
    return both(found, judged(find, in_cases("lora", MIDDLE, "lora-r1"), lambda d: d.clearly_better))


@claim("lora-7", lesson="18_lora_questioned.py", section="3 · Which layers?", experiment=league((*TARGETS, "lora-qv", "lora-qv-r43"), MIDDLE))
def query_and_value(rows: Rows) -> Verdict:
    """Holds if q and v are not worse (interval above -0.02) than their best rival of q, v, qkvo, the MLP and all layers at rank 8, and,
    with rank 43, than all layers with as many parameters, on both tasks; holds if some of these four are so; does not hold here if none is."""
    find = finder(rows)
    equal_rank = judged(find, against(find, "lora-qv", TARGETS, MIDDLE), not_clearly_worse)
    return both(equal_rank, judged(find, in_cases("lora-qv-r43", MIDDLE, "lora"), not_clearly_worse))


@claim("lora-8", lesson="18_lora_questioned.py", section="3 · Which layers?", experiment=league(("lora", "lora-qv", "lora-qv-r43"), MIDDLE))
def all_linear(rows: Rows) -> Verdict:
    """Holds if LoRA on all linear layers clearly beats q and v, at rank 8 and with as many parameters, on both tasks; holds if in some
    of these four cases; does not hold here if in none."""
    pairs = in_cases("lora", MIDDLE, "lora-qv") + in_cases("lora", MIDDLE, "lora-qv-r43")
    return judged(finder(rows), pairs, lambda d: d.clearly_better)


@claim("lora-12", lesson="18_lora_questioned.py", section="5 · LoRA against full fine-tuning", experiment=league(("full", "lora")))
def lora_against_full(rows: Rows) -> Verdict:
    """Holds if LoRA loses less than a trifle to full fine-tuning (the interval of the difference stays above -0.02) in every case of
    task and number of examples; holds if in some; does not hold here if in none."""
    return judged(finder(rows), in_cases("lora", CASES, "full"), not_clearly_worse)


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
    return judged(find, pairs, lambda d: d.better.low > d.near)


# ------------------------------------------------------------------------------------------- adapters and soft prompts


@claim("adapter-6", lesson="16_which_method.py", section="3 · The table", experiment=league(("full", "bottleneck")))
def adapters_against_full(rows: Rows) -> Verdict:
    """Holds if adapters lose less than a trifle to full fine-tuning (the interval stays above -0.02) in every case; holds if in some;
    does not hold here if in none."""
    return judged(finder(rows), in_cases("bottleneck", CASES, "full"), not_clearly_worse)


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
    return judged(finder(rows), pairs, lambda d: d.clearly_better)


@claim("soft-8", lesson="16_which_method.py", section="3 · The table", experiment=league(("lora", "bottleneck", "prompt", "prefix")))
def soft_prompts(rows: Rows) -> Verdict:
    """Holds if a prompt and a prefix clearly lose to the better (on validation) of LoRA and adapters in every case; holds if in some;
    does not hold here if in none."""
    find = finder(rows)
    pairs = [pair for method in ("prompt", "prefix") for pair in against(find, method, ("lora", "bottleneck"), CASES)]
    return judged(find, pairs, lambda d: d.clearly_worse)


@claim("soft-9", lesson="06_soft_prompts.py", section="4 · The start, and the rate", experiment=league(("prompt", "prompt-random"), MIDDLE))
def start_of_a_prompt(rows: Rows) -> Verdict:
    """Holds if a prompt that starts as words of the vocabulary and one that starts at random clearly differ on both tasks, each with
    its own rate, epochs and batch size; holds if on one; does not hold here otherwise."""
    return judged(
        finder(rows), in_cases("prompt", MIDDLE, "prompt-random"), lambda d: (d.clearly_better or d.clearly_worse) and not d.equal
    )


@claim("qlora-5", lesson="07_qlora.py", section="6 · Train", experiment=league(("lora", "qlora")))
def four_bits(rows: Rows) -> Verdict:
    """Holds if QLoRA loses less than a trifle to LoRA (the interval stays above -0.02) in every case; holds if in some; does not hold
    here if in none."""
    return judged(finder(rows), in_cases("qlora", CASES, "lora"), not_clearly_worse)


# ------------------------------------------------------------------------------------------------ practice, forgetting


@claim("best-4", lesson="14_best_practices.py", section="2 · The learning rate", experiment=league(MAIN))
def rates(rows: Rows) -> Verdict:
    """Holds if the best rate of full fine-tuning lies between 1e-5 and 5e-5 in every case, and the ratio of the best rates, of each
    other method to full, is above 1 (its interval over the cases, of the mean over methods); holds if one of the two is so; does
    not hold here otherwise. A search starts at the method's usual rate, and ends where twice and half as much are worse."""
    find = finder(rows)
    best = {(case, m): tuned(find, search(case.task, m, case.examples))[0].rate for case in CASES for m in MAIN}
    ratios = [np.mean([np.log2(best[case, m] / best[case, "full"]) for m in MAIN if m != "full"]) for case in CASES]
    middle, half = interval(ratios)
    full = [best[case, "full"] for case in CASES]
    low, high = (float(2 ** (middle + sign * half)) for sign in (-1, 1))
    outcome = {"the range": all(1e-5 <= rate <= 5e-5 for rate in full), "the order": low > 1}
    return Verdict(
        graded(outcome), f"The best rates of full fine-tuning are {min(full):.0e} to {max(full):.0e}, those of the other methods "
        f"{2**middle:.1f} times as high (geometric mean; {low:.1f} to {high:.1f}).",
        Number("best rate of the other methods, over full's", float(2**middle), "times", low, high),
        [Number(f"{m}, {case.name}", rate, "rate") for (case, m), rate in best.items()], base="the shipped base", task="rewrite and source",
    )  # fmt: skip


@claim("best-8", lesson="14_best_practices.py", section="1 · What is a run, and when is a difference one?", experiment=league(MAIN))
def selection(rows: Rows) -> Verdict:
    """Holds if the loss on validation by which a trial was chosen is clearly below the loss of the same trial on the same records
    under seeds that chose nothing: selection flatters. Does not hold here if the interval over the cases, of the mean over
    methods, lies below 0.02; cannot be tested here if it is too wide to tell."""
    find, flattery = finder(rows), []
    for case in CASES:
        gained = []
        for method in MAIN:
            trial, _ = tuned(find, search(case.task, method, case.examples))
            again = [find(described(trial) | {"seed": seed, "split": "test"})["loss"] for seed in SEEDS]
            gained.append(float(np.mean(again)) - find(described(trial))["loss"])
        flattery.append(float(np.mean(gained)))  # those of a case share the records, and depend on each other
    found = measured("loss under other seeds, less the loss that was selected by", flattery, "nats per token")
    return Verdict(
        above_zero(found), f"A selected loss is {found.value:+.3f} nats per token better than what other seeds give "
        f"(95 % {found.low:+.3f} to {found.high:+.3f} over {len(flattery)} cases).",
        found, seeds=len(SEEDS), items=256, base="the shipped base", task="rewrite and source",
    )  # fmt: skip


@claim("forget-1", lesson="15_forgetting.py", section="1 · Two numbers", experiment=league(MAIN, MIDDLE))
def abilities(rows: Rows) -> Verdict:
    """Holds if every method, tuned for its task, clearly answers fewer of the 640 general items right than the base; holds if some
    do; does not hold here if none does."""
    pairs = [pair for method in MAIN for pair in in_cases(method, MIDDLE, "base")]
    return judged(finder(rows), pairs, lambda d: d.clearly_worse, "cloze")


EQUAL = [pair for method in ("lora", "bottleneck") for pair in at_equal_quality(method, MIDDLE, "full")]


@claim("forget-5", lesson="15_forgetting.py", section="3 · Methods and rates", experiment=Searches.pairs("league", EQUAL))
def less_by_peft(rows: Rows) -> Verdict:
    """Holds if LoRA and adapters clearly answer more of the 640 general items right than full fine-tuning, on both tasks, each at its
    gentlest setting that learns the task as well as the other does; holds if in some of these four cases; does not hold here if in
    none."""
    return judged(finder(rows), EQUAL, lambda d: d.clearly_better, "cloze")


@claim("peft-4", lesson="14_best_practices.py", section="4 · Epochs, and the gap", experiment=league(("lora", "full"), FEW + MIDDLE))
def overfitting(rows: Rows) -> Verdict:
    """Holds if, where LoRA and full fine-tuning have the same training loss (within 0.05), LoRA's loss on validation is clearly lower, over
    such settings that the searches saw (the mean of each of the four cases of task, and 50 or 500 examples, is one value); does
    not hold here if it is lower by less than 0.02, with the whole interval; cannot be tested here if the interval is too wide to tell."""
    find, gaps, pairs = finder(rows), [], 0
    for case in FEW + MIDDLE:
        seen: dict[str, dict[Any, float]] = {"lora": {}, "full": {}}
        for method, losses in seen.items():
            tuned(find, search(case.task, method, case.examples), losses)
        trained = {m: [(find(described(t))["train_loss"], loss) for t, loss in losses.items()] for m, losses in seen.items()}
        own = []
        for fit, loss in trained["full"]:
            near = [(abs(other - fit), value) for other, value in trained["lora"] if other is not None and fit is not None]
            if near and min(near)[0] < 0.05:
                own.append(loss - min(near)[1])
        gaps += [float(np.mean(own))] if own else []
        pairs += len(own)
    if len(gaps) < 2:
        return Verdict(UNTESTABLE, f"The searches saw {pairs} pairs of settings with equal training loss, in {len(gaps)} cases.")
    found = measured("validation loss of full fine-tuning, less LoRA's, at equal training loss", gaps, "nats per token")
    return Verdict(
        above_zero(found), f"At equal training loss LoRA's loss on validation is {found.value:+.3f} nats per token lower ({found.low:+.3f} to "
        f"{found.high:+.3f} over {len(gaps)} cases, with {pairs} pairs of settings).",
        found, items=256, base="the shipped base", task="rewrite and source",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- which method?


@claim("which-1", lesson="16_which_method.py", section="4 · Let the table decide", experiment=league(MAIN))
def full_for_quality(rows: Rows) -> Verdict:
    """Holds if in every case full fine-tuning is not inferior (interval above -0.02) to its rival, the best other method on validation;
    holds if in some; does not hold here if in none. Memory and storage are said to be no object."""
    find = finder(rows)
    return judged(find, against(find, "full", MAIN[1:], CASES), not_clearly_worse)


@claim("which-2", lesson="16_which_method.py", section="4 · Let the table decide", experiment=league(MAIN))
def lora_for_balance(rows: Rows) -> Verdict:
    """Holds if in every case LoRA clearly beats each method that stores less, and is not inferior (interval above -0.02) to each that
    stores more; holds if in some; does not hold here if in none."""
    find = finder(rows)
    size = {m: find(described(tuned(find, search("source", m, SIZES[1]))[0]))["storage"] for m in MAIN}
    less, more = ([m for m in MAIN if m != "lora" and (size[m] < size["lora"]) is smaller] for smaller in (True, False))
    smaller = judged(find, [pair for m in less for pair in in_cases("lora", CASES, m)], lambda d: d.clearly_better)
    return both(smaller, judged(find, [pair for m in more for pair in in_cases("lora", CASES, m)], not_clearly_worse))
