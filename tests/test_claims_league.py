"""The rules that compare tuned methods, on made-up rows: each comes out as the numbers are, and the other way with others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from minipeft.claims import comparison, forgetting, league, practice, protocol, searches, seconds
from minipeft.claims.comparison import Case, Pair, judged
from minipeft.claims.protocol import TABLE, Trial, search, untrained
from minipeft.claims.register import HOLDS, IF, NOT, RULES, UNTESTABLE, UNTRIED, Number, Verdict
from minipeft.claims.searches import spread
from minipeft.claims.standings import as_text, matrix, pairs, so_far, standings
from minipeft.evaluation.intervals import Estimate
from minipeft.experiments.rows import described

ITEMS, CLOZE = 64, 64
COMPARED = sorted(id for id, rule in RULES.items() if rule.function.__module__ == league.__name__)


STORED = {"full": 9000, "lora": 2000, "qlora": 2000, "bottleneck": 1900, "prefix": 1500, "prompt": 100}
Of = dict[str, float] | Callable[[Trial], float]  # of methods by name, or of any trial


def value(given: Of, trial: Trial, usual: float) -> float:
    return given(trial) if callable(given) else given.get(trial.method, usual)


def off(trial: Trial) -> float:
    """What a rate costs that is not the best one, nats."""
    return 0.02 * abs(np.log2(trial.rate / (1e-3 if trial.method in ("full", "scratch") else 8e-3))) if trial.rate else 0.0


def row(trial: Trial, skill: Of, memory: Of) -> dict:
    """What a trial that gains `skill` nats on a task and keeps `memory` of the general items would be measured as."""
    rng = np.random.default_rng([trial.seed, len(trial.method)])
    gained = value(skill, trial, 0.5) + (0.1 * np.log2(trial.examples / 500) if trial.examples else 0)
    if trial.rate is None:
        gained, kept = 0.0, 1.0
    else:
        gained -= off(trial) + 0.02 * (trial.epochs != search(trial.task, trial.method, trial.examples).start.epochs)
        kept = value(memory, trial, 0.8)
    luck = rng.normal(size=ITEMS) / 200
    made: dict = {"trainable": 10, "storage": STORED.get(trial.method, 1000), "train_loss": 2.0, "loss": 3 - gained, "general": {"austen": 3 + (1 - kept)}, "nll": (10 * (3 - gained + luck)).tolist()}
    made["right"] = (np.arange(ITEMS) < ITEMS * (0.4 + gained / 2)).astype(int).tolist()
    made["cloze"] = (np.arange(CLOZE) < CLOZE * kept).astype(int).tolist()
    return made | ({"tokens": [10] * ITEMS} if trial.rate is None else {})


def filled(experiment, skill: Of, memory: Of) -> list[dict]:
    """All rows that an experiment asks for."""
    rows: list[dict] = []
    while trials := experiment.missing(rows):
        rows += [described(trial) | row(trial, skill, memory) for trial in trials]
    return rows


def filled_on(experiment, rows: list[dict]) -> list[dict]:
    """The rows with those that are asked for now, which have diverged."""
    while trials := experiment.missing(rows):
        rows = rows + [described(trial) | {"loss": None, "general": {}} for trial in trials]
    return rows


HIGH, LOW = 0.9, 0.1
# what is better than all else, or keeps less, where a statement holds, and where it does not
CASES = {
    "start-1": ({"full": HIGH, "scratch": LOW - 0.3}, {"full": LOW, "scratch": HIGH}),
    "full-5": ({"full": HIGH}, {"lora": HIGH}),
    "lora-2": ({"lora": HIGH, "lora-r1": LOW}, {"lora": LOW, "lora-r1": HIGH}),
    "lora-7": ({"lora-qv": HIGH, "lora-qv-r43": HIGH}, {"lora-qv": LOW, "lora-qv-r43": LOW}),
    "lora-8": ({"lora": HIGH}, {"lora": LOW}),
    "lora-12": ({"lora": 0.53, "full": 0.5}, {"lora": LOW}),
    "adapter-6": ({"bottleneck": 0.53, "full": 0.5}, {"bottleneck": LOW}),
    "adapter-8": ({"lora": HIGH, "lora-r1": HIGH}, {"lora": LOW, "lora-r1": LOW}),
    "soft-8": ({"prompt": LOW, "prefix": LOW}, {"prompt": HIGH, "prefix": HIGH}),
    "soft-9": ({"prompt": HIGH, "prompt-small": LOW}, {}),
    "which-1": ({"full": HIGH}, {"full": LOW}),
    "which-2": ({"lora": HIGH}, {"lora": LOW}),
    "lora-13": (lambda t: {"lora": 0.5}.get(t.method, 0.1), lambda t: 0.5),
    "qlora-5": ({"qlora": 0.5, "lora": 0.5}, {"qlora": LOW}),
}


@pytest.mark.parametrize("id", CASES)
def test_a_comparison_follows_its_rows(id):
    rule = RULES[id]
    verdicts = [rule.judge(filled(rule.experiment, skill, {})) for skill in CASES[id]]
    assert [verdict.verdict for verdict in verdicts] == [HOLDS, NOT]
    assert all(verdict.effect.low <= verdict.effect.value <= verdict.effect.high for verdict in verdicts)
    assert all(verdict.seeds == 5 and verdict.items == ITEMS and verdict.because.endswith(".") for verdict in verdicts)


@pytest.mark.parametrize("id, holds, not_", [
    ("full-10", {"full": 0.4}, {"full": 1.0}),
    ("forget-1", {}, dict.fromkeys(TABLE, 1.0)),
    ("forget-5", {"full": 0.2}, {"lora": 0.2, "bottleneck": 0.2, "full": 0.9}),
])  # fmt: skip
def test_what_is_forgotten_follows_its_rows(id, holds, not_):
    rule = RULES[id]
    assert [rule.judge(filled(rule.experiment, {}, memory)).verdict for memory in (holds, not_)] == [HOLDS, NOT]


def better(is_so: Callable[[Trial], bool]) -> Callable[[Trial], float]:
    return lambda trial: HIGH if is_so(trial) else LOW


PRACTICE = {
    "best-1": (better(lambda t: t.data == "drawn"), better(lambda t: t.data != "drawn")),
    "best-2": (lambda t: {"drawn": 0.9, "oversampled:0.8": 0.5}.get(t.data, 0.1), better(lambda t: t.data == "skewed:0.8")),
    "best-3": (better(lambda t: t.data == "mixed"), better(lambda t: t.data == "easy")),
    "best-5": (better(lambda t: t.batch_size == 64), better(lambda t: t.batch_size < 64)),
    "best-6": (lambda t: 0.9 - abs(np.log2((t.epochs or 1) / 2)) / 4, lambda t: 0.9 - abs(np.log2((t.epochs or 1) / 0.5)) / 4),
    "best-7": (better(lambda t: t.warmup > 0), better(lambda t: t.warmup == 0)),
}


@pytest.mark.parametrize("id", PRACTICE)
def test_advice_follows_its_rows(id):
    rule = RULES[id]
    assert rule.function.__module__ == practice.__name__
    assert [rule.judge(filled(rule.experiment, skill, {})).verdict for skill in PRACTICE[id]] == [HOLDS, NOT]


def test_hard_examples_have_to_beat_chance_as_well():
    rule = RULES["best-3"]
    verdict = rule.judge(filled(rule.experiment, better(lambda t: t.data != "easy"), {}))
    assert verdict.verdict == IF and len([verdict.effect, *verdict.evidence]) == 8
    assert [one.name.partition(",")[0] for one in (verdict.effect, *verdict.evidence)].count("easy and hard examples over easy ones") == 4
    assert verdict.because == (
        "Beside easy ones: of 4 comparisons (4 better) 4 are as stated. "
        "Beside random ones: of 4 comparisons (4 equal) 0 are as stated and 4 are not."
    )


KEPT = {
    "full-4": lambda t: t.rate < 1e-3,
    "forget-2": lambda t: t.rate < (1e-3 if t.method == "full" else 3e-3),
    "forget-3": lambda t: t.replay > 0,
    "forget-4": lambda t: t.weight_decay + t.dropout > 0,
}


@pytest.mark.parametrize("id", KEPT)
def test_a_remedy_follows_its_rows(id):
    rule, is_so = RULES[id], KEPT[id]
    assert rule.function.__module__ == forgetting.__name__
    kept = [better(is_so), better(lambda t: not is_so(t))]
    alike = lambda t: 0.5 + off(t)  # noqa: E731 - at every rate as much is learned
    at_most = IF if id == "full-4" else HOLDS  # why larger rates overwrite is not tested
    assert [rule.judge(filled(rule.experiment, alike, memory)).verdict for memory in kept] == [at_most, NOT]


def test_who_keeps_more_because_it_learned_less_has_no_remedy():
    rule = RULES["full-4"]
    keeps = better(KEPT["full-4"])
    rows = filled(rule.experiment, lambda t: 0.5 + off(t), keeps)
    lazy = [r | {"nll": [v + 1 for v in r["nll"]]} if r["rate"] and r["rate"] < 1e-3 and r["split"] == "test" else r for r in rows]
    verdict = rule.judge(lazy)
    assert verdict.verdict == UNTESTABLE and "better (+0.797" in verdict.because and "the task worse, -0.1" in verdict.because


def test_overfitting_is_compared_at_equal_training_loss():
    rule = RULES["peft-4"]
    higher, equal = (filled(rule.experiment, {"full": skill}, {}) for skill in (0.2, 0.5))
    assert [rule.judge(rows).verdict for rows in (higher, equal)] == [HOLDS, NOT]
    for fit, said in ((1.94, "1.94"), (0.9, "0.9")):
        apart = [row | {"train_loss": fit if row["method"] == "full" and row["split"] == "test" else 2.0} for row in higher]
        verdict = rule.judge(apart)
        assert verdict.verdict == UNTESTABLE and verdict.because.count(f"their training losses are 2 and {said}.") == 8
    lost = [row | {"loss": None} if row["method"] == "lora" and row["split"] == "test" and row["seed"] == 2 else row for row in higher]
    assert rule.judge(lost).verdict == UNTESTABLE


def test_what_fits_is_chosen_by_the_training_loss_alone():
    one, other = (search("rewrite", method, 500, axes=("rate",)) for method in ("lora", "full"))
    rates = {of: [of.start.rate * 2**i for i in (-1, 0, 1)] for of in (one, other)}
    fits = {one: [2.0, 1.5, 1.0], other: [1.9, 1.2, None]}
    rows = [
        described(replace(of.start, rate=rate)) | {"loss": 2.0, "train_loss": fit}
        for of in (one, other) for rate, fit in zip(rates[of], fits[of])
    ]  # fmt: skip
    find = protocol.finder(rows)
    lowest, best = protocol.Fits(one), one
    assert protocol.chosen(find, lowest) == (replace(one.start, rate=rates[one][2]), [])
    assert protocol.chosen(find, protocol.Fits(other, lowest)) == (replace(other.start, rate=rates[other][1]), []), "1.2 is near 1.0"
    assert protocol.chosen(find, protocol.Fits(other, best)) == (replace(other.start, rate=rates[other][1]), []), "and near 1.5"
    exact = [r | {"train_loss": 0.0} if r["train_loss"] == 1.0 else r for r in rows]
    assert protocol.chosen(protocol.finder(exact), protocol.Fits(other, lowest))[0].rate == rates[other][1], "a loss may round to 0"
    lacking = protocol.finder(rows[:-1])
    assert protocol.chosen(lacking, protocol.Fits(other, lowest))[1] == [replace(other.start, rate=rates[other][2])]
    assert protocol.chosen(protocol.finder(rows[1:]), protocol.Fits(other, lowest))[1] == [replace(one.start, rate=rates[one][0])]


@pytest.mark.parametrize("aim", [1.0, 0.55, 1.8, 0.1, 9.0])
def test_what_fits_another_is_trained_for_as_long_as_makes_their_training_losses_equal(aim):
    """Here a training loss is 2 nats over the epochs, of which there may be half of one at least."""
    one, other = (search("rewrite", method, 500, axes=("epochs",)) for method in ("lora", "full"))
    of, rows = protocol.Fits(other, one), []
    while trials := protocol.wanted(protocol.finder(rows), [of]):
        rows += [described(t) | {"loss": 2.0, "train_loss": aim if t.method == "lora" else 2 / t.epochs} for t in trials if t.rate]
        rows += [described(t) | {"loss": 2.0} for t in trials if not t.rate]
    best = protocol.chosen(protocol.finder(rows), of)[0]
    assert best.rate == other.start.rate and best.epochs == pytest.approx(min(other.most, max(0.5, 2 / aim)), rel=0.02)
    assert len({row["epochs"] for row in rows if row["method"] == "full"}) <= protocol.TRIES


def test_the_search_for_an_equal_training_loss_ends_where_the_loss_jumps():
    of, at = protocol.Fits(search("rewrite", "full", 500), search("rewrite", "lora", 500, axes=())), search("rewrite", "full", 500).start
    for jump in (0.953, 1.234, 7.9):
        loss = {"lora": lambda epochs: 0.5, "full": lambda epochs, jump=jump: 1.0 if epochs < jump else 0.1}
        best, unknown = protocol.chosen(lambda t, loss=loss: {"loss": 2.0, "train_loss": loss[t.method](t.epochs)}, of)
        assert (unknown, best.rate, loss["full"](best.epochs)) == ([], at.rate, 1.0), "1 is nearer 0.5 than 0.1 is"
        assert protocol.chosen(lambda t: {"loss": None, "train_loss": None if t.method == "full" else 0.5}, of)[1] == [], "all diverged"


def test_some_cases_make_it_holds_if():
    rule = RULES["forget-5"]
    verdict = rule.judge(filled(rule.experiment, {}, {"lora": 0.9, "full": 0.5, "bottleneck": 0.2}))
    assert verdict.verdict == IF
    assert "lora beside full, rewrite, 500 examples: better" in verdict.because
    assert "bottleneck beside full, rewrite, 500 examples: worse" in verdict.because


@pytest.mark.parametrize("better, verdict", [(1, UNTESTABLE), (3, UNTESTABLE), (5, IF)])
def test_what_is_said_of_some_of_many_is_clear_among_that_many(better, verdict, monkeypatch):
    """Five seeds -2 to 2 around a mean: Student's interval reaches 1.96 to either side, and among ten comparisons 3.96."""
    base = untrained("source")
    values = {"a": better + np.arange(-2.0, 3)[:, None] * np.ones(4), "b": np.zeros((5, 4))}
    names = iter(["a", "b", *["b", "b"] * 9])
    monkeypatch.setattr(protocol, "report", lambda *_: protocol.Report(base, values[next(names)], None))
    pairs = [Pair(f"case {i}", "a", base, "b", base) for i in range(10)]
    assert judged(lambda _: None, pairs, comparison.better).verdict == verdict


