"""A layer and the named adapters on it.

    x ─► adapter "b" ( adapter "a" ( base layer ) ) ─► y        for the active adapters, in order; none: the base layer

An adapter is a function of its input and of the layer it is put around: `adapter(x, inner, base, rng)` calls
`inner(x)`, which is the base layer or the base layer with the adapters before it. So methods compose without knowing
each other, and an adapter that is not active costs nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Array, Rng, asarray, is_array, xp_of
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from .config import PeftError, Seed, Shape

BASE = "__base__"  # in a mixed batch, the name of a row that uses no adapter (as in PEFT)
STREAM = 1 << 20  # random streams of adapters are numbered from here, apart from those of the model's own dropout


class Adapter(Module):
    """What a method trains at one place. A subclass gives its parameters values and defines `forward` and `merge`.

    Args:
        shapes: {key: shape}, the key being the parameter's name in a file; up to the first dot it is the attribute.
        like: a layer beside which the parameters are allocated: on its device, in float32 (float64 where it is).
        seed: of the initial values, which a subclass gives. None allocates nothing: for a model that is about to be
            loaded, or only counted.
    """

    frozen: tuple[str, ...] = ()  # attributes that are constants, neither trained nor counted

    def __init__(self, shapes: dict[str, Shape], like: Module, seed: Seed):
        self.keys = list(shapes)
        for key, shape in shapes.items():
            setattr(self, key.partition(".")[0], Parameter(zeros(shape, *placement(like), seed)))

    def forward(self, x: Any, inner: Callable[[Any], Tensor], base: Module, rng: Rng | None) -> Tensor:
        """The adapted layer's output.

        Args:
            x: the layer's input.
            inner: the layer as it is without this adapter.
            base: the frozen layer at the bottom.
            rng: this place's own random stream, or None outside of training.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def merge(self, layer: Module, base: Module) -> Module:
        """A new plain layer that computes what this adapter around `layer` does. Raises PeftError if none does."""
        raise PeftError(f"{type(self).__name__} cannot be merged into a plain layer")

    def trained(self) -> dict[str, Parameter]:
        """{path: parameter} of what is trained."""
        return {path: p for path, p in self.named_parameters() if path.partition(".")[0] not in self.frozen}

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Set `requires_grad` of what is trained; returns self."""
        for p in self.trained().values():
            p.requires_grad = requires_grad
        return self

    def saved(self) -> dict[str, Parameter]:
        """{key in a file: parameter} of what is written; a key is relative to the layer, or from "base_model."."""
        return {key: getattr(self, key.partition(".")[0]) for key in self.keys}

    def loading(self, base: Module) -> None:
        """Called before a file's values are put in place, to compute what a file does not hold."""


class TrainedCopy(Adapter):
    """A whole module trained as a copy, in the place of the original (modules_to_save, LN tuning); in float32 at least.

    `prefix` comes before the names of its parameters in a file; `seed` None allocates nothing, as in `Adapter`.
    """

    def __init__(self, module: Module, seed: Any, prefix: str = ""):
        if len(inspect.signature(module.forward).parameters) > 2:
            raise PeftError(f"a {type(module).__name__} takes more than one input; name the layers inside it instead")
        if any(p.dtype.kind != "f" for p in module.parameters()):
            raise PeftError(
                f"a {type(module).__name__} with quantized weights cannot be trained whole; "
                "keep it in floats (quantize_model(skip=...)) or adapt it"
            )
        self.module = module.copy(share=seed is None).requires_grad_(True)
        for p in self.module.parameters():
            xp = xp_of(p.data)
            dtype = xp.float32 if p.dtype == xp.float16 else p.dtype
            p.data = zeros(p.shape, xp, dtype, None) if seed is None else p.data.astype(dtype, copy=False)
        self.prefix = prefix

    def forward(self, x: Any, inner: Callable[[Any], Tensor], base: Module, rng: Rng | None) -> Tensor:
        """The copy's output. What is below, the base layer or another adapter, is not used."""
        return self.module(x, rng)

    def merge(self, layer: Module, base: Module) -> Module:
        merged = self.module.copy()
        for p, original in zip(merged.parameters(), base.parameters()):
            p.data = p.data.astype(original.dtype, copy=False)
        return merged

    def saved(self) -> dict[str, Parameter]:
        return {self.prefix + path: p for path, p in self.module.named_parameters()}


class Prompt(Adapter):
    """What a method trains in front of a model's input: virtual tokens, or keys and values of virtual positions."""

    length = 0  # virtual positions

    def arguments(self, model: Module, **given: Any) -> dict[str, Any]:
        """The arguments for `model` with the virtual positions in front, from a caller's (Transformer.forward's).

        When `given["past_key_values"]` is a KVCache that holds positions already, the virtual ones are among them.
        """
        raise TypeError(f"{type(self).__name__} defines no arguments")


class Selection(Module):
    """Which adapters the layers of one model use: the same object in every layer.

    A call of the model fixes the choice, in a context variable: a checkpointed block that is computed again in backward
    uses the adapters of its forward pass, whatever has been selected since.
    """

    def __init__(self) -> None:
        self.names: list[str] = []  # active, in order; a new list for each choice

    @contextmanager
    def call(self, rows: list[str] | None) -> Iterator[None]:
        """Inside, a call of the model: with the active adapters, or in a mixed batch with one for each of its rows."""
        token = _CALL.set((self, self.names, rows))
        try:
            yield
        finally:
            _CALL.reset(token)

    def now(self) -> tuple[list[str], list[str] | None]:
        """(active adapters, None), or in a mixed batch ([], the adapter of each row)."""
        selection, names, rows = _CALL.get()
        if selection is not self:
            return self.names, None
        return ([], rows) if rows is not None else (names, None)


