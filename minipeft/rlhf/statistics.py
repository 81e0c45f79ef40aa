"""What an update of PPO, RLOO or GRPO reports: a line of metrics.jsonl, by these names (after TRL's PPOTrainer).

Of the responses, before anything is trained on them (π is the policy that sampled, y_t are the real tokens):

    step                        the number of the update, from 1
    objective/kl                mean over responses of Σ_t log π(y_t) - log π_ref(y_t): nats a response
    objective/entropy           mean over responses of -Σ_t log π(y_t): nats a response
    objective/raw_scores        mean score, as the reward gave it
    objective/scores            mean score that is trained on: after `missing_eos`
    objective/scores_equal      share of groups in which all scores are equal, so that none is preferred; a group is
                                what is compared: all responses (PPO), or those to one prompt (RLOO, GRPO)
    objective/non_score_reward  what KL takes off the reward, -β objective/kl; GRPO, whose KL is in the loss: 0
    objective/rlhf_reward       objective/scores + objective/non_score_reward
    objective/kl_coef           β of this update
    num_eos                     how many responses a stop token ended
    text/length                 mean tokens of a response, its stop token included
    text/distinct_2             distinct bigrams over all bigrams (`distinct_n`)
    text/ref_loss               mean of -log π_ref(y_t) over all tokens: nats a token
    watch/<name>                mean of a watcher's scores; None where that is no finite number

Of the training, means over the minibatches of all epochs (ρ is the ratio π_new(y_t) / π(y_t)):

    loss/policy                 PPO, RLOO: the clipped objective; GRPO: with β KL, in the loss's average over responses
    loss/value                  PPO: before vf_coef
    loss/kl                     GRPO: k3, nats a token, before β
    policy/approxkl             mean of (log ρ)² / 2 (k2, Schulman 2020): nats a token
    policy/clipfrac             share of tokens (RLOO: responses) at whose ratio clipping acted
    policy/entropy              mean entropy of the whole distribution at a position: nats a token
    val/ratio                   mean ρ over tokens
    val/ratio_max               largest ρ of any minibatch, not a mean
    val/ratio_deviation         largest |ρ - 1| of any minibatch, not a mean
    val/clipfrac                PPO: share of values at which clipping acted
    grad_norm                   2-norm of all gradients before it is clipped
    learning_rate               of this update
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..autograd.tensor import Tensor
from ..backend import Array, read
from .advantages import masked_mean
from .rollouts import Rollout, distinct_n


class RLHFError(RuntimeError):
    """A run cannot go on as it is. The message names the update, what went wrong, and what helps."""


def of_responses(roll: Rollout, batch: Mapping[str, Array], watched: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Statistics of an update's responses, without scores; old_logprobs, ref_logprobs and kl of `batch` are [B, n]."""
    size, responses = len(roll.mask), roll.responses()
    means = {name: float(scores.mean()) for name, scores in watched.items()}
    sums = [(batch[name] * roll.mask).sum() for name in ("kl", "old_logprobs")]
    kl, logprobs, ended, ref = map(float, read(*sums, roll.ended.sum(), masked_mean(batch["ref_logprobs"], roll.mask)))
    return {
        "objective/kl": kl / size,
        "objective/entropy": -logprobs / size,
        "num_eos": int(ended),
        "text/length": float(np.mean([len(r) for r in responses])),
        "text/distinct_2": distinct_n(responses, 2),
        "text/ref_loss": -ref,
        **{f"watch/{name}": mean if math.isfinite(mean) else None for name, mean in means.items()},
    }


def of_scores(raw: np.ndarray, scores: np.ndarray, group: int) -> dict[str, float]:
    """Statistics of scores [B], before and after `missing_eos`, of which each `group` in a row are compared."""
    groups = scores.reshape(-1, group)
    equal = float((groups == groups[:, :1]).all(axis=1).mean()) if group > 1 else 0.0
    means = {"objective/scores": float(scores.mean()), "objective/raw_scores": float(raw.mean())}
    return means | {"objective/scores_equal": equal}


def of_objective(record: Mapping[str, Any], non_score: float, beta: float) -> dict[str, float]:
    """Statistics of what is maximized, of an update with this record of its scores."""
    return {
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + record["objective/scores"],
        "objective/kl_coef": beta,
    }


def of_ratio(log_ratio: Array, ratio: Array, mask: Array, entropy: Array) -> dict[str, Array]:
    """How far the policy has gone from the one that sampled; log ρ (0 at padding), ρ, mask and entropy are [B, n]."""
    return {
        "policy/approxkl": 0.5 * masked_mean(log_ratio**2, mask),
        "policy/entropy": masked_mean(entropy, mask),
        "val/ratio": masked_mean(ratio, mask),
        "val/ratio_max": (ratio * (mask != 0)).max(),
        "val/ratio_deviation": abs(ratio - 1).max(),
    }


def clip_fraction(ratio: Array, advantages: Array, mask: Array, cliprange: float = 0.2) -> Array:
    """The share of the real positions at which `policy_loss` took the clipped side: a scalar array.

    ratio, advantages and mask have one shape, or broadcast to that of mask: [B, n], or [B] for ratios of whole
    responses.
    """
    clipped = -advantages * ratio.clip(1 - cliprange, 1 + cliprange) > -advantages * ratio
    return masked_mean(clipped.astype(ratio.dtype), mask)


def value_clip_fraction(
    values: Tensor, old_values: Array, returns: Array, mask: Array, cliprange_value: float = 0.2
) -> Array:
    """The share of the real positions at which `value_loss` took the clipped side: a scalar array; all are [B, n]."""
    v = values.data
    near = old_values + (v - old_values).clip(-cliprange_value, cliprange_value)
    return masked_mean(((near - returns) ** 2 > (v - returns) ** 2).astype(v.dtype), mask)


def over_minibatches(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The statistics of an update's training, from those of its minibatches."""
    over = {name: np.max if name in ("val/ratio_max", "val/ratio_deviation") else np.mean for name in seen[0]}
    return {name: float(over[name]([s[name] for s in seen])) for name in seen[0]}


def check_first_minibatch(stats: Mapping[str, float]) -> None:
    """Before an update's first optimizer step the policy is the one that sampled: |ρ - 1| < 1e-4, no KL, no clipping.

    `stats` are a minibatch's "val/ratio_deviation", "policy/approxkl" and "policy/clipfrac". Raises RLHFError
    otherwise, since then the log-probabilities of two forward passes differ: dropout is on, the temperatures differ,
    or the positions of padded prompts do.
    """
    if not stats["val/ratio_deviation"] < 1e-4 or not stats["policy/approxkl"] < 1e-8 or stats["policy/clipfrac"]:
        raise RLHFError(
            "before the first optimizer step of an update the policy already differs from the one that sampled: "
            f"|ratio - 1| = {stats['val/ratio_deviation']:.3g}, approxkl = {stats['policy/approxkl']:.3g}, clipfrac = "
            f"{stats['policy/clipfrac']:.3g}; is something random in its forward pass, or its weights shared and "
            "trained?"
        )
