"""Beyond PPO, without a value function: the other answers to the same prompt say what was to be expected.

                 baseline of an answer                     ratio of          KL from the reference
    RLOO         mean score of the other answers           whole sequences   k1, in the reward
    GRPO         mean of the group, over its deviation     each token        k3, in the loss

Sources: Ahmadian et al. 2024 (RLOO, arXiv:2402.14740), which is plain REINFORCE: one optimizer step a sample, no ratio;
the ratio and its clipping, for several, are TRL's. Shao et al. 2024 (GRPO, arXiv:2402.03300, eq. 3 and 4). k3 is
Schulman's (2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, asarray
from ..options import configuration, option
from .advantages import masked_mean
from .online import OnlineConfig, OnlineTrainer, Outputs
from .ppo import clip_fraction
from .rollout import Rollout


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
    ratio = F.where(mask != 0, logprobs - old_logprobs, 0).sum(axis=1).exp()  # [B]
    return F.maximum(-advantages * ratio, -advantages * F.clip(ratio, 1 - cliprange, 1 + cliprange)).mean()


def grpo_advantages(rewards: Array, k: int) -> Array:
    """A = (r - mean) / (std + 1e-4) within each group of k, std with Bessel's correction: [n · k] -> [n · k].

    Raises as `rloo_advantages`.
    """
    groups = _groups(rewards, k)
    centered = groups - groups.mean(axis=1, keepdims=True)
    return (centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def _groups(rewards: Array, k: int) -> Array:
    if k < 2:
        raise ValueError(f"an answer is compared with others to its prompt, so a group has k of at least 2, got {k}")
    if rewards.shape[0] % k:
        raise ValueError(f"{rewards.shape[0]} rewards are not groups of k={k}")
    return rewards.reshape(-1, k)


def k3(logprobs: Tensor, ref_logprobs: Array) -> Tensor:
    """exp(ref - lp) - 1 - (ref - lp): an estimate of KL(π ‖ π_ref) at tokens drawn from π, unbiased and never negative.

    Both of one shape, which the result has (Schulman 2020).
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Array,
    ref_logprobs: Array,
    advantages: Array,
    mask: Array,
    cliprange: float = 0.2,
    beta: float = 0.04,
) -> Tensor:
    """Mean over responses of the mean over their tokens of max(-A ρ_t, -A clip(ρ_t, 1 ± ε)) + β k3_t (GRPO, eq. 3).

    logprobs, old_logprobs, ref_logprobs, mask [B, n]; advantages [B], one for all tokens of a response, which has at
    least one. β = 0.04 is the paper's.
    """
    real = mask != 0
    ratio = F.where(real, logprobs - old_logprobs, 0).exp()
    a = advantages[:, None]
    token = F.maximum(-a * ratio, -a * F.clip(ratio, 1 - cliprange, 1 + cliprange))
    if beta:
        token = token + beta * k3(F.where(real, logprobs, 0), ref_logprobs * real)
    return (F.where(real, token, 0).sum(axis=1) / mask.sum(axis=1)).mean()


@configuration(kw_only=True)
class GroupConfig(OnlineConfig):
    """RLOO's and GRPO's options beside those of OnlineConfig.

    β is taken off the reward by RLOO, and weighs the KL in the loss of GRPO. 0.05 is TRL's for PPO and RLOO, and
    PPOConfig's, so that the methods can be compared at one price; GRPO's paper has 0.04.
    """

    num_generations: int = option(4, "responses to each prompt", least=2, flag="--generations", metavar="K")
    kl_coef: float = option(0.05, "β, the price of KL from the reference", least=0, metavar="B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_generations:
            raise ValueError(
                f"batch_size must be a multiple of num_generations, {self.num_generations}, got {self.batch_size}"
            )


class RLOOTrainer(OnlineTrainer):
    """REINFORCE with a leave-one-out baseline. Arguments and errors: see `OnlineTrainer`; config: a GroupConfig."""

    config: GroupConfig

    @property
    def responses_per_prompt(self) -> int:
        """num_generations."""
        return self.config.num_generations

    def prepare(
        self, roll: Rollout, old: dict[str, Array], ref_logprobs: Array, scores: np.ndarray
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """Scores minus β KL of the whole response, against the other responses to the prompt."""
        kl = ((old["logprobs"] - ref_logprobs) * roll.mask).sum(axis=1)  # [B]
        rewards = asarray(scores.astype(np.float32), self._xp) - self.config.kl_coef * kl
        arrays = {"advantages": rloo_advantages(rewards, self.config.num_generations)}
        return arrays, _objective(-self.config.kl_coef * float(kl.mean().item()), scores, self.config.kl_coef)

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, float]]:
        """`rloo_loss`."""
        xp = self._xp
        loss = rloo_loss(new.logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"], self.config.cliprange)
        change = xp.where(batch["mask"] != 0, new.logprobs.data - batch["old_logprobs"], 0).sum(axis=1)
        clipped = clip_fraction(xp.exp(change), batch["advantages"], xp.ones_like(change), self.config.cliprange)
        return loss, {"loss/policy": loss.item(), "policy/clipfrac": clipped.item()}


class GRPOTrainer(OnlineTrainer):
    """Group relative policy optimization. Arguments and errors: see `OnlineTrainer`; config: a GroupConfig."""

    config: GroupConfig

    @property
    def responses_per_prompt(self) -> int:
        """num_generations."""
        return self.config.num_generations

    def prepare(
        self, roll: Rollout, old: dict[str, Array], ref_logprobs: Array, scores: np.ndarray
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """Scores, standardized within each group; the KL is in the loss."""
        rewards = asarray(scores.astype(np.float32), self._xp)
        return {"advantages": grpo_advantages(rewards, self.config.num_generations)}, _objective(
            0.0, scores, self.config.kl_coef
        )

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, float]]:
        """`grpo_loss`."""
        c, mask, ref = self.config, batch["mask"], batch["ref_logprobs"]
        loss = grpo_loss(new.logprobs, batch["old_logprobs"], ref, batch["advantages"], mask, c.cliprange, c.kl_coef)
        change = self._xp.where(mask != 0, new.logprobs.data - batch["old_logprobs"], 0)
        return loss, {
            "loss/policy": loss.item(),
            "loss/kl": masked_mean(k3(Tensor(new.logprobs.data), ref), mask).item(),
            "policy/clipfrac": clip_fraction(
                self._xp.exp(change), batch["advantages"][:, None], mask, c.cliprange
            ).item(),
        }


def _objective(non_score: float, scores: np.ndarray, beta: float) -> dict[str, Any]:
    return {
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + float(scores.mean()),
        "objective/kl_coef": beta,
    }
