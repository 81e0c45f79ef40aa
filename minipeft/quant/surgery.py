"""A model's linear layers in four bits, and back: surgery that leaves the given model as it was."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..nn.heads import HEADS
from ..nn.layers import Conv1D, Linear
from ..nn.module import Module, Parameter
from ..options import check_flags
from .checks import QuantError
from .linear import Linear4bit


def quantize_model(
    model: Module,
    skip: Iterable[str] = HEADS,
    quant_type: str = "nf4",
    blocksize: int = 64,
    compress_statistics: bool = True,
) -> Module:
    """A new model whose Linear and Conv1D layers are Linear4bit; everything else shares the model's arrays.

    Embeddings, norms and biases stay as they are. Its parameters are frozen, as a base for adapters.

    Args:
        skip: names of modules that keep their floats, by default the usual heads; a name is a part of a path, "lm_head"
            or "layers.0" (all inside it).
        quant_type, blocksize, compress_statistics: see `quantize_4bit`; double quantization is on.

    Raises QuantError for a name that matches nothing (other than the usual heads), when nothing is left to quantize, and
    for a weight that another module shares: quantizing it would untie the two; TypeError for a text as
    compress_statistics.
    """
    check_flags(compress_statistics=compress_statistics)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    made = model.copy(share=True)
    paths = [path for path, _ in made.named_modules()]
    for name in skip:
        if name not in HEADS and not any(_inside(path, name) for path in paths):
            names = dict.fromkeys([path.rpartition(".")[2] for path in paths] + paths)
            near = difflib.get_close_matches(name, list(names), n=3)
            raise QuantError(f"skip: no module is called {name!r}; nearest: {', '.join(near) or 'none'}")
    layers = quantizable_layers(made, skip)
    if not layers:
        raise QuantError(f"there is no Linear or Conv1D layer to quantize in this {type(model).__name__} (skip: {', '.join(skip) or 'nothing'})")
    weights = {id(module.weight): path for path, module in layers.items()}
    for name, parameter in made.all_named_parameters():
        path = weights.get(id(parameter))
        if path is not None and name.rpartition(".")[0] not in layers:
            raise QuantError(f"{path} shares its weight with {name}: quantizing it would untie them; put {path!r} into skip")

    def in_four_bits(path: str, layer: Linear | Conv1D) -> Linear4bit:
        try:
            return Linear4bit.from_linear(layer, blocksize, quant_type, compress_statistics)
        except QuantError as error:
            raise QuantError(f"{path}: {error}") from error

    return _replaced(made, layers, in_four_bits).requires_grad_(False)


def quantizable_layers(model: Module, skip: Iterable[str] = HEADS) -> dict[str, Linear | Conv1D]:
    """path -> layer of the Linear and Conv1D layers that `quantize_model` replaces."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear | Conv1D) and not any(_inside(path, name) for name in skip)
    }


def quantized_layers(model: Module) -> dict[str, Linear4bit]:
    """path -> layer of the layers in four bits."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantize_model(model: Module) -> Module:
    """A new model whose Linear4bit layers are Linear layers of their dequantized weights; the rest shares its arrays."""
    made = model.copy(share=True)

    def dense(path: str, layer: Linear4bit) -> Linear:
        linear = Linear(layer.in_features, layer.out_features, bias=False, seed=None)
        linear.weight, linear.bias = Parameter(layer.dequantize(), requires_grad=False), layer.bias
        return linear

    return _replaced(made, quantized_layers(made), dense)


def _replaced(model: Module, layers: Mapping[str, Module], make: Callable[[str, Any], Module]) -> Module:
    """The model with make(path, layer) in place of each of its layers; a layer that has several paths stays one."""
    new: dict[int, Module] = {}
    for path, layer in layers.items():
        if id(layer) not in new:
            new[id(layer)] = make(path, layer)
        if not path:  # the model is the layer
            return new[id(layer)]
        model.replace(path, new[id(layer)])
    return model


def _inside(path: str, name: str) -> bool:
    """Whether `name` is a run of whole parts of a dotted path."""
    return f".{name}." in f".{path}."
