"""Rollouts: a policy answers prompts, and it is marked which tokens are its own.

    prompt, padded on the left     response, n tokens                      mask: what counts
    0  0  p  p  p  p               y  y  y  EOS 0  0                       1  1  1  1  0  0

Tokens are drawn from softmax(logits / temperature) alone: top-k, top-p or a minimal length would draw from another
distribution than the one whose log-probabilities are compared, and the KL estimate could become negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, Rng, asarray, to_numpy, xp_of
from ..nn.generation import generate
from ..text.tokenizer import pad_sequences


@dataclass
class Rollout:
    """Prompts with their responses, on the policy's device.

    input_ids       [B, P + n]  left-padded prompts, then responses; 0 wherever nothing real stands
    attention_mask  [B, P + n]  1 at real tokens
    mask            [B, n]      1 at the response's tokens, the one that ended it included
    ended           [B]         whether a stop token ended the response
    """

    input_ids: Array
    attention_mask: Array
    mask: Array
    ended: Array

    @property
    def length(self) -> int:
        """n, of which a response uses as many as its mask says."""
        return self.mask.shape[1]

    def responses(self) -> list[list[int]]:
        """Each response's own tokens, in host memory."""
        ids, mask = to_numpy(self.input_ids[:, -self.length :]), to_numpy(self.mask)
        return [row[real != 0].tolist() for row, real in zip(ids, mask)]

    def prompts(self) -> list[list[int]]:
        """Each prompt's tokens, in host memory."""
        ids, mask = (to_numpy(a[:, : -self.length]) for a in (self.input_ids, self.attention_mask))
        return [row[real != 0].tolist() for row, real in zip(ids, mask)]


def truncate_response(response: Array, stop_token_ids: Sequence[int]) -> tuple[Array, Array]:
    """(mask [B, n], ended [B]) of sampled tokens [B, n]: 1 up to the first stop token, that one included.

    Stop tokens are kept. mask is int64, ended boolean.
    """
    xp = xp_of(response)
    stop = xp.zeros(response.shape, bool)
    for token in stop_token_ids:
        stop |= response == token
    stops = stop.astype(xp.int64)
    return (stops.cumsum(axis=1) - stops == 0).astype(xp.int64), stop.any(axis=1)


def rollout(
    policy: Any, prompts: Sequence[Sequence[int]], length: int, temperature: float = 1.0,
    stop_token_ids: Sequence[int] = (), seed: int | Rng = 0,
) -> Rollout:  # fmt: skip
    """Let `policy` answer prompts (token ids) with at most `length` tokens each.

    A row's random numbers depend on the seed, its index and the position alone, so stopping it at its stop token gives
    the tokens that sampling `length` of them and truncating afterwards gives.

    Raises ValueError for a temperature that is not above 0, for no prompts or an empty one, and for prompts that with
    `length` tokens more are longer than the model's positions; FloatingPointError where the model's logits are NaN.
    """
    if not temperature > 0:
        raise ValueError(f"a rollout samples: temperature must be above 0, got {temperature}")
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("a rollout answers prompts, each of at least one token; there is an empty one, or none")
    ids, prompt_mask = pad_sequences(prompts, 0, side="left")  # [B, P]
    out = generate(
        policy, ids, prompt_mask, length, temperature=temperature, seed=seed, eos_token_id=list(stop_token_ids),
        pad_token_id=0,
    )[:, ids.shape[1] :]  # fmt: skip
    response = np.zeros((len(prompts), length), np.int64)
    response[:, : out.shape[1]] = out
    mask, ended = truncate_response(response, stop_token_ids)
    whole = (np.concatenate([ids, response * mask], axis=1), np.concatenate([prompt_mask, mask], axis=1), mask, ended)
    xp = xp_of(policy.parameters()[0].data)
    return Rollout(*(asarray(array, xp) for array in whole))


def check_prompts(prompts: Iterable[Any]) -> list[Any]:
    """The prompts as a list. Raises TypeError where they are texts."""
    found = list(prompts)
    if any(isinstance(prompt, str) for prompt in found):
        raise TypeError("prompts are lists of token ids, not texts: encode them with the policy's tokenizer")
    return found


def rollouts(
    policy: Any, prompts: Sequence[Sequence[int]], k: int, length: int, temperature: float,
    stop_token_ids: Sequence[int], seed: int, batch_size: int,
) -> Iterator[Rollout]:  # fmt: skip
    """k responses to each prompt, beside each other, as rollouts of batch_size of them.

    Raises as `rollout` and `check_prompts`, and ValueError for k or batch_size below 1.

    They depend on the seed and their place among all responses alone, and not on batch_size.
    """
    if min(k, batch_size) < 1:
        raise ValueError(f"k and batch_size must be at least 1, got {k} and {batch_size}")
    rows = [prompt for prompt in check_prompts(prompts) for _ in range(k)]
    for i in range(0, len(rows), batch_size):
        stream = Rng(seed, first_row=i)
        yield rollout(policy, rows[i : i + batch_size], length, temperature, stop_token_ids, stream)


def distinct_n(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of the responses (Li et al. 2016, arXiv:1510.03055): near 0 for repetition.

    It falls with the number of responses, too: compare sets of one size. NaN-free: 0 where there is no n-gram.
    """
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
