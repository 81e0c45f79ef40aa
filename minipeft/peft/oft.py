"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280).

    W' = W Rᵀ,  y = W Rᵀ x + b        R = diag(R_1, ..., R_k), orthogonal blocks [b, b], k b = in
    R_i = (I + Q_i) (I - Q_i)^-1,  Q_i = -Q_iᵀ                    Cayley transform of a skew-symmetric matrix

The b (b - 1) / 2 numbers above Q's diagonal are trained, from zero on: R starts as I. A rotation keeps the lengths of
W's rows and the angles between them. The input is rotated, W never formed anew.

With use_cayley_neumann, PEFT's default, the inverse is a truncated series, I + Q + Q² + Q³: then, with 5 terms,
R_i = I + 2 Q + 2 Q² + 2 Q³ + Q⁴, orthogonal but for terms of Q⁴ (Qiu et al. 2025, arXiv:2506.19847).

Constrained OFT (coft) keeps R near I: Q is scaled to the length ||Q_i|| <= eps / sqrt(k) (section 3.4) in the parameter
itself, in every forward pass and merge, as in PEFT.

Departures, 1 from the equation above, 2 and 3 from PEFT:
1. Without use_cayley_neumann R is PEFT's, (I - Q) (I + Q)^-1: the transform of -Q, the other way round than the series.
2. module_dropout acts in training: each block is I with that probability. PEFT 0.21's linear layers never apply it.
3. GPT-2's [in, out] layers are adapted too, which PEFT refuses; convolutions and embeddings are not.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, Rng, xp_of
from ..nn.module import Module
from ..options import configuration, option
from .config import PeftConfig, PeftError, Seed, Shape
from .layer import Adapter, Inner, kept
from .weights import dense_weight, fill, out_in, with_weight

SINCE = "0.18.0"  # the version of PEFT whose series this is; files of earlier ones mean another
_projecting = threading.Lock()


