"""BitFit: training only the biases (Ben Zaken, Goldberg & Ravfogel 2021, arXiv:2106.10199).

    y = W x + b  with b trained:  0.1 % of a GPT-2's parameters

The frozen layer has added its own bias b0 already, so the adapter adds b - b0. A model without biases, as most of the
Llama family, has nothing to train.

PEFT has no such method; its files are this package's own (peft_type BITFIT, <path>.bias).
"""

from __future__ import annotations

import numpy as np

from ..autograd.tensor import Tensor
from ..backend import Rng
from ..nn.module import Module
from ..options import configuration
from .config import PeftConfig, PeftError, Shape
from .layer import Adapter, Inner
from .weights import dense_weight, with_weight


class Bias(Adapter):
    """A trained copy of a layer's bias, [out]."""

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        self.bias.data = layer.bias.data.astype(self.bias.dtype)

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return inner(x) + (self.bias - base.bias.data)

    def merge(self, layer: Module, base: Module) -> Module:
        """The layer with b - b0 added to its bias."""
        bias = self.bias.data if layer is base else layer.bias.data + (self.bias.data - base.bias.data)
        return with_weight(layer, dense_weight(layer), bias)


@configuration
class BitFitConfig(PeftConfig):
    """BitFit, y = W x + b with b trained, has no options of its own: target_modules says whose b (None: all)."""

    peft_type, adapter_class = "BITFIT", Bias
    usual_learning_rate = 1e-2
    kinds = ("linear", "conv1d", "norm")
    usual_targets = None  # all that have a bias

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is None and self.layers_to_transform is not None:
            raise PeftError("layers_to_transform (--layers) chooses among target_modules (--target): give that, too")

    def targets(self, name: str, kind: str) -> bool:
        if self.target_modules is None:
            return bool(name) and kind in self.kinds and self.replace(target_modules=".*").targets(name, kind)
        return super().targets(name, kind)

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        found = {path: m for path, m in super().resolve(modules).items() if getattr(m, "bias", None) is not None}
        if not found:
            whose = "the modules it was asked for have none"
            if self.target_modules is None:
                whose = "this model has none; take LN tuning (ln), or a model with biases, such as GPT-2"
            raise PeftError(f"BitFit trains biases, and {whose}")
        return found

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        return {"bias": shape} if kind == "bias" and self.targets(name, "linear") else {}

    def layer_shapes(self, name: str, layer: Module) -> dict[str, Shape]:
        return {"bias": layer.bias.shape}
