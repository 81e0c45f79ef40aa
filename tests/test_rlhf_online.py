"""PPO, RLOO, GRPO and DPO as trainers: what a rollout marks, what an update does, resuming, and what stops a run."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_train import weights

import minipeft as mp
from minipeft import rlhf
from minipeft.backend import to_numpy
from minipeft.rlhf import online
from minipeft.rlhf.dpo import completion_logprobs
from minipeft.text.examples import Example, PreferencePair
from minipeft.train.callbacks import Callback, Log
from minipeft.train.checkpoint import CheckpointError

EOS, LIKED = 1, 7
PROMPTS = [[3, 4], [5], [6, 3, 9, 2], [8, 8, 8]]


def base(xp=np, **fields):
    shape = dict(vocab_size=16, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.3)
    return mp.Transformer(mp.TransformerConfig.llama(**(shape | dict(eos_token_id=EOS) | fields)), seed=1).to(xp)


def liked(roll):
    """How often the token 7 stands in a response, and a little for its length."""
    return np.array([sum(t == LIKED for t in r) + 0.01 * len(r) for r in roll.responses()])


SMALL = dict(batch_size=16, mini_batch_size=8, num_epochs=2, response_length=6, missing_eos_score=None, steps=4)
METHODS = {
    "ppo": (rlhf.PPOTrainer, rlhf.PPOConfig),
    "rloo": (rlhf.RLOOTrainer, rlhf.GroupConfig),
    "grpo": (rlhf.GRPOTrainer, rlhf.GroupConfig),
}
VALUES_ALONE = {"ppo": dict(vf_coef=0)}  # without the value loss, which reaches the policy's states


def trainer(method="ppo", policy=None, reward=liked, prompts=PROMPTS, watch=None, value_model=None, **fields):
    kind, config = METHODS[method]
    more = {} if value_model is None else {"value_model": value_model}
    return kind(base() if policy is None else policy, reward, prompts, config(**(SMALL | fields)), watch, **more)


def same(a, b):
    return all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_learning_rate_it_is_a_twentieth_of_the_usual_one_of_adapters_a_sixth(method):
    lora = mp.get_peft_model(base(), mp.LoraConfig(r=2))
    assert trainer(method).config.learning_rate == 5e-5
    assert trainer(method, lora).config.learning_rate == pytest.approx(5e-4)
    assert trainer(method, lora, learning_rate=1e-3).config.learning_rate == 1e-3


# ------------------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize(
    "ids, stops, mask, ended",
    [
        ([[4, 1, 5, 1], [1, 1, 1, 1], [4, 5, 6, 7]], [1], [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [True, True, False]),
        ([[4, 6, 5]], [1, 6], [[1, 1, 0]], [True]),
        ([[4, 1]], [], [[1, 1]], [False]),
    ],
)
def test_a_response_ends_with_its_first_stop_token(ids, stops, mask, ended, xp):
    found = rlhf.truncate_response(xp.asarray(np.array(ids)), stops)
    assert [to_numpy(array).tolist() for array in found] == [mask, ended]


def test_a_rollout_is_fixed_length_sampling_cut_at_the_stop_token(xp):
    policy = base(xp)
    roll = rlhf.rollout(policy, PROMPTS * 4, 8, 1.0, [EOS], seed=3)
    ids, mask = to_numpy(roll.input_ids), to_numpy(roll.attention_mask)
    padded = np.array([[0] * (4 - len(p)) + p for p in PROMPTS * 4])
    free = policy.generate(padded, mask[:, :4], max_new_tokens=8, temperature=1.0, seed=3, eos_token_id=())[:, 4:]
    real = np.cumsum(free == EOS, axis=1) - (free == EOS) == 0
    assert np.array_equal(ids, np.concatenate([padded, np.where(real, free, 0)], axis=1))
    assert np.array_equal(mask, np.concatenate([padded > 0, real], axis=1))
    assert roll.prompts() == PROMPTS * 4 and roll.responses() == [f[r].tolist() for f, r in zip(free, real)]
    assert to_numpy(roll.ended).tolist() == (free == EOS).any(axis=1).tolist() and roll.length == 8
    assert 0 < to_numpy(roll.ended).sum() < 16, "both kinds of responses were seen"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_do_not_depend_on_padding_or_on_the_batch(temperature):
    policy = base()
    roll = rlhf.rollout(policy, PROMPTS, 5, temperature, [EOS], seed=1)
    together = rlhf.response_logprobs(policy, roll.input_ids, roll.attention_mask, 5, temperature).numpy()
    for row, (prompt, response) in enumerate(zip(roll.prompts(), roll.responses())):
        logits = policy(np.array([prompt + response])).numpy()[0, len(prompt) - 1 : -1] / temperature
        alone = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = alone[np.arange(len(response)), response]
        np.testing.assert_allclose(together[row, : len(response)], expected, atol=1e-5)


def test_sequence_logprobs_are_sums_over_the_completion(rng):
    policy = base()
    ids = rng.integers(2, 16, (3, 7))
    labels, mask = ids.copy(), np.ones_like(ids)
    labels[0, :3], labels[1, :5], labels[2, :2] = -100, -100, -100
    labels[2, 5:], mask[2, 5:] = -100, 0
    got = rlhf.sequence_logprobs(policy, ids, labels, mask).numpy()
    logits = policy(ids).numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got, (each * (labels[:, 1:] != -100)).sum(1), atol=1e-5)
    assert -got.sum() / (labels[:, 1:] != -100).sum() == pytest.approx(policy.loss(ids, labels).item(), rel=1e-5)
    labels[0], labels[1, 1:] = -100, ids[1, 1:]  # one answer is empty, another begins at once
    want = (each * (labels[:, 1:] != -100)).sum(1)
    np.testing.assert_allclose(rlhf.sequence_logprobs(policy, ids, labels, mask).numpy(), want, atol=1e-5)


def test_distinct_n():
    assert rlhf.distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert rlhf.distinct_n([[5] * 11], 2) == 1 / 10 and rlhf.distinct_n([[1]], 2) == 0


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_is_rewarded_and_reports_everything(method):
    run = trainer(method, steps=25, learning_rate=3e-3, kl_coef=0.01, watch={"length": lambda r: r.mask.sum(axis=1)})
    history = run.train()
    scores = [r["objective/scores"] for r in history]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 1, scores
    objective = ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores", "raw_scores", "scores_equal", "kl_coef")
    expected = {*(f"objective/{name}" for name in objective), "policy/approxkl", "policy/clipfrac", "policy/entropy"}
    expected |= {"loss/policy", "val/ratio", "val/ratio_max", "val/ratio_deviation", "num_eos", "text/distinct_2"}
    expected |= {"text/ref_loss", "text/length", "watch/length", "learning_rate", "grad_norm", "step"}
    expected |= {"ppo": {"loss/value", "val/clipfrac"}, "rloo": set(), "grpo": {"loss/kl"}}[method]
    assert expected == set(history[0]) and all(math.isfinite(v) for r in history for v in r.values())
    named = {line.split()[0] for line in rlhf.statistics.__doc__.splitlines() if line.startswith("    ") and line[4] != " "}
    assert expected - {"watch/length"} <= named, "every statistic is described"
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-5), "the reference is the policy as it was"
    assert history[-1]["objective/kl"] > 0.1
    for r in history:
        assert r["objective/rlhf_reward"] == pytest.approx(r["objective/scores"] + r["objective/non_score_reward"])
        assert r["watch/length"] == pytest.approx(r["text/length"])


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_of_kl_is_reported_as_what_it_takes_off_the_reward(method):
    run = trainer(method, steps=3, learning_rate=1e-2, kl_coef=0.3)
    for r in run.train()[1:]:
        assert r["objective/kl"] > 0.01
        assert r["objective/non_score_reward"] == pytest.approx(0 if method == "grpo" else -0.3 * r["objective/kl"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_minibatch_is_the_methods_also_where_policy_and_reference_differ(method, rng):
    run = trainer(method, kl_coef=0.3)
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    old, ref, values, returns = (rng.normal(-2, 0.3, (4, 3)) * mask for _ in range(4))
    new = mp.Tensor(old + rng.normal(0, 0.3, (4, 3)) - 1e3 * (mask == 0), requires_grad=True)  # what stands at padding
    v = mp.Tensor(values + 0.3)
    advantages = np.array([2.0, -1.0, 0.5, -0.5]) if method != "ppo" else rng.normal(size=(4, 3)) * mask
    batch = dict(old_logprobs=old, ref_logprobs=ref, old_values=values, returns=returns, mask=mask, advantages=advantages)
    loss, found = run.loss(batch, rlhf.Outputs(new, np.ones((4, 3)), v))
    change = np.where(mask, new.data - old, 0)
    if method == "ppo":
        want = rlhf.policy_loss(new, old, advantages, mask) + 0.1 * rlhf.value_loss(v, values, returns, mask)
        ratio, counted = np.exp(change), mask
    elif method == "rloo":
        want = rlhf.rloo_loss(new, old, advantages, mask)
        ratio, counted = np.exp(change.sum(1)), np.ones(4)
    else:
        want = rlhf.grpo_loss(new, old, ref, advantages, mask, beta=0.3)
        gap = (ref - new.data)[mask != 0]
        assert found["loss/kl"] == pytest.approx((np.exp(gap) - 1 - gap).mean())
        ratio, counted, advantages = np.exp(change), mask, advantages[:, None]
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    loss.backward()
    assert np.isfinite(new.grad).all() and not new.grad[mask == 0].any()
    assert found["policy/clipfrac"] == pytest.approx(rlhf.clip_fraction(ratio, advantages, counted))


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_autocast_around_each_update(method):
    """Sampling, the log-probabilities of policy and reference, the loss and its gradients: the same bytes."""
    trainers = {name: trainer(method, learning_rate=0.01, bf16=name == "bf16") for name in ("bf16", "by hand", "float32")}
    for name, one in trainers.items():
        with mp.autocast("bfloat16", enabled=name == "by hand"):
            one.step(), one.step()
    after = {name: weights(one.policy) for name, one in trainers.items()}
    assert trainers["bf16"].history == trainers["by hand"].history != trainers["float32"].history
    assert same(after["bf16"], after["by hand"]) and not same(after["bf16"], after["float32"])
    assert all(array.dtype == np.float32 for array in after["bf16"].values())


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_another_place_in_a_batch_is_no_alarm(method):
    """It rounds to another number, by more than float32 would ever differ."""
    run = trainer(method, policy=base(hidden_size=128), batch_size=12, mini_batch_size=3, learning_rate=1e-3, bf16=True)
    assert len(run.train()) == 4


def test_what_was_done_step_by_step_stays_in_the_history():
    run = trainer()
    run.step()
    assert [r["step"] for r in run.train()] == [1, 2, 3, 4] == [r["step"] for r in run.train()]


def test_a_run_is_resumed_in_its_own_precision(tmp_path):
    trainer(output_dir=tmp_path, save_steps=1, steps=2, bf16=True).train()
    with pytest.raises(CheckpointError, match="bf16"):
        trainer(output_dir=tmp_path, save_steps=1, steps=2).train(resume_from_checkpoint=True)


def test_rloo_takes_the_kl_off_the_score_before_answers_are_compared(monkeypatch):
    run = trainer("rloo", kl_coef=0.5, learning_rate=1e-2)
    run.step()
    scored, trained, score, epochs = [], [], run.score, run.epochs
    monkeypatch.setattr(run, "score", lambda *a: scored.append(score(*a)) or scored[0])
    monkeypatch.setattr(run, "epochs", lambda batch: trained.append(batch) or epochs(batch))
    run.step()
    kl = trained[0]["kl"].sum(axis=1)
    assert abs(kl).max() > 0.1
    np.testing.assert_allclose(trained[0]["advantages"], rlhf.rloo_advantages(scored[0][0] - 0.5 * kl, 4), rtol=1e-5)


def test_whitened_rewards_keep_their_mean(monkeypatch):
    given, gae = [], rlhf.ppo.gae
    monkeypatch.setattr(rlhf.ppo, "gae", lambda rewards, *a: given.append((rewards, a[-1])) or gae(rewards, *a))
    trainer(seed=3).step()
    trainer(seed=3, whiten_rewards=True).step()
    plain, white = (rewards[mask != 0] for rewards, mask in given)
    assert white.mean() == pytest.approx(plain.mean(), rel=1e-4) and abs(plain.mean()) > 0.01
    assert white.std(ddof=1) == pytest.approx(1, abs=1e-3)


def test_an_update_of_a_single_token_trains_the_values_alone():
    for options in ({}, {"whiten_rewards": True}):
        run = trainer(batch_size=1, mini_batch_size=1, num_epochs=1, response_length=1, steps=1, **options)
        (record,) = run.train()
        assert record["loss/policy"] == 0 and record["loss/value"] > 0 and run.v_head.weight.data.any()


@pytest.mark.parametrize("method", METHODS)
def test_at_another_temperature_the_reference_is_still_the_policy_as_it_was(method):
    assert trainer(method, temperature=0.6).step()["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_each_update_learns_at_the_rate_of_the_schedule():
    run = trainer(steps=4, learning_rate=1e-3)
    for share in (1, 0.75, 0.5, 0.25):
        assert run.step()["learning_rate"] == pytest.approx(1e-3 * share)
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([1e-3 * share])


def test_what_an_update_starts_from_is_zero_at_padding():
    run = trainer(steps=1)
    roll = run.rollout()
    assert not roll.mask.all()
    batch = run.examine(roll)
    for name in ("old_logprobs", "ref_logprobs", "kl", "old_values"):
        assert batch[name].shape == roll.mask.shape and not batch[name][roll.mask == 0].any()


def test_a_checkpoint_with_a_price_of_kl_below_zero_is_refused():
    for beta in (-0.5, "0.1", None):
        with pytest.raises(ValueError, match="beta is"):
            trainer().load_state({"beta": beta})
    trainer().load_state({"beta": 0.0})


def test_padding_on_the_left_does_not_move_a_completions_probability():
    policy, mask = base(), np.array([[0, 0, 1, 1, 1, 1]])
    ids = np.array([[9, 9, 3, 4, 5, 6]])
    labels = np.where(np.arange(6) < 4, -100, ids)
    padded, alone = rlhf.sequence_logprobs(policy, ids, labels, mask), rlhf.sequence_logprobs(policy, ids[:, 2:], labels[:, 2:])
    assert padded.item() == pytest.approx(alone.item(), rel=1e-5)


def test_statistics_of_the_first_update_are_those_of_its_rollout():
    run = trainer(steps=1)
    roll = rlhf.rollout(base(), run.prompts_of(0), 6, 1.0, [EOS], mp.backend.Rng(0, 0))
    logprobs = rlhf.response_logprobs(base(), roll.input_ids, roll.attention_mask, 6).numpy() * roll.mask
    record = run.step()
    assert record["objective/entropy"] == pytest.approx(-logprobs.sum(1).mean(), rel=1e-5)
    assert record["objective/scores"] == liked(roll).mean() and record["num_eos"] == roll.ended.sum()
    assert record["text/ref_loss"] == pytest.approx(-logprobs.sum() / roll.mask.sum(), rel=1e-5)
    assert record["text/distinct_2"] == rlhf.distinct_n(roll.responses())


@pytest.mark.parametrize("method", METHODS)
def test_one_update_is_the_published_algorithm_step_by_step(method):
    """The trainer against the same update written down with the published losses, with one minibatch and one epoch."""
    run = trainer(method, steps=1, mini_batch_size=16, num_epochs=1, learning_rate=1e-3, lr_scheduler_type="constant")
    policy, head = base(), mp.nn.Linear(16, 1, seed=0)
    for p in head.parameters():
        p.data = np.zeros_like(p.data)
    prompts = run.prompts_of(0, 1 if method == "ppo" else 4)
    roll = rlhf.rollout(policy, prompts, 6, 1.0, [EOS], mp.backend.Rng(0, 0))
    logprobs, scores = rlhf.response_logprobs(policy, roll.input_ids, roll.attention_mask, 6), liked(roll).astype("f4")
    old = logprobs.numpy() * roll.mask
    if method == "ppo":
        rewards = rlhf.shaped_rewards(old, old, scores, roll.mask, 0.05)
        advantages, returns = rlhf.gae(rewards, np.zeros_like(old), 1.0, 0.95, roll.mask)
        values = head(policy.backbone(roll.input_ids, roll.attention_mask)[:, -7:-1]).reshape(16, 6)
        loss = rlhf.policy_loss(logprobs, old, rlhf.whiten(advantages, roll.mask), roll.mask)
        loss = loss + 0.1 * rlhf.value_loss(values, np.zeros_like(old), returns, roll.mask)
    elif method == "rloo":
        loss = rlhf.rloo_loss(logprobs, old, rlhf.rloo_advantages(scores, 4), roll.mask)
    else:
        loss = rlhf.grpo_loss(logprobs, old, old, rlhf.grpo_advantages(scores, 4), roll.mask, beta=0.05)
    loss.backward()
    named = [*policy.named_parameters(), *(head.named_parameters() if method == "ppo" else ())]
    mp.optim.clip_grad_norm(named, 1.0)
    mp.optim.Adam(named, lr=1e-3, eps=1e-5).step()
    run.step()
    for name, p in policy.named_parameters():
        np.testing.assert_allclose(run.trainable[name].data, p.data, atol=2e-5, err_msg=name)
    if method == "ppo":
        np.testing.assert_allclose(run.v_head.weight.data, head.weight.data, atol=2e-5)


@pytest.mark.parametrize("seed", [0, 1 << 40])
def test_no_two_purposes_share_a_stream_of_random_numbers(seed, monkeypatch):
    """Tokens, the order of the prompts and the order of the minibatches: each draws from streams of its own."""
    drawn, default_rng = {}, np.random.default_rng

    def spied(path):
        generator, caller = default_rng(path), sys._getframe(1)
        purpose = caller.f_code.co_name, caller.f_locals.get("purpose")
        drawn.setdefault(purpose, set()).add(tuple(generator.bit_generator.seed_seq.generate_state(4)))
        return generator

    run = trainer(seed=seed, num_epochs=3)
    monkeypatch.setattr(np.random, "default_rng", spied)
    run.train()
    assert len(drawn) == 3, drawn.keys()
    assert min(map(len, drawn.values())) == 12, "4 updates of 3 epochs"
    assert sum(map(len, drawn.values())) == len(set.union(*drawn.values()))


def test_the_reference_shares_what_is_frozen_and_copies_what_is_trained():
    model = base()
    full = rlhf.frozen_copy(model)
    assert not any(np.shares_memory(p.data, q.data) for p, q in zip(model.parameters(), full.parameters()))
    sft = mp.get_peft_model(model, mp.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_sft = rlhf.frozen_copy(sft)
    for (name, p), q in zip(sft.named_parameters(), with_sft.parameters()):
        assert np.shares_memory(p.data, q.data) != p.requires_grad and not q.requires_grad, name
    ids = np.array([[3, 4, 5]])
    start = with_sft(ids).numpy()
    for p in sft.parameters():
        if p.requires_grad:
            p.data += 1
    sft.set_adapter("default", inference_mode=True)
    with sft.disable_adapter():
        assert np.array_equal(with_sft(ids).numpy(), start), "neither training nor switching the policy moves it"
    assert not np.allclose(start, model(ids).numpy()), "and it holds the adapter it began with"


def test_a_lora_policy_trains_its_adapter_and_nothing_else():
    model = base()
    before = weights(model)
    policy = mp.get_peft_model(model, mp.LoraConfig(r=4, target_modules="all-linear"))
    run = trainer(policy=policy, steps=2, learning_rate=1e-2)
    shared = {id(p.data) for p in run.reference.parameters()} & {id(p.data) for p in policy.parameters()}
    assert {id(p.data) for p in model.parameters()} <= shared, "one base for policy and reference"
    first, second = run.train()
    assert same(before, weights(model)) and not policy.unmoved()
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and second["objective/kl"] != 0


def test_a_policy_on_top_of_a_frozen_sft_adapter():
    policy = mp.get_peft_model(base(), mp.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.add_adapter("rl", mp.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    policy.set_adapter(["default", "rl"])
    for _, part in policy.parts("default"):
        part.requires_grad_(False)
    sft = {n: p.data.copy() for n, p in policy.named_parameters() if not p.requires_grad}
    first, _ = trainer(policy=policy, steps=2, learning_rate=1e-2).train()
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5), "the reference is base plus SFT adapter"
    assert all(np.array_equal(sft[n], p.data) for n, p in policy.named_parameters() if n in sft)


@pytest.mark.parametrize("method", METHODS)
def test_merged_adapters_are_refused_because_they_would_not_learn(method):
    policy = mp.get_peft_model(base(), mp.LoraConfig(r=2))
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters get no gradient: call unmerge_adapter\(\)"):
        trainer(method, policy)
    policy.unmerge_adapter()
    trainer(method, policy)
    value = mp.get_peft_model(mp.ValueModel(base()), mp.LoraConfig(r=2, modules_to_save=["v_head"]))
    value.merge_adapter()
    if method == "ppo":
        with pytest.raises(ValueError, match="merged adapters get no gradient"):
            trainer(value_model=value)


def test_a_value_model_of_its_own_needs_a_head_that_learns():
    value = mp.ValueModel(base())
    run = trainer(value_model=value)
    run.train()
    assert value.v_head.weight.data.any() and all(n.startswith("value.") for n in run.trainable if "v_head" in n)
    options = dict(r=2, target_modules="all-linear")
    value = mp.get_peft_model(mp.ValueModel(base()), mp.LoraConfig(**options))
    with pytest.raises(ValueError, match=r'v_head requires gradients.*modules_to_save=\["v_head"\]'):
        trainer(value_model=value)
    value = mp.get_peft_model(mp.ValueModel(base()), mp.LoraConfig(**options, modules_to_save=["v_head"]))
    trainer(value_model=value, steps=1).train()
    head = [to_numpy(p.data) for n, p in value.named_parameters() if p.requires_grad and "v_head" in n]
    assert len(head) == 2 and all(a.any() for a in head)


class Recorder(Callback):
    """Remembers how it was called, over interruptions; `add` is added to every gradient, `end` is the last step."""

    def __init__(self, add=0.0, end=None):
        self.add, self.end, self.models, self.steps, self.records = add, end, [], [], []

    def before_step(self, model, step):
        self.models.append(model)
        self.steps.append(step)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = p.grad + self.add

    def after_step(self, model, step, record):
        assert model is self.models[-1] and step == self.steps[-1] == record["step"]
        assert any(p.grad is not None for p in model.parameters()), "the gradients are still there"
        self.records.append(record)
        return step == self.end

    def state_dict(self):
        return {"steps": np.array(self.steps)}

    def load_state_dict(self, arrays):
        self.steps = to_numpy(arrays["steps"]).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_stand_around_every_optimizer_step(method, tmp_path):
    own, given = Recorder(), Recorder(add=1e3)
    policy = base()
    policy.training_callbacks = lambda: [own]
    options = dict(policy=policy, steps=2, learning_rate=1e-3, save_steps=1, output_dir=tmp_path)
    history = trainer(method, **options).train(callbacks=[given])
    assert own.steps == given.steps == list(range(1, 9)), "2 updates of 2 epochs of 2 minibatches"
    assert all(model is policy for model in own.models + given.models)
    assert history[0]["grad_norm"] > 1e3, "the norm is that of what the optimizer gets, before it is clipped"
    assert np.mean([r["loss/policy"] for r in given.records[:4]]) == pytest.approx(history[0]["loss/policy"])
    shutil.rmtree(tmp_path / "checkpoint-2")
    again, resumed = base(), Recorder(add=1e3)
    again.training_callbacks = lambda: [Recorder()]
    run = trainer(method, **options | {"policy": again})
    with pytest.raises(CheckpointError, match="other callbacks"):
        run.train(resume_from_checkpoint=True)
    assert run.train(resume_from_checkpoint=True, callbacks=[resumed]) == history
    assert resumed.steps == given.steps and len(resumed.records) == 4 and same(weights(policy), weights(again))


def test_a_callback_ends_the_run_in_the_middle_of_an_update():
    end = Recorder(end=6)
    assert len(trainer().train(callbacks=[end])) == 2 and end.steps == [1, 2, 3, 4, 5, 6]


def test_a_value_models_callbacks_get_the_value_model_also_in_an_own_loop():
    value, policy = mp.ValueModel(base()), base()
    recorders = {model: Recorder() for model in (value, policy)}
    for model, recorder in recorders.items():
        model.training_callbacks = lambda recorder=recorder: [recorder]
    trainer(policy=policy, value_model=value, steps=2).step()
    assert all(r.models == [model] * 4 and r.steps == [1, 2, 3, 4] for model, r in recorders.items())


def test_what_is_watched_never_stops_a_run_is_asked_before_training_and_drawn(tmp_path, monkeypatch, rendered):
    policy, asked = base(), []

    def length(roll):
        asked.append(weights(policy))
        return np.where(np.arange(16) == 3, np.nan if len(asked) == 2 else 1.0, 1.0)

    untrained = weights(policy)
    run = trainer(policy=policy, watch={"gold": length}, steps=3, output_dir=tmp_path, learning_rate=1e-3)
    assert [r["watch/gold"] for r in run.train()] == [1.0, None, 1.0]
    assert same(asked[0], untrained) and not same(asked[1], untrained)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.history, "None is null"
    drawn = []
    monkeypatch.setattr("minipeft.rlhf.curves.save_png", lambda figure, path: drawn.append(figure))
    rlhf.plot_run(run.history, tmp_path / "run.png")
    reward, kl, shares = drawn[0].axes
    assert all(whole_steps(ax) for ax in (reward, kl, shares))
    assert [ax.get_title() for ax in (reward, kl, shares)] == ["Reward", "KL from the reference", "Shares"]
    assert [t.get_text() for t in reward.get_legend().get_texts()] == ["reward, optimized", "gold, watched"]
    assert shares.get_ylim() == (-0.02, 1.02) and len(shares.get_legend().get_texts()) == 2 and not kl.get_legend()
    assert [line.get_ydata().tolist() for line in kl.lines[:2]] == [[r["objective/kl"] for r in run.history]] * 2
    best = rlhf.BestOfN([], np.zeros((1, 2)), np.array([0.0, 1.0]), np.array([0.0, 0.5]))
    rlhf.plot_run(run.history, tmp_path / "run.png", best)
    assert drawn[1].axes[3].get_title() == "Reward over KL"
    assert drawn[1].axes[3].lines[1].get_xydata().tolist() == [[0, 0], [0.5, 1]]
    rlhf.plot_calibration(np.array([0.2, 0.8]), np.array([0.3, 0.7]), np.array([3, 5]), [(1, 0.7), (2, 0.6)], tmp_path / "x.png")
    loss, calibration = drawn[2].axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]] and loss.get_title().startswith("Loss")
    assert whole_steps(loss) and not whole_steps(calibration)
    assert loss.lines[2].get_ydata() == pytest.approx([math.log(2)] * 2), "a coin"
    assert calibration.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]], "predicted is observed"
    assert calibration.lines[1].get_xydata().tolist() == [[0.2, 0.3], [0.8, 0.7]]
    assert calibration.collections[0].get_sizes().tolist() == [64, 100], "points grow with the number of pairs"
    assert calibration.get_xlim() == calibration.get_ylim() == (0, 1)
    with pytest.raises(ValueError, match="watch 'gold' must give one score a response"):
        trainer(watch={"gold": lambda r: np.ones(3)}).step()


def whole_steps(axes):
    """Whether the ticks of a short run are at steps, not between them."""
    return all(tick.is_integer() for tick in axes.get_xticks().tolist())


def test_a_run_on_preferences_is_drawn_with_its_held_out_points(monkeypatch):
    names = {"loss": 0.7, "logps/chosen": -3.0, "logps/rejected": -4.0, "rewards/accuracies": 0.5}
    steps = [{"step": i, **{n: v + i for n, v in names.items()}} for i in (1, 2)]
    held_out = [{"step": 2, **{f"eval_{n}": v for n, v in names.items()}}]
    drawn = []
    monkeypatch.setattr("minipeft.rlhf.curves.save_png", lambda figure, path: drawn.append(figure))
    rlhf.plot_preferences(steps + held_out, "x.png")
    loss, logps, accuracy = drawn[0].axes
    assert all(map(whole_steps, drawn[0].axes))
    assert [len(ax.lines) for ax in drawn[0].axes] == [3, 6, 3], "the mean, each, held out"
    assert loss.lines[1].get_xydata().tolist() == [[1, 1.7], [2, 2.7]]
    for ax, value in ((loss, 0.7), (logps, -3.0), (accuracy, 0.5)):
        mean, _, points = ax.lines[:3]
        assert points.get_xydata().tolist() == [[2, value]] and points.get_color() == mean.get_color()
    assert [ax.get_legend() is not None for ax in drawn[0].axes] == [False, True, False]
    assert logps.lines[5].get_color() == logps.lines[3].get_color() != logps.lines[0].get_color()
    assert accuracy.get_ylim() == (-0.02, 1.02)


def test_a_curve_is_drawn_with_its_mean_over_a_tenth_of_the_run(monkeypatch):
    drawn = []
    monkeypatch.setattr("minipeft.rlhf.curves.save_png", lambda figure, path: drawn.append(figure))
    for n in (20, 29):
        y = np.arange(float(n)) ** 2
        rlhf.plot_calibration(np.ones(1), np.ones(1), np.ones(1), list(enumerate(y)), "x.png")
        mean, each, _ = drawn[-1].axes[0].lines
        assert each.get_ydata().tolist() == y.tolist()
        assert mean.get_ydata().tolist() == [0, *((y[1:] + y[:-1]) / 2)]


def test_the_largest_ratio_is_the_largest_ratio(monkeypatch):
    run = trainer(steps=1, mini_batch_size=16, num_epochs=2, learning_rate=1e-2)
    seen = []
    original = run.loss

    def kept(batch, new):
        seen.append(np.exp(np.where(batch["mask"] != 0, new.logprobs.data - batch["old_logprobs"], np.nan)))
        return original(batch, new)

    monkeypatch.setattr(run, "loss", kept)
    record = run.step()
    assert record["val/ratio_max"] == pytest.approx(max(np.nanmax(r) for r in seen), rel=1e-6)
    assert record["val/ratio_deviation"] == pytest.approx(max(np.nanmax(abs(r - 1)) for r in seen), rel=1e-5)
    assert record["val/ratio"] == pytest.approx(np.mean([np.nanmean(r) for r in seen]), rel=1e-6)


def test_without_max_grad_norm_nothing_is_clipped():
    free, huge = (trainer(steps=2, max_grad_norm=norm) for norm in (0, 1e9))
    assert free.train() == huge.train() == trainer(steps=2, max_grad_norm=None).train() and free.history[0]["grad_norm"] > 0


def test_adaptive_kl_moves_beta_and_logs_the_one_it_used():
    history = trainer(learning_rate=3e-3, kl_coef=0.1, kl_target=1e-3, kl_horizon=64).train()
    first, second, third, fourth = (r["objective/kl_coef"] for r in history)
    assert first == 0.1 and second == pytest.approx(0.1 * (1 - 0.2 * 16 / 64)), "KL 0: 20% below target"
    assert fourth > third, "then it is far above"


def test_groups_share_their_prompt_and_epochs_cover_all_prompts():
    run = trainer("grpo", num_generations=4)
    first = run.prompts_of(0, 4)
    assert all(first[i] == first[i - i % 4] for i in range(16)) and run.rollout(4).prompts() == first
    assert sorted(map(tuple, first[::4])) == sorted(map(tuple, PROMPTS))
    assert first == trainer("rloo").prompts_of(0, 4)


def test_a_reward_model_as_reward_and_another_number_to_watch():
    model = rlhf.RewardModel(base(), seed=3)
    model.mean, model.std = 0.25, 2.0
    whole = lambda r: model.score_texts([np.array(p + q) for p, q in zip(r.prompts(), r.responses())])  # noqa: E731
    record = trainer(reward=model, watch={"same": whole}).step()
    assert record["objective/scores"] == pytest.approx(record["watch/same"], abs=1e-5)


def test_a_run_works_on_a_device(xp):
    run = trainer(policy=base(xp), steps=2)
    run.train()
    assert np.isfinite(run.history[-1]["loss/policy"])


# ------------------------------------------------------------------------------------------------- checkpoints, resume


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_bytes(method, tmp_path):
    options = dict(kl_coef=0.1, learning_rate=1e-3, save_steps=1)
    options |= dict(kl_target=0.5, kl_horizon=64) if method == "ppo" else {}
    whole = trainer(method, output_dir=tmp_path / "whole", **options)
    whole.train()

    def stop(record):
        if record["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer(method, output_dir=tmp_path / "halves", **options).train(callbacks=[Log(stop)])
    again = trainer(method, output_dir=tmp_path / "halves", **options)
    assert again.train(resume_from_checkpoint=True) == whole.history
    for name, p in whole.trainable.items():
        assert again.trainable[name].data.tobytes() == p.data.tobytes(), name
    lines = [(tmp_path / d / "metrics.jsonl").read_bytes() for d in ("whole", "halves")]
    assert lines[0] == lines[1] and [json.loads(line)["step"] for line in lines[0].splitlines()] == [1, 2, 3, 4]
    files = [sorted(Path(tmp_path / d).rglob("*.safetensors")) for d in ("whole", "halves")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


class Once(Callback):
    """Interrupts a run at its first optimizer step of this number."""

    at = 8

    def before_step(self, model, step):
        if step == self.at:
            Once.at = 0
            raise Interrupted


def test_an_interrupted_trainer_goes_on_itself_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Once, "at", 0)
    options = dict(learning_rate=1e-3, max_grad_norm=None, save_steps=1)
    whole = trainer("grpo", output_dir=tmp_path / "whole", **options)
    whole.train(callbacks=[Once()])
    monkeypatch.setattr(Once, "at", 8)  # in update 2, between backward and the optimizer's step
    halves = trainer("grpo", output_dir=tmp_path / "halves", **options)
    with pytest.raises(Interrupted):
        halves.train(callbacks=[Once()])
    halves.step()  # an update of its own, after which the checkpoint is older than the trainer
    assert halves.train(resume_from_checkpoint=True, callbacks=[Once()]) == whole.history
    assert all(halves.trainable[name].data.tobytes() == p.data.tobytes() for name, p in whole.trainable.items())


def test_a_run_that_goes_on_without_a_checkpoint_keeps_its_records(tmp_path, monkeypatch):
    monkeypatch.setattr(Once, "at", 8)
    run = trainer("rloo", output_dir=tmp_path)
    with pytest.raises(Interrupted):
        run.train(callbacks=[Once()])
    assert [r["step"] for r in run.train()] == [1, 2, 3, 4]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    reward = rlhf.RewardModel(base(), seed=3)
    trainer(reward=reward, output_dir=tmp_path, save_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint-4 is of an earlier run"):
        trainer(output_dir=tmp_path).train()
    for match, changed in (
        ("other kl_coef .0.05 there, 0.3 here", dict(kl_coef=0.3)),
        ("other prompts", dict(prompts=PROMPTS[:2])),
        ("other reference policy", dict(policy=base(initializer_range=0.1))),
        ("other reward model", dict(reward=rlhf.RewardModel(base(), seed=4))),
        ("other method", dict(method="grpo")),
    ):
        with pytest.raises(CheckpointError, match=match):
            trainer(**({"reward": reward} | changed), output_dir=tmp_path).train(resume_from_checkpoint=True)

    def value(**fields):
        model = mp.ValueModel(base(**fields)).requires_grad_(False)
        model.v_head.requires_grad_(True)
        return model

    trainer(value_model=value(), output_dir=tmp_path / "value", save_steps=2).train()
    with pytest.raises(CheckpointError, match="other value model"):
        run = trainer(value_model=value(initializer_range=0.1), output_dir=tmp_path / "value")
        run.train(resume_from_checkpoint=True)


def test_large_things_are_hashed_once_a_run(tmp_path, monkeypatch):
    hashed = []
    for name in ("fingerprint", "frozen_fingerprint"):
        original = getattr(online, name)
        monkeypatch.setattr(online, name, lambda x, f=original, n=name: hashed.append(n) or f(x))
    trainer(reward=rlhf.RewardModel(base(), seed=3), output_dir=tmp_path, save_steps=1).train()
    assert sorted(hashed) == ["fingerprint", "fingerprint", "frozen_fingerprint"], "prompts, reward model, reference"


def test_a_run_that_max_kl_stopped_goes_on_with_a_higher_one(tmp_path):
    options = dict(learning_rate=1e-2, save_steps=1)
    whole = trainer(output_dir=tmp_path / "whole", **options).train()
    limit = whole[1]["objective/kl"] / 2
    with pytest.raises(rlhf.RLHFError, match=r"update 2.*beyond max_kl"):
        trainer(output_dir=tmp_path / "stopped", max_kl=limit, **options).train()
    assert trainer(output_dir=tmp_path / "stopped", **options).train(resume_from_checkpoint=True) == whole


# ------------------------------------------------------------------------------------------------------ what stops it


def constant(roll):
    return np.full(16, 2.0)


def by_prompt(roll):
    return np.array([float(len(p)) for p in roll.prompts()])


@pytest.mark.parametrize("method, reward", [(m, constant) for m in METHODS] + [("rloo", by_prompt), ("grpo", by_prompt)])
def test_equal_scores_prefer_nothing_and_the_run_goes_on(method, reward):
    policy = base()
    before = weights(policy)
    learned = trainer(method, policy, reward, steps=2, learning_rate=1e-2, kl_coef=0, **VALUES_ALONE.get(method, {})).train()
    assert [r["objective/scores_equal"] for r in learned] == [1, 1] and same(before, weights(policy))
    assert all(r["loss/policy"] == 0 for r in learned)
    mixed = trainer(method, reward=lambda r: by_prompt(r) + (np.arange(16) == 3)).step()
    assert mixed["objective/scores_equal"] == (0 if method == "ppo" else 0.75), "a group is what is compared"


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_end_a_run_after_many_updates_which_is_kept(method, tmp_path):
    mixed = lambda r: liked(r) if len(asked) == 2 else np.full(16, float(len(asked)))  # noqa: E731
    asked = []
    options = dict(steps=9, max_equal_updates=3, output_dir=tmp_path, reward=lambda r: asked.append(0) or mixed(r))
    with pytest.raises(rlhf.RLHFError, match=r"update 5: no response has scored .* for 3 updates .* 5\).*checkpoint-5 keeps"):
        trainer(method, **options).train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["objective/scores_equal"] for line in lines] == [1, 0, 1, 1, 1]
    assert len(trainer(method, **options | dict(max_equal_updates=7)).train(resume_from_checkpoint=True)) == 9
    with pytest.raises(rlhf.RLHFError, match=r"none ended with a stop token; raise response_length$"):
        trainer(method, stop_token_ids=(99,), missing_eos_score=-1.0, max_equal_updates=2).train()


def test_not_a_number_stops_with_a_reason():
    with pytest.raises(rlhf.RLHFError, match="update 1: the reward is NaN or infinite for 1 of 16"):
        trainer(reward=lambda r: np.r_[np.nan, np.arange(15.0)]).step()
    with pytest.raises(ValueError, match=r"one score a response, \(16,\), not \(3,\)"):
        trainer(reward=lambda r: np.arange(3.0)).step()
    run = trainer(learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises((rlhf.RLHFError, FloatingPointError), match=r"NaN|loss is"):
        run.train()


def test_a_diverged_kl_stops_with_a_reason_and_a_stop_kl_ends_the_run():
    with pytest.raises(rlhf.RLHFError, match=r"nats a response from its reference, beyond max_kl=0.01; lower learning"):
        trainer(learning_rate=3e-2, max_kl=0.01).train()
    history = trainer(learning_rate=3e-2, stop_kl=0.01, steps=10).train()
    assert len(history) < 10 and history[-1]["objective/kl"] > 0.01 >= history[-2]["objective/kl"]


def test_the_first_minibatch_shows_a_policy_that_is_not_the_one_that_sampled(monkeypatch):
    good = {"val/ratio_deviation": 1e-6, "policy/approxkl": 0.0, "policy/clipfrac": 0.0}
    rlhf.check_first_minibatch(good)
    bad = {"val/ratio_deviation": (2e-4,), "policy/approxkl": (1e-3, math.nan), "policy/clipfrac": (0.1,)}
    for name, value in ((name, value) for name, values in bad.items() for value in values):
        with pytest.raises(rlhf.RLHFError, match="already differs from the one that sampled"):
            rlhf.check_first_minibatch(good | {name: value})
    run = trainer()
    scale, original = iter([1.0, 1.0, 1.01]), run.outputs  # two batches before, then a temperature that has changed
    other = lambda *a: (out := original(*a))._replace(logprobs=out.logprobs * next(scale, 1.0))  # noqa: E731
    monkeypatch.setattr(run, "outputs", other)
    with pytest.raises(rlhf.RLHFError, match="is something random in its forward pass"):
        run.step()


@pytest.mark.parametrize(
    "message, fields",
    [
        ("batch_size must be a multiple of mini_batch_size, 8, got 12", dict(batch_size=12)),
        ("multiple of num_generations, 5", dict(method="grpo", num_generations=5)),
        ("set one of them to None", dict(missing_eos_score=-1.0, missing_eos_penalty=1.0)),
        ("kl_coef must not start at 0", dict(kl_coef=0, kl_target=3.0)),
        ("save_steps needs an output_dir", dict(save_steps=1)),
        ("kl_horizon must be above batch_size / 5, 3.2, .* got 3", dict(kl_horizon=3, kl_target=1.0)),
        (r"prompts\[1\] has 27 tokens; with response_length=6 at most 26 fit", dict(prompts=[[3], [4] * 27])),
        ("there are no prompts", dict(prompts=[])),
        ("the model names no EOS token", dict(policy=base(eos_token_id=None), missing_eos_score=-1.0)),
        ("nothing to train", dict(policy=base().requires_grad_(False))),
    ],
)
def test_arguments_that_make_no_sense(message, fields):
    with pytest.raises(ValueError, match=message):
        trainer(**fields)


def test_a_prompt_may_fill_the_positions_with_its_answer():
    assert trainer(prompts=[[4] * 26], steps=1).train()[0]["text/length"] <= 6


def test_what_belongs_to_another_trainer_or_is_text_is_named():
    with pytest.raises(TypeError, match="PPOTrainer takes a PPOConfig, not a GroupConfig"):
        rlhf.PPOTrainer(base(), liked, PROMPTS, rlhf.GroupConfig())
    with pytest.raises(TypeError, match=r"rlhf.text_reward\(function, tokenizer\)"):
        trainer(reward=lambda prompts, completions: [1.0] * len(prompts))
    texts = ["She was"]
    for sample in (lambda: trainer(prompts=texts), lambda: rlhf.sample_answers(base(), texts), lambda: rlhf.best_of_n(base(), liked, texts, 2)):
        with pytest.raises(TypeError, match="lists of token ids, not texts"):
            sample()
    once = rlhf.sample_answers(base(), (prompt for prompt in PROMPTS[:2]), 2, 3)
    assert once == rlhf.sample_answers(base(), PROMPTS[:2], 2, 3) and len(once) == 2
    with pytest.raises(TypeError, match="a function of a rollout, not 'length'"):
        trainer(reward="length")
    assert trainer(reward=max).reward is max, "a builtin does not say what it takes"
    adapted = mp.get_peft_model(rlhf.RewardModel(base()), mp.LoraConfig(r=2))
    for score in (lambda: trainer(reward=adapted), lambda: rlhf.best_of_n(base(), adapted, PROMPTS, 2)):
        with pytest.raises(TypeError, match="the reward is a PeftModel: merge its adapters into a RewardModel first"):
            score()


def test_what_a_rollout_and_an_update_cannot_work_with():
    with pytest.raises(ValueError, match="this trains no virtual tokens"):
        trainer(policy=mp.get_peft_model(base(), mp.PromptTuningConfig(num_virtual_tokens=2)))
    for k, size in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match="k and batch_size must be at least 1"):
            rlhf.sample_answers(base(), PROMPTS, k, batch_size=size)
    with pytest.raises(TypeError, match="abstract"):
        rlhf.OnlineTrainer(base(), liked, PROMPTS, rlhf.OnlineConfig(**SMALL))
    for prompts in ([], [[3], []]):
        with pytest.raises(ValueError, match="each of at least one token"):
            rlhf.rollout(base(), prompts, 3)
    for temperature in (0, -0.5):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            rlhf.rollout(base(), PROMPTS, 3, temperature)


# ----------------------------------------------------------------------------------------------------------------- DPO


def preference(chosen, rejected):
    prompt = [3, 4]
    return PreferencePair(*(
        Example(np.array(prompt + answer + [EOS]), np.array([-100] * 2 + answer + [EOS])) for answer in (chosen, rejected)
    ))  # fmt: skip


def pairs(n, seed):
    rng = np.random.default_rng(seed)
    return [
        preference([LIKED] * int(rng.integers(1, 4)), rng.integers(8, 16, rng.integers(1, 4)).tolist())
        for _ in range(n)
    ]


def test_dpo_learns_to_prefer_from_where_it_begins():
    policy = base()
    args = mp.TrainingArguments(learning_rate=3e-3, max_steps=20, per_device_train_batch_size=8, progress=False)
    run = rlhf.dpo_trainer(policy, pairs(40, 0), pairs(20, 1), args, beta=0.5)
    assert run.evaluate() == pytest.approx(math.log(2), abs=1e-5), "the policy is its own reference"
    result = run.train()
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and run.evaluate() < 0.4
    reference = [(p.ref_chosen, p.ref_rejected) for p in run.eval_examples]
    rewards = 0.5 * (completion_logprobs(policy, pairs(20, 1)) - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    assert (margin > 0).mean() > 0.9
    assert np.log1p(np.exp(-margin)).mean() == pytest.approx(run.evaluate(), rel=1e-4)
    with pytest.raises(ValueError, match="beta must be a number above 0, or None, got 0"):
        rlhf.dpo_trainer(policy, pairs(4, 0), beta=0)
    assert rlhf.dpo_trainer(policy, pairs(4, 0)).args.learning_rate == 1e-4, "a tenth of the method's usual rate"


def test_dpo_resumes_with_another_evaluation_batch_but_not_another_beta(tmp_path):
    def run(size, beta=0.1):
        options = dict(max_steps=4, save_steps=2, output_dir=tmp_path, learning_rate=1e-3, progress=False)
        args = mp.TrainingArguments(per_device_eval_batch_size=size, **options)
        return rlhf.dpo_trainer(base(), pairs(37, 0), pairs(9, 1), args, beta=beta)

    class Stop(Callback):
        def before_step(self, model, step):
            if step == 4 and (tmp_path / "checkpoint-2").exists() and not stopped:
                stopped.append(step)
                raise Interrupted

    stopped = []
    with pytest.raises(Interrupted):
        run(8).train(callbacks=[Stop()])
    with pytest.raises(CheckpointError, match=r"other loss .dpo_objective\(.*beta=0.1\) there, .*beta=0.2\) here"):
        run(8, beta=0.2).train(resume_from_checkpoint=True, callbacks=[Stop()])
    assert run(32).train(resume_from_checkpoint=True, callbacks=[Stop()]).steps == 4
    with pytest.raises(ValueError, match="reference_batch_size must be an integer of at least 1, got 0"):
        rlhf.dpo_trainer(base(), pairs(4, 0), reference_batch_size=0)


def test_dpo_of_a_lora_policy_refers_to_the_base():
    model = base()
    before = weights(model)
    policy = mp.get_peft_model(model, mp.LoraConfig(r=4, target_modules="all-linear"))
    args = mp.TrainingArguments(learning_rate=1e-2, max_steps=10, progress=False)
    run = rlhf.dpo_trainer(policy, pairs(16, 0), args=args)
    on_base = rlhf.with_reference(model, pairs(16, 0))
    assert [p.ref_chosen for p in run.train_examples] == pytest.approx([p.ref_chosen for p in on_base], abs=1e-5)
    run.train()
    assert same(before, weights(model)) and not policy.unmoved()


def test_a_models_callbacks_take_part_in_dpo_and_in_reward_training():
    args = mp.TrainingArguments(max_steps=3, progress=False)
    policy, judge = base(), rlhf.RewardModel(base())
    ranked = [rlhf.Ranking((p.chosen.input_ids, p.rejected.input_ids)) for p in pairs(8, 0)]
    for model, run in (
        (policy, rlhf.dpo_trainer(policy, pairs(8, 0), args=args)),
        (judge, mp.Trainer(judge, ranked, args=args, collate=rlhf.collate_rankings)),
    ):
        recorder = Recorder()
        model.training_callbacks = lambda recorder=recorder: [recorder]
        run.train()
        assert recorder.models == [model] * 3 and recorder.steps == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------- a model's own data


def test_answers_become_rankings_and_pairs_in_the_raters_order():
    answers = rlhf.sample_answers(base(), PROMPTS, k=3, length=5, stop_token_ids=[EOS], seed=4, batch_size=5)
    assert [len(a) for a in answers] == [3] * 4 and max(len(a) for own in answers for a in own) <= 5
    assert answers == rlhf.sample_answers(base(), PROMPTS, k=3, length=5, stop_token_ids=[EOS], seed=4)
    assert answers != rlhf.sample_answers(base(), PROMPTS, k=3, length=5, stop_token_ids=[EOS], seed=5)
    order = np.array([[2, 0, 1]] * 4)
    ranking = rlhf.rankings(PROMPTS, answers, order)[1]
    assert [t.tolist() for t in ranking.texts] == [PROMPTS[1] + answers[1][i] for i in (2, 0, 1)]
    pair = rlhf.preference_pairs(PROMPTS, answers, order)[2]
    assert pair.chosen.input_ids.tolist() == PROMPTS[2] + answers[2][2]
    assert pair.rejected.labels.tolist() == [-100] * 4 + answers[2][1]
