"""Layers and the transformer, with PyTorch's names."""

from .layers import Conv1D, Dropout, Embedding, LayerNorm, Linear, RMSNorm
from .module import Module, ModuleList, Parameter, Sequential
from .watch import gradient_norms

__all__ = [
    "Conv1D", "Dropout", "Embedding", "LayerNorm", "Linear", "Module", "ModuleList", "Parameter", "RMSNorm",
    "Sequential", "gradient_norms",
]  # fmt: skip
