"""The experiments on mechanisms: projections, spectra, bits, laws and curves of which the answer is known; rules both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import pytest
from models import unlearned

from minipeft.backend import to_numpy
from minipeft.claims import intrinsic_dimension, memorization, speed, width
from minipeft.claims.intrinsic_dimension import (
    GRID,
    RANKS,
    Projection,
    Subspace,
    SubspaceAdam,
    log_size_at,
    non_decreasing,
    rank_at,
    truncated,
    update_spectrum,
)
from minipeft.claims.mechanisms import HOLDS, IF, NOT, ByItem, best_rate, curve, geometric, spread, train
from minipeft.claims.memorization import Memory, memorized, random_answers
from minipeft.claims.protocol import SEEDS
from minipeft.claims.register import UNTESTABLE, Number, Verdict
from minipeft.claims.speed import Curve, Pace, product, steps_to
from minipeft.claims.width import Law, Width, vertex
from minipeft.evaluation.intervals import Estimate
from minipeft.experiments.rows import described
from minipeft.experiments.shipped import base
from minipeft.nn.transformer import Transformer, TransformerConfig
from minipeft.text.examples import Example


def toy(seed: int = 0) -> Transformer:
    shape = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
    return Transformer(TransformerConfig.llama(max_position_embeddings=16, **shape), seed=seed)


def sequences(n: int = 8) -> list[Example]:
    drawn = np.random.default_rng(0).integers(1, 16, (n, 8))
    return [Example(ids, ids) for ids in drawn]


def evidence(verdict: Verdict) -> dict[str, Number]:
    return {number.name: number for number in verdict.evidence}


@pytest.fixture
def short(monkeypatch):
    """No neighbor is better by enough: a search ends after three rates."""
    for module in (intrinsic_dimension, memorization, speed):
        monkeypatch.setattr(module, "LEAST", 100.0)
    monkeypatch.setattr(width, "best_rate", lambda loss, rate: best_rate(loss, rate, 100.0))


# --------------------------------------------------------------------------------------------------------- what is shared


def test_a_best_rate_lies_inside_what_was_tried_and_a_divergence_is_worse_than_all():
    best, tried = best_rate(lambda rate: None if rate > 0.01 else (math.log2(rate) - math.log2(0.003)) ** 2, 0.008)
    assert best == 0.004
    assert tried.keys() == {0.002, 0.004, 0.008, 0.016}
    assert curve(tried)[-1] == [0.016, None]
    assert curve({1e-6: 0.1234567}) == [[1e-6, 0.12346]], "a rate may be small"


@dataclass(frozen=True)
class Cell:
    method: str
    seeds: tuple[int, ...] = (1, 2, 3)


def test_a_cell_is_checked_under_one_seed_at_the_rate_that_was_tuned():
    trained = []

    def run(cell, of_one=lambda rate: abs(math.log2(rate / 4))):
        def loss(rate):
            trained.append(rate)
            return of_one(rate)

        row = {"rates": {task: curve(best_rate(loss, start)[1]) for task, start in (("a", 1.0), ("b", 4.0))}}
        return row | {"losses": [[seed, seed + 1.0] for seed in cell.seeds], "of": {"x": [*cell.seeds]}, "tokens": [5, 6]}

    experiment = ByItem("mine", run, [Cell("full")])
    row = described(Cell("full")) | run(Cell("full"))
    assert len(row["rates"]["a"]) == 5 and len(row["rates"]["b"]) == 3
    trained.clear()
    for seed in range(4):
        assert experiment.check(row, Random(seed)) == [] and trained[2 * seed :] == [4.0, 4.0], "each search's best alone"
    (line,) = replace(experiment, run=partial(run, of_one=lambda rate: 9.0)).check(row, Random(0))
    assert line.startswith("run 0, rates: ")
    (line,) = experiment.check(row | {"of": {"x": [11, 12, 13]}}, Random(0))
    assert line.startswith("run 0, of: ")
    best_rate(lambda rate: abs(rate - 4), 4.0)  # nothing is left of what was recorded


def test_what_is_measured_again_may_differ_by_the_luck_of_seeds_and_no_more():
    rows = [described(Cell("full")) | {"share": [[0.8, x] for x in (0.4, 0.6, 0.8)], "size": 7} for _ in range(2)]  # 0.6, 0.7, 0.8
    experiment = ByItem("mine", None, [Cell("full")])
    assert spread(rows[0]) == {"share": pytest.approx(0.1)}
    assert experiment.differences(rows, [rows[0] | {"share": [1.25]}, rows[1]]) == []
    (line,) = experiment.differences(rows, [rows[0] | {"share": [1.35]}, rows[1]])
    assert line.startswith("run 0, share: 1.35, and 0.7")
    assert len(experiment.differences(rows, [rows[0] | {"size": 8}, rows[1]])) == 1


def test_a_geometric_mean_has_an_interval_around_it():
    found = geometric([1.0, 2.0, 3.0])
    assert found.value == 4
    assert found.low < 4 < found.high


# --------------------------------------------------------------------------------------------------- random subspaces


@pytest.mark.parametrize("D, d", [(12, 4), (13, 4), (100, 1), (37, 36), (20, 20)])
def test_the_columns_of_the_projection_are_orthonormal_and_down_is_its_transpose(D, d):
    P = Projection(D, d, 3, np.float32([0]))
    columns = np.stack([P.up(row) for row in np.eye(d, dtype=np.float32)], axis=1)
    assert np.allclose(columns.T @ columns, np.eye(d), atol=1e-6)
    assert np.allclose(np.stack([P.down(row) for row in np.eye(D, dtype=np.float32)]), columns, atol=1e-6)
    assert (np.count_nonzero(columns, axis=1) == 1).all()


def test_the_projection_keeps_the_share_of_a_vector_that_a_dense_random_one_keeps():
    D, d = 200, 20
    v = np.linspace(1, 3, D).astype(np.float32)  # all of one sign: the signs of P must make up for it
    kept = [np.sum(Projection(D, d, seed, v).down(v) ** 2) / np.sum(v**2) for seed in range(400)]
    assert np.mean(kept) == pytest.approx(d / D, abs=4 * float(np.std(kept)) / 20)


def test_a_subspace_of_the_full_size_is_full_fine_tuning_and_a_small_one_learns_less():
    examples, losses, models = sequences(), {}, {}
    D = sum(p.size for p in toy().parameters())
    for d in (None, D, 8):
        model = models[d] = toy()
        optimizer = None if d is None else SubspaceAdam(model.parameters(), d, 1e-2, seed=5)
        result = train(model, examples, 1e-2, 30, 8, 0, pad_token_id=0, optimizer=optimizer)
        losses[d] = result.losses()[-1][1]
    assert losses[None] < 1.5 < 2.5 < losses[8]
    assert losses[D] == pytest.approx(losses[None], rel=1e-2)
    full, projected = (np.concatenate([p.data.ravel() for p in models[d].parameters()]) for d in (None, D))
    start = np.concatenate([p.data.ravel() for p in toy().parameters()])
    assert np.linalg.norm(projected - full) < 0.01 * np.linalg.norm(full - start)


def test_what_a_subspace_moved_lies_in_it():
    model, start = toy(), toy()
    optimizer = SubspaceAdam(model.parameters(), 8, 1e-2, seed=5)
    train(model, sequences(), 1e-2, 5, 8, 0, pad_token_id=0, optimizer=optimizer)
    moved = np.concatenate([(p.data - q.data).ravel() for p, q in zip(model.parameters(), start.parameters())])
    P = optimizer.projection
    assert np.linalg.norm(moved) > 0
    assert np.allclose(P.up(P.down(moved)), moved, atol=1e-5)


def test_a_subspace_and_the_part_of_low_rank_are_the_same_on_every_device(xp):
    states = []
    for library in (np, xp):
        model, start = toy().to(library), toy().to(library)
        optimizer = SubspaceAdam(model.parameters(), 8, 1e-2, seed=5)
        train(model, sequences(), 1e-2, 5, 8, 0, pad_token_id=0, optimizer=optimizer)
        (part,) = truncated(start, model, [1])
        states.append([to_numpy(w) for one in (model, part) for w in one.state_dict().values()])
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(*states))


def test_a_subspace_larger_than_the_model_says_so():
    with pytest.raises(ValueError, match="between 1 and 4 dimensions, not 5"):
        Projection(4, 5, 0, np.float32([0]))


# ------------------------------------------------------------------------------------------------------------- spectra


def with_update(rank: int) -> tuple[Transformer, Transformer, str]:
    before, after, path = toy(), toy(), "model.layers.0.mlp.up_proj.weight"
    path = next(name for name, _ in after.named_parameters() if name.endswith("up_proj.weight"))
    rng, weight = np.random.default_rng(0), dict(after.named_parameters())[path].data
    n_out, n_in = weight.shape
    weight += (rng.normal(size=(n_out, rank)) @ rng.normal(size=(rank, n_in))).astype(np.float32)
    return before, after, path


def test_the_rank_of_an_update_of_rank_two_is_found_and_that_part_is_all_of_it():
    before, after, path = with_update(2)
    found = update_spectrum(before, after)
    assert found.keys() == {path}
    assert found[path]["rank"] <= 2 < found[path]["noise"]
    nothing, half, whole = (model.state_dict()[path] for model in truncated(before, after, [0, 1, 2]))
    assert np.allclose(whole, after.state_dict()[path], atol=1e-4)
    assert np.linalg.matrix_rank(half - before.state_dict()[path], tol=1e-3) == 1
    assert np.array_equal(nothing, before.state_dict()[path])


def test_a_rank_holds_its_share_of_the_squared_norm():
    assert rank_at([3, 1, 0]) == 1  # 9 of 10
    assert rank_at([2, 2, 1]) == 3
    assert rank_at([1, 1]) == 2
    assert rank_at([0, 0]) == 0


def test_sizes_are_read_between_the_grid_on_a_curve_that_does_not_fall():
    assert non_decreasing([1, 3, 2, 4]).tolist() == [1, 2.5, 2.5, 4]
    assert log_size_at([2, 8, 32], [0.5, 0.8, 1.0], 0.5, 1.0) == pytest.approx(4.5)  # 0.95 is three quarters of the way from 8 to 32
    assert log_size_at([2, 8], [1.0, 1.0], 0.5, 1.0) == 1
    assert log_size_at([2, 8], [0.5, 0.6], 0.5, 1.0) is None
    assert log_size_at([2, 8], [0.5, 0.5], 0.5, 0.5) is None


def subspace_rows(half: dict[str, float], task_rank: float, norm_rank: int) -> list[dict]:
    """Rows whose accuracy rises from 0.4 by 0.4 d / (d + half), whose updates have these ranks."""
    rows, D = [], 2**21
    for start, middle in half.items():
        for d in (*GRID, 0):
            luck = np.random.default_rng(d).normal(size=5) / 200
            scores = (0.4 + 0.4 * (d or D) / ((d or D) + middle) + luck).tolist()
            row = described(Subspace(start, d)) | {"D": D, "before": [0.4] * 5, "accuracy": scores}
            if not d:
                applied = [[0.4 + 0.4 * r / (r + task_rank) for r in RANKS[:-1]] + [one] for one in scores]
                row |= {"spectra": [{"w": {"rank": norm_rank, "noise": 60}}] * 5, "applied": applied}
            rows.append(row)
    return rows


def test_the_rule_of_the_intrinsic_dimension_comes_out_each_way():
    low = intrinsic_dimension.verdict(subspace_rows({"base": 100, "random": 1e5}, 0.5, 10))
    assert low.verdict == HOLDS
    assert low.effect.value == pytest.approx(900, rel=0.5)  # d / (d + 100) = 0.9
    assert low.effect.low < low.effect.value < low.effect.high < evidence(low)["d90 from random"].value
    assert intrinsic_dimension.verdict(subspace_rows({"base": 100, "random": 1e5}, 0.5, 50)).verdict == IF
    high = intrinsic_dimension.verdict(subspace_rows({"base": 2e5, "random": 1e5}, 30, 50))
    assert high.verdict == NOT
    assert "random subspaces" in high.because


def test_the_rule_of_the_intrinsic_dimension_takes_no_gain_for_an_answer():
    rows = subspace_rows({"base": 100, "random": 1e5}, 0.5, 10)
    for row in rows:
        if row["start"] == "random":
            row["accuracy"] = [0.4] * 5
    found = intrinsic_dimension.verdict(rows)
    assert found.verdict == HOLDS
    assert "d90 from random" not in evidence(found)
    assert "nothing is gained under some seed" in found.because
    rows = subspace_rows({"base": 100, "random": 1e5}, 0.5, 10)
    for row in rows:
        row["accuracy"] = [0.4] * 5
    found = intrinsic_dimension.verdict(rows)
    assert found.verdict == UNTESTABLE
    assert "gains nothing" in found.because


def test_a_cell_of_a_subspace_and_one_of_all_weights(short, monkeypatch):
    monkeypatch.setattr(intrinsic_dimension, "base", unlearned)
    tiny = {"examples": 4, "epochs": 1, "batch_size": 4, "validation": 2, "items": 4, "seeds": (1,)}
    row = intrinsic_dimension.run(Subspace("random", 2**12, **tiny))
    assert (len(row["before"]), len(row["accuracy"])) == (1, 1)
    assert row["rate"] in dict(row["rates"])
    row = intrinsic_dimension.run(Subspace("base", **tiny))
    assert row["D"] == sum(p.size for p in unlearned()[0].parameters())
    assert len(row["spectra"][0]) == 15, "two layers of seven matrices, and the embedding"
    assert row["applied"][0][-1] == row["accuracy"][0], "the last rank is the whole update"


# ------------------------------------------------------------------------------------------------------- random answers


def test_who_knows_nothing_has_memorized_no_bits_and_who_knows_all_has_the_priors():
    tokens = np.full(10, 4)
    assert memorized(4 * np.log(2048) * np.ones(10), tokens, 2048) == pytest.approx(0, abs=1e-9)
    assert memorized(np.zeros(10), tokens, 2048) == 10 * 4 * 11
    assert memorized(4 * np.log(4096) * np.ones(10), tokens, 2048) == pytest.approx(-40)


def test_random_answers_are_behind_different_prompts_and_of_all_tokens():
    examples, vocabulary = random_answers(64, 1), base()[1].vocab_size
    assert len({tuple(e.input_ids[:8]) for e in examples}) == 64
    answers = np.array([e.labels[8:] for e in examples])
    assert answers.shape == (64, 4)
    assert (np.array([e.labels[:8] for e in examples]) == -100).all()
    assert all(np.array_equal(e.labels[8:], e.input_ids[8:]) for e in examples)
    assert answers.mean() == pytest.approx(vocabulary / 2, rel=0.2)
    assert not np.array_equal(answers, [e.labels[8:] for e in random_answers(64, 2)])
    with pytest.raises(ValueError, match="different prompts"):
        random_answers(3, 1, prompt=500)


def test_a_cell_of_random_answers(short):
    row = memorization.run(Memory("lora-r1", 4, epochs=3, batch_size=4, answer=2, seeds=(1, 2)))
    assert row["bits"] == 4 * 2 * 11
    assert all(after > before for before, after in zip(row["before"], row["memorized"]))
    assert row["rate"] in dict(row["rates"])


def test_all_methods_that_fit_the_base_are_run():
    assert {one.method for one in memorization.runs()} == {*memorization.METHODS}


def memory_rows(bits: dict[str, float]) -> list[dict]:
    sizes = {"full": 1000, "lora": 100, "head": 50, "prefix": 4000}
    rows = []
    for method, most in bits.items():
        for n, epochs in memorization.LOADS:
            luck = np.random.default_rng(n).normal(size=5)
            row = described(Memory(method, n, epochs)) | {"trainable": sizes[method], "bits": 176.0 * n}
            rows.append(row | {"memorized": (min(176 * n, most * epochs / 32) + luck + 10 * (method == "full") * luck[::-1]).tolist()})
    return rows


def test_the_rule_of_memorization_comes_out_each_way():
    found = memorization.verdict(memory_rows({"full": 9000, "lora": 1500, "head": 500}))
    assert found.verdict == HOLDS
    assert found.effect.name == "full, more than lora, 512 in 32 passes"
    assert found.effect.value == pytest.approx((9000 - 1500) / (176 * 512), rel=0.05), "of 512 answers of 16 tokens, 11 bits each"
    assert evidence(found)["lora, 64 in 32 passes: a trainable parameter"].value == pytest.approx(15, rel=0.05)
    assert memorization.verdict(memory_rows({"full": 2000, "lora": 1980, "head": 500})).verdict == IF, "by a trifle is not ahead"
    found = memorization.verdict(memory_rows({"full": 2000, "lora": 2500, "prefix": 100}))
    assert found.verdict == NOT, "prefix trains more than all"
    assert "64 examples in 32 passes: full fine-tuning remembers 17.8% of 11,264 bits, clearly more than none, and not clearly more than lora (by -0.04 [-0.05, -0.04])." in found.because
    found = memorization.verdict(memory_rows({"full": 1e5, "lora": 1e5, "head": 500}))
    assert found.verdict == IF
    assert "clearly more than head, the data are too few to compare lora" in found.because
    assert memorization.verdict(memory_rows({"full": 1e5, "lora": 1e5})).verdict == UNTESTABLE
    lost = memory_rows({"full": 9000, "lora": 4000, "head": 500})
    lost[4]["memorized"][2] = None
    assert "lora, 64 in 128 passes" not in str(memorization.verdict(lost)), "of a run that diverged nothing is said"


# ---------------------------------------------------------------------------------------------------------------- width


def test_a_vertex_is_found_between_the_rates_and_not_at_an_edge():
    tried = {2.0**k: (k + 7.3) ** 2 for k in range(-10, -4)}
    assert vertex(tried, 2.0**-7) == pytest.approx(2**-7.3)
    assert vertex(tried | {2.0**-6: math.inf}, 2.0**-7) == 2.0**-7
    with pytest.raises(ValueError, match="edge"):
        vertex({1.0: 1.0, 2.0: 2.0}, 1.0)


def test_a_known_law_is_recovered():
    widths, covered = np.array([32, 64, 128, 256]), []
    for seed in range(400):
        law = Law(widths, 0.5 * widths**-0.9 * 2 ** (0.1 * np.random.default_rng(seed).normal(size=(5, 4))))
        assert law.exponent.value == pytest.approx(0.9, abs=0.1)
        covered.append([one.low <= truth <= one.high for one, truth in ((law.exponent, 0.9), (law.at(4096), 0.5 * 4096**-0.9))])
    assert all(0.91 <= share <= 0.99 for share in np.mean(covered, axis=0))  # 0.95 within 3.7 of its standard errors
    assert Law(widths, 0.5 / widths[None]).at(1024).value == pytest.approx(0.5 / 1024)
    with pytest.raises(ValueError, match="two widths"):
        Law([32], np.ones((5, 1)))


def width_rows(at_4096: float, pretraining: float) -> list[dict]:
    """Rates that fall as 1 / width to one at 4096, and pretraining's a multiple of them."""
    rows = []
    for one in width.runs():
        rate = at_4096 * 4096 / one.width * 2 ** np.random.default_rng(one.seed + one.width).normal(scale=0.1)
        tried = {name: [[r / 2, 2.0], [r, 1.0], [r * 2, 2.0]] for name, r in (("full", rate), ("pretraining", pretraining * rate))}
        rows.append(described(one) | {name: of[1][0] for name, of in tried.items()} | {f"{name}_rates": of for name, of in tried.items()})
    return rows


