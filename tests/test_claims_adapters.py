"""Adapters as components, and their units: what a cell measures, and the rules on made-up rows, both ways."""

from __future__ import annotations

import numpy as np
import pytest
from models import unlearned

from minipeft.claims import adapters, components, units
from minipeft.claims.components import Components
from minipeft.claims.protocol import version
from minipeft.claims.register import HOLDS, IF, NOT, UNTESTABLE, rule_of
from minipeft.claims.units import Units, middle, nearest, readings, remove
from minipeft.experiments.rows import described
from minipeft.experiments.shipped import base
from minipeft.peft.methods import METHODS

ITEMS = 200


@pytest.fixture
def short(monkeypatch):
    """A search for a rate ends after three; the model is small."""
    for module in (components, units):
        monkeypatch.setattr(module, "LEAST", 100.0)
        monkeypatch.setattr(module, "base", unlearned)


def shares(share: float, seeds: int = 5) -> list[list[int]]:
    """[seeds, items], of which a share is 1, with some luck of the seeds."""
    return [(np.arange(ITEMS) < ITEMS * share + seed % 2).astype(int).tolist() for seed in range(seeds)]


# ----------------------------------------------------------------------------------------------------------- components


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_a_cell_of_components_swaps_and_removes_bit_for_bit(short, method):
    s = Components(method, examples=8, batch_size=4, tested=4, validation=2, seeds=(1, 2))
    row = components.run(s)
    assert row["swapped"] == row["removed"] == [0.0, 0.0]
    assert {use: np.array(of["rewrite"]).shape for use, of in row["scores"].items()} == {
        "base": (1, 4), "alone": (2, 4), "together": (2, 4),
    }  # fmt: skip
    assert row["scores"]["alone"]["rewrite"] != row["scores"]["together"]["rewrite"], "the other adapter does something"
    assert len(row["tokens"]) == 4 and described(s)["base"] == version()


def component_rows(together: float, alone: float = 0.9, exact: float = 0.0) -> list[dict]:
    """Rows whose answers are right so often, and cost so little, together and alone."""
    rows = []
    for one in rule_of("which-3").experiment.settings:
        scores = {
            use: {"source": shares(share, seeds), "rewrite": [[5.0 - 3 * share + seed / 100] * ITEMS for seed in range(seeds)]}
            for use, share, seeds in (("base", 0.3, 1), ("alone", alone, 5), ("together", together, 5))
        }
        rows.append(described(one) | {"scores": scores, "tokens": [5] * ITEMS, "swapped": [exact] * 5, "removed": [exact] * 5})
    return rows


def test_components_are_exact_apart_and_keep_their_tasks_together():
    rule = rule_of("which-3")
    kept = rule.judge(component_rows(together=0.9))
    assert (kept.verdict, kept.seeds, kept.items) == (HOLDS, 5, ITEMS)
    lost = rule.judge(component_rows(together=0.5))
    assert lost.verdict == IF
    assert "in these senses: swapped and removed; LoRA's in these: swapped and removed." in lost.because
    assert "bottleneck together beside alone, source: worse" in lost.because
    assert rule.judge(component_rows(together=0.5, exact=1e-6)).verdict == NOT
    unlearned = rule.judge(component_rows(together=0.3, alone=0.3))
    assert unlearned.verdict == IF and "together" not in unlearned.because.partition(";")[0], "nothing was learned to keep"
    rows = component_rows(together=0.9)
    rows[0]["swapped"][1] = rows[0]["removed"][1] = None
    assert rule.judge(rows).verdict == UNTESTABLE


# ---------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("method", ["bottleneck", "lora"])
def test_a_unit_that_is_removed_reads_the_same_and_does_nothing(method):
    model = METHODS[method].prepare(base()[0], 1, 0)
    into, out = units.PARTS[method]
    rng, parts = np.random.default_rng(0), [part for _, part in model.parts("default")]
    for part in parts:
        getattr(part, out).data = rng.normal(size=getattr(part, out).shape).astype(np.float32) / 50
    before = readings(model, "test", 2)
    size = getattr(parts[0], into).shape[0]
    assert before.shape == (2, size * len(parts))
    for unit in range(before.shape[1]):
        remove(model, method, unit)
    assert not any(getattr(part, out).data.any() for part in parts)
    assert not any("forward" in vars(part) for part in parts), "the adapters compute as before"
    first = slice(0, size)
    assert np.allclose(readings(model, "test", 2)[:, first], before[:, first], atol=1e-5), "nothing is before the first"


def test_what_is_read_is_the_middle_of_an_adapter():
    part = METHODS["bottleneck"].prepare(base()[0], 1, 0).parts("default")[0][1]
    x = np.random.default_rng(0).normal(size=(1, 3, 128)).astype(np.float32)
    by_hand = np.maximum(x[0] @ part.down_weight.data.T, 0).mean(axis=0)
    assert np.allclose(middle(part, x), by_hand, atol=1e-6)


def test_the_nearest_mean_names_the_book():
    means = np.array([[0.0, 5.0], [1.0, 5.1], [2.0, 9.0]])
    assert nearest(means, np.array([[0.4, 8.0], [1.6, 0.0]])).tolist() == [[0, 2], [2, 0]]


def test_a_cell_of_units(short):
    row = units.run(Units("bottleneck", examples=8, batch_size=4, validation=6, tested=4, seeds=(1,)))
    assert {key: np.array(row[key]).shape for key in units.KEYS} == {
        "trained": (1, 4), "untrained": (1, 4), "whole": (1, 4), "without": (1, 4),
    }  # fmt: skip


def unit_rows(read: float, without: float) -> list[dict]:
    """Rows in which a unit reads so well, and without it so much is right; LoRA's direction reads half, and costs nothing."""
    made = {"bottleneck": (read, without), "lora": (0.5, 0.8)}
    return [
        described(one) | {
            "trained": shares(made[one.method][0]), "untrained": shares(0.5), "whole": shares(0.8), "without": shares(made[one.method][1]),
        }
        for one in rule_of("adapter-4").experiment.settings
    ]  # fmt: skip


def test_what_is_simple_is_counted_and_what_is_interpretable_is_read(monkeypatch):
    rule = rule_of("adapter-4")
    read = rule.judge(unit_rows(0.9, 0.4))
    assert read.verdict == IF and "fewer options" in read.because, "its file is no shorter than LoRA's"
    monkeypatch.setattr(adapters, "method_lines", lambda: {"bottleneck": 10, "lora": 20})
    assert rule.judge(unit_rows(0.9, 0.4)).verdict == HOLDS
    assert rule.judge(unit_rows(0.9, 0.8)).verdict == IF, "what a unit tells does not matter to the answer"
    monkeypatch.setattr(adapters, "method_lines", lambda: {"bottleneck": 20, "lora": 20})
    monkeypatch.setattr(adapters, "own_options", lambda config: 1)
    assert rule.judge(unit_rows(0.4, 0.8)).verdict == NOT
    assert (read.seeds, read.effect.name) == (5, "a unit over a direction of LoRA, read")
    rows = unit_rows(0.9, 0.4)
    rows[0]["without"][3] = None
    assert rule.judge(rows).verdict == UNTESTABLE
