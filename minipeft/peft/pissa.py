"""PiSSA: LoRA that starts as the principal part of W (Meng et al. 2024, arXiv:2404.02948).

    W / s = U S Vᵀ,    A0 = sqrt(S[:r]) Vᵀ[:r],    B0 = U[:, :r] sqrt(S[:r])        eq. 2 and 3
    W' = (W - s B0 A0) + s B A,    A and B starting as A0 and B0                      eq. 4 and 5

The paper puts the rest, W - s B0 A0, in the place of W. Here W stays as it is and the start is kept beside the trained
pair: W' is W with a LoRA of rank 2r, [B, -B0] [A; A0]. So the base stays shared, the adapter can be switched off, and W
is never copied.
"""

from __future__ import annotations

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import one_blas_thread, to_numpy
from ..nn.module import Module, Parameter
from .config import PeftError, Seed, Shape
from .lora import LoraConfig, LoraLinear
from .weights import dense_weight, fill, out_in


class PissaLinear(LoraLinear):
    """LoRA beside its start: start_A [r, in] and start_B [out, r], constants that are computed from the base layer."""

    frozen = ("start_A", "start_B")

    def __init__(self, shapes: dict[str, Shape], like: Module, seed: Seed, config: LoraConfig, path: str):
        super().__init__(shapes, like, None, config, path)
        self.start_A, self.start_B = (Parameter(p.data, requires_grad=False) for p in (self.lora_A, self.lora_B))
        if seed is not None:
            self.start(like, np.random.default_rng(seed))

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        self.loading(layer)
        self.lora_A.data, self.lora_B.data = self.start_A.data.copy(), self.start_B.data.copy()

    def loading(self, base: Module) -> None:
        """Compute the start: once, and once more from the same base layer when a file is loaded.

        Raises PeftError for a rank that W does not have.
        """
        W, r = to_numpy(out_in(base, dense_weight(base))).astype(self.lora_A.dtype), self.lora_A.shape[0]
        if r > min(W.shape):
            raise PeftError(f"{self.path}: a start from W has a rank of {min(W.shape)} at most there, not {r}")
        with one_blas_thread():  # thousands of small products, for each of which a second thread would only wait
            A, B = self.decompose(W, r, self.scaling)
        fill(self.start_A, A)
        fill(self.start_B, B)

    @staticmethod
    def decompose(W: np.ndarray, r: int, s: float) -> tuple[np.ndarray, np.ndarray]:
        """(A0 [r, in], B0 [out, r]) of W [out, in]."""
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        root = np.sqrt(S[:r] / S.dtype.type(s))
        return root[:, None] * Vt[:r], U[:, :r] * root

    def factors(self) -> tuple[Tensor, Tensor]:
        """([A; A0] [2r, in], [B, -B0] [out, 2r]), whose product is B A - B0 A0."""
        return F.cat([self.lora_A, self.start_A], axis=0), F.cat([self.lora_B, -self.start_B], axis=1)