def test_of_differences_that_nobody_would_notice_none_is_as_stated():
    """At 95 % +0.0120 ± 0.0075 is clear, and equal; at the level for three it reaches beyond 0.02, and is clear still."""
    base, luck = untrained("source"), np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    one = protocol.Report(base, 0.012 + 0.0076 * luck[:, None] * np.ones(4), None)
    other = protocol.Report(base, np.zeros((5, 4)), None)
    found = comparison.told([comparison.Beside("here", "a", one, "b", other, "right")] * 3, comparison.better, "source")
    at = [comparison.compare(one, other, "right", level) for level in (0.95, 1 - 0.05 / 3)]
    assert [(d.clearly_better, d.equal) for d in at] == [(True, True), (True, False)]
    assert (found.verdict, found.because.partition(":")[0]) == (NOT, "Of 3 comparisons 0 are as stated and 3 are not")


def test_the_best_rates_of_peft_are_above_those_of_full_fine_tuning():
    rows = filled(RULES["best-4"].experiment, {}, {})
    rates = RULES["best-4"].judge(rows)
    assert rates.verdict == IF, "the order is as taught, the range is not"
    assert rates.effect.low > 1
    assert rates.effect.value == pytest.approx(8, rel=0.5)


def test_who_has_no_validation_set_pays():
    """A setting's training loss says the same as its loss on validation, or the opposite."""
    rule = RULES["best-8"]

    def rows(opposite: bool) -> list[dict]:
        found: list[dict] = []
        while trials := rule.experiment.missing(found):
            made = [described(trial) | row(trial, {}, {}) for trial in trials]
            found += [r | {"train_loss": 10 - r["loss"] if opposite else r["loss"]} for r in made]
        return found

    told, misled = rows(False), rows(True)
    assert [rule.judge(of).verdict for of in (told, misled)] == [NOT, HOLDS]
    lost = rule.judge([r | {"loss": None} if r["seed"] == 3 and (r["method"], r["task"]) == ("prompt", "source") else r for r in misled])
    assert lost.verdict == IF and lost.because.count("prompt diverged under one of the seeds") == 3


