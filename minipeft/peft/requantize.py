"""Adapters merged into a quantized base, which is quantized again.

    Q' = quantize(Q + s B A)

The sum is exact, and dense. Quantizing it again rounds each weight to its nearest point: an update much smaller than the
gaps between the points is largely rounded away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..backend import Array, asarray, xp_of
from ..nn.module import Module
from ..quant import Linear4bit
from .layer import AdaptedLayer
from .model import PeftModel, independent
from .weights import out_in


@dataclass(frozen=True)
class RequantizationLoss:
    """How far a merged layer is from the layer with its adapters, over normal inputs x (Frobenius norms).

    dense        ||dense(x) - adapted(x)|| / ||adapted(x)||: float32 rounding
    requantized  ||requantized(x) - adapted(x)|| / ||adapted(x)||
    of_update    ||requantized(x) - adapted(x)|| / ||adapted(x) - base(x)||: above 1, more is lost than was learned
    codes        the share of the packed bytes that the update changed
    """

    dense: float
    requantized: float
    of_update: float
    codes: float


def merge_and_requantize(model: PeftModel, adapter_names: list[str] | None = None) -> tuple[Any, dict[str, RequantizationLoss]]:
    """(a plain model whose quantized layers have the adapters merged and are quantized again, {path: error}).

    Each layer is quantized as it was; layers that were not quantized are merged as `merge_and_unload` does. One layer's
    dense weight exists at a time. The error of a dense merge is reported beside that of the one that is made. Raises
    PeftError as `merge_and_unload`.
    """
    names, errors = model._mergeable(adapter_names), {}

    def made(path: str, layer: AdaptedLayer) -> Module:
        merged, base, layer.merged_names = layer.merge(names), layer.base_layer, []
        if not isinstance(base, Linear4bit) or merged is base:
            return merged
        again = base.quantize(out_in(merged, merged.weight.data))
        again.bias = merged.bias
        probe = np.random.default_rng(0).standard_normal((64, base.in_features)).astype(np.float32)
        x = Tensor(asarray(probe, xp_of(base.weight.data)))
        with no_grad():
            adapted = layer.compute(names, x, ()).data
            dense, requantized, plain = (_norm(m(x).data - adapted) for m in (merged, again, base))
        size = _norm(adapted) or 1.0  # an output of zeros is met exactly
        errors[path] = RequantizationLoss(
            dense / size,
            requantized / size,
            requantized / plain if plain else math.inf,
            float((again.weight.data != base.weight.data).mean().item()),
        )
        return again

    plain_model = independent(model.replaced(made))
    return plain_model, {path: errors[path] for path in model.layers if path in errors}


def _norm(x: Array) -> float:
    return float(xp_of(x).sqrt((x * x).sum()).item())
