"""What LoHa and LoKr share: an update of full size, made of small factors (LyCORIS: Yeh et al. 2023, arXiv:2309.14859).

    W' = W + s ΔW,    s = alpha / r

In training, rank_dropout drops rows of ΔW, and module_dropout all of ΔW. What is kept is scaled as each method says.
"""

from __future__ import annotations

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng
from ..nn.module import Module
from ..options import configuration, option
from .layer import Adapter, Inner, kept
from .ranks import Ranked, pattern_value
from .weights import fill, kaiming_uniform, with_update


class LycorisLayer(Adapter):
    """An update around a linear layer. A subclass defines update(x), s ΔW x, and delta_weight(), s ΔW [out, in]."""

    @property
    def scaling(self) -> float:
        """s."""
        return self.config.scaling(self.path)

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """Draw every factor, Kaiming-uniform, but for those that start at zero."""
        for key in self.keys:
            if key not in self.config.zero:
                factor = getattr(self, key)
                fill(factor, kaiming_uniform(generator, factor.shape))

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """y = inner(x) + s ΔW x, [..., in] -> [..., out]."""
        update, c = self.update(x), self.config
        if rng is not None and c.rank_dropout:
            rows = kept(base.out_features, c.rank_dropout, rng.at(0), x)
            update = update * (rows / F.maximum(rows.mean(), 1e-6) if c.rescaled else rows)
        if rng is not None and c.module_dropout:
            update = update * kept(1, c.module_dropout, rng.at(1), x)
        return inner(x) + update

    def merge(self, layer: Module, base: Module) -> Module:
        """W' = W + s ΔW, in a new layer; a four-bit W is dequantized."""
        return with_update(layer, self.delta_weight())


@configuration
class LycorisConfig(Ranked):
    """The options that LoHa and LoKr share, with PEFT's names and defaults.

    A subclass says which factors start at `zero`, and whether the rows that rank_dropout keeps are `rescaled`.
    """

    r: int = option(8, "rank", least=1)
    alpha: float = option(8, "numerator of the scaling")
    rank_dropout: float = option(0.0, "probability of dropping an output of the update", least=0, below=1)
    module_dropout: float = option(0.0, "probability of dropping the update of a layer", least=0, below=1)
    use_effective_conv2d: bool = option(False, "must be False: it is for convolutions", choices=(False,))

    def scaling(self, name: str) -> float:
        """s of the module at a path."""
        return pattern_value(self.alpha_pattern, name, self.alpha) / self.rank(name)
