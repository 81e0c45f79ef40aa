"""Proximal policy optimization for language models: the losses, the KL controller, and one update in numbered steps.

    maximize    E[r(x, y)] - β KL(π ‖ π_ref)            over policies π that answer a prompt x with y = y_1 ... y_n
    rewards     r_t = -β (log π_old(y_t) - log π_ref(y_t)), plus the score r(x, y) at the last real token
    advantages  δ_t = r_t + γ V_{t+1} - V_t    A_t = δ_t + γλ A_{t+1}    R_t = A_t + V_t    0 after the last token
    loss        mean of max(-A ρ, -A clip(ρ, 1 ± ε))  +  vf_coef · ½ mean of max((V - R)², (clip(V, V_old ± ε) - R)²)

where ρ_t = π(y_t) / π_old(y_t), π at the sampling temperature. "old" is the policy that sampled, "ref" the policy as it
was at the start. V_t is read before y_t is drawn and estimates R_t. The loss takes A whitened: mean 0, variance 1.
Policy and values have an ε each.

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Huang et al. 2024, "The
N+ implementation details of RLHF with PPO" (arXiv:2403.17031). As in Ziegler et al., policy and value head share one
network, so the value loss moves the policy's weights, too. A `ValueModel` is a network of its own. As in Huang et al.'s
code, advantages (and rewards, if asked) are whitened over the whole batch; Ziegler et al.'s whitens each minibatch.

Departures from Huang et al.:
1. If all scores of an update are equal (and there are several), its advantages are 0. Whitening would scale up the
   rest, the cost of KL and the value head's errors, to variance 1. The value loss and Adam's momentum still move weights.
2. A full forward pass gives log π_old; they keep the sampler's.
3. The score is at the last real token; theirs is one later.
4. V is a head of the policy's network and starts at 0; theirs is a network of its own, a copy of the reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, xp_of
from ..nn.layers import Linear
from ..options import fits
from ..train.checkpoint import frozen_fingerprint
from .advantages import gae, masked_mean, shaped_rewards, whiten
from .config import PPOConfig
from .logprobs import Outputs, outputs_of, response_hidden
from .online import OnlineTrainer, RewardFunction
from .reward import RewardModel
from .statistics import clip_fraction, of_objective, of_ratio, value_clip_fraction


def log_ratio(logprobs: Tensor, old_logprobs: Array, mask: Array) -> Tensor:
    """log ρ = log π(y_t) - log π_old(y_t), [B, n]; 0 at padding."""
    return F.where(mask != 0, logprobs - old_logprobs, 0)


def clipped_objective(ratio: Tensor, advantages: Array, cliprange: float = 0.2) -> Tensor:
    """max(-A ρ, -A clip(ρ, 1 ± ε)), element by element, in the shape of ρ (PPO, eq. 7, negated: it is minimized)."""
    return F.maximum(-advantages * ratio, -advantages * F.clip(ratio, 1 - cliprange, 1 + cliprange))


def policy_loss(
    logprobs: Tensor, old_logprobs: Array, advantages: Array, mask: Array, cliprange: float = 0.2
) -> Tensor:
    """Masked mean of max(-A ρ, -A clip(ρ, 1 ± ε)), ρ = exp(log π - log π_old): all [B, n] (PPO, eq. 7)."""
    return masked_mean(clipped_objective(log_ratio(logprobs, old_logprobs, mask).exp(), advantages, cliprange), mask)


def value_loss(values: Tensor, old_values: Array, returns: Array, mask: Array, cliprange_value: float = 0.2) -> Tensor:
    """Half the masked mean of max((V - R)², (clip(V, V_old ± ε) - R)²): all [B, n].

    The PPO paper does not clip values; OpenAI's code does (Huang et al. 2024).
    """
    near = old_values + F.clip(values - old_values, -cliprange_value, cliprange_value)
    return 0.5 * masked_mean(F.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


class KLController:
    """The KL coefficient β. Without a target it is fixed. With one, β grows while the KL is above it, and falls below.

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
            if not 0 <= n < 5 * self.horizon:  # 5 = 1 / 0.2: β stays above 0
                raise ValueError(f"n must be below 5 · horizon, {5 * self.horizon}, got {n}")
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * n / self.horizon


