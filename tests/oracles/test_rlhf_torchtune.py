"""Our definitions against torchtune's (PPO, DPO), functions that were written by others for the same papers."""

from __future__ import annotations

import numpy as np
import pytest

import minipeft as mp
from minipeft import rlhf

torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")
theirs = pytest.importorskip(
    "torchtune.rlhf", reason="needs torchtune (pip install torchtune torchao==0.9.0)", exc_type=ImportError
)

SHAPE = (5, 9)
tensor = torch.tensor


@pytest.fixture
def numbers(rng):
    mask = np.arange(SHAPE[1]) < np.array([9, 1, 4, 8, 2])[:, None]
    draw = lambda scale: np.where(mask, rng.standard_normal(SHAPE) * scale, 0)  # noqa: E731
    return {
        "mask": mask, "old": draw(1) - mask, "new": draw(0.3), "reference": draw(1) - mask, "values": draw(1),
        "scores": rng.standard_normal(5), "returns": draw(1), "advantages": draw(1),
    }  # fmt: skip


def test_whitening_and_masked_mean(numbers):
    x, mask = numbers["values"], numbers["mask"]
    # Their masked means divide by n + 1e-8. Their shift_mean=True puts the mean back.
    want = theirs.whiten(tensor(x), mask=tensor(mask), shift_mean=True).numpy()
    np.testing.assert_allclose(rlhf.whiten(x, mask, keep_mean=True)[mask], want[mask], atol=1e-8)
    want = theirs.whiten(tensor(x), mask=tensor(mask), shift_mean=False).numpy()
    np.testing.assert_allclose(rlhf.whiten(x, mask)[mask], want[mask], atol=1e-8)
    assert rlhf.masked_mean(x, mask).item() == pytest.approx(theirs.masked_mean(tensor(x), tensor(mask)).item())


def test_shaped_rewards(numbers):
    n, last = numbers, numbers["mask"].sum(1) - 1
    want, _, _ = theirs.get_rewards_ppo(
        tensor(n["scores"]), tensor(n["old"]), tensor(n["reference"]), 0.1, tensor(last)
    )
    np.testing.assert_allclose(
        rlhf.shaped_rewards(n["old"], n["reference"], n["scores"], n["mask"], 0.1), want, atol=1e-12
    )


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae(numbers, gamma, lam):
    rewards, values, mask = numbers["returns"], numbers["values"], numbers["mask"]
    advantages, returns = rlhf.gae(rewards, values, gamma, lam, mask)
    # theirs come whitened, with their mean put back
    want, want_returns = theirs.estimate_advantages(tensor(values), tensor(rewards), gamma, lam, tensor(mask))
    np.testing.assert_allclose(rlhf.whiten(advantages, mask, keep_mean=True), want, atol=1e-8)
    np.testing.assert_allclose(returns[mask], want_returns[mask], atol=1e-10)


def test_ppo_loss_and_gradients(numbers):
    n = numbers
    new, values = n["old"] + n["new"], n["values"] + n["new"]
    ours = [mp.Tensor(new.copy(), requires_grad=True), mp.Tensor(values.copy(), requires_grad=True)]
    policy = rlhf.policy_loss(ours[0], n["old"], n["advantages"], n["mask"], 0.2)
    value = rlhf.value_loss(ours[1], n["values"], n["returns"], n["mask"], 0.2)
    loss = policy + 0.1 * value
    loss.backward()
    from torchtune.rlhf.loss import PPOLoss

    leaves = [tensor(new, requires_grad=True), tensor(values, requires_grad=True)]
    mask = tensor(n["mask"])
    want, want_policy, want_value, _, _ = PPOLoss(epsilon=0.2, value_coeff=0.1, value_clip_range=0.2)(
        tensor(n["old"]), leaves[0], tensor(n["advantages"]), tensor(n["values"]), leaves[1], tensor(n["returns"]),
        padding_masks=mask, value_padding_masks=mask,
    )  # fmt: skip
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    assert policy.item() == pytest.approx(want_policy.item(), rel=1e-10)
    assert value.item() == pytest.approx(want_value.item(), rel=1e-10)
    for ours_, leaf in zip(ours, leaves):
        np.testing.assert_allclose(ours_.grad, leaf.grad, atol=1e-12)


def test_dpo_loss_and_gradients(rng):
    sums = rng.standard_normal((4, 6)) * 3
    chosen, rejected = (mp.Tensor(s.copy(), requires_grad=True) for s in sums[:2])
    loss = rlhf.dpo_loss(chosen, rejected, sums[2], sums[3], beta=0.1)
    loss.backward()
    from torchtune.rlhf.loss import DPOLoss

    given = [tensor(s, requires_grad=True) for s in sums]
    losses, *_ = DPOLoss(beta=0.1)(*given)
    losses.mean().backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    np.testing.assert_allclose(chosen.grad, given[0].grad, atol=1e-9)
    np.testing.assert_allclose(rejected.grad, given[1].grad, atol=1e-9)


def test_truncation_after_the_first_stop_token(rng):
    ids = rng.integers(0, 5, (8, 10))
    mask, _ = rlhf.truncate_response(ids, [1, 3])
    padding, _ = theirs.truncate_sequence_at_first_stop_token(tensor(ids), tensor([1, 3]), 0)
    np.testing.assert_array_equal(mask == 0, padding.numpy())


def test_log_probabilities(rng):
    logits, targets = rng.standard_normal((2, 5, 7)), rng.integers(0, 7, (2, 5))
    ours = rlhf.token_logprobs(mp.Tensor(logits / 0.7), targets).numpy()
    np.testing.assert_allclose(
        ours, theirs.logits_to_logprobs(tensor(logits), tensor(targets), temperature=0.7), atol=1e-6
    )
