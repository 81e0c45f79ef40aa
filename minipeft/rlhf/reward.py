"""Reward models: a scalar for a text, learned from which of several answers people prefer.

    answers to one prompt, best first ─► scores r_1 .. r_K ─► mean of -log σ(r_i - r_j) over all pairs i before j

The score is read at the last real token, found by length and not by looking for a padding id, so that a text may end
with the very id that pads. Scores have no natural zero and scale; calibration gives them mean 0 and standard deviation
1 on reference texts, so that a KL coefficient means the same for every reward model.

Sources: Bradley & Terry 1952; Stiennon et al. 2020 (arXiv:2009.01325); Ouyang et al. 2022 (InstructGPT,
arXiv:2203.02155, eq. 1); the margin is that of Llama 2 (arXiv:2307.09288, eq. 2), centering that of Eisenstein et al.
2023 (arXiv:2312.09244), calibration that of Ziegler et al. 2019 (arXiv:1909.08593, section 2).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, Rng, asarray, to_numpy, xp_of
from ..directory import replacing
from ..files import FileError, read_json, write_json
from ..nn.heads import SequenceClassifier
from ..nn.transformer import Transformer, from_host
from ..text.tokenizer import Tokenizer, pad_sequences
from ..train.batches import Batch
from .config import RewardConfig

CALIBRATION = "reward_calibration.json"


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Array | None = None, center: float = 0.0, weight: Array | None = None
) -> Tensor:
    """Bradley-Terry: mean of -log σ(r_chosen - r_rejected - margin) + center · mean of (r_chosen + r_rejected)².

    chosen, rejected, margin, weight: [pairs]. `weight` makes both means weighted ones, with weights that sum to 1.
    Raises ValueError where the shapes differ.
    """
    chosen, rejected = (x if isinstance(x, Tensor) else Tensor(x) for x in (chosen, rejected))
    for name, x in (("rejected", rejected), ("margin", margin), ("weight", weight)):
        if x is not None and x.shape != chosen.shape:
            raise ValueError(f"{name} must have the shape of chosen, {chosen.shape}, not {x.shape}")
    difference = chosen - rejected
    loss = -F.logsigmoid(difference if margin is None else difference - margin)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    return loss.mean() if weight is None else (loss * weight).sum()


class Ranking(NamedTuple):
    """Answers to one prompt, best first: token ids of prompt, answer and end-of-sequence token, 1-D arrays.

    `margin`, of a pair, is by how much the first should win.
    """

    texts: tuple[np.ndarray, ...]
    margin: float = 0.0


def ranking_pairs(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rankings that lie one after the other in a batch: (row of better, of worse, weight), [pairs] each.

    A ranking of K answers gives K(K-1)/2 pairs, each with the weight 1 / (rankings · K(K-1)/2): every ranking counts
    once, and its answers are computed once (InstructGPT, eq. 1).
    """
    pairs = [np.array(np.triu_indices(K, 1)) for K in sizes]  # [2, K(K-1)/2] each
    starts = np.cumsum([0, *sizes[:-1]])
    better, worse = np.concatenate([start + own for start, own in zip(starts, pairs)], axis=1)
    weight = [np.full(own.shape[1], 1 / (len(sizes) * own.shape[1]), np.float32) for own in pairs]
    return better, worse, np.concatenate(weight)


def collate_rankings(rankings: Sequence[Ranking]) -> Batch:
    """Rankings as one batch, padded on the right: the arguments of `RewardModel.loss`.

    Raises ValueError for a ranking of fewer than two answers.
    """
    for number, ranking in enumerate(rankings):
        if len(ranking.texts) < 2:
            raise ValueError(f"ranking {number} has {len(ranking.texts)} answer; a comparison takes two")
    ids, mask = pad_sequences([text for ranking in rankings for text in ranking.texts], 0)
    better, worse, weight = ranking_pairs([len(ranking.texts) for ranking in rankings])
    margin = np.concatenate([np.full(math.comb(len(r.texts), 2), r.margin, np.float32) for r in rankings])
    arguments = {
        "input_ids": ids, "attention_mask": mask, "better": better, "worse": worse, "weight": weight,
        "margin": margin if margin.any() else None,
    }  # fmt: skip
    return Batch(arguments, len(rankings), int(mask.sum()))


