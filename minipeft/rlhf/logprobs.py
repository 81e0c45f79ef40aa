"""How probable a model finds the tokens of a text: what every method of this folder is made of.

log π(y_t | y_<t) = log softmax(logits_{t-1} / temperature)[y_t]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, is_grad_enabled
from ..backend import Array, xp_of
from ..nn.module import Module
from ..train.batches import IGNORE


def token_logprobs(logits: Tensor, targets: Array) -> Tensor:
    """log softmax(logits)[target]: logits [..., V], integer targets [...] -> [...]."""
    return F.gather(F.log_softmax(logits, axis=-1), targets[..., None], axis=-1).reshape(targets.shape)


def response_hidden(model: Module, input_ids: Array, attention_mask: Array, length: int) -> Tensor:
    """Hidden states [B, length, d] from which the last `length` tokens of input_ids [B, T] are predicted.

    The positions are those of the real tokens (`cumsum(mask) - 1`), so prompts may be padded on the left. Raises
    ValueError for a model that has no backbone, or puts virtual tokens before its input.
    """
    if getattr(model, "virtual_tokens", 0) or not hasattr(model, "backbone"):
        raise ValueError(
            "this works on the hidden states of a language model, alone or with adapters inside; methods with virtual "
            f"tokens do not fit, nor does this {type(model).__name__}"
        )
    T = input_ids.shape[1]
    hidden = model.backbone(input_ids, attention_mask)  # [B, T, d]
    return hidden[:, T - length - 1 : T - 1]


def response_logprobs(
    model: Module, input_ids: Array, attention_mask: Array, length: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities [B, length] of the last `length` tokens of input_ids [B, T], each given all before it.

    `temperature` is the one that the tokens were drawn with. What stands at padding has no meaning: mask it.
    Raises as `response_hidden`.
    """
    hidden = response_hidden(model, input_ids, attention_mask, length)
    return token_logprobs(model.lm_head(hidden) / temperature, input_ids[:, -length:])


def sequence_logprobs(
    model: Module, input_ids: Array, labels: Array, attention_mask: Array | None = None, first: int | None = None
) -> Tensor:
    """log π(completion | prompt) [B]: the sum over the tokens whose label is not -100.

    input_ids, labels [B, T] are those of `model.loss`: labels equal the ids, or are -100 where a token does not count.
    `first` is `prompt_length(labels)` where that is known; to read it, the host waits for a device. Raises as
    `response_hidden`.
    """
    xp = xp_of(input_ids)
    counts = labels[:, 1:] != IGNORE
    first = prompt_length(labels) if first is None else first
    n = input_ids.shape[1] - 1 - first
    mask = xp.ones(input_ids.shape, xp.int64) if attention_mask is None else attention_mask
    hidden = response_hidden(model, input_ids, mask, n)
    logprobs = token_logprobs(model.lm_head(hidden), input_ids[:, -n:])  # [B, n]
    return F.where(counts[:, first:], logprobs, 0).sum(axis=1)


def prompt_length(labels: Array) -> int:
    """How many tokens of every row stand before what is predicted first, of labels [B, T]: they need no logits."""
    return int((labels[:, 1:] != IGNORE).any(axis=0).argmax().item())


def completion_lengths(labels: Array) -> Array:
    """How many tokens `sequence_logprobs` adds up: labels [B, T] -> float32 [B]."""
    return (labels[:, 1:] != IGNORE).sum(axis=1).astype(np.float32)


class Outputs(NamedTuple):
    """What a policy makes of responses of n tokens: every array is [B, n]."""

    logprobs: Tensor
    entropy: Array | None  # of the distribution at every position; None without gradients, where nothing reads it
    values: Tensor | None = None


def outputs_of(policy: Module, hidden: Tensor, input_ids: Array, temperature: float) -> Outputs:
    """The outputs for the last n tokens of input_ids [B, T], from the `response_hidden` [B, n, d] of the policy."""
    logits = policy.lm_head(hidden) / temperature  # [B, n, V]
    spread = entropy(logits.data) if is_grad_enabled() else None
    return Outputs(token_logprobs(logits, input_ids[:, -hidden.shape[1] :]), spread)


def entropy(logits: Array) -> Array:
    """-Σ p log p of softmax(logits): [..., V] -> [...]."""
    xp = xp_of(logits)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    e = xp.exp(shifted)
    total = e.sum(axis=-1)
    return xp.log(total) - (e * shifted).sum(axis=-1) / total


def frozen_copy(model: Any) -> Any:
    """The model as it is now, for reference: what is trained is copied, what is frozen is shared, nothing learns."""
    twin = model.copy(share=True)
    for p in twin.parameters():
        if p.requires_grad:
            p.data = p.data.copy()
    return twin.requires_grad_(False)