def test_what_no_interval_can_tell_is_not_judged():
    rule, rng = RULES["lora-8"], np.random.default_rng(0)
    rows = filled(rule.experiment, {}, {})
    noisy = [
        r | {"nll": (np.array(r["nll"]) + 30 * rng.normal()).tolist(), "right": rng.integers(0, 2, ITEMS).tolist()}
        for r in rows
    ]  # fmt: skip
    verdict = rule.judge(noisy)
    assert verdict.verdict == UNTESTABLE and re.search(r": undecided \(.*\), not told", verdict.because)


def test_a_way_that_diverges_at_every_setting_forgets_nothing_and_stops_nothing():
    rule = RULES["full-4"]
    rows = [r | {"loss": None} if r["rate"] and r["rate"] > 2e-3 else r for r in filled(rule.experiment, {}, {})]
    rows = filled_on(rule.experiment, rows)
    assert rule.judge(rows).verdict == UNTESTABLE


def test_rows_that_are_missing_leave_a_statement_untried_and_divergence_is_told():
    rule = RULES["lora-12"]
    rows = filled(rule.experiment, {}, {})
    assert rule.judge(rows[:-1]).verdict == UNTRIED
    seed = next(i for i, r in enumerate(rows) if r["split"] == "test" and r["method"] == "lora")
    rows[seed] = rows[seed] | {"loss": None}
    verdict = rule.judge(rows)
    assert verdict.verdict == IF, "what is found of the other pairs stands"
    assert verdict.because.startswith("Of 6 comparisons 4 are as stated and 2 are not told") and "lora diverged" in verdict.because