class PPOTrainer(OnlineTrainer):
    """PPO of a language model against a reward. Arguments and errors: see `OnlineTrainer`; and

    value_model: a `ValueModel`, or a PeftModel around one, in place of the value head on the policy's hidden states.
        Its v_head must be trained, which a PeftModel does with modules_to_save=["v_head"]; ValueError otherwise.
    """

    config: PPOConfig

    def __init__(
        self, policy: Any, reward: RewardModel | RewardFunction, prompts: Sequence[Sequence[int]],
        config: PPOConfig | None = None, watch: Mapping[str, RewardFunction] | None = None, value_model: Any = None,
    ):  # fmt: skip
        v_head, xp = Linear(policy.config.hidden_size, 1, seed=None), xp_of(policy.parameters()[0].data)
        for p in v_head.parameters():  # V = 0, so the first update's A_t is Σ (γλ)^k r_{t+k}
            p.data = xp.zeros(p.shape, xp.float32)
        beside = {"v_head": v_head} if value_model is None else {"value": value_model}
        trained = (f"{name}.{n}" for name, m in beside.items() for n, p in m.named_parameters() if p.requires_grad)
        if not any("v_head" in name.split(".") for name in trained):
            raise ValueError(
                "no parameter of the value model's v_head requires gradients, so it would stay as it is, at 0 from "
                'the start; train it: in a PeftModel, with modules_to_save=["v_head"]'
            )
        super().__init__(policy, reward, prompts, config or PPOConfig(), watch, beside)
        self.v_head, self.value_model = v_head, value_model
        self.kl_controller = KLController(self.config.kl_coef, self.config.kl_target, self.config.kl_horizon)

    def update(self) -> dict[str, Any]:
        """One update, of B = batch_size responses of up to n = response_length tokens. Returns its record."""
        c = self.config
        # 1. Rollout: the policy samples one response to each of the next B prompts.
        roll = self.rollout()  # input_ids [B, P + n]: prompts padded on the left; mask [B, n]: 1 at y_t, stop token too
        # 2. Full forward passes of policy and reference, without gradients: kl = old_logprobs - ref_logprobs.
        batch = self.examine(roll)  # old_logprobs, ref_logprobs, kl, old_values [B, n], 0 at padding; roll's arrays
        # 3. One score a response. Where no stop token came, `missing_eos` replaces or lowers it, if the config asks.
        scores, record = self.score(roll, batch, group=c.batch_size)  # [B]; statistics, in which all B are one group
        # 4. Shaped rewards: every token pays for its KL; the last real token gets the score. Then β moves.
        beta, mean_kl = self.kl_controller.beta, record["objective/kl"]  # nats a response
        rewards = shaped_rewards(batch["old_logprobs"], batch["ref_logprobs"], scores, roll.mask, beta)  # [B, n]
        self.kl_controller.update(mean_kl, c.batch_size)
        if c.whiten_rewards:
            rewards = whiten(rewards, roll.mask, keep_mean=True)
        # 5. Advantages and returns. Then the advantages, not the returns, are whitened over all real tokens.
        advantages, batch["returns"] = gae(rewards, batch["old_values"], c.gamma, c.lam, roll.mask)  # [B, n]
        all_equal = record["objective/scores_equal"] == 1  # after missing_eos; never for B = 1
        batch["advantages"] = 0 * advantages if all_equal else whiten(advantages, roll.mask)  # departure 1
        # 6. num_epochs passes over the rows in random order. Each minibatch: `outputs`, `loss`, one step of Adam.
        trained = self.epochs(batch)
        return record | of_objective(record, -beta * mean_kl, beta) | trained

    def loss(self, batch: dict[str, Array], new: Outputs) -> tuple[Tensor, dict[str, Array]]:
        """(`policy_loss` + vf_coef · `value_loss`, statistics) of a minibatch. `new`: what `outputs` gives now."""
        c, mask, old, advantages = self.config, batch["mask"], batch["old_logprobs"], batch["advantages"]
        policy = policy_loss(new.logprobs, old, advantages, mask, c.cliprange)
        of_values = new.values, batch["old_values"], batch["returns"], mask, c.cliprange_value
        value = value_loss(*of_values)
        change = log_ratio(new.logprobs.detach(), old, mask)  # log ρ, [b, n]
        ratio = change.exp()
        return policy + c.vf_coef * value, {
            "loss/policy": policy.data,
            "loss/value": value.data,
            "policy/clipfrac": clip_fraction(ratio.data, advantages, mask, c.cliprange),
            "val/clipfrac": value_clip_fraction(*of_values),
            **of_ratio(change.data, ratio.data, mask, new.entropy),
        }

    def outputs(self, input_ids: Array, attention_mask: Array, length: int) -> Outputs:
        """As `OnlineTrainer.outputs`, and the values of the states in which the tokens were drawn: all [B, length]."""
        hidden = response_hidden(self.policy, input_ids, attention_mask, length)  # [B, n, d], one position earlier
        if self.value_model is None:
            values = self.v_head(hidden).reshape(hidden.shape[:2])
        else:
            values = self.value_model(input_ids, attention_mask)[:, -length - 1 : -1]
        return outputs_of(self.policy, hidden, input_ids, self.config.temperature)._replace(values=values)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: β."""
        return {"beta": self.kl_controller.beta}

    def load_state(self, state: dict[str, Any]) -> None:
        """Set β from a checkpoint. Raises ValueError for what is no β."""
        if not fits(state["beta"], float) or state["beta"] < 0:
            raise ValueError(f"beta is {state['beta']!r}")
        self.kl_controller.beta = state["beta"]

    def identity(self) -> dict[str, Any]:
        """As in OnlineTrainer, and the value model."""
        model = self.value_model
        return super().identity() | ({} if model is None else {"value model": frozen_fingerprint(model)})
