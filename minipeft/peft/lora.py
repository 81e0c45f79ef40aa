"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    W' = W + s B A        A [r, in] random, B [out, r] zero        eq. 3, with s = lora_alpha / r of section 4.1

Only A and B are trained. The paper draws A from a Gaussian; here, as in PEFT, A is uniform in ±1/sqrt(in) by default.
The forward pass never forms B A: y = W x + (s B) (A x), with r numbers per position in between. Backward needs x for
A's gradient and those r numbers for B's; W has no gradient. Without dropout q, k and v share x.

rsLoRA takes s = lora_alpha / sqrt(r), so that the update does not shrink when r grows (Kalajdzievski 2023,
arXiv:2312.03732). `variants` lists the extensions: DoRA, PiSSA, OLoRA, fused projections, embeddings.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng
from ..nn.module import Module
from ..options import configuration, option
from .config import Seed, Shape
from .layer import Adapter, Inner
from .ranks import Ranked, check_rank, pattern_value
from .targets import kind_of
from .trainable_tokens import WithTokenRows
from .variants import check_variant, variant_class
from .weights import fill, kaiming_uniform, with_update


class LoraLinear(Adapter):
    """LoRA around a linear layer (Linear, GPT-2's Conv1D, or a quantized one): lora_A [r, in] and lora_B [out, r]."""

    @property
    def scaling(self) -> float:
        """s."""
        return self.config.scaling(self.path)

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """y = inner(x) + s B A z, [..., in] -> [..., out]; z is dropout(x) in training, else x (rng is None then).

        inner: the layer below this adapter, usually the frozen W x + b; base: W's own layer, used by DoRA.
        """
        z = F.dropout(x, self.config.lora_dropout, rng) if self.config.lora_dropout else x
        return self.update(z, inner(x))

    def update(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """y + s B A z: z [..., in] -> [..., out], by way of [..., r]."""
        A, B = self.factors()
        return F.linear(F.linear(z, A), B, y, alpha=self.scaling)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """Draw A; B stays zero, so training starts at the base layer (section 4.1). init False draws B, too."""
        A, B, init = self.lora_A, self.lora_B, self.config.init_lora_weights
        if init == "gaussian":
            fill(A, generator.standard_normal(A.shape, np.float32) / np.float32(B.shape[1]))  # / r
        else:
            fill(A, kaiming_uniform(generator, A.shape))  # ±1/sqrt(in)
        if init is False:
            fill(B, kaiming_uniform(generator, B.shape))

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + s B A, in a new layer; a four-bit W is dequantized."""
        return with_update(layer, self.delta_weight())

    def delta_weight(self) -> Array:
        """s B A, [out, in]."""
        A, B = self.factors()
        return (B.data @ A.data) * B.dtype.type(self.scaling)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]); a variant may return larger ones with the same meaning."""
        return self.lora_A, self.lora_B

    @staticmethod
    def factor_shapes(config: LoraConfig, name: str, r: int, n_out: int, n_in: int) -> dict[str, Shape]:
        """What is trained: {key in a file: shape}."""
        return {"lora_A.weight": (r, n_in), "lora_B.weight": (n_out, r)}


@configuration
class LoraConfig(WithTokenRows, Ranked):
    """LoRA's options, with PEFT's names and defaults."""

    r: int = option(8, "rank", least=1)
    lora_alpha: float = option(8, "numerator of the scaling")
    lora_dropout: float = option(0.0, "probability of dropping an element of the adapter's input", least=0, below=1)
    use_rslora: bool = option(False, "divide lora_alpha by sqrt(r) in place of r")
    use_dora: bool = option(False, "train each row's length apart from its direction (DoRA)")
    init_lora_weights: bool | str = option(
        True, "the start; True: A uniform, gaussian: of deviation 1/r; False: B random, too (for tests)",
        choices=(True, False, "gaussian", "pissa", "olora"),
    )  # fmt: skip
    enable_lora: list[bool] | None = option(None, "which projections of a fused layer are adapted")
    fan_in_fan_out: bool | None = option(None, "whether weights are stored [in, out]; None: each layer knows its own")

    peft_type = "LORA"
    kinds = ("linear", "conv1d", "embedding")
    stores_constants = False  # recomputed from W on loading, not written

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variant(self)

    @property
    def usual_learning_rate(self) -> float:
        """PiSSA's is lower: both of its factors start away from zero, so a step moves their product more."""
        return 1e-3 if self.init_lora_weights == "pissa" else 3e-3

    def scaling(self, name: str) -> float:
        """s of the module at a path."""
        r, alpha = self.rank(name), pattern_value(self.alpha_pattern, name, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        check_rank(self, name, self.rank(name), n_out, n_in)
        return variant_class(self, name, kind).factor_shapes(self, name, self.rank(name), n_out, n_in)

    def adapter(self, name: str, layer: Module, shapes: dict[str, Shape], seed: Seed) -> LoraLinear:
        return variant_class(self, name, kind_of(layer))(shapes, layer, seed, self, name)

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """The start that PiSSA and OLoRA keep beside W: A0 and B0, of the shapes of A and B."""
        found: dict[str, Shape] = {}
        for name, (kind, shape) in layers.items():
            starts, factors = variant_class(self, name, kind).frozen, self.parameter_shapes(name, kind, shape).values()
            found |= {f"{name}.{start}": factor for start, factor in zip(starts, factors)}
        return found
