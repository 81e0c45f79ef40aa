"""The protocol of the claims: intervals that cover, tuning that ends inside, examples of the kind that is named."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from models import unlearned

from minipeft.claims import data, protocol
from minipeft.claims.comparison import CASES
from minipeft.claims.league import AT_ONE_SETTING, FROM_SECOND_START, MAIN, UNTRAINED
from minipeft.claims.protocol import TABLE, Trial, climb, finder, neighbors, report, search, tuned, untrained, wanted
from minipeft.claims.register import ROWS, rule_of, statements
from minipeft.claims.searches import Searches
from minipeft.claims.statistics import crossed, right, spreads
from minipeft.evaluation.intervals import Estimate, mean, share
from minipeft.experiments.rows import described
from minipeft.hub.base import load_base
from minipeft.text.datasets import MultipleChoice


def drawn_at_random(S: int, n: int, a: float, b: float, e: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return a * rng.normal(size=(S, 1)) + b * rng.normal(size=n) + e * rng.normal(size=(S, n))


def bootstrap(y: np.ndarray, weights: np.ndarray | None = None, draws: int = 2000, seed: int = 0) -> Estimate:
    """The same mean; its interval from `draws` samples of the seeds and, independently, of the items: percentiles."""
    w = np.ones(y.shape[1]) if weights is None else weights
    mean, (S, n), rng = y.sum() / (len(y) * w.sum()), y.shape, np.random.default_rng(seed)
    seeds = rng.multinomial(S, np.full(S, 1 / S), draws) / S  # [draws, seeds]: how often each is drawn
    items = rng.multinomial(n, np.full(n, 1 / n), draws)  # [draws, items]
    means = ((seeds @ y) * items).sum(axis=1) / (items @ w)
    return Estimate(mean, *(float(q) for q in np.quantile(means, (0.025, 0.975))))


@pytest.mark.parametrize("a, b, e", [(0.05, 0.1, 0.1), (0.003, 0.3, 0.1), (0.01, 0.1, 0.1), (0, 0, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(a, b, e):
    found = [crossed(drawn_at_random(5, 512, a, b, e, seed)) for seed in range(400)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.91 <= covered <= 0.99  # 0.95 within 3.7 of its standard errors, or a little more: the interval is approximate


@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 7])
def test_three_seeds_cover_the_truth_as_well(level):
    """Their variance looks like 0 by luck more often; one SD of a seed's mean is the error of its 256 items here."""
    found = [crossed(drawn_at_random(3, 256, (3 / 256) ** 0.5, 0.3, 1.0, seed), level=level) for seed in range(1500)]
    missed, luck = np.mean([not one.low <= 0 <= one.high for one in found]), ((1 - level) * level / 1500) ** 0.5
    assert missed < 1 - level + 3 * luck


@pytest.mark.parametrize("r", [0.0, 0.8])
def test_the_ratio_of_two_spreads_is_covered_where_a_seeds_values_go_together(r):
    rng = np.random.default_rng(0)
    draws = [rng.multivariate_normal([0, 0], [[9, 3 * r], [3 * r, 1]], size=5).T for _ in range(4000)]
    covered = np.mean([one.low <= 3 <= one.high for one in (spreads(a, b) for a, b in draws)])
    assert abs(covered - 0.95) < 0.011  # three standard errors


def test_without_luck_of_items_it_is_students_interval_over_the_seeds():
    seeds = np.array([1.0, 1.2, 0.9, 1.4, 1.1])
    assert crossed(np.repeat(seeds[:, None], 50, axis=1)) == pytest.approx(mean(seeds))


def test_the_bootstrap_agrees_where_the_items_decide():
    y = drawn_at_random(40, 300, 0.0, 0.3, 0.3, 0)
    weights = np.random.default_rng(1).integers(5, 50, 300).astype(float)
    a, b = crossed(y * weights, weights), bootstrap(y * weights, weights)
    assert a.value == pytest.approx(b.value)
    assert a.value == pytest.approx((y * weights).sum() / (40 * weights.sum()))
    assert a.high - a.low == pytest.approx(b.high - b.low, rel=0.1)


