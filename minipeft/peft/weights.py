"""Values of weights, frozen or trained: where they are placed, how they begin, and a layer with another weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import Array, asarray, xp_of
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from .config import Shape


def placement(layer: Module) -> tuple[Any, Any]:
    """(array library, dtype) of what is trained beside a layer: float64 beside float64, float32 beside all else."""
    arrays = [p.data for p in layer.parameters()[:1]]
    xp = xp_of(*arrays)
    return xp, xp.float64 if arrays and arrays[0].dtype == xp.float64 else xp.float32


def zeros(shape: Shape, xp: Any, dtype: Any, seed: Any) -> Array:
    """Zeros to be given values; with no seed (None) a read-only array of that shape in the memory of one number."""
    return xp.broadcast_to(xp.zeros((), dtype), shape) if seed is None else xp.zeros(shape, dtype)


def kaiming_uniform(generator: np.random.Generator, shape: Shape) -> np.ndarray:
    """PyTorch's kaiming_uniform_(a=sqrt(5)): uniform in ±1/sqrt(fan_in), float32 [..., fan_in]."""
    bound = 1 / math.sqrt(shape[-1])
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def fill(parameter: Parameter, values: np.ndarray) -> None:
    """Give a parameter values of its shape, drawn on the host, in its dtype and on its device."""
    parameter.data = asarray(values.astype(parameter.dtype, copy=False), xp_of(parameter.data))


def quantized(model: Module) -> list[Any]:
    """The quantized layers of a model."""
    return [module for _, module in model.named_modules() if hasattr(type(module), "dequantize")]


def dense_weight(layer: Module) -> Array:
    """The layer's weight, as it is stored, in `shape_of`'s shape; dequantized where it is quantized."""
    return layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.data


def out_in(layer: Module, weight: Array) -> Array:
    """A weight of `layer`'s layout seen as [out, in] (for an embedding, whose input is one-hot: [d, V])."""
    return weight if isinstance(layer, Linear) or hasattr(layer, "dequantize") else weight.T


def with_weight(layer: Module, weight: Array, bias: Array | None = None) -> Module:
    """A new layer like `layer`, with this weight, as stored (and bias [out]); of a quantized one, a plain Linear."""
    if hasattr(layer, "dequantize"):
        made = Linear(layer.in_features, layer.out_features, bias=False, seed=None)
        made.bias = None if layer.bias is None else Parameter(layer.bias.data)
        dtype = weight.dtype
    else:
        made, dtype = layer.copy(share=True), layer.weight.dtype
    made.weight = Parameter(xp_of(weight).ascontiguousarray(weight.astype(dtype, copy=False)))
    if bias is not None:
        made.bias = Parameter(bias.astype(layer.bias.dtype))
    return made


def with_update(layer: Module, delta: Array) -> Module:
    """A new plain layer whose weight is W + delta, delta [out, in]."""
    return with_weight(layer, out_in(layer, out_in(layer, dense_weight(layer)) + delta))
