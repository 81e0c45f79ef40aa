"""Best of n: sample n answers, keep the one that the reward likes best. It trains nothing, and is what RLHF must beat.

The expected score of the best of n, estimated without bias from the N >= n sorted scores r_1 <= ... <= r_N of a prompt:

    E max(n) = Σ_i C(i - 1, n - 1) / C(N, n) r_i            C(i - 1, n - 1) sets of n have r_i as their largest
    KL(best of n, policy) <= log n - (n - 1) / n            nats an answer; equal where no two answers are the same

What RLHF pays in KL for a score can so be compared with what sampling pays for it.

Sources: the estimator is that of Nakano et al. 2021, arXiv:2112.09332, appendix I; the KL is in Stiennon et al. 2020,
arXiv:2009.01325, appendix G.3, and compared with PPO's in Gao et al. 2022, arXiv:2210.10760; that it is a bound is
shown by Beirami et al. 2024, arXiv:2401.01879.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .online import RewardFunction, reward_function
from .reward import RewardModel
from .rollouts import rollouts


class BestOfN(NamedTuple):
    """The best answers, and what best of 1, 2, ... n is worth."""

    responses: list[list[int]]  # each prompt's best answer: token ids
    scores: np.ndarray  # of all answers, in the order in which they were drawn: [prompts, n]
    expected: np.ndarray  # expected score of the best of 1, ... n, mean over prompts: [n]
    kl: np.ndarray  # and its KL from the policy at most: [n]


def best_of_n(
    policy: Any, reward: RewardModel | RewardFunction, prompts: Sequence[Sequence[int]], n: int, length: int = 24,
    temperature: float = 1.0, stop_token_ids: Sequence[int] = (), seed: int = 0, batch_size: int = 64,
) -> BestOfN:  # fmt: skip
    """n answers of at most `length` tokens to each prompt (token ids), scored by the reward, and the best.

    To compare with an online trainer, give its `stop_token_ids`; scores are the reward's alone, without the trainer's
    missing_eos_score or missing_eos_penalty. Of equal scores the first is the best. Raises ValueError for n or
    batch_size below 1, a reward that does not give one finite number a response, and as `rollout`; TypeError for a reward
    that is no function of a rollout, and for prompts that are texts.
    """
    if n < 1:
        raise ValueError(f"the best of n answers takes n of at least 1, got {n}")
    if batch_size < 1:
        raise ValueError(f"batch_size, responses that are drawn at a time, must be at least 1, got {batch_size}")
    if not len(prompts):
        raise ValueError("there are no prompts")
    score = reward_function(reward)
    answers, scores = [], []
    for roll in rollouts(policy, prompts, n, length, temperature, stop_token_ids, seed, batch_size):
        scores.append(np.asarray(score(roll), np.float64))
        if scores[-1].shape != roll.mask.shape[:1]:
            wanted = f"one score a response, {roll.mask.shape[:1]}"
            raise ValueError(f"the reward must give {wanted}, not {scores[-1].shape}")
        if bad := np.flatnonzero(~np.isfinite(scores[-1])).tolist():
            prompt, where = (len(answers) + bad[0]) // n, f"for {len(bad)} of {len(scores[-1])} responses"
            raise ValueError(f"the reward is NaN or infinite {where}, first of prompts[{prompt}]: none can be the best")
        answers += roll.responses()
    table = np.concatenate(scores).reshape(-1, n)
    best = [answers[k * n + i] for k, i in enumerate(table.argmax(axis=1).tolist())]
    return BestOfN(best, table, expected_best(table).mean(axis=0), best_of_n_kl(np.arange(1, n + 1)))


def expected_best(scores: np.ndarray) -> np.ndarray:
    """The expected highest of 1, 2, ... N of a row's scores, drawn without replacement: [..., N] -> [..., N]."""
    N = scores.shape[-1]
    weights = np.zeros((N, N))  # [n, i]: the share of the sets of n that have score i as their largest
    for n in range(1, N + 1):
        weights[n - 1, N - 1] = n / N  # C(N - 1, n - 1) / C(N, n); the others from it, since C(N, n) may be huge
        for i in range(N - 1, n - 1, -1):  # C(i - 1, n - 1) = C(i, n - 1) (i - n + 1) / i
            weights[n - 1, i - 1] = weights[n - 1, i] * (i - n + 1) / i
    return np.sort(scores, axis=-1) @ weights.T


def best_of_n_kl(n: np.ndarray | int) -> np.ndarray:
    """log n - (n - 1) / n: the KL of the best of n from the policy, at most, in nats; in the shape of n."""
    return np.log(n) - (n - 1) / np.asarray(n)
