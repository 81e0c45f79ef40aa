"""Experiments: a run measures what it says, a sweep loses nothing, and verdicts follow from the rows alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from experiments import forgetting, items, practice, real_llm

import minipeft as mp
from minipeft.claims import data, protocol
from minipeft.claims.league import MAIN, league
from minipeft.claims.register import ROWS
from minipeft.claims.statistics import crossed
from minipeft.experiments import seeds, shipped
from minipeft.experiments.costs import latency, memory, merged
from minipeft.experiments.rows import add_row, read_rows
from minipeft.experiments.run import Settings, TaskData, evaluate, fine_tune, l2_sp, with_dropout
from minipeft.peft.methods import METHODS
from minipeft.text.examples import Example

RESULTS = Path(__file__).parent.parent / "lessons" / "results"


@pytest.fixture(scope="module")
def base():
    config = mp.TransformerConfig.llama(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1,
    )  # fmt: skip
    return mp.Transformer(config, seed=0)


def examples(n, seed, offset):
    """Sequences in which every token is the one before plus `offset`: something that can be learned."""
    starts = np.random.default_rng(seed).integers(2, 32, n)
    rows = [2 + (start - 2 + offset * np.arange(8)) % 30 for start in starts]
    return [Example(ids, np.where(np.arange(8) < 2, -100, ids)) for ids in rows]


@pytest.fixture(scope="module")
def task():
    return TaskData(examples(64, 0, 3), examples(16, 1, 3), examples(16, 2, 5), examples(10, 3, 5), 0)


S = Settings(learning_rate=1e-2, steps=8, batch_size=8)


# --------------------------------------------------------------------------------------------------------- one run


def test_a_run_measures_the_model_that_it_returns_and_leaves_the_base_as_it_was(base, task):
    before = {name: p.data.copy() for name, p in base.named_parameters()}
    row, model = fine_tune(base, task, replace(S, evaluations=4))
    assert (row["task_loss"], row["general_loss"]) == pytest.approx(evaluate(model, task), rel=1e-6)
    assert row["task_loss"] < evaluate(base, task)[0]
    assert [step for step, _ in row["curve"]] == list(range(1, 9))
    assert [step for step, _ in row["held_out_curve"]] == [2, 4, 6, 8]
    assert row["train_loss"] == pytest.approx(np.mean([loss for _, loss in row["curve"][-2:]]))
    assert all(np.array_equal(p.data, before[name]) for name, p in base.named_parameters())


def test_the_seed_decides_everything(base, task):
    rows = [fine_tune(base, task, replace(S, seed=seed, dropout=0.1))[0] for seed in (0, 0, 1)]
    for row in rows:
        del row["seconds_per_step"]
    assert rows[0] == rows[1] != rows[2]


def test_an_adapter_starts_from_the_seed(base, task):
    (_, a), (_, b) = (fine_tune(base, task, Settings("lora", 1e-9, 1, 2, seed=seed)) for seed in (3, 4))
    path = "base_model.model.layers.0.mlp.up_proj.default.lora_A"
    assert abs(a.state_dict()[path] - b.state_dict()[path]).max() > 0.1


@pytest.mark.parametrize("steps, evaluations, at", [(50, 4, [13, 26, 39, 50]), (8, 3, [3, 6, 8]), (3, 4, [1, 2, 3])])
def test_evaluations_are_evenly_spaced_and_end_with_the_run(base, task, steps, evaluations, at):
    row, _ = fine_tune(base, task, replace(S, steps=steps, evaluations=evaluations, batch_size=2))
    assert [step for step, _ in row["held_out_curve"]] == at


def test_a_wide_model_gets_the_rate_that_finetune_gives_it(task):
    config = mp.TransformerConfig.llama(
        vocab_size=32, hidden_size=256, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )  # fmt: skip
    wide = mp.Transformer(config, seed=0)
    row, _ = fine_tune(wide, task, Settings("lora", steps=1, batch_size=2))
    assert row["rate"] == METHODS["lora"].learning_rate / 2


def test_the_seconds_of_a_step_are_those_that_were_measured(base, task, monkeypatch):
    write = mp.train.metrics.Metrics.write
    monkeypatch.setattr(mp.train.metrics.Metrics, "write", lambda self, record: write(self, record | {"seconds": 0.125}))
    assert fine_tune(base, task, replace(S, steps=3))[0]["seconds_per_step"] == 0.125


def test_a_step_in_parts_is_the_same_step(base, task):
    whole, parts = (fine_tune(base, task, replace(S, accumulation=n))[0]["task_loss"] for n in (1, 4))
    assert parts == pytest.approx(whole, abs=1e-4)
    with pytest.raises(ValueError, match="8 examples cannot be cut into 3 equal parts"):
        fine_tune(base, task, replace(S, accumulation=3))
    with pytest.raises(ValueError, match="15 examples cannot be cut into 4 equal parts"):
        fine_tune(base, task, replace(S, accumulation=4, replay=0.9))


def test_replay_keeps_what_it_replays(base, task):
    _, pretrained = fine_tune(base, task._replace(train=task.replay * 8), replace(S, steps=40))
    learned, kept = (fine_tune(pretrained, task, replace(S, steps=16, replay=r))[0]["general_loss"] for r in (0.0, 1.0))
    assert kept < learned
    with pytest.raises(ValueError, match="no general text to replay"):
        fine_tune(base, task._replace(replay=[]), replace(S, replay=0.5))


def test_the_penalty_of_l2_sp_is_half_alpha_times_the_squared_distance(base, task):
    model = base.copy().requires_grad_(True)
    loss = l2_sp(model, alpha=0.5)
    ids, labels = (np.stack(arrays) for arrays in zip(*task.train[:4]))
    plain = model.loss(input_ids=ids, labels=labels).item()
    assert loss(model, input_ids=ids, labels=labels).item() == pytest.approx(plain)
    moved = 0.0
    for p in model.parameters():
        p.data = p.data + np.float32(0.01)
        moved += p.size * 1e-4
    far = model.loss(input_ids=ids, labels=labels).item()
    assert loss(model, input_ids=ids, labels=labels).item() == pytest.approx(far + 0.25 * moved, rel=1e-4)
    with mp.no_grad():
        assert loss(model, input_ids=ids, labels=labels).item() == pytest.approx(far)


def test_l2_sp_is_a_leash(base, task):
    def distance(alpha):
        _, model = fine_tune(base, task, replace(S, l2_start=alpha))
        return sum(float(((p.data - q.data) ** 2).sum()) for p, q in zip(model.parameters(), base.parameters()))

    assert distance(100.0) < distance(1.0) < distance(0.0)


def test_dropout_is_put_into_a_twin(base):
    twin, ids = with_dropout(base, 0.5), np.arange(2, 10)[None]
    assert np.array_equal(twin(ids).data, base(ids).data)
    assert not np.array_equal(twin(ids, rng=0).data, base(ids, rng=0).data)
    assert np.array_equal(base(ids, rng=0).data, base(ids).data)
    assert all(p.data is q.data for p, q in zip(twin.parameters(), base.parameters()))


def test_a_run_that_diverges_is_a_row_without_losses(base, task):
    row, _ = fine_tune(base, task, replace(S, learning_rate=1e30))
    assert row["task_loss"] is None and row["general_loss"] is None and row["curve"] == []
    assert json.loads(json.dumps(row, allow_nan=False)) == row


# ------------------------------------------------------------------------------------------------------------ costs


def test_merged_models_compute_the_same_and_soft_prompts_have_none(base, task):
    ids = np.arange(2, 12)[None]
    for method in ("full", "lora", "ia3"):
        _, model = fine_tune(base, task, replace(S, method=method, steps=2))
        assert np.allclose(merged(model)(ids).data, model(ids).data, atol=1e-4), method
    for method in ("bottleneck", "prompt", "prefix"):
        assert merged(METHODS[method].prepare(base, 2)) is None, method


def test_costs_are_measured_on_the_models_own_device(xp, base, task):
    there = base.copy().to(xp)
    assert 0 < latency(there, prompt=4, tokens=2, passes=1) < 10
    if xp.__name__ != "strict_device":  # whose arrays have objects of their own beside the numbers
        _, measured = memory(METHODS["full"], there, task.train, 2, 0)
        assert measured > 4 * sum(p.data.nbytes for p in base.parameters())  # weights, gradients, two moments


# ---------------------------------------------------------------------------------------------------- the shipped task


def test_what_is_held_out_depends_on_no_seed():
    a, b = shipped.rewriting(4, 0), shipped.rewriting(4, 1)
    assert a.held_out is b.held_out and a.general is b.general and len(a.held_out) == shipped.HELD_OUT_VERSES
    assert not all(np.array_equal(x.input_ids, y.input_ids) for x, y in zip(a.train, b.train))


# ------------------------------------------------------------------------------------------------------ differences


def test_a_difference_is_clear_where_its_interval_excludes_zero():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.5, 2.9])
    assert seeds.below(a, b) is None
    assert seeds.below(a, a + 1) is True and seeds.below(a + 1, a) is False
    assert seeds.below(a, a) is None and seeds.below(a, np.array([2.0, 3.0, np.nan])) is None
    small = np.array([0.1, 0.2, 0.3])  # its interval is 0.2 ± 0.248
    assert seeds.below(a, a + small) is None and seeds.below(a, a + small + 0.1) is True
    assert seeds.below(a[:1], b[:1]) is None  # one seed has no interval
    ten = np.arange(-2.0, 8.0)  # 2.5 ± 2.17, with some seeds on either side
    assert seeds.below(np.zeros(10), ten) is True and seeds.below(np.zeros(10), ten - 0.4) is None
    assert seeds.spread(a) == "2.000 ± 2.484" and seeds.spread(a[:1]) == "1.000"


def test_nothing_beats_a_point_of_the_frontier():
    points = [tuple(p) for p in np.random.default_rng(0).random((50, 2))]
    edge = forgetting.frontier(points)
    assert set(edge) <= set(points)
    for p in points:
        beaten = any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
        assert (p in edge) == (not beaten)


# -------------------------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    ("name", "searches"),
    [("14_best_practices", practice.SEARCHES), ("15_forgetting", forgetting.SEARCHES)],
)
def test_the_shipped_rows_are_those_that_the_searches_need(name, searches):
    rows = practice.known(searches, RESULTS / f"{name}.jsonl")
    assert not protocol.wanted(protocol.finder(rows), searches)
    own = [row for row in read_rows(RESULTS / f"{name}.jsonl") if row["run"] == "Trial"]
    assert own and {row["minipeft"] for row in own} == {mp.__version__}
    league = {protocol.trial_of(row) for row in read_rows(ROWS / "league.jsonl")}
    assert league.isdisjoint(map(protocol.trial_of, own)), "the league has it: no run of the lesson would compute it again"
    for row in own:
        others = [other for other in rows if protocol.trial_of(other) != protocol.trial_of(row)]
        assert protocol.trial_of(row) in protocol.wanted(protocol.finder(others), searches), "nobody needs it"


def test_general_text_read_again_by_block_is_what_the_rows_of_the_trials_say_by_kind():
    store = RESULTS / "15_forgetting.jsonl"
    find = protocol.finder(practice.known([*league(MAIN).searches, *forgetting.SEARCHES], store))
    read = forgetting.blocks(store)
    assert len(read) > 90
    for trial, nats in read.items():
        kinds = nats.reshape(-1, protocol.BLOCKS).mean(axis=1) / (protocol.LENGTH - 1)
        assert kinds == pytest.approx([*find(trial)["general"].values()], abs=1e-4)
    assert {protocol.Trial(**vars(one)) for one in forgetting.read_again(find)} == read.keys(), "all are there, and no other"


def test_the_shipped_rows_of_the_way_back_lie_between_the_base_and_the_leagues():
    find = protocol.finder(practice.known(forgetting.SEARCHES, RESULTS / "15_forgetting.jsonl"))
    task = forgetting.walked(RESULTS / "15_forgetting.jsonl", "task")
    assert [*task] == [0.0, 0.25, 0.5, 0.75, 1.0] and {losses.shape for losses in task.values()} == {(len(protocol.SEEDS), protocol.ITEMS["rewrite"])}
    assert np.allclose(task[0.0][0], find(protocol.untrained("rewrite"))["nll"], atol=1e-3)
    ends = [find(forgetting.Way(1.0, seed).to)["nll"] for seed in protocol.SEEDS]
    assert np.allclose(task[1.0].mean(axis=1), np.mean(ends, axis=1), atol=0.05)  # nats a verse: another processor's rounding


def test_the_way_back_leads_from_the_base_to_the_model():
    start = shipped.base()[0]
    far = start.copy()
    for p in far.parameters():
        p.data += 1
    for share in (0.0, 0.25, 1.0):
        moved = forgetting.between(share, far)
        assert all(np.allclose(p.data, q.data + share, atol=1e-6) for p, q in zip(moved.parameters(), start.parameters()))


def test_a_row_of_another_base_is_not_known(tmp_path):
    own = next(row for row in read_rows(RESULTS / "14_best_practices.jsonl") if row["run"] == "Trial")
    for version in ("00000000", None):
        add_row(tmp_path / "rows.jsonl", own | {"version": version})
    league = practice.known(practice.SEARCHES, tmp_path / "none.jsonl")
    assert practice.known(practice.SEARCHES, tmp_path / "rows.jsonl") == league


# -------------------------------------------------------------------------------------------------------------- lesson 13


def test_a_copied_verse_is_told_from_a_rewriting_and_the_best_rate_is_validations():
    asked = real_llm.verses("test", 3)

    def row(rate, texts, split="test", nats=30.0):
        of = {"rate": rate, "split": split, "nats": [nats + i for i in range(3)], "tokens": [20, 25, 30]}
        similar = {name: real_llm.similar(texts, [getattr(r, side) for r in asked]) for name, side in (("similar", "output"), ("copied", "input"))}
        return of | similar | {"plain": real_llm.plain(texts)}

    copies, references = ([getattr(r, side) for r in asked] for side in ("input", "output"))
    start, tried = row(0.0, ["Yes."] * 3, nats=50.0), [row(rate, copies, "validation", nats) for rate, nats in ((1e-3, 32), (2e-3, 31), (4e-3, 33))]
    assert real_llm.best_rate([start, *tried]) == 2e-3
    assert {rate: e.value for rate, e in real_llm.margins([start, *tried]).items()} == pytest.approx({1e-3: 3 / 75, 4e-3: 6 / 75})
    copied, rewritten = (real_llm.found([start, *tried, row(2e-3, texts), row(2e-3, texts)]) for texts in (copies, references))
    assert copied["copied"]["after"].value == 100 and copied["chrF"]["over the copy"].value == copied["plain"]["over the copy"].value == 0
    assert rewritten["chrF"]["after"].value == 100 and rewritten["copied"]["over the copy"].high < 0 < rewritten["plain"]["over the copy"].value
    assert rewritten["loss"]["gained"].value == pytest.approx(20 / 25)
    assert copied["copied"]["the reference"].value == pytest.approx(real_llm.similar(references, copies).mean())


def test_a_drawn_answer_is_labeled_up_to_its_end_and_its_padding_is_not(monkeypatch):
    tokenizer = SimpleNamespace(pad=lambda prompts, side: (np.zeros((2, 3), int), None), eos_token_id=2)
    monkeypatch.setattr(real_llm, "generate", lambda *a, **k: np.array([[0, 0, 0, 7, 2, 2], [0, 0, 0, 5, 6, 7]]))
    ended, cut = real_llm.drawn(None, tokenizer, [[4, 4], [3, 3, 3]], 3)
    assert ended.input_ids.tolist() == [4, 4, 7, 2] and ended.labels.tolist() == [-100, -100, 7, 2]
    assert cut.input_ids.tolist() == [3, 3, 3, 5, 6, 7] and cut.labels.tolist() == [-100] * 3 + [5, 6, 7]


# --------------------------------------------------------------------------------------------- lessons 17 and 19, by record


def test_losses_by_record_have_the_interval_of_the_ratio_and_add_up():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 60)
    a, b = (tokens * 3 + rng.normal(size=(5, 60)) * 10 + shift for shift in (0, 4))
    assert np.allclose(crossed(items.per_token(a, tokens)), crossed(a, tokens))
    assert np.allclose(crossed(items.per_token(b, tokens) - items.per_token(a, tokens)), crossed(b - a, tokens))
    assert np.allclose(items.per_token(a, tokens).mean(axis=1), a.sum(axis=1) / tokens.sum())
    x, y = items.per_token(a, tokens), items.per_token(b, tokens) + 1
    assert items.below(x, y) is True and items.below(y, x) is False and items.below(x, x[::-1]) is None
    mean = crossed(items.both(x, y))
    assert np.isclose(mean.value, (x.mean() + y.mean()) / 2)
    assert mean.high - mean.low < max(e.high - e.low for e in (crossed(x), crossed(y))), "of two sets, not of one whose means differ"


def test_a_ratio_has_the_interval_of_the_linear_one():
    rng = np.random.default_rng(1)
    b = 5 + rng.normal(size=(5, 400))
    a = 0.25 * b + 0.01 * rng.normal(size=b.shape)
    found = items.ratio(a, b)
    assert found.low < 0.25 < found.high and found.high - found.low < 0.002, "what both share does not count"
    assert items.within(a - 0.25 * b, 0.01) and not items.within(a, 0.01)


def test_the_test_records_are_those_of_the_protocol_and_of_the_test_split():
    asked = data.asked("rewrite", "test", 12)
    assert [len(e.input_ids) for e in items.test("rewrite", 12)] == [len(e.input_ids) for e in data.encode(asked)]
    assert items.tokens(items.test("define", 3)).min() > 0 and len(items.test("define")) == 512
