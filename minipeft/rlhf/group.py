"""Beyond PPO, without a value function: the other answers to the same prompt say what was to be expected.

            advantage of answer i                      ratio                    KL from the reference
    RLOO    A_i = r_i - mean of the others' r          ρ of the whole answer    k1, in the reward
    GRPO    A_i = (r_i - mean) / std of the group      ρ_t of each token        k3, in the loss

Sources: Ahmadian et al. 2024 (RLOO, arXiv:2402.14740), which is plain REINFORCE: one optimizer step a sample, no ratio;
the ratio and its clipping, for several, are TRL's. Shao et al. 2024 (GRPO, arXiv:2402.03300, eq. 3 and 4). k3 is
Schulman's (2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html).

Departure from GRPO's paper: 1e-4 stands beside the deviation, which has Bessel's correction, both as in TRL.

Two objections to GRPO:
1. In the loss, k3 of fresh samples is differentiated with the samples held fixed. Its mean is KL(π ‖ π_ref), but its
   mean gradient is that of KL(π_ref ‖ π): Lesson 10, section 9, derives it. k1 in the reward has the former's gradient.
2. Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) leaves out the division by the group's deviation, and the mean over the
   tokens of an answer, by which each token of a long answer counts less.
"""

from __future__ import annotations

from typing import Any

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array
from .advantages import masked_mean
from .config import GroupConfig
from .logprobs import Outputs
from .online import OnlineTrainer
from .ppo import clipped_objective, log_ratio
from .statistics import clip_fraction, of_objective, of_ratio


def rloo_advantages(rewards: Array, k: int) -> Array:
    """A_i = r_i - mean of the other k - 1 rewards of the group: rewards [n · k], groups beside each other -> [n · k].

    Raises ValueError for k < 2, or rewards that are not groups of k.
    """
    groups = _groups(rewards, k)
    return (groups - (groups.sum(axis=1, keepdims=True) - groups) / (k - 1)).reshape(-1)


def rloo_loss(logprobs: Tensor, old_logprobs: Array, advantages: Array, mask: Array, cliprange: float = 0.2) -> Tensor:
    """Mean over responses of max(-A ρ, -A clip(ρ, 1 ± ε)), where ρ = π(y) / π_old(y) is that of the whole response.

    logprobs, old_logprobs, mask [B, n]; advantages [B]. At the first optimizer step of an update, ρ = 1, its gradient
    is REINFORCE's: that of the mean of -A log π(y).
    """
    ratio = log_ratio(logprobs, old_logprobs, mask).sum(axis=1).exp()  # [B]
    return clipped_objective(ratio, advantages, cliprange).mean()