def test_the_rules_of_the_rates_come_out_each_way():
    assert width.verdict(width_rows(3e-5, 8), 3e-5 * 4096 / 576).verdict == HOLDS
    assert width.verdict(width_rows(3e-4, 8), 3e-4 * 4096 / 576).verdict == IF
    low = width.verdict(width_rows(3e-4, 1), 1.9 * 3e-4 * 4096 / 576)
    assert low.verdict == NOT
    for times, found in ((8, IF), (1, UNTESTABLE)):
        missed = width.verdict(width_rows(3e-5, times), 2.2 * 3e-5 * 4096 / 576)
        assert missed.verdict == found and missed.because.endswith("so this says nothing of 7B.")
    assert evidence(low)["a of fine-tuning"].value == pytest.approx(1, abs=0.1)


def test_a_cell_of_a_width(short):
    settings = Width(32, 1, pretraining_steps=2, blocks=2, length=16, examples=8, batch_size=4, validation=4)
    row = width.run(settings)
    assert row.keys().isdisjoint(vars(settings)), "a row has its settings beside its results"
    for name in ("pretraining", "full"):
        rates = [rate for rate, _ in row[f"{name}_rates"]]
        assert rates[0] <= row[name] <= rates[-1]


def test_widths_differ_in_width_alone():
    tokenizer = base()[1]
    shapes = [width.shape(w, tokenizer) for w in width.WIDTHS]
    assert {s.head_dim for s in shapes} == {16}
    assert {s.intermediate_size / s.hidden_size for s in shapes} == {3}
    assert {s.num_attention_heads / s.num_key_value_heads for s in shapes} == {2}