_CALL: ContextVar[tuple[Any, list[str], list[str] | None]] = ContextVar("call", default=(None, [], None))


class AdaptedLayer(Module):
    """A base layer with named adapters. Attributes it does not have are the base layer's."""

    def __init__(self, base_layer: Module, selection: Selection, stream: int):
        self.base_layer = base_layer
        self.adapters: dict[str, Adapter] = {}
        self.selection = selection
        self.stream = stream
        self.merged: Module | None = None  # a plain layer that computes the base layer with
        self.merged_names: list[str] = []  # these adapters

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base_layer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.base_layer, name)

    def children(self) -> Iterator[tuple[str, Module]]:
        """The base layer, then each adapter under its name."""
        yield "base_layer", self.base_layer
        yield from self.adapters.items()

    def _set_child(self, name: str, module: Module) -> None:
        if name == "base_layer":
            self.base_layer = module
        else:
            self.adapters[name] = module

    def forward(self, x: Any, *arguments: Any) -> Tensor:
        """The base layer's arguments and result; the last argument is the random stream, or None."""
        names, rows = self.selection.now()
        if rows is None:
            return self._through([name for name in names if name in self.adapters], x, arguments)
        positions = is_array(x) and x.shape[0] == 1  # the same for every row
        if x.shape[0] != len(rows) and not positions:
            raise PeftError(f"adapter_names has {len(rows)} names for an input of {x.shape[0]} rows")
        mine = [name if name in self.adapters else BASE for name in rows]
        if len(set(mine)) == 1:
            return self._through([n for n in mine[:1] if n != BASE], x, arguments)
        if any(a is not None for a in arguments):
            raise PeftError(
                "a batch that mixes adapters is computed without dropout: leave rng out"
                if all(a is None or isinstance(a, Rng) for a in arguments)
                else f"a {type(self.base_layer).__name__} with several inputs cannot mix adapters in a batch"
            )
        xp = xp_of(x if is_array(x) else x.data)
        if positions:
            x = xp.broadcast_to(x, (len(rows), *x.shape[1:]))
        parts, order = [], []
        for name in dict.fromkeys(mine):
            index = [i for i, n in enumerate(mine) if n == name]
            parts.append(self._through([] if name == BASE else [name], x[xp.asarray(index)], arguments))
            order += index
        return F.cat(parts, axis=0)[xp.asarray(np.argsort(order))]

    def _through(self, names: list[str], x: Any, arguments: tuple) -> Tensor:
        if not names:
            return self.base_layer(x, *arguments)
        if self.merged is not None and self.merged_names == names:
            return self.merged(x, *arguments)
        rng = arguments[-1] if arguments and isinstance(arguments[-1], Rng) else None

        def around(adapter: Adapter, inner: Callable, number: int) -> Callable[[Any], Tensor]:
            stream = rng and rng.at(STREAM + self.stream, number)
            return lambda x: adapter(x, inner, self.base_layer, stream)

        layer: Callable[[Any], Tensor] = lambda x: self.base_layer(x, *arguments)  # noqa: E731
        for number, name in enumerate(names):
            layer = around(self.adapters[name], layer, number + 1)
        return layer(x)

    def merge(self, names: list[str] | None = None) -> Module:
        """A new plain layer that computes what these adapters (by default the active ones), in order, make of the base.

        Where the layer has none of them it is the base layer itself.
        """
        layer = self.base_layer
        for name in [n for n in (self.selection.now()[0] if names is None else names) if n in self.adapters]:
            layer = self.adapters[name].merge(layer, self.base_layer)
            for path, p in layer.named_parameters():
                if not bool(xp_of(p.data).isfinite(p.data).all().item()):
                    raise PeftError(
                        f"merging the adapter {name!r} gives a {path} that is not finite; nothing was merged"
                    )
        return layer


# ------------------------------------------------------------------------------------- values of weights, frozen or not


def placement(layer: Module) -> tuple[Any, Any]:
    """(array library, dtype) of what is trained beside a layer: float64 beside float64, float32 beside all else."""
    arrays = [p.data for p in layer.parameters()[:1]]
    xp = xp_of(*arrays)
    return xp, xp.float64 if arrays and arrays[0].dtype == xp.float64 else xp.float32


def zeros(shape: Shape, xp: Any, dtype: Any, seed: Any) -> Array:
    """Zeros to be given values; with no seed (None) a read-only array of that shape in the memory of one number."""
    return xp.broadcast_to(xp.zeros((), dtype), shape) if seed is None else xp.zeros(shape, dtype)


def dense_weight(layer: Module) -> Array:
    """The layer's weight, as it is stored; dequantized where it is quantized."""
    return layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.data


def out_in(layer: Module, weight: Array) -> Array:
    """A weight of `layer`'s layout seen as [out, in] (for an embedding, whose input is one-hot: [d, V])."""
    return weight if isinstance(layer, Linear) or hasattr(layer, "dequantize") else weight.T


def with_weight(layer: Module, weight: Array, bias: Array | None = None) -> Module:
    """A new layer like `layer`, with this weight (and bias): a quantized layer becomes a plain Linear."""
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


def kaiming_uniform(generator: np.random.Generator, shape: Shape) -> np.ndarray:
    """PyTorch's kaiming_uniform_(a=sqrt(5)): uniform in ±1/sqrt(fan_in), fan_in the last axis."""
    bound = 1 / math.sqrt(shape[-1])
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def fill(parameter: Parameter, values: np.ndarray) -> None:
    """Give a parameter values drawn on the host, in its dtype and on its device."""
    parameter.data = asarray(values.astype(parameter.dtype, copy=False), xp_of(parameter.data))