class OFTLayer(Adapter):
    """OFT around a linear layer: oft_R [k, b (b - 1) / 2], one row where the blocks share it."""

    def __init__(self, shapes: dict[str, Shape], like: Module, seed: Seed, config: OFTConfig, path: str):
        super().__init__(shapes, like, seed, config, path)
        self.blocks = config.blocks(like.in_features)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        if not self.config.init_weights:
            fill(self.oft_R, 0.1 * generator.standard_normal(self.oft_R.shape))

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """y = inner(Rᵀ x): x [..., in] -> [..., out]."""
        R, (k, b), p = self.rotations(), self.blocks, self.config.module_dropout
        if rng is not None and p:
            I = xp_of(x.data).eye(b, dtype=x.dtype)
            R = (R - I) * kept(k, p, rng, x).reshape(k, 1, 1) + I
        return inner(F.cat([x[..., i * b : (i + 1) * b] @ R[i % len(R)] for i in range(k)], axis=-1))

    def rotations(self) -> Tensor:
        """R_1, ..., R_k: [k, b, b], or [1, b, b] where the blocks share one."""
        v, c = self.oft_R, self.config
        xp, b = xp_of(v.data), self.blocks[1]
        if c.coft:  # so that a step starts from there
            self.project(v.data, c.eps / math.sqrt(len(v)))
        place, sign = _skew(b, xp)
        Q, I = v[:, place] * sign, xp.eye(b, dtype=v.dtype)
        if not c.use_cayley_neumann:
            return F.inv(Q + I) * 2 - I  # (I - Q) (I + Q)^-1
        P = Q + 2 * I
        for _ in range(c.num_cayley_neumann_terms - 3):
            P = Q @ P + 2 * I
        return Q @ P + I

    @staticmethod
    def project(v: Array, most: float) -> None:
        """Scale the rows of v [k, n], in place, whose Q is longer than `most`: ||Q||² = 2 Σ v².

        Rows of a batch may be computed on several threads, of which only the first finds something to scale: what is
        longer by rounding alone stays as it is.
        """
        xp = xp_of(v)
        with _projecting:
            length = xp.sqrt(2 * (v**2).sum(axis=1, keepdims=True))
            v *= xp.where(length > most * (1 + 1e-5), most / xp.maximum(length, most), 1)

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W Rᵀ, in a new layer; a four-bit W is dequantized."""
        with no_grad():
            R, (k, b) = self.rotations().data, self.blocks
        W = out_in(layer, dense_weight(layer))
        rotated = W.reshape(-1, k, b).swapaxes(0, 1) @ R.swapaxes(-1, -2)
        return with_weight(layer, out_in(layer, rotated.swapaxes(0, 1).reshape(W.shape)))


@configuration
class OFTConfig(PeftConfig):
    """OFT's options, with PEFT's names and defaults: W' = W Rᵀ.

    A block's size, or a number of blocks, that does not divide a layer's inputs becomes the nearest one that does.
    """

    r: int = option(0, "number of blocks of a layer; 0: as oft_block_size says", least=0)
    oft_block_size: int = option(32, "size b of a block; 0: as r says", least=0)
    module_dropout: float = option(0.0, "probability of leaving a block of the input as it is", least=0, below=1)
    fan_in_fan_out: bool | None = option(None, "whether weights are stored [in, out]; None: each layer knows its own")
    init_weights: bool = option(True, "the start: R = I; False: random (for tests)")
    coft: bool = option(False, "keep the rotations near I")
    eps: float = option(6e-5, "with coft, the length that a layer's Q has at most", above=0)
    block_share: bool = option(False, "the blocks of a layer share one rotation")
    use_cayley_neumann: bool = option(True, "a truncated series in place of the inverse")
    num_cayley_neumann_terms: int = option(5, "terms of the series", least=4, most=100)

    peft_type, adapter_class = "OFT", OFTLayer
    usual_learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            given = f"r={self.r}, oft_block_size={self.oft_block_size}"
            raise PeftError(f"inputs are r blocks of oft_block_size: give one of them, and 0 for the other; got {given}")

    def blocks(self, n_in: int) -> tuple[int, int]:
        """(k, b): how many blocks a layer of n_in inputs has, and their size."""
        divisor = _near_divisor(n_in, self.r or self.oft_block_size)
        return (divisor, n_in // divisor) if self.r else (n_in // divisor, divisor)

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        k, b = self.blocks(n_in)
        if b == 1:
            raise PeftError(f"{name}: of {n_in} inputs OFT makes {k} blocks of size 1, which do not rotate")
        return {"oft_R.weight": (1 if self.block_share else k, b * (b - 1) // 2)}

    def training_callback(self, model: Any, adapter_name: str) -> Any:
        return Projection(model, adapter_name) if self.coft else None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_version": SINCE}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        """Raises PeftError, too, for a file of an earlier version of PEFT, whose rotations are others."""
        version = str(options.get("peft_version") or "0").split(".")
        if [int("0" + "".join(filter(str.isdecimal, part))[:9]) for part in version[:2]] < [0, 18]:
            raise PeftError(f"the adapter is of a PEFT before {SINCE}, whose OFT is another; train it again")
        return super().from_dict(options)


class Projection:
    """With coft, projects before a step, which starts from the Q whose gradient it has, wherever that was computed."""

    def __init__(self, model: Any, adapter_name: str):
        self.model, self.adapter_name = model, adapter_name

    def before_step(self, model: Any, step: int) -> None:
        with no_grad():
            for _, part in self.model.parts(self.adapter_name):
                if isinstance(part, OFTLayer):
                    part.rotations()

    def after_step(self, model: Any, step: int, record: Any = None) -> None: ...

    def state_dict(self) -> dict[str, Array]:
        return {}

    def load_state_dict(self, arrays: dict[str, Array]) -> None: ...


@lru_cache
def _skew(b: int, xp: Any) -> tuple[Array, Array]:
    """Which of the b (b - 1) / 2 numbers, row by row, stands at each place of Q, and its sign, both [b, b]."""
    i, j = xp.arange(b)[:, None], xp.arange(b)
    low, high = xp.minimum(i, j), xp.maximum(i, j)
    return low * b - low * (low + 1) // 2 + high - low - 1, xp.sign(j - i).astype(xp.int8)


def _near_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`, the smaller of two; n where that is larger."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
