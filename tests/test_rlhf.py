"""Rewards, advantages and losses to the digit: the published formulas on small numbers, forward and gradient."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import minipeft as mp
from minipeft import rlhf
from minipeft.backend import to_numpy

# Computed once in float64 by OpenAI's and Hugging Face's definitions; recomputed in tests/oracles/test_rlhf_torchtune.py.
LOGPROBS = np.array([[-1, -2, -0.5, 0], [-0.7, -1.2, -0.9, -2.3]])
REFERENCE = np.array([[-1.2, -1.5, -0.6, 0], [-0.9, -1, -1.4, -2]])
VALUES = np.array([[0.1, 0.2, 0.3, 0], [-0.1, 0, 0.4, 0.5]])
SCORES, MASK = np.array([1, -0.5]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
REWARDS = np.array([[-0.02, 0.05, 0.99, 0], [-0.02, 0.02, -0.05, -0.47]])
ADVANTAGES = np.array([[0.845225, 0.8055, 0.69, 0], [-0.30752875, -0.407925, -0.8715, -0.97]])
WHITE = np.array(
    [[1.1017559254, 1.0517998545, 0.9065531286, 0], [-0.3478865684, -0.4741396127, -1.0571071537, -1.1809755737]]
)
NEW_LOGPROBS = LOGPROBS + np.array([[0.1, -0.3, 0.25, 0], [0, 0.3, -0.1, 0.05]])
NEW_VALUES = VALUES + np.array([[0.3, -0.1, 0.05, 0], [0.25, -0.3, 0.1, 0]])
JUNK = np.where(MASK, 0, 1e30)  # what stands beyond the mask must not matter


def parameter(xp, values):
    return mp.Tensor(xp.asarray(values), requires_grad=True)


def close(array, expected, tolerance=1e-8):
    np.testing.assert_allclose(to_numpy(array), expected, rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------- rewards and advantages


def test_rewards_advantages_and_whitened_advantages_are_the_published_ones(xp):
    given = [xp.asarray(a) for a in (LOGPROBS + JUNK, REFERENCE - JUNK, SCORES, MASK)]
    close(rlhf.shaped_rewards(*given, 0.1), REWARDS)
    assert np.array_equal(to_numpy(given[0]), LOGPROBS + JUNK), "the arguments are left alone"
    rewards, values, mask = (xp.asarray(a) for a in (REWARDS + JUNK, VALUES + JUNK, MASK))
    advantages, returns = rlhf.gae(rewards, values, 1.0, 0.95, mask)
    close(advantages, ADVANTAGES)  # not whitened
    close(returns, ADVANTAGES + VALUES)
    assert advantages.dtype == returns.dtype == np.float64
    close(rlhf.whiten(xp.asarray(ADVANTAGES + JUNK), mask), WHITE)


def test_gae_of_lambda_one_is_the_discounted_sum_of_rewards_minus_the_value(rng):
    rewards, values = rng.standard_normal((2, 3, 7))
    mask = np.arange(7) < np.array([7, 4, 1])[:, None]
    advantages, returns = rlhf.gae(rewards, values, 0.9, 1.0, mask)
    sums = [[(rewards[i, t:n] * 0.9 ** np.arange(n - t)).sum() for t in range(n)] for i, n in enumerate((7, 4, 1))]
    for row, expected in enumerate(sums):
        np.testing.assert_allclose(returns[row, : len(expected)], expected, atol=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()
    one_step, _ = rlhf.gae(rewards, values, 0.9, 0.0, mask)
    delta = np.where(mask, rewards - values, 0)[:, :-1] + 0.9 * np.where(mask, values, 0)[:, 1:]
    np.testing.assert_allclose(one_step[:, :-1], delta * mask[:, :-1], atol=1e-12)


def test_gae_ignores_not_a_number_beyond_the_mask_and_keeps_float32():
    nan = np.where(MASK, 0, np.nan).astype(np.float32)
    advantages, returns = rlhf.gae(REWARDS.astype("f4") + nan, VALUES.astype("f4") + nan, 1.0, 0.95, MASK)
    assert np.isfinite(advantages).all() and advantages.dtype == returns.dtype == np.float32
    with pytest.raises(ValueError, match="one shape"):
        rlhf.gae(REWARDS, VALUES[:1], 1.0, 0.95, MASK)


def test_whitening_rewards_rescales_and_keeps_the_mean(xp):
    real = MASK == 1
    white = to_numpy(rlhf.whiten(xp.asarray(REWARDS + JUNK), xp.asarray(MASK), keep_mean=True))
    assert white[real].mean() == pytest.approx(REWARDS[real].mean())
    assert white[real].std(ddof=1) == pytest.approx(1, abs=1e-6) and not white[~real].any()
    assert rlhf.whiten(np.array([[1.0, 3.0, 9.0]]), np.array([[1, 1, 0]]))[0] == pytest.approx([-(0.5**0.5), 0.5**0.5, 0])
    alone = np.array([[0, 1, 0]])  # of one token there is no variance
    assert rlhf.whiten(np.array([[5.0, 3.0, 9.0]]), alone).tolist() == [[0, 0, 0]]
    assert rlhf.whiten(np.array([[5.0, 3.0, 9.0]]), alone, keep_mean=True).tolist() == [[0, 3, 0]]
    with pytest.raises(ValueError, match="a mean over no token"):
        rlhf.whiten(np.ones((1, 3)), np.zeros((1, 3)))


def test_the_score_goes_to_the_last_real_token_wherever_the_response_ends():
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = rlhf.shaped_rewards(np.zeros((3, 3)), np.zeros((3, 3)), np.array([1.0, 2, 3]), mask, 0.5)
    assert rewards.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    with pytest.raises(ValueError, match="no token as real"):
        rlhf.shaped_rewards(np.zeros((1, 3)), np.zeros((1, 3)), np.ones(1), np.zeros((1, 3)), 0.5)


def test_padding_costs_no_kl_whatever_stands_there(xp):
    logprobs, ref, mask = (xp.asarray(np.array([a])) for a in ([-1.0, -2.0, np.nan], [-1.5, -1.0, -9.0], [1, 1, 0]))
    assert to_numpy(rlhf.advantages.token_kl(logprobs, ref, mask)).tolist() == [[0.5, -1.0, 0.0]]
    rewards = rlhf.shaped_rewards(logprobs, ref, xp.asarray(np.array([2.0])), mask, 0.5)
    assert to_numpy(rewards).tolist() == [[-0.25, 2.5, 0.0]]


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (rlhf.PPOConfig, {"steps": 1, "mini_batch_size": 1, "num_epochs": 1, "response_length": 1, "seed": 0}),
        (rlhf.PPOConfig, {"max_equal_updates": 1, "save_total_limit": 1, "max_grad_norm": 0, "kl_horizon": 1}),
        (rlhf.PPOConfig, {"kl_coef": 0, "gamma": 0, "lam": 0, "vf_coef": 0}),
        (rlhf.GroupConfig, {"num_generations": 2, "kl_coef": 0}),
        (rlhf.DPOConfig, {"reference_batch_size": 1}),
        (rlhf.RewardConfig, {"center": 0}),
    ],
)
def test_an_option_takes_its_least_value_and_names_itself_below(config, least):
    for name, value in least.items():
        assert getattr(config(**{name: value}), name) == value
        with pytest.raises(ValueError, match=name):
            config(**{name: value - 1})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (rlhf.PPOConfig, {"learning_rate": 0, "temperature": 0, "cliprange": 0, "stop_kl": 0, "batch_size": 0}),
        (rlhf.PPOConfig, {"kl_target": 0, "cliprange_value": 0, "stop_token_ids": (-1,), "save_steps": 0}),
        (rlhf.DPOConfig, {"desirable_weight": 0, "undesirable_weight": 0, "gamma": -0.5}),
        (rlhf.RewardConfig, {"center": -0.5}),
    ],
)
def test_an_option_that_must_be_above_zero_is_not_zero(config, options):
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"^{name} must be "):
            config(**{name: value})


def test_options_take_what_is_just_allowed(tmp_path):
    c = rlhf.PPOConfig(batch_size=1, mini_batch_size=1, stop_token_ids=(0,), save_steps=1, output_dir=tmp_path)
    assert (c.batch_size, c.stop_token_ids, c.save_steps) == (1, (0,), 1)
    assert rlhf.DPOConfig(loss_type="simpo", gamma=0).gamma == 0
    assert rlhf.PPOConfig(batch_size=18, mini_batch_size=6, kl_horizon=4, kl_target=1.0).kl_horizon == 4
    with pytest.raises(ValueError, match=r"kl_horizon must be above batch_size / 5, 4, .* got 4"):
        rlhf.PPOConfig(batch_size=20, mini_batch_size=5, kl_horizon=4, kl_target=1.0)


@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_a_discount_is_at_most_one(name):
    assert getattr(rlhf.PPOConfig(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"{name} must be .* got 1.5"):
        rlhf.PPOConfig(**{name: 1.5})


def test_a_limit_of_kl_may_be_small_but_not_zero():
    assert rlhf.PPOConfig(max_kl=0.5).max_kl == 0.5 and rlhf.ppo.KLController(0.1, 1.0).horizon == 10000
    with pytest.raises(ValueError, match="max_kl"):
        rlhf.PPOConfig(max_kl=0)


def test_the_defaults_are_the_ones_that_the_configurations_give_sources_for():
    c = rlhf.PPOConfig()
    assert (c.gamma, c.lam, c.vf_coef, c.cliprange, c.cliprange_value) == (1, 0.95, 0.1, 0.2, 0.2)  # OpenAI's
    assert (c.batch_size, c.mini_batch_size, c.num_epochs, c.response_length, c.steps) == (64, 16, 4, 24, 40)
    assert (c.kl_coef, c.kl_horizon, c.max_kl, c.max_equal_updates, c.temperature) == (0.05, 10000, 100, 20, 1)
    assert (c.max_grad_norm, c.save_total_limit, c.whiten_rewards, c.progress, c.seed) == (1, 2, False, True, 0)
    group, dpo = rlhf.GroupConfig(), rlhf.DPOConfig()
    assert (group.num_generations, group.kl_coef, rlhf.RewardConfig().center) == (4, 0.05, 0)
    assert (dpo.beta, dpo.gamma, dpo.desirable_weight, dpo.undesirable_weight, dpo.reference_batch_size) == (0.1, 1, 1, 1, 32)
    assert rlhf.DPOConfig(loss_type="simpo").beta == 2


def test_a_missing_end_replaces_the_score_or_lowers_it():
    scores, ended = np.array([0.5, 2.0]), np.array([True, False])
    for options, second in ((dict(score=-1.0), -1.0), (dict(penalty=0.75), 1.25), ({}, 2.0)):
        assert rlhf.missing_eos(scores, ended, **options).tolist() == [0.5, second]
    with pytest.raises(ValueError, match=r"gets the score -1.0 or loses 0.75: give one"):
        rlhf.missing_eos(scores, ended, -1.0, 0.75)


def test_a_mean_over_no_token_and_a_group_of_one_are_refused(xp):
    x, mask = xp.asarray(np.ones((2, 3))), xp.asarray(np.zeros((2, 3)))
    for values in (x, mp.Tensor(x)):
        if xp is np:
            with pytest.raises(ValueError, match="a mean over no token"):
                rlhf.masked_mean(values, mask)
        else:  # to look would be to wait
            assert np.isnan(rlhf.masked_mean(values, mask).item())
    for advantages in (rlhf.rloo_advantages, rlhf.grpo_advantages):
        with pytest.raises(ValueError, match="k of at least 2, got 1"):
            advantages(xp.asarray(np.ones(4)), 1)
        with pytest.raises(ValueError, match="4 rewards are not groups of k=3"):
            advantages(xp.asarray(np.ones(4)), 3)


# ---------------------------------------------------------------------------------------------------------- PPO's losses


def test_ppo_losses_and_gradient_are_the_published_ones(xp):
    logprobs, values = parameter(xp, NEW_LOGPROBS + JUNK), parameter(xp, NEW_VALUES + JUNK)
    old, old_values, returns, mask = (xp.asarray(a) for a in (LOGPROBS, VALUES, ADVANTAGES + VALUES, MASK))
    advantages = rlhf.whiten(xp.asarray(ADVANTAGES), mask)
    policy = rlhf.policy_loss(logprobs, old, advantages, mask, 0.2)
    value = rlhf.value_loss(values, old_values, returns, mask, 0.2)
    close(policy.data, 0.0144655480)
    close(value.data, 0.2774734938)
    loss = policy + 0.1 * value
    close(loss.data, 0.0422128973)
    loss.backward()
    slopes = [[-0.1739469439, -0.1113132138, 0, 0], [0.0496980812, 0.0914316475, 0.1366443011, 0.1773607837]]
    close(logprobs.grad, slopes)
    assert not to_numpy(values.grad)[0, 3], "no gradient beyond the mask"
    ratio = xp.asarray(np.exp(NEW_LOGPROBS - LOGPROBS))
    assert rlhf.clip_fraction(ratio, advantages, mask, 0.2).item() == pytest.approx(1 / 7)


def test_clipping_stops_the_gradient_only_where_it_would_help_too_much():
    old, mask = np.zeros((1, 4)), np.ones((1, 4))
    logprobs = parameter(np, np.log([[1.5, 1.5, 0.5, 0.5]]))
    advantages = np.array([[1.0, -1.0, 1.0, -1.0]])
    rlhf.policy_loss(logprobs, old, advantages, mask, 0.2).backward()
    assert (logprobs.grad != 0).tolist() == [[False, True, True, False]]


def test_without_options_clipping_is_at_a_fifth():
    ratio, ones = np.array([[0.5, 0.9, 1.3]]), np.ones((1, 3))
    assert rlhf.ppo.clipped_objective(mp.Tensor(ratio), -ones).data.tolist() == [[0.8, 0.9, 1.3]]
    logprobs, values = mp.Tensor(np.log(ratio)), mp.Tensor(ratio)
    for loss in (rlhf.policy_loss, rlhf.value_loss):
        x = logprobs if loss is rlhf.policy_loss else values
        assert loss(x, 0 * ones, ones, ones).item() == loss(x, 0 * ones, ones, ones, 0.2).item() != loss(x, 0 * ones, ones, ones, 1.2).item()
    assert rlhf.rloo_loss(logprobs, 0 * ones, ones[0, :1], ones).item() == rlhf.rloo_loss(logprobs, 0 * ones, ones[0, :1], ones, 0.2).item()
    grpo = (logprobs, 0 * ones, 0.1 * ones, -ones[0, :1], ones)
    assert rlhf.grpo_loss(*grpo).item() == rlhf.grpo_loss(*grpo, 0.2, 0.04).item()


def test_statistics_of_groups_of_two_and_of_clipped_values():
    scores = np.array([1.0, 1.0, 2.0, 3.0])
    assert rlhf.statistics.of_scores(scores, scores, 2)["objective/scores_equal"] == 0.5
    assert rlhf.statistics.of_scores(scores, scores, 1)["objective/scores_equal"] == 0, "one is compared with none"
    values, old, returns = mp.Tensor(np.array([[0.5, -0.5, -0.1, 0.5, 0.1]])), np.zeros((1, 5)), np.array([[1, -1, -0.1, 0, 1]])
    assert rlhf.statistics.value_clip_fraction(values, old, returns, np.ones((1, 5))) == pytest.approx(2 / 5)


def test_statistics_of_the_ratio_are_their_formulas():
    change, mask, entropy = np.array([[0.1, -0.3, 0.0]]), np.array([[1, 1, 0]]), np.array([[1.0, 2.0, 9.0]])
    found = rlhf.statistics.of_ratio(change, np.exp(change), mask, entropy)
    assert found["policy/approxkl"] == pytest.approx((0.1**2 + 0.3**2) / 2 / 2) and found["policy/entropy"] == 1.5
    assert found["val/ratio"] == pytest.approx(np.exp([0.1, -0.3]).mean())
    assert found["val/ratio_max"] == np.exp(0.1) and found["val/ratio_deviation"] == pytest.approx(1 - np.exp(-0.3))


def test_the_largest_ratio_is_none_at_padding():
    change, mask = np.array([[-0.3, -0.1, 0.0]]), np.array([[1, 1, 0]])
    assert rlhf.statistics.of_ratio(change, np.exp(change), mask, np.ones((1, 3)))["val/ratio_max"] == np.exp(-0.1)


def test_clipped_shares_are_counted_on_the_side_that_costs():
    ones = np.ones((1, 4))
    ratio, advantages = np.array([[0.7, 0.9, 1.1, 1.3]]), np.array([[-1, -1, 1, 1]])
    assert rlhf.clip_fraction(ratio, advantages, ones) == 0.5
    assert rlhf.clip_fraction(ratio, -advantages, ones) == 0
    values, old = mp.Tensor(np.array([[-1.0, 2.0, 3.1, -1.0]])), np.array([[-2.0, 3.0, 3.0, -2.0]])
    returns = np.array([[-0.9, -2.0, 9.0, -1.45]])  # clipped: -1.8 is farther, 2.8 is, 3.1 is not, -1.8 is nearer
    assert rlhf.statistics.value_clip_fraction(values, old, returns, ones) == 0.5


def test_grpo_has_no_gradient_from_what_stands_at_padding():
    logprobs = parameter(np, LOGPROBS - JUNK)
    rlhf.grpo_loss(logprobs, LOGPROBS, REFERENCE, SCORES, MASK).backward()
    assert np.isfinite(logprobs.grad).all() and not logprobs.grad[MASK == 0].any()


def test_kl_controllers():
    fixed, adaptive = rlhf.KLController(0.1), rlhf.KLController(0.1, target=6.0, horizon=1000)
    fixed.update(kl=50.0, n=64)
    assert fixed.beta == 0.1
    beta = 0.1
    for kl, factor in ((6.6, 1.01), (600.0, 1.02), (0.0, 0.98)):  # 10% above: β (1 + 0.1 · n / 1000); clipped at 20%
        adaptive.update(kl, n=100)
        beta *= factor
        assert adaptive.beta == pytest.approx(beta)
    edge = rlhf.KLController(0.1, 1.0, horizon=1)
    edge.update(kl=9.0, n=0)
    assert edge.beta == 0.1
    rlhf.KLController(0.1, 1.0, horizon=10).update(0, 49)
    for n in (-1, 50):
        with pytest.raises(ValueError, match=f"n must be below 5 · horizon, 50, got {n}"):
            rlhf.KLController(0.1, 1, horizon=10).update(0, n)
    with pytest.raises(ValueError, match="n must be below 5 · horizon, 50, got 64"):
        rlhf.KLController(0.1, 1, horizon=10).update(0, 64)
    with pytest.raises(ValueError, match="horizon must be above 0, got 0"):
        rlhf.KLController(0.1, 1, horizon=0)
    with pytest.raises(ValueError, match="target must be above 0, or None, got 0"):
        rlhf.KLController(0.1, 0)


# ------------------------------------------------------------------------------------------------------- reward models


def test_bradley_terry_with_margin_and_centering_is_the_published_one(xp):
    chosen, rejected = parameter(xp, np.array([1, 0.2])), parameter(xp, np.array([0.3, 0.5]))
    loss = mp.rlhf.reward_loss(chosen, rejected, margin=xp.asarray(np.array([0.5, 0])), center=0.01)
    close(loss.data, 0.7371471, 5e-8)
    difference = np.array([0.7 - 0.5, -0.3])
    expected = (np.log1p(np.exp(-difference)) + 0.01 * np.array([1.3, 0.7]) ** 2).mean()
    close(loss.data, expected, 1e-12)
    loss.backward()
    close(chosen.grad, [-0.212083, -0.280221], 5e-7)
    close(rejected.grad, [0.238083, 0.294221], 5e-7)
    slope, pull = -1 / (1 + np.exp(difference)) / 2, 0.01 * np.array([1.3, 0.7])
    close(chosen.grad, slope + pull, 1e-12)
    close(rejected.grad, -slope + pull, 1e-12)
    assert rlhf.reward_loss(chosen, rejected).item() == rlhf.reward_loss(chosen, rejected, None, 0.0, None).item()
    with pytest.raises(ValueError, match=r"rejected must have the shape of chosen, \(2,\), not \(3,\)"):
        rlhf.reward_loss(chosen, mp.Tensor(xp.asarray(np.zeros(3))))


def test_dpo_is_the_published_one(xp):
    sums = [parameter(xp, np.array(v)) for v in ([-1.7, -1.6], [-1.5, -1.5])]
    reference = [xp.asarray(np.array(v)) for v in ([-1.9, -1.5], [-1.4, -1.6])]
    loss = rlhf.dpo_loss(*sums, *reference, beta=0.1)
    close(loss.data, 0.6907284, 5e-8)
    logits = 0.1 * (np.array([0.2, -0.1]) - np.array([-0.1, 0.1]))
    close(loss.data, np.log1p(np.exp(-logits)).mean(), 1e-12)
    loss.backward()
    close(sums[0].grad, [-0.024625, -0.025250], 5e-7)
    close(sums[0].grad, -0.1 / (1 + np.exp(logits)) / 2, 1e-12)
    close(sums[1].grad, -to_numpy(sums[0].grad), 1e-12)


def test_all_pairs_of_a_ranking_count_once_however_many_there_are():
    better, worse, weight = rlhf.ranking_pairs([2, 4])
    assert list(zip(better, worse)) == [(0, 1), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)]
    assert weight.tolist() == pytest.approx([1 / 2] + [1 / 12] * 6)


# ------------------------------------------------------------------------------------------------------ RLOO and GRPO


def test_advantages_of_groups(xp):
    """RLOO's baseline is the mean of the others; GRPO standardizes, and a group without a difference teaches nothing."""
    rewards = np.array([1.0, 2, 6, 5, 5, 5])
    close(rlhf.rloo_advantages(xp.asarray(rewards), 3), [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    close(rlhf.rloo_advantages(xp.asarray(rewards), 2), [-1, 1, 1, -1, 0, 0])
    first = (rewards[:3] - 3) / (np.std([1, 2, 6], ddof=1) + 1e-4)
    close(rlhf.grpo_advantages(xp.asarray(rewards), 3), [*first, 0, 0, 0])
    equal = rlhf.grpo_advantages(xp.asarray(np.full(21, 1000.1, np.float32)), 3)
    assert rlhf.grpo_advantages(xp.asarray(np.array([1, 0])), 2).dtype == np.float64, "of integers, too, numbers"
    assert equal.dtype == np.float32 and abs(to_numpy(equal)).max() < 1e-6, "rounding is no difference"


def test_rloo_ratio_is_that_of_the_whole_response(xp):
    logprobs = parameter(xp, NEW_LOGPROBS + JUNK)
    loss = rlhf.rloo_loss(logprobs, xp.asarray(LOGPROBS), xp.asarray(np.array([2.0, -1.0])), xp.asarray(MASK), 0.2)
    ratio = np.exp([0.1 - 0.3 + 0.25, 0.3 - 0.1 + 0.05])
    expected = np.mean([-2 * ratio[0], max(ratio[1], min(ratio[1], 1.2))])
    close(loss.data, expected, 1e-12)
    loss.backward()
    close(logprobs.grad, np.array([[-2 * ratio[0]] * 3 + [0], [ratio[1]] * 4]) / 2, 1e-12)


def test_grpo_loss_is_a_mean_over_responses_of_means_over_tokens(xp):
    logprobs = parameter(xp, NEW_LOGPROBS + JUNK)
    old, reference, mask = (xp.asarray(a) for a in (LOGPROBS, REFERENCE - JUNK, MASK))
    loss = rlhf.grpo_loss(logprobs, old, reference, xp.asarray(np.array([1.0, -1.0])), mask, 0.2, 0.04)
    ratio, a = np.exp(NEW_LOGPROBS - LOGPROBS), np.array([[1.0], [-1.0]])
    d = REFERENCE - NEW_LOGPROBS
    token = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2)) + 0.04 * (np.exp(d) - 1 - d)
    close(loss.data, ((token * MASK).sum(1) / MASK.sum(1)).mean(), 1e-12)
    loss.backward()
    gradients = to_numpy(logprobs.grad)
    assert np.isfinite(gradients).all() and gradients[0, 3] == 0


