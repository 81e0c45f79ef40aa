"""Forgetting, and its remedies, at equal quality of the task: of two ways to train, each is taken as it forgets least within 0.02
nats per token of the weaker one's best loss on validation. What is kept is the share of 640 general items answered right. Who keeps more must
not have learned less, on the test items and by more than 0.02 nats per token; else the comparison tells nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import protocol
from .comparison import CASES, SIZES, Pair, better, judged, way
from .protocol import TABLE, Gentle, finder
from .register import HOLDS, IF, Verdict, claim, listed
from .searches import Searches

Rows = Sequence[Mapping[str, Any]]

MIDDLE = [case for case in CASES if case.examples == SIZES[1]]


def remedies(a: str, one: Mapping[str, Any], b: str, other: Mapping[str, Any], methods: Sequence[str] = ("full", "lora")) -> list[Pair]:
    """Two ways to train, at equal quality of the task."""
    pairs = []
    for method in methods:
        for case in MIDDLE:
            with_it, without = way(method, case, **one), way(method, case, **other)
            pairs.append(Pair(f"{method}, {case.name}", a, Gentle(with_it, without), b, Gentle(without, with_it)))
    return pairs


def _at(method: str, factor: float) -> tuple[str, dict[str, Any]]:
    rate = TABLE[method].learning_rate * factor
    return f"rate {rate:g}", {"rate": rate, "axes": ("epochs", "batch_size")}


LARGER = remedies(*_at("full", 0.25), *_at("full", 4), ["full"])
LOWER = [
    pair._replace(other=pair.other.of)  # the tuned trial itself
    for method in ("full", "lora")
    for pair in remedies(*_at(method, 0.25), "the tuned rate", {}, [method])
]


@claim("full-4", lesson="15_forgetting.py", section="3 · Methods and rates", experiment=Searches.pairs("league", LARGER))
def overwritten(rows: Rows) -> Verdict:
    """Holds if full fine-tuning at a quarter of its usual rate clearly keeps more general items than at four times that rate, at equal
    quality of the task, on one task or both; does not hold here otherwise. (That larger rates overwrite; why is not tested, so that
    it never holds without an if.)"""
    find = finder(rows)
    found = judged(find, LARGER, better, "cloze")
    tuned = [protocol.tuned(find, way("full", case))[0].rate for case in MIDDLE]
    because = f"{found.because} The tuned rates are {listed([f'{rate:g}' for rate in tuned])}. That good weights are the reason is not tested."
    return replace(found, verdict=IF if found.verdict == HOLDS else found.verdict, because=because)


@claim("forget-2", lesson="15_forgetting.py", section="4 · The remedies", experiment=Searches.pairs("league", LOWER))
def lower_rate(rows: Rows) -> Verdict:
    """Holds if a quarter of the usual rate, which is a half or a quarter of the tuned one, clearly keeps more general items than the tuned
    method does, without having learned less, for full fine-tuning and LoRA on both tasks; holds if in some of these cases; does not
    hold here if in none. (At the lower rate, epochs and batch are those that forget least.)"""
    return judged(finder(rows), LOWER, better, "cloze")


REPLAY = [pair for share in (0.25, 1.0) for pair in remedies(f"{share:g} general block{'s' * (share != 1)} an example", {"replay": share}, "none", {})]


@claim("forget-3", lesson="15_forgetting.py", section="4 · The remedies", experiment=Searches.pairs("league", REPLAY))
def general_data(rows: Rows) -> Verdict:
    """Holds if mixing in general text, 0.25 or 1 block of 64 tokens an example, clearly keeps more general items, at equal quality of the
    task, in every case; holds if in some; does not hold here if in none. (The blocks cost computation of their own.)"""
    return judged(finder(rows), REPLAY, better, "cloze")


DECAY = [pair for strength in (0.1, 1.0) for pair in remedies(f"weight decay {strength:g}", {"weight_decay": strength}, "none", {})]
DROPOUT = remedies("dropout 0.1", {"dropout": 0.1}, "none", {})


@claim("forget-4", lesson="15_forgetting.py", section="4 · The remedies", experiment=Searches.pairs("league", DECAY + DROPOUT))
def regularization(rows: Rows) -> Verdict:
    """Holds if weight decay (0.1 and 1) and dropout (0.1) clearly keep more general items, at equal quality of the task, in every case of
    method and task; holds if in some; does not hold here if in none."""
    return judged(finder(rows), DECAY + DROPOUT, better, "cloze")