@pytest.mark.parametrize("low, high, so", [(-0.015, 0.01, True), (-0.05, -0.03, False), (-0.025, -0.01, None)])
def test_a_margin_is_met_missed_or_not_told(low, high, so):
    found = comparison.Difference(Estimate((low + high) / 2, low, high), 0.02)
    assert comparison.not_inferior(found) is so
    assert comparison.much_better(comparison.Difference(Estimate(0.0, low + 0.04, high + 0.04), 0.02)) is so


def test_two_parts_of_a_statement():
    parts = {v: Verdict(v, f"{v}.", Number("x", 1.0)) for v in (HOLDS, IF, NOT, UNTESTABLE)}
    joined = {(a, b): comparison.both(parts[a], parts[b]).verdict for a in parts for b in parts}
    assert all(joined[a, a] == a for a in parts) and joined[NOT, UNTESTABLE] == UNTESTABLE
    assert joined[HOLDS, UNTESTABLE] == joined[HOLDS, NOT] == joined[IF, NOT] == IF
    tried = replace(parts[HOLDS], seeds=5, items=512, task="source")
    whole = comparison.both(Verdict(UNTESTABLE, "Nothing."), tried)
    assert (whole.effect, whole.seeds, whole.items, whole.task) == (tried.effect, 5, 512, "source") and not whole.evidence
    part = comparison.both(replace(parts[NOT], effect=Number("not so", 1.0)), replace(parts[HOLDS], effect=Number("so", 2.0)))
    assert (part.effect.name, part.evidence[0].name) == ("so", "not so"), "the effect is of the part that holds"


