"""DPO, IPO, KTO, ORPO and SimPO: closed-form facts of the equations, and what is true of a run of each."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_rlhf import close, parameter
from test_rlhf_online import EOS, base, pairs, preference

import minipeft as mp
from minipeft import rlhf
from minipeft.backend import to_numpy
from minipeft.rlhf.dpo import collate_pairs, completion_logprobs, dpo_objective
from minipeft.rlhf.kto import kto_objective, mismatch
from minipeft.rlhf.preference_losses import log_odds
from minipeft.text.examples import Example, PreferencePair, UnpairedExample
from minipeft.train import TrainingArguments

LOSSES = ("sigmoid", "ipo", "kto", "orpo", "simpo")
CHOSEN, REJECTED = np.array([-1.7, -1.6]), np.array([-1.5, -2.5])
REFERENCES = np.array([-1.9, -1.5]), np.array([-1.4, -1.6])


# ----------------------------------------------------------------------------------------------------------- equations


def test_ipo_wants_the_difference_to_be_one_over_two_beta_and_no_larger(xp):
    beta, references = 0.25, [xp.asarray(r) for r in REFERENCES]
    for lead, sign in ((1.0, -1), (2.0, 0), (5.0, 1)):  # 1 / 2β = 2
        chosen, rejected = parameter(xp, REFERENCES[0] + lead), parameter(xp, REFERENCES[1])
        loss = rlhf.ipo_loss(chosen, rejected, *references, beta)
        close(loss.data, (lead - 2) ** 2)
        loss.backward()
        close(chosen.grad, np.full(2, 2 * (lead - 2) / 2))
        assert (np.sign(to_numpy(chosen.grad).round(9)) == sign).all()
        close(rejected.grad, -to_numpy(chosen.grad))


def test_kto_weighs_gains_and_losses_from_the_kl(xp):
    policy, ref = parameter(xp, np.array([-1.0, -2.0, -3.0])), xp.asarray(np.array([-1.5, -2.0, -2.0]))
    desirable, z, beta = xp.asarray(np.array([True, False, False])), 0.3, 0.5
    loss = rlhf.kto_loss(policy, ref, desirable, z, beta, desirable_weight=2.0, undesirable_weight=3.0)
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    sides = sigma(beta * np.array([0.5 - z, z - 0.0, z + 1.0]))
    close(loss.data, (np.array([2, 3, 3]) * (1 - sides)).mean(), 1e-12)
    loss.backward()
    close(policy.grad, np.array([-2, 3, 3]) * beta * sides * (1 - sides) / 3, 1e-12)
    start = rlhf.kto_loss(mp.Tensor(ref), ref, desirable, 0.0, beta)
    assert start.item() == pytest.approx(0.5), "at the reference nothing is gained or lost"


def test_kto_counts_the_answers_that_are_on_their_own_side_of_z():
    policy, ids = base(), np.array([[3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8], [6, 7, 8, 9]])
    labels = np.where(np.arange(4) < 2, -100, ids)
    lp = rlhf.sequence_logprobs(policy, ids, labels).numpy()
    desirable = np.array([True, True, False, False])

    def accuracies(gain, z):
        given = (ids, labels, None, ids, labels, None, desirable, lp - np.float32(gain), lp - np.float32(z))
        return rlhf.kto.kto_objective(policy, *given)[1]["rewards/accuracies"].tolist()

    assert accuracies([0.5, 0.1, 0.1, 0.5], 0.3) == [1, 0, 1, 0]
    assert accuracies([0, 0, 0, 0], 0) == [0.5] * 4, "undecided"
    assert accuracies([0.1, -0.1, -0.1, 0.1], -0.3) == [1, 0, 1, 0], "z is never below 0"


def test_without_options_a_loss_takes_its_papers():
    w, l, u, v = (mp.Tensor(a) for a in (CHOSEN, REJECTED, *REFERENCES))
    refs = [r.data for r in (u, v)]
    for loss in (rlhf.dpo_loss, rlhf.ipo_loss):
        assert loss(w, l, *refs).item() == loss(w, l, *refs, 0.1).item()
    assert rlhf.orpo_loss(w, l).item() == rlhf.orpo_loss(w, l, 0.1).item()
    assert rlhf.simpo_loss(w, l).item() == rlhf.simpo_loss(w, l, 2.0, 1.0).item()
    liked = np.array([True, False])
    assert rlhf.kto_loss(w, refs[0], liked, 0.3).item() == rlhf.kto_loss(w, refs[0], liked, 0.3, 0.1, 1.0, 1.0).item()


def test_a_batch_of_kto_counts_the_tokens_of_both_answers():
    referenced = rlhf.kto.with_reference(base(), rlhf.kto.unpaired(pairs(2, 0)), 2)
    batch = rlhf.kto.collate_answers(referenced)
    counted = [len(e.input_ids) for answer in referenced for e in (answer.example, answer.mismatched)]
    assert (batch.weight, batch.tokens) == (4, sum(counted))


def test_without_options_an_objective_takes_its_losss():
    batch, ref = collate_pairs(pairs(2, 0)).arguments, np.full(2, -3.0)
    value = lambda objective, *given, **options: objective(base(), *given, **options)[0].item()  # noqa: E731
    refs = dict(ref_chosen=ref, ref_rejected=ref - 1)
    assert value(dpo_objective, **batch, **refs) == value(dpo_objective, **batch, **refs, loss_type="sigmoid", beta=0.1)
    simpo = batch | dict(loss_type="simpo")
    assert value(dpo_objective, **simpo) == value(dpo_objective, **simpo, beta=0.1, gamma=1.0)
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    kto = ids, ids, None, ids, ids, None, np.array([True, False]), ref, ref
    assert value(kto_objective, *kto) == value(kto_objective, *kto, 0.1, 1.0, 1.0)


def test_orpo_is_cross_entropy_and_the_log_odds_ratio(xp):
    chosen, rejected = parameter(xp, CHOSEN), parameter(xp, REJECTED)
    loss = rlhf.orpo_loss(chosen, rejected, beta=0.3)
    p, q = np.exp(CHOSEN), np.exp(REJECTED)
    ratio = p / (1 - p) / (q / (1 - q))
    close(loss.data, (-CHOSEN + 0.3 * np.log1p(1 / ratio)).mean(), 1e-12)
    loss.backward()
    slope = 1 / (1 + ratio) / (1 - p)  # of log σ(log odds ratio)
    close(chosen.grad, -(1 + 0.3 * slope) / 2, 1e-12)
    close(rejected.grad, 0.3 / (1 + ratio) / (1 - q) / 2, 1e-12)


def test_log_odds_are_exact_near_no_and_near_full_probability():
    x = np.array([-1e-6, -1e-3, -0.5, -5.0, -80.0])
    want = x - np.log(-np.expm1(x))
    np.testing.assert_allclose(log_odds(mp.Tensor(x)).numpy(), want, rtol=1e-9)
    np.testing.assert_allclose(log_odds(mp.Tensor(x.astype(np.float32))).numpy(), want, rtol=2e-6)
    sure = parameter(np, np.zeros(1))
    log_odds(sure).sum().backward()
    assert np.isfinite(sure.grad).all(), "an answer that is certain breaks no run"


def test_simpo_is_dpo_of_means_without_a_reference_but_for_its_margin(xp):
    chosen, rejected = (mp.Tensor(xp.asarray(v)) for v in (CHOSEN, REJECTED))
    zero = xp.asarray(np.zeros(2))
    like = rlhf.dpo_loss(chosen, rejected, zero, zero, beta=2.0)
    close(rlhf.simpo_loss(chosen, rejected, beta=2.0, gamma=0.0).data, to_numpy(like.data), 1e-12)
    lead = 2.0 * (CHOSEN - REJECTED)
    close(rlhf.simpo_loss(chosen, rejected, 2.0, 1.5).data, np.log1p(np.exp(1.5 - lead)).mean(), 1e-12)


@pytest.mark.parametrize("loss", [rlhf.dpo_loss, rlhf.ipo_loss])
def test_only_the_difference_is_trained_so_the_chosen_may_fall(loss):
    given = lambda shift: [mp.Tensor(CHOSEN - shift), mp.Tensor(REJECTED - shift), *REFERENCES]  # noqa: E731
    assert loss(*given(0)).item() == pytest.approx(loss(*given(40.0)).item())


# ---------------------------------------------------------------------------------------------------------------- runs


def trained(loss, train=None, held_out=None, **options):
    args = mp.TrainingArguments(
        learning_rate=3e-3, max_steps=20, per_device_train_batch_size=8, eval_steps=10, progress=False
    )
    policy = base()
    run = rlhf.dpo_trainer(policy, train or pairs(40, 0), held_out or pairs(20, 1), args, loss_type=loss, **options)
    before = run.measure()
    return run, before, run.train()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_to_prefer_and_records_both_log_probabilities(loss):
    run, before, result = trained(loss)
    after = run.measure()
    assert after["loss"] < before["loss"]
    lead = lambda r: r["logps/chosen"] - r["logps/rejected"]  # noqa: E731
    assert lead(after) > lead(before) + 1
    names = {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies"}
    steps = [r for r in result.history if "loss" in r]
    evaluations = [r for r in result.history if "eval_loss" in r]
    whole = [r for r in steps if names <= r.keys()]
    assert len(whole) == len(steps) == 20 or (loss == "kto" and len(whole) > 15), "a batch of KTO may lack one side"
    assert [r["step"] for r in evaluations] == [10, 20]
    assert {f"eval_{n}": after[n] for n in names}.items() <= evaluations[-1].items()
    policy, held_out = run.model, pairs(20, 1)
    sums = np.array([[rlhf.sequence_logprobs(policy, *(a[None] for a in e)).item() for e in pair] for pair in held_out])
    assert [after["logps/chosen"], after["logps/rejected"]] == pytest.approx(sums.mean(axis=0).tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", ("sigmoid", "ipo", "orpo", "simpo"))
def test_margin_and_accuracy_are_those_of_the_rewards(loss):
    run, before, _ = trained(loss)
    if loss in ("sigmoid", "ipo"):
        assert before["rewards/margins"] == pytest.approx(0, abs=1e-5), "the policy is its own reference"
        reference = [(p.ref_chosen, p.ref_rejected) for p in run.eval_examples]
        rewards = 0.1 * (completion_logprobs(run.model, pairs(20, 1)) - reference)
    else:
        beta, policy = (0.1 if loss == "orpo" else 2.0), run.model
        mean = lambda e: rlhf.sequence_logprobs(policy, *(a[None] for a in e)).item() / (e.labels != -100).sum()  # noqa: E731
        rewards = beta * np.array([[mean(e) for e in pair] for pair in pairs(20, 1)])
    after = run.measure()
    assert after["rewards/margins"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4)
    assert after["rewards/accuracies"] == pytest.approx(rlhf.reward_accuracy(*rewards.T))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_pairs_does_not_depend_on_how_they_are_cut_into_batches(loss):
    """KTO's does: z is a batch's own estimate."""

    def measured(size):
        args = mp.TrainingArguments(max_steps=1, per_device_eval_batch_size=size, progress=False)
        run = rlhf.dpo_trainer(base(), pairs(4, 0), pairs(20, 1), args, loss_type=loss)
        skipped = {"rewards/accuracies"}  # at its own reference a policy's rewards are rounding errors
        return {n: v for n, v in run.measure().items() if n not in skipped | ({"loss"} if loss == "kto" else set())}

    assert measured(3) == pytest.approx(measured(20), rel=1e-5, abs=1e-5)


def test_without_a_reference_nothing_is_computed_before_training(monkeypatch):
    from minipeft.rlhf import dpo

    monkeypatch.setattr(dpo, "with_reference", None)
    for loss in ("orpo", "simpo"):
        rlhf.dpo_trainer(base(), pairs(4, 0), loss_type=loss)


def test_a_loss_and_a_reference_that_do_not_go_together_are_refused():
    batch = collate_pairs(pairs(2, 0)).arguments
    with pytest.raises(ValueError, match=r"^without ref_chosen .* must be 'orpo' or 'simpo', got 'sigmoid'$"):
        dpo_objective(base(), **batch)
    with pytest.raises(ValueError, match=r"^with ref_chosen .* must be 'sigmoid' or 'ipo', got 'simpo'$"):
        dpo_objective(base(), **batch, ref_chosen=np.zeros(2), ref_rejected=np.zeros(2), loss_type="simpo")


def test_at_the_reference_no_answer_is_preferred():
    batch, logps = collate_pairs(pairs(3, 0)).arguments, completion_logprobs(base(), pairs(3, 0)).astype(np.float32)
    _, found = dpo_objective(base(), **batch, ref_chosen=np.zeros(3), ref_rejected=np.zeros(3))
    at = {"ref_chosen": found["logps/chosen"], "ref_rejected": found["logps/rejected"]}
    np.testing.assert_allclose(np.stack(list(at.values()), axis=1), logps, rtol=1e-4)
    _, found = dpo_objective(base(), **batch, **at)
    assert found["rewards/accuracies"].tolist() == [0.5] * 3 and not found["rewards/margins"].any()


@pytest.mark.parametrize(("loss", "at"), [("sigmoid", math.log(2)), ("ipo", 25), ("kto", 0.5)])
def test_the_reference_is_the_policy_in_its_own_precision(loss, at):
    trainer = rlhf.dpo_trainer(base(), pairs(8, 0), pairs(8, 0), TrainingArguments(max_steps=1, bf16=True), loss_type=loss)
    assert trainer.measure()["loss"] == pytest.approx(at, rel=1e-4)


def test_kto_takes_answers_one_by_one():
    both = pairs(40, 0)
    alone = [UnpairedExample(p.chosen, True) for p in both] + [UnpairedExample(p.rejected, False) for p in both]
    from_pairs, from_answers = (trained("kto", data)[2] for data in (both, alone))
    assert from_pairs.losses() == from_answers.losses(), "a pair is two answers"
    liked = [UnpairedExample(p.chosen, True) for p in both]
    run, _, result = trained("kto", liked, liked, desirable_weight=0.5)
    assert result.losses()[0][1] == pytest.approx(0.25, abs=1e-4), "λ_D / 2 at the reference"
    assert "logps/rejected" not in result.history[0] and run.measure()["kl"] != 0
    numbers = [UnpairedExample(e.example, int(e.label)) for e in alone]
    rejected = [result.losses("logps/rejected") for result in (trained("kto", numbers)[2], from_answers)]
    assert rejected[0] == rejected[1], "1 and 0 are labels, too"
    for given in ({"chosen": 1, "rejected": 2}, both[0].chosen):
        with pytest.raises(ValueError, match=rf"training example 1 is a {type(given).__name__}, not a PreferencePair"):
            rlhf.dpo_trainer(base(), [both[0], given])
    with pytest.raises(ValueError, match="compares the two answers of a pair; unpaired ones are for 'kto'"):
        rlhf.dpo_trainer(base(), alone)
    with pytest.raises(ValueError, match="compares the two answers of a pair"):
        rlhf.dpo_trainer(base(), both[:2], [both[2], alone[0]])
    with pytest.raises(ValueError, match="1 of 3 examples are single answers and the others pairs: give one kind"):
        rlhf.dpo_trainer(base(), [both[0], alone[0], both[1]], loss_type="kto")
    with pytest.raises(ValueError, match="takes at least 2 examples"):
        rlhf.dpo_trainer(base(), alone[:1], loss_type="kto")


def test_a_mismatched_answer_is_the_one_before_it_cut_to_the_models_length():
    def example(prompt, answer):
        ids = np.array([*prompt, *answer])
        return Example(ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids))

    texts = [example([3, 4], [7, EOS]), example([5], [8, 9, 8, EOS]), example([6, 6, 6], [9, EOS])]
    found = mismatch(texts, limit=5)
    assert [e.input_ids.tolist() for e in found] == [[3, 4, 9, EOS], [5, 7, EOS], [6, 6, 6, 8, 9]]
    assert [e.labels.tolist() for e in found] == [[-100, -100, 9, EOS], [-100, 7, EOS], [-100] * 3 + [8, 9]]


def test_a_mismatched_answer_keeps_its_labels():
    """A conversation's answer has turns of the user inside, which no one learns."""
    talk = Example(np.array([3, 4, 7, 8, 9, EOS]), np.array([-100, -100, 7, -100, 9, EOS]))
    found = mismatch([talk, Example(np.array([5, 6]), np.array([-100, 6]))], limit=8)
    assert found[1].input_ids.tolist() == [5, 7, 8, 9, EOS] and found[1].labels.tolist() == [-100, 7, -100, 9, EOS]
    assert found[0].input_ids.tolist() == [3, 4, 6] and found[0].labels.tolist() == [-100, -100, 6]


