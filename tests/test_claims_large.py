"""The main comparisons on a real language model: a cell, here on the shipped base, and what is said of known rows."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft.claims import large
from minipeft.claims.large import METHODS, QUESTIONS, Large, Seconds, best_rates, compared, told
from minipeft.claims.register import statements
from minipeft.experiments.rows import described
from minipeft.experiments.shipped import base

TINY = {"examples": 8, "batch_size": 4, "validation": 4, "items": 3, "blocks": 1, "length": 16, "seeds": (1, 2)}


def rows(**losses: float) -> list[dict]:
    """Losses a token around a mean, base 3.0 if nothing is said, and best rates at 1e-3."""
    found = []
    for one in large.runs():
        rng, base = np.random.default_rng(len(one.method)), one.method == "base"
        shape, mean = (1 if base else 5, one.items), losses.get(one.method.replace("-", "_"), 3.0)
        row = {"nll": 2 * mean + rng.normal(scale=0.01, size=shape), "general": mean + rng.normal(scale=0.01, size=(shape[0], 32))}
        more = {"tokens": [2] * one.items} if base else {"rate": 1e-3, "rates": [[5e-4, 2.1], [1e-3, 2.0], [2e-3, 2.1]]}
        found.append(described(one) | {name: x.tolist() for name, x in row.items()} | more)
    return found


def test_a_cell_has_its_losses_by_seed_and_item_and_the_best_rate(monkeypatch):
    monkeypatch.setattr(large, "smollm2", base)
    monkeypatch.setattr(large, "LEAST", 100.0)  # no neighbor is better by enough: the search ends after three rates
    start = large.run(Large("base", **TINY))
    assert np.shape(start["nll"]) == (1, 3) and np.shape(start["tokens"]) == (3,) and np.shape(start["general"]) == (1, 4)
    row = large.run(Large("lora-qv", **TINY))
    assert np.shape(row["nll"]) == (2, 3) and np.shape(row["general"]) == (2, 4)
    assert [rate for rate, _ in row["rates"]] == [row["rate"] / 2, row["rate"], row["rate"] * 2]
    assert row["nll"][0] != row["nll"][1], "each seed has examples and a start of its own"
    assert row["trainable"] == 6 * 8 * (128 + 128 + 128 + 64), "A and B of q and v in 6 layers"


def test_a_comparison_is_in_nats_a_token_and_above_0_where_the_first_is_better():
    found = compared(rows(lora=1.5, full=2.0), "lora", "full", "nll")
    assert found.better.value == pytest.approx(0.5, abs=0.01) and found.clearly_better
    assert compared(rows(prompt=3.5), "prompt", "base", "general").better.value == pytest.approx(-0.5, abs=0.02)


def test_what_is_told_of_each_statement():
    given = rows(lora=1.5, full=2.0)
    assert told("lora-12", given).startswith("lora beside full, 320 examples of source: better (+0.50")
    assert told("forget-1", given).count("general text") == len(METHODS)
    assert told("best-4", given) == "The best rate of full fine-tuning is 1.0e-03; times this, the others': lora 1.0, lora-qv 1.0, qlora 1.0, prompt 1.0 and prefix 1.0."
    assert told("lora-6", given) == "" == told("lora-6", given[:1]), "of other statements nothing"
    for id, lacking in {"soft-8": "prefix", "forget-1": "prompt", "best-4": "prompt"}.items():
        rest = [row for row in given if row["method"] != lacking]
        assert told(id, rest) == f"On SmolLM2-135M: nothing is said; not computed so far: {lacking}."
    assert told("lora-12", given[:3]) == told("lora-12", given), "a statement needs only the settings that it compares"
    assert {*QUESTIONS} < {*statements()}


def test_the_seconds_of_a_step_are_told_beside_full_fine_tuning(monkeypatch):
    monkeypatch.setattr(large, "smollm2", base)
    measured = large.seconds(Seconds(1, ("full", "lora"), steps=1, rounds=1, batch_size=2))["seconds"]
    assert measured.keys() == {"full", "lora"} and min(measured.values()) > 0
    machine = {"processor": "P", "threads": 2, "date": "2026-11-30"}
    times = {name: 0.5 for name in METHODS} | {"full": 1.0}
    rows = [{"batch_size": 8, "seconds": {name: x * luck for name, x in times.items()}} | machine for luck in (0.9, 1.0, 1.1)]
    found = told("peft-3", rows)
    assert found.startswith("A step of full fine-tuning takes 1.00 seconds on 8 examples of source; the others take of that: lora 0.50 [0.50, 0.50], lora-qv")
    assert found.endswith("(P, 2 threads, 2026-11-30).") and "nothing is said" in told("peft-3", [])
    assert told("qlora-4", rows) == "A step of QLoRA takes 1.00 [1.00, 1.00] times LoRA's (P, 2 threads, 2026-11-30)."
    assert "nothing is said" in told("qlora-4", [])


def test_a_seed_that_diverged_is_said():
    given = rows()
    next(row for row in given if row["method"] == "qlora")["nll"][2] = None
    assert "one diverged under some seed" in told("qlora-5", given)
    assert set(best_rates(given)) == {*METHODS}
