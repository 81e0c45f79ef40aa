"""A gold reward that no one trains on: the rules of VADER, and a rater who follows them, with noise.

VADER (Hutto & Gilbert 2014, the library vaderSentiment) computes the sentiment of an English text from words that
people rated and from rules for negation, emphasis and the like. It is independent of every model here, so a reward
model trained on a rater's labels is a proxy for it, and what optimizing the proxy does to the gold can be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..lazy import extra


def vader(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound score of each text, from -1 (most negative) to 1: float64 [n].

    Raises ImportError naming the extra where vaderSentiment is not installed.
    """
    analyzer = _analyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], np.float64)


@cache
def _analyzer() -> Any:
    return extra("vaderSentiment.vaderSentiment", "rlhf", "the gold reward").SentimentIntensityAnalyzer()


def rank(scores: np.ndarray, rng: np.random.Generator, temperature: float = 0.1, flip: float = 0.0) -> np.ndarray:
    """How a noisy rater orders K answers with gold scores [n, K]: indices [n, K], best first.

    The rater adds Gumbel noise, of scale `temperature`, to each score and sorts. Of any two answers i is then put
    before j with the Bradley-Terry probability

        P(i before j) = σ((s_i - s_j) / temperature)

    (of K answers the order has Plackett and Luce's distribution: Yellott 1977). At temperature 0 the better one
    always wins, and equals are ordered at random. With probability `flip` the rater reads the scale the wrong way round
    and the order is reversed, so no reward model can agree with more than max(flip, 1 - flip) of such labels.

    Raises ValueError for a temperature below 0 and a flip outside of [0, 1].
    """
    if not (temperature >= 0 and 0 <= flip <= 1):
        raise ValueError(f"temperature must not be negative and flip must lie in [0, 1], got {temperature} and {flip}")
    noise = rng.gumbel(size=scores.shape)
    order = np.lexsort((-noise, -scores), axis=-1) if temperature == 0 else np.argsort(-(scores / temperature + noise))
    reverse = rng.random(len(scores)) < flip
    order[reverse] = order[reverse, ::-1]
    return order


def gold_reward(tokenizer: Any, score: Callable[[Sequence[str]], np.ndarray] = vader) -> Callable[[Any], np.ndarray]:
    """`score` of the texts of a rollout's responses, as a reward or a watcher of the trainers: rollout -> [B]."""
    return lambda rollout: score([tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.responses()])