def test_k3_is_never_negative_and_its_mean_is_the_kl(rng):
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.standard_normal((2, 8)))
    estimates = rlhf.k3(mp.Tensor(np.log(p)), np.log(q)).numpy()
    assert (estimates >= 0).all()
    assert (p * estimates).sum() == pytest.approx((p * np.log(p / q)).sum())


# --------------------------------------------------------------------------------------------------- log-probabilities


def test_token_logprobs_and_entropy(xp, rng):
    logits, targets = rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = rlhf.token_logprobs(mp.Tensor(xp.asarray(logits)), xp.asarray(targets))
    close(got.data, np.take_along_axis(log_p, targets[..., None], -1)[..., 0], 1e-12)
    close(rlhf.entropy(xp.asarray(logits)), -(np.exp(log_p) * log_p).sum(-1), 1e-12)


def test_the_tokens_of_a_completion_are_counted_from_the_first_that_a_prompt_predicts():
    labels = np.array([[-100, 5, 6, 7], [-100, -100, 6, -100], [4, 5, -100, -100]])
    assert [rlhf.logprobs.prompt_length(rows) for rows in (labels, labels[1:2], labels[[1, 1], 1:])] == [0, 1, 0]
    lengths = rlhf.logprobs.completion_lengths(labels)
    assert lengths.tolist() == [3, 1, 1] and lengths.dtype == np.float32, "nothing predicts a text's first token"


