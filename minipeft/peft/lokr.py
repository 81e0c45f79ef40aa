"""LoKr: low-rank Kronecker product (Yeh et al. 2023, arXiv:2309.14859).

    W' = W + s C ⊗ D,    D = A B        C [out1, in1], D [out2, in2], out = out1 out2, in = in1 in2        s = alpha / r

C is zero at the start. Where r is at least half of D's larger side, D is trained as it is; decompose_both makes C of two
factors likewise. With an input read as a matrix X [in1, in2], (C ⊗ D) x is C X Dᵀ: the forward pass never forms C ⊗ D.

Departure: GPT-2's [in, out] layers are adapted too; PEFT refuses them.
"""

from __future__ import annotations

import math

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, xp_of
from ..options import configuration, option
from .config import Shape
from .lycoris import LycorisConfig, LycorisLayer


class LokrLayer(LycorisLayer):
    """LoKr around a linear layer: C is lokr_w1, or lokr_w1_a lokr_w1_b; D is lokr_w2, or lokr_w2_a lokr_w2_b."""

    def update(self, x: Tensor) -> Tensor:
        """s ΔW x: x [..., in] -> [..., out]."""
        C, D = self.factors()
        X = x.reshape(*x.shape[:-1], C.shape[1], D.shape[1])  # [..., in1, in2]
        Y = F.linear(F.linear(X, D).swapaxes(-1, -2), C).swapaxes(-1, -2)  # C X Dᵀ, [..., out1, out2]
        return Y.reshape(*x.shape[:-1], C.shape[0] * D.shape[0])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s C, D)."""
        C, D = (
            getattr(self, w) if w in self.keys else getattr(self, f"{w}_a") @ getattr(self, f"{w}_b")
            for w in ("lokr_w1", "lokr_w2")
        )
        return C * self.scaling, D

    def delta_weight(self) -> Array:
        with no_grad():
            C, D = self.factors()
        return xp_of(C.data).kron(C.data, D.data)


@configuration
class LoKrConfig(LycorisConfig):
    """LoKr's options, with PEFT's names and defaults: W' = W + s C ⊗ D."""

    decompose_both: bool = option(False, "C is a product of rank r, too")
    decompose_factor: int = option(-1, "C's size, or what it comes near to; -1: near the square root", least=-1)
    rank_dropout_scale: bool = option(False, "divide the rows that rank_dropout keeps by their share")
    init_weights: bool | str = option(
        True, "the start; True: C zero, lycoris: D zero, False: neither (for tests)", choices=(True, False, "lycoris")
    )

    peft_type, adapter_class = "LOKR", LokrLayer
    usual_learning_rate = 1e-2

    @property
    def rescaled(self) -> bool:
        """Whether the rows that rank_dropout keeps are divided by their share."""
        return self.rank_dropout_scale

    @property
    def zero(self) -> tuple[str, ...]:
        """The factors that start at zero, so that training starts at the base layer."""
        if self.init_weights == "lycoris":
            return ("lokr_w2", "lokr_w2_b")
        return ("lokr_w1", "lokr_w1_a") if self.init_weights else ()

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        r, sides = self.rank(name), zip(self.factorization(n_out), self.factorization(n_in))
        found: dict[str, Shape] = {}
        for w, (rows, columns), decomposed in zip(("lokr_w1", "lokr_w2"), sides, (self.decompose_both, True)):
            if decomposed and r < max(rows, columns) / 2:
                found |= {f"{w}_a": (rows, r), f"{w}_b": (r, columns)}
            else:
                found[w] = (rows, columns)
        return found

    def factorization(self, n: int) -> tuple[int, int]:
        """n as a product (of C's side, of D's): decompose_factor where it divides n, else a divisor near it.

        That is the largest one up to both decompose_factor and sqrt(n).
        """
        factor = self.decompose_factor
        if factor > 0 and n % factor == 0:
            return factor, n // factor
        most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
        m = max((d for d in range(1, most + 1) if n % d == 0), default=1)
        return m, n // m