# ---------------------------------------------------------------------------------------------------------------- speed


def test_steps_to_a_loss_are_read_between_the_measurements():
    assert steps_to([3.0, 2.0, 2.5], 2.5, 10, 4.0) == 15
    assert steps_to([3.0], 3.5, 10, 4.0) == 5
    assert steps_to([3.0], 4.0, 10, 4.0) == 0
    assert steps_to([3.0], 2.0, 10, 4.0) == math.inf
    assert steps_to(None, 2.0, 10, 4.0) == math.inf


def test_a_product_of_estimates_is_as_uncertain_as_both():
    found = product(Estimate(2.0, 1.0, 4.0), Estimate(3.0, 1.5, 6.0))
    assert found.value == 6
    assert found.high / found.value == pytest.approx(2 ** math.sqrt(2))
    assert product(Estimate(2.0), Estimate(3.0, 1.5, 6.0)) == (6, None, None)


def speed_rows(pace: dict[str, float], fall: dict[str, float]) -> list[dict]:
    """Losses 2 + 2 exp(-steps / fall), and seconds a step."""
    rows = []
    for name, constant in fall.items():
        one = Curve(name)
        at = np.arange(one.every, one.steps + 1, one.every)
        curves = [(2 + 2 * np.exp(-at / constant / (1 + seed / 50))).tolist() for seed in one.seeds]
        made = {"trainable": 1000 if name == "full" else 10, "flops": 600 if name == "full" else 400, "before": 4.0, "curves": curves}
        rows.append(described(one) | made)
    for repeat in SEEDS:
        luck = 1 + np.random.default_rng(repeat).normal(scale=0.01)
        seconds = {name: s * (luck if name != "full" else 1) for name, s in pace.items()}
        rows.append(described(Pace(repeat)) | {"seconds": seconds, "processor": "a", "threads": 2, "date": "today"})
    return rows