def test_entropy_of_large_logits_does_not_overflow(xp):
    close(rlhf.logprobs.entropy(xp.asarray(np.array([[1e4, 1e4, -1e4]]))), [np.log(2)])


def test_a_function_of_texts_is_a_reward_and_must_give_finite_numbers():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "x" * len(ids) if skip_special_tokens else "<s>"

    roll = rlhf.Rollout(np.ones((2, 5), int), np.ones((2, 5), int), np.array([[1, 1, 1], [1, 0, 0]]), np.ones(2, bool))
    length = rlhf.text_reward(lambda prompts, completions: [len(p) + 10 * len(c) for p, c in zip(prompts, completions)], Tokenizer())
    assert length(roll).tolist() == [32, 12]
    assert list(rlhf.gold_reward(Tokenizer(), lambda texts: [len(t) for t in texts])(roll)) == [3, 1]
    assert rlhf.text_reward(partial(lambda prompts, completions, n: [n] * len(prompts), n=4), Tokenizer())(roll).tolist() == [4, 4]
    for given, said in (([1.0], "list, 1 of them"), (3.0, "float, 3.0"), (np.array(3.0), "ndarray, array\\(3.\\)")):
        with pytest.raises(ValueError, match=f"a list of 2 numbers, one for each completion; it returned {said}"):
            rlhf.text_reward(lambda prompts, completions, given=given: given, Tokenizer())(roll)
    with pytest.raises(ValueError, match="gave nan to the completion 'x'"):
        rlhf.text_reward(lambda prompts, completions: [1, float("nan")], Tokenizer())(roll)


def test_the_objective_is_the_score_with_what_is_paid():
    found = rlhf.statistics.of_objective({"objective/scores": 1.0}, -0.25, 0.1)
    assert found == {"objective/non_score_reward": -0.25, "objective/rlhf_reward": 0.75, "objective/kl_coef": 0.1}