def test_a_share_without_a_seed_and_one_of_none_have_the_interval_of_their_items():
    many = np.random.default_rng(0).integers(0, 2, (5, 40))
    assert right(many) == crossed(many) and right(many[:1]) == share(many[0])
    assert right(0 * many) == share(np.zeros(40)) and right(0 * many).high > 0.05, "0 of 40 may be one in twenty"


def test_one_seed_has_no_interval_and_nothing_infinite_has_a_mean():
    assert crossed(np.ones((1, 4))) == (1.0, None, None)
    with pytest.raises(ValueError, match="finite"):
        crossed(np.array([[1.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="seeds, items"):
        crossed(np.ones(4))


def test_climbing_ends_where_no_neighbor_is_better_by_enough():
    scores = {x: (x - 7) ** 2 for x in range(20)} | {8: -0.001}
    assert climb(scores.get, 0, lambda x: [[x - 1, x + 1] if x else [1]], least=0.01) == (7, [])
    assert climb({0: 1.0}.get, 0, lambda x: [[x - 1, x + 1]]) == (0, [-1, 1])
    assert climb({}.get, 0, lambda x: [[x - 1, x + 1]]) == (0, [0])


def test_a_search_says_how_many_examples_it_may_have():
    assert search("rewrite", "lora", 10_000).most == protocol.PASSES[10_000][1]
    with pytest.raises(ValueError, match="at most 10,000 examples, got 10,001"):
        search("rewrite", "lora", 10_001)


def test_climbing_goes_on_one_axis_after_the_other_and_comes_back():
    asked = {}

    def score(point):
        asked[point] = (point[0] - 3) ** 2 + (point[1] - point[0]) ** 2
        return asked[point]

    plane = lambda p: [[(p[0] - 1, p[1]), (p[0] + 1, p[1])], [(p[0], p[1] - 1), (p[0], p[1] + 1)]]  # noqa: E731
    at, unknown = climb(score, (0, 0), plane)
    assert not unknown and all(asked[at] <= score(p) for points in plane(at) for p in points)
    assert at == (2, 2) and len(asked) < 25
    scores = {(1, 0): -1, (0, 1): -2, (0, 2): -3}
    assert climb(lambda p: scores.get(p, 0), (0, 0), plane) == ((1, 0), []), "the first axis goes first"


def test_a_neighbor_is_a_factor_of_two_away_and_allowed():
    at = Trial("rewrite", "lora", 500, 1e-3, 8, 1, 0)
    found = [[(t.rate, t.epochs, t.batch_size) for t in axis] for axis in neighbors(at, protocol.AXES, 8)]
    assert found == [[(5e-4, 8, 1), (2e-3, 8, 1)], [(1e-3, 4, 1)], [(1e-3, 8, 2)]]
    assert [[t.epochs for t in axis] for axis in neighbors(at, ("rate",), 8)] == [[8, 8]]


def simulated(trial: Trial) -> dict:
    """A row as `protocol.run` gives, of a loss with its best at the rate 4e-3 and four epochs."""
    luck = np.random.default_rng(trial.seed).normal(size=4) / 100
    if trial.rate is None:
        return {"loss": 4.0, "nll": [8.0, 8.0, 8.0, 8.0], "tokens": [2, 2, 2, 2]}
    loss = 2 + 0.1 * abs(np.log2(trial.rate / 4e-3)) + 0.1 * abs(np.log2(trial.epochs / 4)) + 0.1 * (trial.batch_size != 16)
    return {"loss": None if trial.rate > 0.1 else loss, "nll": (2 * (loss + luck)).tolist()}


def test_a_search_is_tuned_on_validation_and_reported_on_test_under_other_seeds():
    rows, of = [], search("rewrite", "lora", 500)
    for _ in itertools.count():
        trials = wanted(finder(rows), [of])
        if not trials:
            break
        assert report(finder(rows), of) is None
        rows += [described(t) | simulated(t) for t in trials]
    best, rest = tuned(finder(rows), of)
    assert not rest
    assert (best.epochs, best.batch_size, best.seed) == (4, 16, protocol.TUNING)
    assert abs(np.log2(best.rate / 4e-3)) <= 0.5
    tested = [row for row in rows if row["split"] == "test" and row["rate"] is not None]
    assert {row["seed"] for row in tested} == set(protocol.SEEDS)
    assert protocol.TUNING not in protocol.SEEDS
    made = report(finder(rows), of)
    assert made.values.shape == (5, 4)
    gain = protocol.difference(made, report(finder(rows), untrained("rewrite")))
    assert gain.low < gain.value < gain.high < 0


def test_another_method_is_reported_at_the_setting_that_a_search_ended_at():
    of, rows = search("rewrite", "lora", 500), []
    beside = protocol.At("full", of)
    while trials := wanted(finder(rows), [beside]):
        rows += [described(t) | simulated(t) for t in trials]
    best, found = tuned(finder(rows), of)[0], report(finder(rows), beside)
    assert found.trial == replace(best, method="full")
    assert {(row["seed"], row["split"]) for row in rows if row["method"] == "full"} == {(seed, "test") for seed in protocol.SEEDS}
    assert not AT_ONE_SETTING.missing(AT_ONE_SETTING.rows()) and not FROM_SECOND_START.missing(FROM_SECOND_START.rows())


def test_what_is_not_trained_is_reported_as_it_is():
    few, base = untrained("source", 2), untrained("source")
    assert wanted(finder([]), [few]) == [few, base]
    rows = [described(one) | {"loss": 2.0, "nll": [4.0, 4.0 + loss], "tokens": [2, 2]} for one, loss in ((few, 2.0), (base, 0.0))]
    assert wanted(finder(rows), [few]) == []
    assert report(finder(rows), few).mean.value == pytest.approx(10 / 4)


def test_examples_in_the_prompt_were_tried_on_both_tasks():
    rows = UNTRAINED.rows()
    assert not UNTRAINED.missing(rows)
    assert {(row["task"], row["examples"]) for row in rows} == {(task, n) for task in ("rewrite", "source") for n in (0, *protocol.SHOTS)}


def test_what_diverged_is_worse_than_all_else():
    of = search("rewrite", "lora", 500, rate=0.09, axes=("rate",))
    rows: list = []
    while trials := wanted(finder(rows), [of]):
        rows += [described(t) | simulated(t) for t in trials]
    assert tuned(finder(rows), of)[0].rate < 0.01


def searches_of(choice: protocol.Choice) -> list[protocol.Search]:
    """Those that a choice is made from."""
    if isinstance(choice, protocol.Search):
        return [choice]
    if isinstance(choice, protocol.Gentle):
        return [choice.of, choice.beside]
    if isinstance(choice, protocol.Fits):
        return [choice.of, *([] if choice.like is None else searches_of(choice.like))]
    if isinstance(choice, protocol.At):
        return [choice.of]
    return [*getattr(choice, "of", ())]


def shipped() -> dict[protocol.Choice, None]:
    """The choices of all statements and tables."""
    experiments = [rule.experiment for id in statements() if (rule := rule_of(id)) and isinstance(rule.experiment, Searches)]
    table = [search(case.task, m, case.examples) for case in CASES for m in (*TABLE, "scratch")]
    experiments += [AT_ONE_SETTING, FROM_SECOND_START]
    return dict.fromkeys([*table, *(choice for one in experiments for choice in one.searches)])


def test_no_row_of_the_test_is_kept_that_nothing_reports():
    rows = list(protocol.read_rows(ROWS / "league.jsonl"))
    find = finder(rows)
    reported = {trial for choice in shipped() for trial in protocol.reported(protocol.chosen(find, choice)[0])}
    kept = {trial for row in rows if row["split"] == "test" and (trial := protocol.trial_of(row)).rate is not None}
    assert len(kept) > 1000 and not kept - reported


def test_every_search_that_ended_has_tried_all_its_neighbors_and_none_is_better():
    """Of the shipped rows, for each statement and table: the best rate lies inside what was tried, with both half and twice of
    it worse or not better by LEAST; so do epochs and batch, or they are at an end of what is allowed, which is printed."""
    searches = dict.fromkeys(of for choice in shipped() for of in searches_of(choice))
    find, edges, ended = finder(Searches.of("league", searches).rows()), Counter(), []
    for of in searches:
        best, unknown = tuned(find, of)
        if unknown:
            continue
        ended.append(of)
        loss = find(best)["loss"]
        assert loss is not None, f"{best} diverged, and nothing better was found"
        allowed = {"rate": (0.0, np.inf), "epochs": (0.5, of.most), "batch_size": (1, min(64, best.examples))}
        for axis in of.axes:
            value, (least, most) = getattr(best, axis), allowed[axis]
            assert least <= value <= most, best
            for there in (value / 2, value * 2):
                if not least <= there <= most:
                    tried_beyond = of not in shipped() or all(map(find, protocol.beyond(of, best)))
                    assert tried_beyond, f"more epochs than those of {best} were not tried"
                    edges[f"{axis} {value:g} of {least:g} to {most:g}"] += 1
                    continue
                row = find(replace(best, **{axis: type(value)(there)}))
                assert row is not None, f"{axis} {there:g} beside {best} was not tried"
                assert row["loss"] is None or row["loss"] >= loss - protocol.LEAST, f"{axis} {there:g} is better than {best}"
    print(f"{len(ended)} searches ended, at an end of what is allowed: {dict(edges)}")
    assert {search(case.task, method, case.examples) for case in CASES for method in MAIN} <= {*ended}


# ------------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("task", data.TASKS)
def test_the_splits_are_large_enough_and_share_no_question(task):
    asked = {split: {q.prompt for q in data.questions(task, split)} for split in ("train", "validation", "test")}
    assert len(asked["validation"]) >= protocol.VALIDATION
    assert len(asked["test"]) >= protocol.ITEMS[task] >= 500
    assert len(asked["train"]) > 5000 + max(protocol.SEEDS)
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]


@pytest.mark.parametrize(("split", "n"), [("validation", protocol.VALIDATION), ("test", protocol.ITEMS["source"])])
def test_what_is_asked_is_from_each_book_as_often(split, n):
    asked = Counter(q.completion for q in data.asked("source", split, n))
    assert len(asked) == 3 and max(asked.values()) <= 1.1 * min(asked.values())


def test_a_seed_draws_its_own_examples_and_always_the_same():
    one, again, other = (data.drawn("source", 8, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, again))
    assert not all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, other))