def test_a_mismatched_answer_is_to_another_prompt_where_answers_of_prompts_are_interleaved():
    texts = [Example(np.array(ids), np.array([-100, ids[1]])) for ids in ([1, 10], [1, 11], [2, 20], [2, 21], [1, 12])]
    found = mismatch(texts, limit=5)
    assert [e.input_ids.tolist() for e in found] == [[1, 21], [1, 21], [2, 11], [2, 11], [1, 21]]
    assert [e.input_ids.tolist() for e in mismatch(texts[:2], limit=5)] == [[1, 11], [1, 10]], "of one prompt"
    again = [texts[0], texts[2], texts[4]]  # the last one has the first one's prompt
    assert [e.input_ids.tolist() for e in mismatch(again, limit=5)] == [[1, 20], [2, 10], [1, 20]]


def test_a_policy_with_virtual_tokens_is_refused_at_once():
    policy = mp.get_peft_model(base(), mp.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="methods with virtual tokens do not fit"):
        rlhf.sequence_logprobs(policy, np.array([[3, 4, 5]]), np.array([[-100, 4, 5]]))
    for loss in LOSSES:
        with pytest.raises(ValueError, match="train no virtual tokens, which this policy has: use LoRA"):
            rlhf.dpo_trainer(policy, pairs(4, 0), loss_type=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_answer_without_a_label_that_counts_is_refused_by_name(loss):
    good, none, one = preference([7], [8]), Example(np.array([3, 4, 8]), np.full(3, -100)), Example(*np.array([[8], [8]]))
    for silent in (none, one):
        with pytest.raises(ValueError, match=rf"rejected training example 1 \({len(silent.labels)} tokens\) has no label"):
            rlhf.dpo_trainer(base(), [good, PreferencePair(good.chosen, silent)], loss_type=loss)
        with pytest.raises(ValueError, match=r"chosen evaluation example 0 .* has no label that counts"):
            rlhf.dpo_trainer(base(), [good] * 2, [PreferencePair(silent, good.rejected)] * 2, loss_type=loss)
    if loss == "kto":
        with pytest.raises(ValueError, match=r"^training example 1 .* has no label that counts"):
            rlhf.dpo_trainer(base(), [UnpairedExample(good.chosen, True), UnpairedExample(none, False)], loss_type=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_policy_with_merged_adapters_is_refused_at_once(loss):
    policy = mp.get_peft_model(base(), mp.LoraConfig(r=2))
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters get no gradient: call unmerge_adapter\(\)"):
        rlhf.dpo_trainer(policy, pairs(4, 0), loss_type=loss)


def test_workers_bring_their_statistics_home():
    args = mp.TrainingArguments(
        max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2, progress=False
    )
    alone, spread = (rlhf.dpo_trainer(base(), pairs(12, 0), args=args) for _ in range(2))
    with ThreadPoolExecutor(2) as executor:
        history = spread.train(executor=executor).history
    for one, other in zip(alone.train().history, history):
        for name in ("loss", "logps/chosen", "rewards/accuracies"):
            assert other[name] == pytest.approx(one[name], rel=1e-6)


def test_ipo_stops_where_dpo_goes_on():
    """One pair, seen again and again: IPO's difference comes to rest at 1 / 2β, DPO's grows without end."""
    (pair,) = pairs(1, 0)
    args = mp.TrainingArguments(
        learning_rate=1e-2, max_steps=150, per_device_train_batch_size=1, lr_scheduler_type="cosine", progress=False
    )
    leads = {}
    for loss in ("ipo", "sigmoid"):
        run = rlhf.dpo_trainer(base(), [pair], args=args, loss_type=loss, beta=0.25)
        run.train()
        leads[loss] = run.measure([*run.train_examples])["rewards/margins"] / 0.25
    assert leads["ipo"] == pytest.approx(1 / (2 * 0.25), rel=0.02) and leads["sigmoid"] > 10


def test_the_chosen_answer_falls_where_it_is_like_the_rejected_one():
    def example(answer):
        ids = np.array([3, 4, *answer, EOS])
        return Example(ids, np.where(np.arange(len(ids)) < 2, -100, ids))

    alike = [PreferencePair(example([8, 9, 10, a, 8, 9]), example([8, 9, 10, a + 1, 8, 9])) for a in range(6, 12)]
    args = mp.TrainingArguments(learning_rate=3e-3, max_steps=60, per_device_train_batch_size=6, progress=False)
    change = {}
    for loss in ("sigmoid", "orpo"):
        run = rlhf.dpo_trainer(base(), alike, args=args, loss_type=loss)
        before = run.measure(run.train_examples)
        run.train()
        after = run.measure(run.train_examples)
        assert after["rewards/margins"] > before["rewards/margins"]
        change[loss] = after["logps/chosen"] - before["logps/chosen"]
    assert change["sigmoid"] < change["orpo"] and change["orpo"] > 0


def test_options_that_a_loss_does_not_have_are_refused_by_name():
    for options, name in (
        ({"gamma": 2.0}, "gamma"), ({"loss_type": "ipo", "desirable_weight": 2.0}, "desirable_weight"),
        ({"loss_type": "orpo", "reference_batch_size": 4}, "reference_batch_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is not an option of loss_type="):
            rlhf.DPOConfig(**options)
    with pytest.raises(ValueError, match="loss_type must be one of"):
        rlhf.DPOConfig(loss_type="dpo")
    assert [rlhf.DPOConfig(loss_type=loss).beta for loss in LOSSES] == [0.1, 0.1, 0.1, 0.1, 2.0]


def test_statistics_of_a_loss_are_means_over_units_that_have_a_number():
    """Any loss may give them: they stand beside the loss in the record of a step, and of an evaluation."""

    def loss(model, input_ids, labels, attention_mask, rng=None):
        first = np.where(input_ids[:, 0] % 2 == 0, input_ids[:, 0], np.nan)
        return model.loss(input_ids, labels), {"first": first}

    rows = [np.array([first, 5, 6]) for first in (4, 3, 8)]
    args = mp.TrainingArguments(
        max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3, progress=False
    )
    run = mp.Trainer(base(), [(r, r) for r in rows], [(r, r) for r in rows[1:2]], args, loss=loss)
    step, evaluation = run.train().history
    assert step["first"] == 6 and "eval_first" not in evaluation and math.isfinite(evaluation["eval_loss"])


def test_a_statistic_that_is_infinite_stops_no_run(tmp_path):
    def loss(model, input_ids, labels, attention_mask, rng=None):
        return model.loss(input_ids, labels), {"wild": np.full(len(input_ids), -np.inf)}

    row = np.array([3, 4, 5])
    args = mp.TrainingArguments(max_steps=1, per_device_train_batch_size=1, progress=False, output_dir=tmp_path)
    history = mp.Trainer(base(), [(row, row)], [(row, row)], args, loss=loss).train().history
    assert [r.get("wild", r.get("eval_wild")) for r in history] == [None, None] and "wild" in history[0]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
