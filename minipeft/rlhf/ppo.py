"""Proximal policy optimization for language models: the losses, the KL controller, and the trainer.

    maximize   E[r(x, y)] - β KL(π ‖ π_ref)      with      ρ_t = π(y_t) / π_old(y_t)

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Huang et al. 2024, "The
N+ implementation details of RLHF with PPO" (arXiv:2403.17031). As in Ziegler et al., one network has two heads: the
value head reads the policy's own hidden states, unless a `ValueModel` of its own is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, asarray, xp_of
from ..nn.heads import ValueModel
from ..nn.layers import Linear
from ..nn.module import Parameter
from ..options import configuration, option
from ..train.checkpoint import frozen_fingerprint
from .advantages import gae, masked_mean, shaped_rewards, whiten
from .logprobs import response_hidden
from .online import OnlineConfig, OnlineTrainer, Outputs, RewardFunction, check_adapters
from .reward import RewardModel
from .rollout import Rollout


def policy_loss(
    logprobs: Tensor, old_logprobs: Array, advantages: Array, mask: Array, cliprange: float = 0.2
) -> Tensor:
    """Masked mean of max(-A ρ, -A clip(ρ, 1 ± ε)), ρ = exp(log π - log π_old): all [B, n] (PPO, eq. 7)."""
    ratio = F.where(mask != 0, logprobs - old_logprobs, 0).exp()
    return masked_mean(F.maximum(-advantages * ratio, -advantages * F.clip(ratio, 1 - cliprange, 1 + cliprange)), mask)


def clip_fraction(ratio: Array, advantages: Array, mask: Array, cliprange: float = 0.2) -> Array:
    """The share of the real positions at which `policy_loss` took the clipped side: a scalar array.

    ratio, advantages and mask have one shape, or broadcast to that of mask: [B, n], or [B] for ratios of whole
    responses.
    """
    clipped = -advantages * ratio.clip(1 - cliprange, 1 + cliprange) > -advantages * ratio
    return masked_mean(clipped.astype(ratio.dtype), mask)


def value_loss(values: Tensor, old_values: Array, returns: Array, mask: Array, cliprange_value: float = 0.2) -> Tensor:
    """Half the masked mean of max((V - R)², (clip(V, V_old ± ε) - R)²): all [B, n].

    The PPO paper does not clip values; OpenAI's code does (baselines' ppo2, then lm-human-preferences; Huang et al.
    2024).
    """
    clipped = old_values + F.clip(values - old_values, -cliprange_value, cliprange_value)
    return 0.5 * masked_mean(F.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


class KLController:
    """The KL coefficient β: fixed, or, given a target, moved towards it by proportional control.

        β ← β (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon)    after every n responses

    Ziegler et al. 2019, section 2.2, have a constant gain in place of n / horizon; that factor is their code's
    (lm-human-preferences, `AdaptiveKLController`). Raises ValueError for a target or a horizon that is not above 0, and
    for n so large that β would not stay above 0.
    """

    def __init__(self, beta: float, target: float | None = None, horizon: int = 10000):
        if target is not None and not target > 0:
            raise ValueError(f"target must be above 0, or None, got {target}")
        if not horizon > 0:
            raise ValueError(f"horizon must be above 0, got {horizon}")
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, n: int) -> None:
        """Move β, given the mean KL, in nats a response, of n responses."""
        if self.target is not None:
            if not 0 <= n < 5 * self.horizon:
                raise ValueError(f"n must be below 5 · horizon, {5 * self.horizon}, got {n}")
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * n / self.horizon


@configuration(kw_only=True)
class PPOConfig(OnlineConfig):
    """PPO's options beside those of OnlineConfig. γ, λ, vf_coef and both clip ranges are OpenAI's (Huang et al. 2024)."""

    kl_coef: float = option(0.05, "β, the price of KL from the reference", least=0, metavar="B")  # TRL's
    kl_target: float | None = option(None, "move β towards this KL, nats a response", above=0, metavar="KL")
    kl_horizon: int = option(10000, "responses over which such a β may move by a fifth", least=1)
    gamma: float = option(1.0, "γ, the discount of later rewards", least=0, most=1)
    lam: float = option(0.95, "λ of generalized advantage estimation", least=0, most=1)
    cliprange_value: float = option(0.2, "ε of the values: how far a value may move in an update", above=0)
    vf_coef: float = option(0.1, "weight of the value loss", least=0)
    whiten_rewards: bool = option(False, "rescale the shaped rewards to variance 1, keeping their mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_target is not None and not 5 * self.kl_horizon > self.batch_size:
            raise ValueError(
                f"kl_horizon must be above batch_size / 5, {self.batch_size / 5:g}, or β would not stay above 0; got "
                f"{self.kl_horizon}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target multiplies kl_coef up and down, so kl_coef must not start at 0")


class PPOTrainer(OnlineTrainer):
    """PPO of a language model against a reward. Arguments and errors: see `OnlineTrainer`; and

    value_model: a `ValueModel`, or a PeftModel around one, in place of the value head on the policy's hidden states.
        Its v_head must be trained, which a PeftModel does with modules_to_save=["v_head"]; ValueError otherwise.
    """

    config: PPOConfig

    def __init__(
        self,
        policy: Any,
        reward: RewardModel | RewardFunction,
        prompts: Sequence[Sequence[int]],
        config: PPOConfig | None = None,
        watch: Mapping[str, RewardFunction] | None = None,
        value_model: ValueModel | None = None,
    ):
        config = config or PPOConfig()
        self.value_model = value_model
        self.v_head, xp = Linear(policy.config.hidden_size, 1, seed=None), xp_of(policy.parameters()[0].data)
        for p in self.v_head.parameters():  # zero: the first advantages are the rewards alone
            p.data = xp.zeros(p.shape, xp.float32)
        if value_model is not None:
            check_adapters(value_model, "value model")
            if not any(p.requires_grad and "v_head" in n.split(".") for n, p in value_model.named_parameters()):
                raise ValueError(
                    "no parameter of the value model's v_head requires gradients, so it would stay as it is, at 0 from "
                    'the start; train it: in a PeftModel, with modules_to_save=["v_head"]'
                )
        self.kl_controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        super().__init__(policy, reward, prompts, config, watch)

    def extra_parameters(self) -> dict[str, Parameter]:
        """The value head's, or the value model's that require gradients."""
        if self.value_model is not None:
            return {f"value.{n}": p for n, p in self.value_model.named_parameters() if p.requires_grad}
        return {f"v_head.{n}": p for n, p in self.v_head.named_parameters()}

    def outputs(self, input_ids: Array, attention_mask: Array, length: int) -> Outputs:
        """As `OnlineTrainer.outputs`, and the values of the states in which the tokens were drawn: all [B, length]."""
        hidden = response_hidden(self.policy, input_ids, attention_mask, length)
        if self.value_model is None:
            values = self.v_head(hidden).reshape(hidden.shape[:2])
        else:
            values = self.value_model(input_ids, attention_mask)[:, -length - 1 : -1]
        return self._outputs_of(hidden, input_ids)._replace(values=values)

    def prepare(
        self, roll: Rollout, old: dict[str, Array], ref_logprobs: Array, scores: np.ndarray
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """Shaped rewards, then returns = advantages + values, and only then whitened advantages."""
        c, xp = self.config, self._xp
        beta = self.kl_controller.beta
        given = asarray(scores.astype(np.float32), xp)
        rewards = shaped_rewards(old["logprobs"], ref_logprobs, given, roll.mask, beta)
        kl = float(((old["logprobs"] - ref_logprobs) * roll.mask).sum().item()) / c.batch_size
        self.kl_controller.update(kl, c.batch_size)
        if c.whiten_rewards:
            rewards = whiten(rewards, roll.mask, keep_mean=True)
        advantages, returns = gae(rewards, old["values"], c.gamma, c.lam, roll.mask)
        arrays = {"advantages": whiten(advantages, roll.mask), "returns": returns, "old_values": old["values"]}
        non_score = -beta * kl
        return arrays, {
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + float(scores.mean()),
            "objective/kl_coef": beta,
        }

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, float]]:
        """policy loss + vf_coef · value loss."""
        c, mask = self.config, batch["mask"]
        policy = policy_loss(new.logprobs, batch["old_logprobs"], batch["advantages"], mask, c.cliprange)
        value = value_loss(new.values, batch["old_values"], batch["returns"], mask, c.cliprange_value)
        ratio = self._xp.exp(self._xp.where(mask != 0, new.logprobs.data - batch["old_logprobs"], 0))
        values, old, returns = new.values.data, batch["old_values"], batch["returns"]
        clipped = old + (values - old).clip(-c.cliprange_value, c.cliprange_value)
        clipped = (clipped - returns) ** 2 > (values - returns) ** 2
        return policy + c.vf_coef * value, {
            "loss/policy": policy.item(),
            "loss/value": value.item(),
            "policy/clipfrac": clip_fraction(ratio, batch["advantages"], mask, c.cliprange).item(),
            "val/clipfrac": masked_mean(clipped.astype(values.dtype), mask).item(),
        }

    def _identity(self) -> dict[str, Any]:
        model = self.value_model
        return super()._identity() | ({} if model is None else {"value model": frozen_fingerprint(model)})

    def state(self) -> dict[str, Any]:
        """The KL coefficient."""
        return {"beta": self.kl_controller.beta}

    def load_state(self, state: dict[str, Any]) -> None:
        """The KL coefficient."""
        self.kl_controller.beta = state["beta"]