def test_of_many_comparisons_those_that_are_unlike_most_are_listed_and_a_second_part_stands_behind_the_list():
    def beside(i: int, better: float) -> comparison.Beside:
        reports = [protocol.Report(None, np.random.default_rng(i).normal(size=(5, 40)) + shift, None) for shift in (better, 0.0)]
        return comparison.Beside(f"case {i}", "a", reports[0], "b", reports[1], "right")

    found = [beside(i, 1.0 if i > 2 else -1.0) for i in range(16)]
    few, many, bad = (comparison.told(some, comparison.better, "source") for some in (found[:6], found, [*found[:3] * 3, found[3]]))
    assert few.because.count("better") == 3 and few.because.count("worse") == 3
    assert many.because.startswith("Of 16 comparisons (13 better and 3 worse) 13 are as stated and 3 are not:")
    assert [one.effect.name for one in (few, bad)] == ["a over b, case 3"] * 2, "one that is as stated, not the first"
    assert "a over b, case 0" in [number.name for number in few.evidence] and few.effect not in few.evidence
    even = comparison.told([*found[:3] * 2, *found[3:6], *found[6:9]], comparison.better, "source").because
    assert "6 are as stated and 6 are not. At the level for 12:" in even and even.count(": better") == 6 and ": worse" not in even
    assert (many.because.count(": better"), many.because.count(": worse"), len(many.evidence)) == (0, 3, 15)
    assert bad.because.startswith("Of 10 comparisons (9 worse and 1 better) 1 is as stated and 9 are not. A beside b, case 3: better")
    lost = comparison.told(found, comparison.better, "source", [f"a beside b, case {i}: b diverged" for i in range(16, 31)]).because
    assert lost == "Of 31 comparisons (15 not compared, 13 better and 3 worse) 13 are as stated, 3 are not and 15 are not told."
    unsure = comparison.told([one._replace(other=found[i - 1].one) for i, one in enumerate(found[:8])], comparison.better, "source").because
    assert "1 better and 6 undecided within [-0.63, +0.48] of items) 1 is as stated" in unsure, "their range, as they are not shown"
    assert "A beside b, case 0: worse" in unsure
    limited = comparison.told([one._replace(limit=", within 4 epochs") for one in found[3:]], comparison.better, "source")
    assert limited.because == "Of 13 comparisons (13 better; 13 where the worse, or both, would take more epochs than allowed) 13 are as stated."
    joined = comparison.both(few, many).because
    assert "\n\nOf 16" in joined and ") Of 16" not in joined, "behind a list a paragraph of its own"