def test_the_rule_of_speed_comes_out_each_way():
    fast = speed.verdict(speed_rows({"full": 0.3, "lora": 0.2, "ia3": 0.2}, {"full": 30, "lora": 30, "ia3": 36}))
    assert fast.verdict == HOLDS
    assert evidence(fast)["lora: seconds to 50% of the gain"].value == pytest.approx(2 / 3, rel=0.02)
    assert evidence(fast)["lora: FLOPs to 90% of the gain"].value == pytest.approx(2 / 3)
    slow = speed.verdict(speed_rows({"full": 0.3, "lora": 0.2}, {"full": 30, "lora": 90}))
    assert slow.verdict == IF
    assert "in a step: lora; to 50% of the gain: none;" in slow.because
    assert speed.verdict(speed_rows({"full": 0.3, "lora": 0.4}, {"full": 30, "lora": 1e6})).verdict == NOT


def test_a_cell_of_a_curve_and_one_of_seconds(short):
    row = speed.run(Curve("ia3", task="source", steps=2, every=1, batch_size=2, validation=2, items=2, seeds=(1, 2)))
    assert np.array(row["curves"]).shape == (2, 2)
    assert row["flops"] > 0
    assert row["rate"] in dict(row["rates"])
    row = speed.run(Pace(1, methods=("full", "ia3"), task="source", steps=1, rounds=1, batch_size=2))
    assert row["seconds"].keys() == {"full", "ia3"}
    assert min(row["seconds"].values()) > 0


def test_every_experiment_names_its_runs_once_and_has_five_seeds():
    for module in (intrinsic_dimension, memorization, width, speed):
        runs = module.runs()
        assert len({str(described(one)) for one in runs}) == len(runs)
    assert len({one.seed for one in width.runs()}) == len({one.repeat for one in speed.runs() if isinstance(one, Pace)}) == 5
    assert all(len(one.seeds) == 5 for one in [*intrinsic_dimension.runs(), *memorization.runs()])


def test_the_register_takes_what_is_found():
    rules = {
        intrinsic_dimension.verdict: subspace_rows({"base": 100, "random": 1e5}, 0.5, 10),
        memorization.verdict: memory_rows({"full": 9000, "lora": 4000, "head": 500}),
        speed.verdict: speed_rows({"full": 0.3, "lora": 0.2, "ia3": 0.2}, {"full": 30, "lora": 30, "ia3": 36}),
    }
    for rule, rows in rules.items():
        verdict = rule(rows)
        assert verdict.verdict in (HOLDS, IF) and verdict.because.endswith(".") and not verdict.because.endswith("..")
        assert verdict.effect.low <= verdict.effect.value <= verdict.effect.high and verdict.evidence and verdict.seeds == 5
