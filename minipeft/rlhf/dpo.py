"""Direct preference optimization: preferences become a policy without a reward model or samples.

The policy that maximizes reward minus β KL is π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β), so every policy is the optimum of
the reward β log(π / π_ref). Put into Bradley-Terry, that reward gives a loss of the policy itself:

    L = -log σ(β [log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)])

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, Rng, to_numpy, xp_of
from ..nn.module import Module
from ..text.examples import PreferencePair
from ..train.batches import Batch, collate
from ..train.evaluation import on_device
from ..train.rates import with_learning_rate
from ..train.trainer import Trainer, TrainingArguments
from .config import DPOConfig
from .logprobs import sequence_logprobs


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Array, ref_rejected: Array, beta: float = 0.1
) -> Tensor:
    """Mean of -log σ(β (Δ_chosen - Δ_rejected)), Δ = log π(y) - log π_ref(y) of whole completions: all [pairs]."""
    return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))).mean()


class ReferencedPair(NamedTuple):
    """A preference pair and what the reference policy makes of it: log-probabilities of the two completions."""

    pair: PreferencePair
    ref_chosen: float
    ref_rejected: float


def collate_pairs(pairs: Sequence[ReferencedPair]) -> Batch:
    """Pairs as one batch for `dpo_objective`: the chosen texts, then the rejected ones, padded on the right."""
    batch = collate([p.pair.chosen for p in pairs] + [p.pair.rejected for p in pairs])
    reference = {name: np.array([getattr(p, name) for p in pairs], np.float32) for name in ("ref_chosen", "ref_rejected")}
    return Batch(batch.arguments | reference, len(pairs), batch.tokens)


def dpo_objective(
    model: Module, input_ids: Array, labels: Array, attention_mask: Array | None, ref_chosen: Array, ref_rejected: Array,
    beta: float = 0.1, rng: Rng | None = None,
) -> Tensor:  # fmt: skip
    """`dpo_loss` of a batch whose first half are the chosen completions: what the Trainer minimizes.

    input_ids, labels, attention_mask [2 · pairs, T]; ref_chosen, ref_rejected [pairs]. `rng` is not used: dropout would
    act on the policy and not on the reference.
    """
    sums = sequence_logprobs(model, input_ids, labels, attention_mask)  # [2 · pairs]
    n = ref_chosen.shape[0]
    return dpo_loss(sums[:n], sums[n:], ref_chosen, ref_rejected, beta)


def completion_logprobs(model: Module, pairs: Sequence[PreferencePair], batch_size: int = 32) -> np.ndarray:
    """log π(completion | prompt) of each pair's (chosen, rejected), without gradients: float32 [n, 2], in memory."""
    xp, out = xp_of(model.parameters()[0].data), np.empty((len(pairs), 2), np.float32)
    with no_grad():
        for i in range(0, len(pairs), batch_size):
            part = pairs[i : i + batch_size]
            batch = collate([p.chosen for p in part] + [p.rejected for p in part])
            sums = sequence_logprobs(model, **on_device(batch, xp))
            out[i : i + batch_size] = to_numpy(sums.data).reshape(2, -1).T
    return out


def with_reference(model: Module, pairs: Sequence[PreferencePair], batch_size: int = 32) -> list[ReferencedPair]:
    """The pairs with the log-probabilities that `model`, as it is now, gives them: the reference of the training."""
    logprobs = completion_logprobs(model, pairs, batch_size)
    return [ReferencedPair(pair, *map(float, row)) for pair, row in zip(pairs, logprobs)]


def dpo_trainer(
    policy: Module, pairs: Sequence[PreferencePair], eval_pairs: Sequence[PreferencePair] | None = None,
    args: TrainingArguments | None = None, beta: float = DPOConfig.beta,
    reference_batch_size: int = DPOConfig.reference_batch_size,
) -> Trainer:  # fmt: skip
    """A Trainer that fine-tunes `policy` (a model, or a PeftModel) on preference pairs by DPO.

    The reference is the policy as it is now. Its log-probabilities are computed here, once, so no second model is held,
    `reference_batch_size` pairs at a time. They are part of the examples, and their last bits depend on that number: a
    run is resumed with the same one, from the policy that it began with. Where `args` give no learning rate it is a
    tenth of the method's usual one (`train.rates`). Raises ValueError as `DPOConfig` does, and for a policy with
    virtual tokens.
    """
    DPOConfig(beta=beta, reference_batch_size=reference_batch_size)  # checks both
    args = with_learning_rate(args or TrainingArguments(), policy, share=1 / 10)
    train = with_reference(policy, pairs, reference_batch_size)
    held_out = None if eval_pairs is None else with_reference(policy, eval_pairs, reference_batch_size)

    return Trainer(policy, train, held_out, args, collate=collate_pairs, loss=partial(dpo_objective, beta=beta))


def implicit_rewards(model: Module, pairs: Sequence[ReferencedPair], beta: float = 0.1) -> np.ndarray:
    """β log(π / π_ref) of each pair's (chosen, rejected) completion: float [n, 2]."""
    reference = np.array([(p.ref_chosen, p.ref_rejected) for p in pairs])
    return beta * (completion_logprobs(model, [p.pair for p in pairs]) - reference)