def test_a_loss_may_differ_by_the_luck_of_seeds_and_no_more(monkeypatch):
    experiment = RULES["qlora-5"].experiment
    rows = filled(experiment, {}, {})
    lucky = [r | {"loss": r["loss"] + (r["seed"] - 3) / 100} if r["rate"] and r["split"] == "test" else r for r in rows]
    monkeypatch.setattr(type(experiment), "rows", lambda self: lucky)
    assert spread(lucky) == pytest.approx(np.std([0, 1, 2, 3, 4], ddof=1) / 100)
    one, *others = [row for row in lucky if row["split"] == "test" and row["rate"]]
    assert experiment.differences([one], [one | {"loss": one["loss"] + 0.09}]) == []
    for loss in (one["loss"] + 0.1, None):
        (line,) = experiment.differences([one], [one | {"loss": loss}])
        assert "in the package; 0.0949 may be luck" in line
    wild = [r | {"loss": 100 * r["seed"]} if r["method"] != one["method"] else r for r in lucky]
    monkeypatch.setattr(type(experiment), "rows", lambda self: wild)
    assert len(experiment.differences([one], [one | {"loss": one["loss"] + 0.1}])) == 1, "no luck of another method"
    assert experiment.differences([one], others) == [], "other trials"
    tried = next(row for row in lucky if row["split"] == "validation")
    assert experiment.differences([tried], [tried | {"loss": None}]) == [], "a setting of the tuning may diverge"
    assert len(experiment.differences([tried], [tried | {"loss": tried["loss"] * 1.1 + 0.1}])) == 1


def test_a_row_is_computed_again_from_its_settings():
    trial = Trial("source", "lora", 8, 1e-3, 1, 4, 3)
    experiment = replace(RULES["qlora-5"].experiment, run=lambda given: {"loss": 1.0 if given == trial else 2.0})
    (line,) = experiment.check(described(trial) | {"loss": 3.0, "version": "x"}, Random(0))
    assert "loss: 1.0, and 3.0 in the package" in line


def test_a_trial_that_sees_many_examples_is_not_drawn():
    experiment, few, many = RULES["qlora-5"].experiment, Trial("source", "lora", 5000, 1e-3, 1, 8), Trial("source", "lora", 5000, 1e-3, 2, 8)
    assert [experiment.affordable(described(one)) for one in (few, many, untrained("source"))] == [True, False, True]


