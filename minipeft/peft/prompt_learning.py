"""What the methods that learn virtual tokens share: prompt tuning, prefix tuning and P-tuning.

    positions    0 ... P-1      P ... P+T-1
                 virtual   │    the input             P + T may be at most the model's context
                 1 1 ... 1 │    attention_mask        left padding stands after the virtual tokens, and uses no position

What stands at the virtual positions is all that is trained. In a file it is one matrix, `prompt_embeddings`, with a row
per virtual token: what the trained part computes, not how (as in PEFT). So an adapter read from a file is that matrix.

Departure from PEFT: positions count the unmasked tokens, in `forward` and `generate` alike, so that padding a row on
the left changes nothing. PEFT's forward counts padding too, and ignores position_ids (except in prefix tuning).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from ..backend import Array, xp_of
from ..nn.layers import Embedding, Linear
from ..nn.module import Module
from ..nn.transformer import Transformer, past_length
from ..options import configuration, option
from .config import PeftConfig, PeftError, Seed, Shape
from .layer import Prompt, fill, placement, zeros

TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared")
MODULE_OPTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@configuration
class PromptLearningConfig(PeftConfig):
    """The options these methods share, with PEFT's names; all but the first come from the model where they are None."""

    num_virtual_tokens: int = option(None, "virtual tokens, P; must be given", least=1)
    token_dim: int | None = option(None, "numbers per virtual token (prefix tuning: per key, all heads together)", least=1)
    num_layers: int | None = option(None, "layers of the model", least=1)
    num_attention_heads: int | None = option(
        None, "heads of the model (prefix tuning: those that have keys of their own)", least=1
    )
    num_transformer_submodules: int | None = option(None, "1: a decoder", choices=(None, 1))

    stored_key: ClassVar[str] = "prompt_embeddings"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in MODULE_OPTIONS:
            if getattr(self, name) is not None:
                raise PeftError(f"{type(self).__name__} puts nothing on modules: it has no {name}")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise PeftError(f"{type(self).__name__} is for task_type='CAUSAL_LM', not {self.task_type!r}")

    def with_targets(self, model: Module) -> Any:
        """This configuration with the model's dimensions filled in."""
        c = getattr(model, "config", None)
        derived = {
            "token_dim": getattr(c, "hidden_size", None),
            "num_layers": getattr(c, "num_hidden_layers", None),
            "num_attention_heads": getattr(c, "num_attention_heads", None),
            "num_transformer_submodules": 1,
            "task_type": "CAUSAL_LM",  # without it PEFT loads the adapter but does not use it
        }
        return self.replace(**{name: value for name, value in derived.items() if getattr(self, name) is None})

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        """What is trained, named at the token embedding [V, d]: it is where the virtual tokens join the input."""
        at_tokens = kind == "embedding" and name.rpartition(".")[2] in TOKEN_EMBEDDINGS
        return self.shapes(shape[1]) if at_tokens else {}

    @abstractmethod
    def shapes(self, width: int) -> dict[str, Shape]:
        """{name: shape} of what is trained, for a model of this width."""

    @abstractmethod
    def build(self, model: Transformer, seed: Seed) -> Prompt:
        """The trained part for a model that it fits."""

    def prompt(self, model: Module, seed: Seed) -> Prompt:
        """The trained part. Raises PeftError for what is no language model, and for too short a context."""
        self.check(model)
        return self.build(model, seed)

    def check(self, model: Module) -> None:
        if not isinstance(model, Transformer):
            raise PeftError(f"{type(self).__name__} needs a Transformer; this is a {type(model).__name__}")
        limit = model.config.max_position_embeddings
        if self.num_virtual_tokens >= limit:
            raise PeftError(
                f"num_virtual_tokens={self.num_virtual_tokens} leaves no position for the input: this model has {limit}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in MODULE_OPTIONS}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        """Of a file, which holds `prompt_embeddings` and nothing of how they were computed (inference_mode)."""
        return super().from_dict({**options, "inference_mode": True})


def make_room(n: int, given: dict[str, Any], limit: int, in_input: bool) -> tuple[dict[str, Any], bool]:
    """The arguments of `Transformer.forward` with `n` virtual positions in front.

    Args:
        n: the number of virtual tokens.
        given: the caller's arguments, which know of no virtual positions; but past_key_values that hold positions
            already hold the virtual ones first.
        limit: positions that the model has.
        in_input: whether the virtual tokens are part of the input (prompt tuning) or of the past (prefix tuning).

    Returns (arguments, whether the virtual tokens are still to be put there).
    Raises PeftError for a mask of another shape and an input that is too long.
    """
    inputs = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
    mask, positions = given["attention_mask"], given["position_ids"]
    B, T = inputs.shape[:2]
    seen = past_length(given["past_key_values"])
    absent = seen == 0
    if not absent:
        seen -= n
        if seen < 0:
            raise PeftError(f"past_key_values hold {seen + n} positions; the {n} virtual tokens cannot be among them")
    S = seen + T
    if mask is not None and mask.shape not in ((B, S), (B, 1, T, S)):
        raise PeftError(
            f"attention_mask must have the shape {(B, S)} or {(B, 1, T, S)}, not {mask.shape}: the {n} virtual tokens "
            "are added to it here"
        )
    longest = S if mask is None or mask.ndim == 4 else int((mask != 0).sum(axis=1).max().item())
    if positions is None and n + longest > limit:
        raise PeftError(
            f"{n} virtual tokens leave {limit - n} of this model's {limit} positions, but the input reaches {longest}: "
            f"shorten it to at most {limit - n} tokens"
        )
    if mask is not None:
        mask = _see_virtual(mask, n, in_input and absent)
    if positions is not None:
        positions = positions + n
        if in_input and absent:
            xp = xp_of(positions)
            first = xp.broadcast_to(xp.arange(n, dtype=positions.dtype), (positions.shape[0], n))
            positions = xp.concatenate([first, positions], axis=1)
    return {**given, "attention_mask": mask, "position_ids": positions}, absent


def _see_virtual(mask: Array, n: int, as_queries: bool) -> Array:
    """The mask with n more keys in front that everybody sees; and with n more queries, which see only those."""
    xp = xp_of(mask)
    mask = xp.concatenate([xp.ones((*mask.shape[:-1], n), mask.dtype), mask], axis=-1)
    if mask.ndim == 2 or not as_queries:
        return mask
    rows = xp.zeros((mask.shape[0], 1, n, mask.shape[3]), mask.dtype)
    rows[..., :n] = 1
    return xp.concatenate([rows, mask], axis=2)


def initialize(module: Module, like: Module, seed: Seed) -> None:
    """Allocate a module's parameters beside `like`, and draw them as PyTorch does (seed None: as in `Adapter`)."""
    for p in module.parameters():
        p.data = zeros(p.shape, *placement(like), seed)
    if seed is None:
        return
    generator = np.random.default_rng(seed)
    for _, layer in module.named_modules():
        if isinstance(layer, Embedding):
            fill(layer.weight, generator.standard_normal(layer.weight.shape, np.float32))
        elif isinstance(layer, Linear):
            bound = layer.in_features**-0.5
            for p in (layer.weight, layer.bias):
                fill(p, generator.uniform(-bound, bound, p.shape).astype(np.float32))
