"""Data made by a model itself: several answers to each prompt, ordered by a rater, as rankings or as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..text.examples import PreferencePair, example_of
from .reward import Ranking
from .rollouts import rollouts

Answers = list[list[int]]  # token ids of the answers to one prompt


def sample_answers(
    policy: Any, prompts: Sequence[Sequence[int]], k: int = 2, length: int = 24, temperature: float = 1.0,
    stop_token_ids: Sequence[int] = (), seed: int = 0, batch_size: int = 64,
) -> list[Answers]:  # fmt: skip
    """k answers of at most `length` tokens to every prompt, as token ids. Raises as `rollout`.

    They depend on the seed and the prompt's place alone.
    """
    rolls = rollouts(policy, prompts, k, length, temperature, stop_token_ids, seed, batch_size)
    answers = [answer for roll in rolls for answer in roll.responses()]
    return [answers[i : i + k] for i in range(0, len(answers), k)]


def rankings(prompts: Sequence[Sequence[int]], answers: Sequence[Answers], order: np.ndarray) -> list[Ranking]:
    """For a reward model: each prompt with its answers, best first, as `order` [n, k] says (see `rank`)."""
    return [
        Ranking(tuple(np.array([*prompt, *own[i]], np.int64) for i in best_first))
        for prompt, own, best_first in zip(prompts, answers, order)
    ]


def preference_pairs(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answers], order: np.ndarray
) -> list[PreferencePair]:
    """For DPO: the first and the last of each prompt's answers, as `order` [n, k] says, with labels on the answer."""
    return [
        PreferencePair(example_of(prompt, own[best_first[0]]), example_of(prompt, own[best_first[-1]]))
        for prompt, own, best_first in zip(prompts, answers, order)
    ]