def test_means_over_items_and_corpora_are_compared_as_well():
    experiment = RULES["qlora-5"].experiment
    row = next(row for row in filled(experiment, {}, {}) if row["split"] == "test" and row["task"] == "source" and row["rate"])
    (line,) = experiment.differences([row], [row | {"right": [2 for _ in row["right"]]}])
    assert "right:" in line
    (line,) = experiment.differences([row], [row | {"general": {name: 99.0 for name in row["general"]}}])
    assert "general: 99.0" in line, "what is forgotten decides choices, too"


def test_rows_of_other_statements_in_a_store_are_not_these(monkeypatch):
    experiment = RULES["qlora-5"].experiment
    mine, other = [{"task": "source", "method": method, "examples": 500} for method in ("qlora", "prefix")]
    monkeypatch.setattr(searches, "_of_today", lambda path, changed: [mine, other])
    monkeypatch.setattr(protocol, "compute", lambda *args, **options: [mine, other])
    assert experiment.compute(searches.ROWS) == [mine]


def test_the_league_table_has_what_was_chosen_what_it_costs_and_how_it_did():
    case, methods = Case("source", 500), ("full", "lora", "prompt")
    rows = filled(league.league(methods, [case]), {"lora": 0.9, "full": 0.6, "prompt": 0.1}, {"full": 0.5})
    first, second, third = standings(case, methods, rows)
    assert (first.method, second.method, third.method) == ("lora", "full", "prompt")
    assert first.trial.rate == pytest.approx(8e-3, rel=0.5) and second.storage == STORED["full"]
    assert first.flops < second.flops, "the gradients of the frozen weights are not computed"
    assert second.cloze.value == pytest.approx(-0.5) and second.forgets.value == pytest.approx(0.5)
    assert first.right.low <= first.right.value <= first.right.high and first.loss.value < third.loss.value
    text = as_text(standings(case, methods, rows)).splitlines()
    assert text[0].split()[:3] == ["method", "trained", "bytes"] and len({len(line) for line in text}) == 1
    assert [line.split()[0] for line in text[1:]] == ["lora", "full", "prompt"]
    assert standings(case, ("full", "vera"), rows)[0].method == "full", "a method without rows is left out"


def test_pairs_have_the_differences_of_the_methods_whose_rows_are_there():
    case, methods = Case("source", 500), ("full", "lora", "prompt")
    rows = filled(league.league(methods, [case]), {"lora": 0.9, "full": 0.6, "prompt": 0.6}, {})
    found = pairs(case, (*methods, "vera"), rows)
    assert next(iter(found)) == ("lora", "full") and len(found) == 6
    assert found["lora", "full"].better.value == pytest.approx((0.9 - 0.6) / 2, abs=1 / ITEMS)
    assert {pair: one.sign for pair, one in found.items() if "lora" in pair} == {
        ("lora", "full"): "+", ("lora", "prompt"): "+", ("full", "lora"): "-", ("prompt", "lora"): "-",
    }  # fmt: skip
    assert matrix(case, found).splitlines()[1].split() == ["1", "lora", ".", "+", "+"]
    assert pairs(case, ("vera",), rows) == {}


@pytest.mark.parametrize("low, high, sign, word", [
    (0.01, 0.03, "+", "better"), (-0.03, -0.01, "-", "worse"), (-0.01, 0.01, "=", "equal"), (-0.03, 0.01, "?", "undecided"),
    (0.005, 0.015, "+=", "better, by less than 0.02"), (-0.015, -0.005, "-=", "worse, by less than 0.02"),
])  # fmt: skip
def test_a_sign_says_what_the_word_says(low, high, sign, word):
    found = comparison.Difference(Estimate((low + high) / 2, low, high), 0.02)
    assert (found.sign, found.word) == (sign, word)


GAIN = " (8: 0.010 better on validation)"


