"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098).

    W' = W + s (A1 B1) * (A2 B2)      A1, A2 [out, r], B1, B2 [r, in]; B2 zero at the start      prop. 1, s = alpha / r

The elementwise product * of two matrices of rank r has a rank of up to r^2, from twice the parameters of a LoRA of
rank r. Both products are formed, [out, in], and kept for backward.

Departure: GPT-2's [in, out] layers are adapted too; PEFT refuses them.
"""

from __future__ import annotations

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array
from ..options import configuration, option
from .config import Shape
from .lycoris import LycorisConfig, LycorisLayer
from .ranks import check_rank


class LohaLayer(LycorisLayer):
    """LoHa around a linear layer: hada_w1_a, hada_w2_a [out, r] and hada_w1_b, hada_w2_b [r, in]."""

    def update(self, x: Tensor) -> Tensor:
        """s ΔW x: x [..., in] -> [..., out]."""
        return F.linear(x, self.product())

    def product(self) -> Tensor:
        """s (A1 B1) * (A2 B2), [out, in]."""
        return (self.hada_w1_a * self.scaling @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    def delta_weight(self) -> Array:
        with no_grad():
            return self.product().data


@configuration
class LoHaConfig(LycorisConfig):
    """LoHa's options, with PEFT's names and defaults: W' = W + s (A1 B1) * (A2 B2)."""

    init_weights: bool = option(True, "the start: all random but B2; False: B2 too (for tests)")

    peft_type, adapter_class = "LOHA", LohaLayer
    usual_learning_rate = 3e-2
    rescaled = True

    @property
    def zero(self) -> tuple[str, ...]:
        """The factors that start at zero, so that training starts at the base layer."""
        return ("hada_w2_b",) if self.init_weights else ()

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        r = self.rank(name)
        check_rank(self, name, r, n_out, n_in)
        return {"hada_w1_a": (n_out, r), "hada_w1_b": (r, n_in), "hada_w2_a": (n_out, r), "hada_w2_b": (r, n_in)}