@pytest.mark.parametrize("kind", ["random:0.5", "systematic:0.5", "off-topic:0.5"])
@pytest.mark.parametrize("task", data.TASKS)
def test_half_of_the_examples_are_spoiled(task, kind):
    clean, noisy = (data.drawn(task, 40, 3, kind) for kind in ("drawn", kind))
    changed = sum(not np.array_equal(a.input_ids, b.input_ids) for a, b in zip(clean, noisy))
    assert changed == 20
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(clean[:20], data.drawn(task, 20, 3))), "the clean part"


def test_skewed_examples_and_their_repetition():
    tokenizer = load_base()[1]

    def counts(kind: str) -> list[int]:
        texts = [tokenizer.decode(example.input_ids) for example in data.drawn("source", 60, 0, kind)]
        return [sum(book in text.partition("Book:")[2] for text in texts) for book in data.questions("source", "train")[0].choices]

    assert counts("skewed:0.8") == [48, 6, 6]
    assert counts("oversampled:0.8") == [48, 48, 48]


def test_easy_examples_have_the_lower_loss():
    model, tokenizer = load_base()
    losses = {}
    for kind in ("easy", "hard", "mixed"):
        drawn = data.drawn("source", 12, 0, kind)
        nll, tokens = protocol.example_losses(model, drawn, 8, tokenizer.pad_token_id)
        losses[kind] = (nll / tokens).mean()
        answers = [tokenizer.decode(one.labels[one.labels >= 0]) for one in drawn]
        assert len(set(answers)) == 3, "each answer has its easy and its hard ones"
    assert losses["easy"] < losses["mixed"] < losses["hard"]


