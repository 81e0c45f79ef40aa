"""Prefix tuning: trained keys and values in front of every layer's own (Li & Liang 2021, arXiv:2101.00190).

    attention(q, [Pk; k], [Pv; v])       Pk, Pv [H, P, D] of each of L layers      eq. 3, written as what attention sees

for P virtual tokens and H key heads of D numbers; only Pk and Pv are trained. `put` gives them to the model as
past_key_values while its cache is empty: in every pass of training, and in the first of generation. Each layer
(nn/transformer.py) joins [Pk; k] and [Pv; v], after RoPE; every query sees all P, and the input's positions start at P.
A virtual position has no query and no logits. A prefix of zeros is not the base model: a zero key has score 0, and
softmax gives score 0 some weight. A prefix cannot be merged into the weights.

The paper found direct training unstable. Its network computes row i, of all layers, from a smaller row eᵢ (section 4.3;
prefix_projection, off by default and with tanh, as in PEFT):

    [Pk₁ Pv₁ Pk₂ Pv₂ ...]ᵢ = W₂ tanh(W₁ eᵢ + b₁) + b₂        e [P, d], W₁ [h, d], W₂ [2 L d, h], d = H D

A file holds only the left side, prompt_embeddings [P, 2 L d], not the network. `key_values` gives the prefix as plain
arrays; with them the base model runs without this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array
from ..nn.module import Module
from ..nn.transformer import KVCache, Transformer
from ..options import configuration, option
from .config import PeftError, Shape
from .prompt_learning import STORED, Prompt, PromptLearningConfig, network_shapes


class Prefix(Prompt):
    """The prefix of all L layers. Trained: prompt_embeddings [P, 2 L H D], which `vectors` returns."""

    in_input = False  # the virtual positions are past, not input: they have no queries and no logits

    def layers(self, batch: int, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(Pk, Pv) of each layer, both [B, H, P, D], from vectors [P, 2 L H D], or of each row [B, P, 2 L H D].

        A virtual token's vector holds layer after layer, keys before values.
        """
        n, H, P = 2 * self.config.num_layers, self.config.num_attention_heads, vectors.shape[-2]
        x = vectors.reshape(-1, P, n, H, vectors.shape[-1] // (n * H))
        x = x.transpose(2, 0, 3, 1, 4)  # [2L, B or 1, H, P, D]; H counts the heads of keys
        parts = [F.broadcast_to(x[i], (batch, *x.shape[2:])) for i in range(n)]
        return list(zip(parts[::2], parts[1::2]))

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        if self.config.init_weights != "zero":
            super().start(layer, generator)

    def put(self, model: Transformer, given: dict[str, Any], vectors: Tensor) -> dict[str, Any]:
        """The prefix as past_key_values, with gradients; or, to generate, appended to the empty KVCache."""
        past, inputs = given["past_key_values"], given["input_ids"]
        prefix = self.layers((given["inputs_embeds"] if inputs is None else inputs).shape[0], vectors)
        if not isinstance(past, KVCache):
            return {**given, "past_key_values": prefix}
        for layer, (k, v) in enumerate(prefix):
            past.append(layer, k.data, v.data)
        return given

    def key_values(self, batch: int = 1) -> list[tuple[Array, Array]]:
        """The prefix as a plain cache: (keys, values) of each layer, arrays [B, H, P, D].

        `base.generate(ids, past_key_values=prefix.key_values(len(ids)))` continues as the adapted model does.
        """
        with no_grad():
            return [(k.data, v.data) for k, v in self.layers(batch, self.vectors())]


class PrefixEncoder(Prefix):
    """Trained in the prefix's place: e [P, d], W1 [h, d], b1 [h], W2 [2 L d, h], b2 [2 L d]. Saved: what they give."""

    def vectors(self) -> Tensor:
        return F.linear(F.tanh(F.linear(self.e, self.W1, self.b1)), self.W2, self.b2)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        Prompt.start(self, layer, generator)
        if self.config.init_weights == "zero":
            self.W2.data[...] = self.b2.data[...] = 0


@configuration
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's options, with PEFT's names (and `folded`)."""

    prefix_projection: bool = option(False, "compute the prefix from a smaller matrix by an MLP while it is trained")
    encoder_hidden_size: int | None = option(None, "width of the MLP; None: token_dim", least=1)
    init_weights: str | None = option(None, "None (random), or zero: the prefix starts at zero", choices=(None, "zero"))
    folded: bool = option(False, "train the prefix itself, not the network; true for an adapter read from a file")

    peft_type = "PREFIX_TUNING"
    usual_learning_rate = 1e-2

    def dimensions(self, config: Any) -> dict[str, int | None]:
        found = super().dimensions(config)
        if heads := getattr(config, "num_key_value_heads", None):  # grouped-query attention: heads that have keys
            found |= {"num_attention_heads": heads, "token_dim": heads * config.head_dim}
        return found

    @property
    def adapter_class(self) -> type[Prefix]:
        """Whether an MLP computes the prefix, or it is trained itself."""
        return PrefixEncoder if self.prefix_projection and not self.folded else Prefix

    def prompt_shapes(self, width: int) -> dict[str, Shape]:
        if self.num_layers is None or self.token_dim is None:
            raise PeftError("PrefixTuningConfig needs num_layers and token_dim for a model of this family")
        P, d, n = self.num_virtual_tokens, self.token_dim, 2 * self.num_layers * self.token_dim
        if self.adapter_class is Prefix:
            return {STORED: (P, n)}
        return network_shapes(P, d, self.encoder_hidden_size or d, n)
