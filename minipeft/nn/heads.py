"""Heads other than the language model's: a classifier, a scalar per token, and training nothing but the head.

                                ┌─ lm_head [V, d]             logits over the next token     Transformer
    backbone ─► hidden [B, T, d]┼─ score [num_labels, d]      at the last real token         SequenceClassifier
                                └─ v_head [1, d] + bias       at every token                 ValueModel

The module trees are those of Hugging Face's LlamaForSequenceClassification and GPT2ForSequenceClassification, and of
TRL's value head. Building one is surgery, and surgery is pure: it makes new parameters, which own copies of the arrays
that will be trained and share those of frozen ones, so training it leaves the model it was built from as it was.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ..autograd import checks
from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, asarray, is_array, xp_of
from .layers import Linear
from .module import Module
from .transformer import Backbone, BackboneModel, Transformer, from_host

HEADS = ("lm_head", "score", "classifier", "v_head", "proj_out")  # names of a model's head, ours and those of other families


class _HeadedBackbone(BackboneModel):
    """A copy of a language model's backbone, under its family's name, to which a subclass adds a head."""

    def __init__(self, model: Transformer, share: bool):
        if not isinstance(getattr(model, "backbone", None), Backbone):
            raise TypeError(f"{type(self).__name__} is built on a Transformer, not on a {type(model).__name__}")
        self.config, self.name_or_path = model.config, model.name_or_path
        backbone = model.backbone.copy(share=True)
        for p in backbone.parameters():
            if p.requires_grad and not share:
                p.data = p.data.copy()
        setattr(self, "transformer" if self.config.model_type == "gpt2" else "model", backbone)


class SequenceClassifier(_HeadedBackbone):
    """One row of logits per sequence, read at its last real token: [B, num_labels]. With num_labels=1, a score: [B, 1].

    Args:
        model: the language model whose backbone is copied (arrays of frozen parameters are shared).
        num_labels: number of classes; 1 makes a regression, as for a reward.
        seed: of the head's weights, N(0, initializer_range²), no bias. None leaves the head unallocated and the
            backbone's arrays shared: for a model that is about to be loaded, or only counted.

    The last real token is found by the attention mask, not by looking for the padding id, so padding with the EOS id
    cannot hide a real EOS (Hugging Face looks for the id).

    Raises TypeError for a model that is no Transformer, ValueError for a num_labels that is no positive integer.
    """

    def __init__(self, model: Transformer, num_labels: int = 2, seed: int | None = 0):
        if isinstance(num_labels, bool) or not isinstance(num_labels, (int, np.integer)) or num_labels < 1:
            raise ValueError(f"num_labels must be a positive integer, not {num_labels!r}")
        super().__init__(model, share=seed is None)
        d = self.config.hidden_size
        self.num_labels = int(num_labels)
        self.score = Linear(d, num_labels, bias=False, seed=None)
        if seed is not None:
            std = np.float32(self.config.initializer_range)
            weight = np.random.default_rng(seed).standard_normal((num_labels, d), np.float32) * std
            self.score.weight.data = asarray(weight, xp_of(self.backbone.embedding.weight.data))

    @cached_property  # a damaged configuration may have any number, until the weights are compared with it
    def id2label(self) -> dict[str, str]:
        """The classes' names, as a configuration of Hugging Face has them."""
        return {str(i): f"LABEL_{i}" for i in range(self.num_labels)}

    def forward(self, input_ids: Array | None = None, attention_mask: Array | None = None, **arguments: Any) -> Tensor:
        """Logits [B, num_labels]. The arguments are those of the backbone's `forward`; attention_mask is [B, past + T].

        Raises as `Transformer.forward`, and ValueError where a row has no real token.
        """
        hidden = self.backbone(input_ids, attention_mask, **arguments)  # [B, T, d]
        B, T, _ = hidden.shape
        xp = xp_of(hidden.data)
        last = last_real_token(attention_mask, T) if attention_mask is not None else xp.full(B, T - 1)
        return self.score(hidden[xp.arange(B), from_host(last, xp)])

    def loss(self, input_ids: Array, labels: Array, attention_mask: Array | None = None, **arguments: Any) -> Tensor:
        """Mean cross-entropy (nats) with class ids labels [B]; with num_labels=1, mean squared error to numbers [B].

        Raises as `forward`, ValueError for labels of another shape, and TypeError for what is no array.
        """
        if not is_array(labels):
            raise TypeError(f"labels must be an array, not a {type(labels).__name__}")
        logits = self(input_ids, attention_mask, **arguments)
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must have the shape {logits.shape[:1]}, one per sequence, not {labels.shape}")
        xp, n = xp_of(logits.data), self.num_labels
        if n > 1:
            t = from_host(labels, xp, lambda t: checks.targets("cross_entropy", t, t.shape, n, -100))
            return F.cross_entropy(logits, t)
        return F.mse_loss(logits.reshape(-1), from_host(labels, xp).astype(logits.dtype))


class ValueModel(_HeadedBackbone):
    """One scalar per position, [B, T]: the value function of a PPO actor-critic.

    Args:
        model: the language model whose backbone is copied (arrays of frozen parameters are shared).

    The head starts at zero, weight and bias, so every first value is 0. Raises TypeError for a model that is no
    Transformer.
    """

    def __init__(self, model: Transformer):
        super().__init__(model, share=False)
        xp = xp_of(self.backbone.embedding.weight.data)
        self.v_head = Linear(self.config.hidden_size, 1, seed=None)
        for p in self.v_head.parameters():
            p.data = xp.zeros(p.shape, xp.float32)

    def forward(self, input_ids: Array | None = None, attention_mask: Array | None = None, **arguments: Any) -> Tensor:
        """Values [B, T]. The arguments and errors are those of the backbone's `forward`."""
        values = self.v_head(self.backbone(input_ids, attention_mask, **arguments))  # [B, T, 1]
        return values.reshape(values.shape[:2])


def last_real_token(attention_mask: Array, length: int) -> Array:
    """The index [B], within the last `length` positions, of each row's last one whose mask [B, past + T] is not zero.

    To look for one in every row, the host waits for a mask on a device. Raises ValueError when a row has none, or the
    mask another number of axes.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"the last real token needs an attention_mask [batch, seq], not one of shape {attention_mask.shape}"
        )
    xp = xp_of(attention_mask)
    real = (attention_mask != 0)[:, -length:]
    if not bool(real.any(axis=1).all().item()):
        raise ValueError("attention_mask marks no token as real in some row, so there is no last real token to read")
    return length - 1 - xp.argmax(real[:, ::-1], axis=1)


def head_only(model: Module) -> Any:
    """A new model in which only the head learns: the classic way to adapt a frozen network.

    Every other parameter is frozen and shares its array with `model`, which stays as it was. The head (`lm_head`,
    `score` or `v_head`) owns a copy; an `lm_head` that was tied to the embedding is untied, in the configuration too.
    Raises TypeError for a model without such a head.
    """
    name = next((n for n in ("lm_head", "score", "v_head") if n in model.__dict__), None)
    if name is None:
        raise TypeError(
            f"head_only knows the heads lm_head, score and v_head; this {type(model).__name__} has none of them"
        )
    twin = model.copy(share=True).requires_grad_(False)
    setattr(twin, name, getattr(twin, name).copy().requires_grad_(True))  # its new Parameters are tied to nothing outside
    if name == "lm_head" and twin.config.tie_word_embeddings:
        twin.config = twin.backbone.config = twin.config.replace(tie_word_embeddings=False)
    return twin