@pytest.mark.parametrize("epochs, longer, better, said", [
    ((4, 4), 2.99, 1, f", the first within 4 epochs{GAIN}, the other within 4 epochs{GAIN}"), ((4, 2), 2.99, -1, f", within 4 epochs{GAIN}"),
    ((4, 2), 2.99, 1, ""), ((2, 4), 2.99, 1, f", within 4 epochs{GAIN}"), ((2, 4), 2.99, 0, ""), ((2, 2), 2.99, 1, ""),
    ((4, 4), 3.0 - protocol.LEAST, 1, ""), ((4, 2), None, -1, ""), ((2, 4), "not run", 1, ", within 4 epochs"),
])  # fmt: skip
def test_where_more_epochs_may_change_a_difference_it_is_said(epochs, longer, better, said):
    """Of the worse method that stopped at the most epochs allowed, and of both, unless twice as many are no better."""
    def find(trial: protocol.Trial) -> dict | None:
        return {"loss": 3.0} if trial.epochs <= 4 else None if longer == "not run" else {"loss": longer}

    ways = [search("source", method, 5000) for method in ("full", "lora")]
    found = [protocol.Report(replace(of.start, epochs=n), np.full((5, 4), v) + np.eye(5, 4) / 100, None) for of, n, v in zip(ways, epochs, (better, 0.0))]
    assert comparison._limit(find, Pair("", "full", ways[0], "lora", ways[1]), *found, "right") == said
    fixed = [search("source", method, 5000, axes=("rate",)) for method in ("full", "lora")]
    assert comparison._limit(find, Pair("", "full", fixed[0], "lora", fixed[1]), *found, "right") == "", "nobody searched for epochs"


def test_a_lesson_prints_the_rows_that_are_there_and_says_which_are_missing():
    rows = filled(league.league(("full", "lora"), [Case("source", 500)]), {}, {})
    lines = so_far(["lora", "full", "prompt"], rows=rows).splitlines()
    assert lines[:2] == ["rewrite, 500 examples", "rows still to come: lora, full, prompt"]
    assert lines[3].startswith("source, 500 examples (the base: loss 3.000, right 40")
    assert {line.split()[0] for line in lines[5:7]} == {"full", "lora"} and lines[7:] == ["rows still to come: prompt"]
    assert so_far(["vera"], rows=[]).count("rows still to come: vera") == 2


def general(rows: list[dict], text: Callable[[dict], float]) -> list[dict]:
    """The rows with another loss on general text."""
    return [r | {"general": {"austen": text(r)}} if r["loss"] is not None else r for r in rows]


def test_general_items_tell_more_than_general_text_where_it_misleads():
    rule = RULES["best-9"]
    memory = {"full": 0.4, "lora": 0.8, "prefix": 0.9}
    rows = filled(rule.experiment, {}, memory)
    same = rule.judge(rows)
    assert same.verdict == IF
    assert same.effect.value == pytest.approx(1)
    assert "misleads in: none." in same.because
    kept = {row["method"]: row["general"]["austen"] for row in rows}
    other_way = general(rows, lambda r: kept["full"] if r["method"] == "prefix" else kept["prefix"] if r["method"] == "full" else kept[r["method"]])
    misled = rule.judge(other_way)
    assert misled.verdict == HOLDS
    assert "full beside prefix, rewrite, 50 examples" in misled.because.lower()
    unmoved = rule.judge(general(rows, lambda r: kept["base"]))
    assert unmoved.verdict == HOLDS
    assert "full, rewrite, 50 examples: items alone" in unmoved.because
    assert rule.judge(filled(rule.experiment, {}, dict.fromkeys(TABLE, 1.0))).verdict == NOT


def test_the_seconds_of_a_run_are_its_steps_by_their_pace(monkeypatch):
    trial = Trial("rewrite", "scratch", 50, 1e-3, epochs=8, batch_size=4)
    monkeypatch.setattr(seconds, "measured", lambda: {("full", "rewrite", 4): 0.5})
    assert seconds.seconds(trial) == 50, "from random weights as in full fine-tuning"
    assert seconds.seconds(replace(trial, batch_size=8)) is None


def test_every_line_of_the_league_has_its_seconds():
    for case in comparison.CASES:
        assert all(line.seconds > 0 for line in standings(case)), "python -m minipeft claims --run all measures them"


def test_a_task_without_choices_has_no_column_of_right_ones():
    rows = filled(league.league(("full", "lora"), [Case("rewrite", 500)]), {}, {})
    head, *lines = as_text(standings(Case("rewrite", 500), ("full", "lora"), rows)).splitlines()
    assert "right, %" not in head and {line.split()[0] for line in lines} == {"full", "lora"}