class RewardModel(SequenceClassifier):
    """A language model's backbone with a scalar head, and the calibration of its scores.

    Args:
        model: the language model whose backbone is copied (arrays of frozen parameters are shared).
        seed: of the head's weights, N(0, 1 / (d + 1)) as in OpenAI's lm-human-preferences; None allocates none.

    Called, it gives raw scores [B, 1], as the LlamaForSequenceClassification that it is saved as does; `rewards` gives
    calibrated ones, (raw - mean) / std.
    """

    def __init__(self, model: Transformer, seed: int | None = 0):
        super().__init__(model, num_labels=1, seed=seed)
        self.mean, self.std = 0.0, 1.0
        if seed is not None:
            d = self.config.hidden_size
            weight = np.random.default_rng(seed).standard_normal((1, d), np.float32) / np.float32(math.sqrt(d + 1))
            self.score.weight.data = asarray(weight, xp_of(self.backbone.embedding.weight.data))

    def rewards(self, input_ids: Array, attention_mask: Array | None = None) -> Tensor:
        """Calibrated rewards [B] of texts [B, T], read at the last real token."""
        return (self(input_ids, attention_mask).reshape(-1) - self.mean) / self.std

    def loss(
        self, input_ids: Array, attention_mask: Array, better: Array, worse: Array, weight: Array | None = None,
        margin: Array | None = None, center: float = RewardConfig.center, rng: Rng | None = None,
    ) -> Tensor:  # fmt: skip
        """`reward_loss` of the pairs (rows `better`, rows `worse`) of a batch of texts, each computed once.

        input_ids, attention_mask [B, T]; better, worse, weight, margin [pairs]. `rng` is not used, so there is no
        dropout: a reward is to be a function of the text.
        """
        scores = self.rewards(input_ids, attention_mask)
        better, worse, weight, margin = (from_host(a, xp_of(scores.data)) for a in (better, worse, weight, margin))
        return reward_loss(scores[better], scores[worse], margin, center, weight)

    def score_texts(self, texts: Sequence[np.ndarray], batch_size: int = 64) -> np.ndarray:
        """Calibrated rewards of token id arrays of any lengths, in host memory: float64 [n].

        Raises ValueError for a batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        scores = np.empty(len(texts))
        order = np.argsort([len(text) for text in texts], kind="stable")  # batches of like lengths
        with no_grad():
            for i in range(0, len(texts), batch_size):
                rows = order[i : i + batch_size]
                ids, mask = pad_sequences([texts[row] for row in rows], 0)
                scores[rows] = to_numpy(self.rewards(ids, mask).data)
        return scores

    def calibrate(self, texts: Sequence[np.ndarray]) -> None:
        """Choose mean and std so that the rewards of these reference texts have mean 0 and standard deviation 1.

        Raises ValueError where there are none, or all have the same score, up to float32's rounding.
        """
        if not len(texts):
            raise ValueError("there are no reference texts")
        before, (self.mean, self.std) = (self.mean, self.std), (0.0, 1.0)
        try:
            scores = self.score_texts(texts)
        finally:
            self.mean, self.std = before
        mean, std = float(scores.mean()), float(scores.std())
        if not 1e-5 * abs(scores).max() < std < math.inf:
            found = f"scores of mean {mean:g} and standard deviation {std:.1g}"
            raise ValueError(f"the {len(texts)} reference texts have {found}: nothing to scale by")
        self.mean, self.std = mean, std

    def save_pretrained(self, directory: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
        """Write a directory that transformers loads as LlamaForSequenceClassification, with the calibration."""
        from ..hub.pretrained import save_pretrained

        with replacing(directory) as fresh:
            save_pretrained(self, fresh, tokenizer)
            write_json(fresh / CALIBRATION, {"mean": self.mean, "std": self.std})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, backend: str | None = None
    ) -> tuple[RewardModel, Tokenizer | None]:
        """(model, tokenizer) of a directory; one without a calibration file has mean 0 and std 1.

        Raises HubError or FileError for a directory that holds no classifier with one label, or a damaged one.
        """
        from ..hub.pretrained import HubError, from_pretrained

        classifier, tokenizer = from_pretrained(directory, backend=backend)
        if not isinstance(classifier, SequenceClassifier) or classifier.num_labels != 1:
            raise HubError(f"{directory}: holds no reward model (a sequence classifier with one label)")
        model = object.__new__(cls)
        model.__dict__.update(classifier.__dict__)
        path = Path(directory) / CALIBRATION
        content = read_json(path) if path.exists() else {"mean": 0, "std": 1}
        try:
            model.mean, model.std = float(content["mean"]), float(content["std"])
        except (TypeError, KeyError, ValueError):
            raise FileError(f"{path}: must hold an object with the numbers 'mean' and 'std'") from None
        if not (math.isfinite(model.mean) and 0 < model.std < math.inf):
            raise FileError(f"{path}: mean {model.mean} and std {model.std} are not a calibration")
        return model, tokenizer


def reward_accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """The share of pairs whose chosen answer has the higher reward, of rewards [pairs]; equal ones count one half."""
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def calibration_curve(chosen: np.ndarray, rejected: np.ndarray, bins: int = 10) -> tuple[np.ndarray, ...]:
    """How often the first of two answers is preferred, where the model says so with probability p: what a plot shows.

    chosen, rejected: rewards [pairs]. Each pair is looked at from both sides: predicted p = σ(r_first - r_second),
    preferred or not. Returns, for each of the equally wide bins of p that are not empty, (mean predicted, observed
    share, number of pairs): a reliability diagram (Guo et al. 2017, arXiv:1706.04599, section 2).
    The rewards must be those that the loss was computed from: with the mean and std that the model had while it was
    trained, not those of a later `calibrate`.
    """
    p = 1 / (1 + np.exp(-(chosen - rejected).astype(np.float64)))
    p, preferred = np.concatenate([p, 1 - p]), np.repeat([1.0, 0.0], len(p))
    place = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    some = count > 0
    predicted, observed = (np.bincount(place, weights=w, minlength=bins)[some] / count[some] for w in (p, preferred))
    return predicted, observed, count[some]