def test_an_unknown_kind_or_task_says_so():
    with pytest.raises(ValueError, match="no 'best' examples"):
        data.drawn("source", 4, 0, "best")
    with pytest.raises(ValueError, match="rewrite and source, got 'define'"):
        data.questions("define", "train")


# --------------------------------------------------------------------------------------------------------------- trials


@pytest.fixture
def few(monkeypatch):
    """Eight items of each kind, so that a trial takes a second."""
    monkeypatch.setattr(protocol, "VALIDATION", 8)
    monkeypatch.setattr(protocol, "ITEMS", dict.fromkeys(data.TASKS, 8))
    block = data.Example(np.arange(20), np.arange(20))
    monkeypatch.setattr(data, "general", lambda n, length: {"austen": [block]})
    items = [MultipleChoice("In the beginning God made the", [" heaven", " banana"], 0)] * 4
    monkeypatch.setattr(protocol, "general_cloze", lambda: items)


def test_a_trial_trains_and_measures_item_by_item(few, monkeypatch):
    monkeypatch.setattr(protocol, "base", unlearned)
    base = protocol.run(untrained("source"))
    trial = Trial("source", "lora", 8, 1e-2, 2, 4, 1, "test")
    row = protocol.run(trial)
    assert row == protocol.run(trial)
    assert len(row["nll"]) == len(row["right"]) == len(base["tokens"]) == 8
    assert row["loss"] < base["loss"]
    assert row["general"].keys() == {"austen"}
    assert len(row["cloze"]) == 4
    assert "tokens" not in row
    shots = protocol.run(untrained("source", 2))
    assert len(shots["nll"]) == 8
    assert shots["nll"] != base["nll"]


