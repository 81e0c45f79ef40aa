"""From scores to advantages: shaped rewards, generalized advantage estimation, whitening. Plain arrays [B, T].

    logprobs, reference ─┐
    scores [B] ──────────┴─► shaped_rewards ─┐
    values ──────────────────────────────────┴─► gae ─► advantages, returns ─► whiten(advantages)

Everywhere `mask` [B, T] is nonzero at the real tokens of a response; what the other arrays hold elsewhere is ignored.
The order matters: returns are advantages + values *before* the advantages are whitened.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, xp_of
from ..nn.heads import last_real_token


def masked_mean(x: Any, mask: Array) -> Any:
    """Mean of x [B, T], a Tensor or an array, over the positions where the mask is not zero: a scalar of x's kind.

    Raises ValueError for a mask without any; on a device, where to look would be to wait, the mean is NaN then.
    """
    real = mask != 0
    count = real.sum()
    if isinstance(count, np.generic) and not count:
        raise ValueError("a mean over no token: the mask is zero everywhere")
    if isinstance(x, Tensor):
        return F.where(real, x, 0).sum() / count.astype(x.dtype)
    return xp_of(x).where(real, x, 0).sum() / count


def whiten(x: Array, mask: Array, keep_mean: bool = False) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over the real positions, 0 elsewhere: x, mask [B, T] -> [B, T].

    The variance is with Bessel's correction. `keep_mean=True` rescales only, for rewards: (x - mean) / sqrt(var + 1e-8)
    + mean. Source: TRL's `masked_whiten`, which gives NaN for a single real position; here that is its own mean, so 0, or
    kept. Raises ValueError for a mask without any.
    """
    xp, real = xp_of(x, mask), mask != 0
    n = int(real.sum().item())
    mean = masked_mean(x, mask)
    centered = xp.where(real, x - mean, 0)
    white = centered / xp.sqrt((centered**2).sum() / max(n - 1, 1) + 1e-8)
    return xp.where(real, white + mean, 0) if keep_mean else white


def token_kl(logprobs: Array, ref_logprobs: Array, mask: Array) -> Array:
    """k1 = log π(y_t) - log π_ref(y_t) at the real tokens, 0 elsewhere: [B, T], in nats; its sum estimates the KL.

    Source: Schulman 2020 (see `group`).
    """
    return xp_of(logprobs).where(mask != 0, logprobs - ref_logprobs, 0)


def shaped_rewards(logprobs: Array, ref_logprobs: Array, scores: Array, mask: Array, beta: float) -> Array:
    """r_t = -β (log π(y_t) - log π_ref(y_t)), plus the score [B] at the last real token: [B, T].

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2. Raises ValueError for a row without real tokens.
    """
    xp = xp_of(logprobs)
    rewards = -beta * token_kl(logprobs, ref_logprobs, mask)
    rewards[xp.arange(mask.shape[0]), last_real_token(mask, mask.shape[1])] += scores
    return rewards


def gae(rewards: Array, values: Array, gamma: float, lam: float, mask: Array) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16): (advantages, returns) [B, T].

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    Beyond the mask values count as 0, inputs are ignored, and outputs are 0: nothing is expected after the last real
    token, so a response that the length limit cut is taken as ended. The advantages are not whitened. Raises ValueError
    where the shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"rewards, values and mask must have one shape, not {rewards.shape}, {values.shape} and {mask.shape}"
        )
    xp, real = xp_of(rewards, values, mask), mask != 0
    dtype = xp.result_type(rewards.dtype, values.dtype, xp.float32)
    rewards, values = (xp.where(real, x, 0).astype(dtype) for x in (rewards, values))
    advantages = xp.zeros(rewards.shape, dtype)
    next_advantage = next_value = xp.zeros(rewards.shape[:-1], dtype)
    for t in range(rewards.shape[-1] - 1, -1, -1):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        next_advantage = xp.where(real[..., t], delta + gamma * lam * next_advantage, 0)
        next_value = values[..., t]
        advantages[..., t] = next_advantage
    return advantages, advantages + values