def grpo_advantages(rewards: Array, k: int) -> Array:
    """A = (r - mean) / (std + 1e-4) within each group of k, std with Bessel's correction: [n · k] -> [n · k].

    Raises as `rloo_advantages`.
    """
    groups = _groups(rewards, k).astype("float64")  # where all are equal, 1e-4 would magnify what float32 rounds
    centered = groups - groups.mean(axis=1, keepdims=True)
    A = (centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    return A.astype(rewards.dtype) if rewards.dtype.kind == "f" else A


def _groups(rewards: Array, k: int) -> Array:
    if k < 2:
        raise ValueError(f"an answer is compared with others to its prompt, so a group has k of at least 2, got {k}")
    if rewards.shape[0] % k:
        raise ValueError(f"{rewards.shape[0]} rewards are not groups of k={k}")
    return rewards.reshape(-1, k)


def k3(logprobs: Tensor, ref_logprobs: Array) -> Tensor:
    """exp(ref - lp) - 1 - (ref - lp): an estimate of KL(π ‖ π_ref) at tokens drawn from π, unbiased and never negative.

    Both of one shape, which the result has (Schulman 2020). The value alone is unbiased: in a loss, the mean gradient is
    that of KL(π_ref ‖ π).
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def grpo_loss(
    logprobs: Tensor, old_logprobs: Array, ref_logprobs: Array, advantages: Array, mask: Array, cliprange: float = 0.2,
    beta: float = 0.04,
) -> Tensor:  # fmt: skip
    """Mean over responses of the mean over their tokens of max(-A ρ_t, -A clip(ρ_t, 1 ± ε)) + β k3_t (GRPO, eq. 3).

    logprobs, old_logprobs, ref_logprobs, mask [B, n]; advantages [B], one for all tokens of a response, which has at
    least one. β = 0.04 is the paper's.
    """
    token = clipped_objective(log_ratio(logprobs, old_logprobs, mask).exp(), advantages[:, None], cliprange)
    if beta:
        token = token + beta * k3(F.where(mask != 0, logprobs, 0), ref_logprobs * (mask != 0))
    return (F.where(mask != 0, token, 0).sum(axis=1) / mask.sum(axis=1)).mean()


class RLOOTrainer(OnlineTrainer):
    """REINFORCE with a leave-one-out baseline. Arguments and errors: see `OnlineTrainer`; config: a GroupConfig."""

    config: GroupConfig

    def update(self) -> dict[str, Any]:
        """One update: scores minus β KL of the whole response, against the other responses to the prompt."""
        beta = self.config.kl_coef
        batch, scores, record = answered(self)
        kl = (batch["kl"] * batch["mask"]).sum(axis=1)  # [B]
        batch["advantages"] = rloo_advantages(scores - beta * kl, self.config.num_generations)  # [B]
        return record | of_objective(record, -beta * float(kl.mean().item()), beta) | self.epochs(batch)

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, Array]]:
        """(`rloo_loss`, statistics) of a minibatch of b responses: per token [b, n], advantages [b]."""
        cliprange, mask, old, advantages = self.config.cliprange, batch["mask"], batch["old_logprobs"], batch["advantages"]
        loss = rloo_loss(new.logprobs, old, advantages, mask, cliprange)
        change = log_ratio(new.logprobs.detach(), old, mask)  # [b, n]
        ratio = change.sum(axis=1).exp()  # of whole responses, [b]
        return loss, {
            "loss/policy": loss.data,
            "policy/clipfrac": clip_fraction(ratio.data, advantages, mask[:, 0], cliprange),
            **of_ratio(change.data, change.exp().data, mask, new.entropy),
        }


class GRPOTrainer(OnlineTrainer):
    """Group relative policy optimization. Arguments and errors: see `OnlineTrainer`; config: a GroupConfig."""

    config: GroupConfig

    def update(self) -> dict[str, Any]:
        """One update: scores, standardized within each group; the KL is in the loss."""
        batch, scores, record = answered(self)
        batch["advantages"] = grpo_advantages(scores, self.config.num_generations)  # [B]
        return record | of_objective(record, 0.0, self.config.kl_coef) | self.epochs(batch)

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, Array]]:
        """(`grpo_loss`, statistics) of a minibatch of b responses: per token [b, n], advantages [b]."""
        c, mask, old, ref = self.config, batch["mask"], batch["old_logprobs"], batch["ref_logprobs"]
        loss = grpo_loss(new.logprobs, old, ref, batch["advantages"], mask, c.cliprange, c.kl_coef)
        now = F.where(mask != 0, new.logprobs.detach(), 0)
        change = log_ratio(now, old, mask)  # [b, n]
        ratio = change.exp()
        return loss, {
            "loss/policy": loss.data,
            "loss/kl": masked_mean(k3(now, ref).data, mask),
            "policy/clipfrac": clip_fraction(ratio.data, batch["advantages"][:, None], mask, c.cliprange),
            **of_ratio(change.data, ratio.data, mask, new.entropy),
        }


def answered(trainer: OnlineTrainer) -> tuple[dict[str, Array], Array, dict[str, Any]]:
    """Steps 1 to 3 of `PPOTrainer.update`: (the arrays of the minibatches, scores [B], the record so far).

    The num_generations responses to a prompt lie beside each other.
    """
    roll = trainer.rollout(trainer.config.num_generations)
    batch = trainer.examine(roll)
    return batch, *trainer.score(roll, batch, trainer.config.num_generations)