def test_a_trial_that_diverges_is_worse_than_the_base(few):
    diverged = protocol.run(Trial("source", "full", 8, 1e6, 2, 4, 1))["loss"]
    assert diverged is None or diverged > protocol.run(untrained("source"))["loss"]


def test_from_scratch_begins_without_the_base(few):
    row = protocol.run(Trial("source", "scratch", 8, 1e-3, 0.5, 4, 1))
    assert row["loss"] > 6  # about the logarithm of the vocabulary
    assert row["trainable"] == sum(p.size for p in load_base()[0].parameters())


def test_equal_parameters_are_equal_and_every_method_fits_the_base():
    base, sizes = load_base()[0], {}
    for name, method in TABLE.items():
        model = method.prepare(base, 10)
        sizes[name] = sum(p.size for p in model.parameters() if p.requires_grad)
    assert TABLE["parallel"].config(10).scaling == TABLE["pfeiffer"].config(10).scaling == 1.0, "they differ in their place"
    assert sizes["lora-qv-r43"] == pytest.approx(sizes["lora"], rel=0.02)
    assert sizes["bottleneck-m37"] == pytest.approx(sizes["lora"], rel=0.02)
    assert sizes["bottleneck-m4"] == pytest.approx(sizes["lora-r1"], rel=0.06)


def test_general_text_is_held_out_text_of_each_corpus():
    found = data.general(4, 32)
    assert found.keys() == {"king-james", "basic-english", "austen", "wordnet"}
    assert all(len(example.input_ids) == 32 for blocks in found.values() for example in blocks)
    assert [len(blocks) for blocks in found.values()] == [4] * 4
