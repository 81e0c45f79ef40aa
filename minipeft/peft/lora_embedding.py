"""LoRA around an embedding: row i of W [V, d] becomes W_i + s B A_i, A_i being the i-th column of A [r, V].

    W'ᵀ = Wᵀ + s B A        A is zero and B [d, r] random, as in loralib: A is what is looked up

As in PEFT, lora_dropout does not act here.
"""

from __future__ import annotations

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng
from ..nn.module import Module
from .config import Shape
from .layer import Inner
from .lora import LoraConfig, LoraLinear
from .weights import fill


class LoraEmbedding(LoraLinear):
    """lora_embedding_A [r, V] and lora_embedding_B [d, r]."""

    def forward(self, ids: Array, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """ids [...] -> [..., d]."""
        return inner(ids) + self.update(ids)

    def update(self, ids: Array) -> Tensor:
        """s B A_i of each id i: [..., d]."""
        return F.linear(F.embedding(ids, self.lora_embedding_A.transpose()) * self.scaling, self.lora_embedding_B)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """Draw B; A stays zero."""
        A, B = self.factors()
        fill(B, generator.standard_normal(B.shape, np.float32))
        if self.config.init_lora_weights is False:
            fill(A, generator.standard_normal(A.shape, np.float32))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, V], B [d, r])."""
        return self.lora_embedding_A, self.lora_embedding_B

    @staticmethod
    def factor_shapes(config: LoraConfig, name: str, r: int, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"lora_embedding_A": (r, n_in), "lora_embedding_B": (n_out, r)}
