"""Own rewards: a plain function of texts, called as Hugging Face TRL calls its reward functions.

def short(prompts, completions, **kwargs):          # a number for each completion, the higher the better
    return [-len(text) for text in completions]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .online import RewardFunction
from .rollouts import Rollout


def text_reward(function: Callable[..., Any], tokenizer: Any, name: str | None = None) -> RewardFunction:
    """`function(prompts=texts, completions=texts)` as a reward or a watcher of the trainers: rollout -> scores [B].

    Both are lists of B texts, without special tokens. `name` is what errors call the function, and what a run that is
    resumed must share. Raises ValueError where the function raises, or does not give B finite numbers.
    """
    name = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"

    def scores(roll: Rollout) -> np.ndarray:
        prompts, completions = (
            [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
            for rows in (roll.prompts(), roll.responses())
        )
        try:
            given = function(prompts=prompts, completions=completions)
        except Exception as error:
            raise ValueError(f"the reward function {name} raised {type(error).__name__}: {error}") from error
        try:
            found = np.asarray(given, np.float64)
        except (TypeError, ValueError, RuntimeError):  # a tensor of PyTorch that requires gradients
            found = np.empty(())
        if found.shape != (len(completions),):
            n = f"{len(given)} of them" if hasattr(given, "__len__") and getattr(given, "shape", None) != () else f"{given!r:.60}"
            wanted = f"a list of {len(completions)} numbers, one for each completion"
            raise ValueError(
                f"the reward function {name} must return {wanted}; it returned {type(given).__name__}, {n}"
            )
        if not np.isfinite(found).all():
            i = int(np.argmin(np.isfinite(found)))
            raise ValueError(f"the reward function {name} gave {found[i]} to the completion {completions[i]!r}")
        return found

    scores.__qualname__ = name
    return scores
