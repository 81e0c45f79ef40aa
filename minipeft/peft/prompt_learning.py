"""What the methods that learn virtual tokens share: prompt tuning, prefix tuning and P-tuning.

What stands at the P virtual positions in front of the input is all that is trained. In a file it is one matrix,
`prompt_embeddings`, with a row per virtual token: what the trained part computes, not how (as in PEFT). So an adapter
that was read from a file is that matrix: it is `folded`, and the network that computed it is gone.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import Any

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..nn.module import Module, Parameter
from ..nn.transformer import Transformer
from ..options import configuration, option
from .config import PeftConfig, PeftError, Seed, Shape
from .layer import Adapter
from .virtual_positions import make_room
from .weights import fill

STORED = "prompt_embeddings"  # the key in a file
TOKEN_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared")
DIMENSIONS = {  # option -> its name in a model's configuration
    "token_dim": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"
}  # fmt: skip
MODULE_OPTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class Prompt(Adapter):
    """What a method trains in front of a model's input: virtual tokens, or keys and values of virtual positions.

    The vectors themselves, prompt_embeddings; or, where a subclass defines `vectors`, a network that computes them.
    """

    in_input = True  # whether the virtual positions are part of the input, or of the past

    @property
    def length(self) -> int:
        """Virtual positions, P."""
        return self.config.num_virtual_tokens

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """As PyTorch draws them: embeddings standard normal, the W and b of a linear layer uniform in ±1/sqrt(in)."""
        for key in self.keys:
            p = getattr(self, key)
            if key in (STORED, "e"):
                values = generator.standard_normal(p.shape, np.float32)
            else:
                bound = getattr(self, f"W{key[1:]}").shape[1] ** -0.5
                values = generator.uniform(-bound, bound, p.shape)
            fill(p, values)

    def arguments(self, model: Transformer, **given: Any) -> dict[str, Any]:
        """The arguments for `model` with the virtual positions in front, from a caller's (Transformer.forward's).

        When `given["past_key_values"]` is a KVCache that holds positions already, the virtual ones are among them.
        Raises PeftError as `make_room`.
        """
        K, P = (0, self.length) if self.in_input else (self.length, 0)
        given, first = make_room(K, P, given, model.config.max_position_embeddings)
        return self.put(model, given, self.vectors()) if first else given

    def vectors(self) -> Tensor:
        """What stands at the virtual positions, [P, numbers of a virtual token]."""
        return self.prompt_embeddings

    def saved(self) -> dict[str, Parameter]:
        """What `vectors` computes, as prompt_embeddings."""
        with no_grad():
            vectors = self.vectors()
        return {STORED: vectors if isinstance(vectors, Parameter) else Parameter(vectors.data)}

    def put(self, model: Transformer, given: dict[str, Any], vectors: Tensor) -> dict[str, Any]:
        """Arguments that have room for the virtual positions, with vectors [P, n], or of each row [B, P, n], there."""
        raise NotImplementedError(f"{type(self).__name__} defines no put")


@configuration
class PromptLearningConfig(PeftConfig):
    """The options these methods share, with PEFT's names; all but the first come from the model where they are None."""

    num_virtual_tokens: int = option(None, "virtual tokens, P; must be given", least=1)
    token_dim: int | None = option(None, "numbers per virtual token (prefix: per key, of all heads)", least=1)
    num_layers: int | None = option(None, "layers of the model", least=1)
    num_attention_heads: int | None = option(None, "heads (prefix tuning: that have keys of their own)", least=1)
    num_transformer_submodules: int | None = option(None, "1: a decoder", choices=(None, 1))

    kinds = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in MODULE_OPTIONS:
            if getattr(self, name) is not None:
                raise PeftError(f"{type(self).__name__} puts nothing on modules: it has no {name}")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise PeftError(f"{type(self).__name__} is for task_type='CAUSAL_LM', not {self.task_type!r}")

    def dimensions(self, config: Any) -> dict[str, int | None]:
        """{option: value} from a model's configuration; None where it does not say."""
        return {option: getattr(config, name, None) for option, name in DIMENSIONS.items()}

    def with_targets(self, model: Module) -> Any:
        """This configuration with the model's dimensions filled in."""
        derived = self.dimensions(getattr(model, "config", None))
        derived |= {"num_transformer_submodules": 1, "task_type": "CAUSAL_LM"}  # without which PEFT does not use it
        return self.replace(**{name: value for name, value in derived.items() if getattr(self, name) is None})

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        """What is trained, named at the token embedding [V, d]: it is where the virtual tokens join the input."""
        at_tokens = kind == "embedding" and name.rpartition(".")[2] in TOKEN_EMBEDDINGS
        return self.prompt_shapes(shape[1]) if at_tokens else {}

    @abstractmethod
    def prompt_shapes(self, width: int) -> dict[str, Shape]:
        """{name: shape} of what is trained, for a model of this width."""

    def prompt(self, model: Module, seed: Seed) -> Prompt:
        """The trained part. Raises PeftError as `check`."""
        self.check(model)
        embedding = model.backbone.embedding
        return self.adapter("", embedding, self.prompt_shapes(embedding.weight.shape[1]), seed)

    def check(self, model: Module) -> None:
        """Raises PeftError for what is no language model, too short a context, other dimensions."""
        if not isinstance(model, Transformer):
            raise PeftError(f"{type(self).__name__} needs a Transformer; this is a {type(model).__name__}")
        limit = model.config.max_position_embeddings
        if self.num_virtual_tokens >= limit:
            taken = f"num_virtual_tokens={self.num_virtual_tokens}"
            raise PeftError(f"{taken} leaves no position for the input: this model has {limit}")
        for name, value in self.dimensions(model.config).items():
            if getattr(self, name) not in (None, value):
                raise PeftError(f"{name}={getattr(self, name)}, but {type(self).__name__} needs {value} for this model")


def network_shapes(P: int, *widths: int) -> dict[str, Shape]:
    """{name: shape} of e [P, d] and of the linear layers that it goes through, W1, b1, ..., of these widths, d first."""
    shapes: dict[str, Shape] = {"e": (P, widths[0])}
    for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
        shapes |= {f"W{i}": (n_out, n_in), f"b{i}": (n_out,)}
    return shapes
