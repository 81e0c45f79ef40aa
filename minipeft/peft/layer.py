"""A layer and the named adapters on it.

    x ─► adapter "b" ( adapter "a" ( base layer ) ) ─► y        for the active adapters, in order; none: the base layer

An adapter is a function of its input and of the layer it is put around: `adapter(x, inner, base, rng)` calls
`inner(x)`, which is the base layer or the base layer with the adapters before it. So methods compose without knowing
each other, and an adapter that is not active costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng, xp_of
from ..nn.module import Module, Parameter, shape_and_dtype
from .config import PeftError, Seed, Shape
from .mixed import Rows, Selection, mixed
from .weights import placement, zeros

Inner = Callable[[Any], Tensor]  # a layer as it is without an adapter
STREAM = 1 << 20  # random streams of adapters are numbered from here, apart from those of the model's own dropout


class AdaptedLayer(Module):
    """A base layer with named adapters. Attributes it does not have are the base layer's."""

    def __init__(self, base_layer: Module, selection: Selection, stream: int):
        self.base_layer = base_layer
        self.adapters: dict[str, Adapter] = {}
        self.selection = selection
        self.stream = stream
        self.merged: Module | None = None  # a plain layer that computes the base layer with
        self.merged_names: list[str] = []  # these adapters

    def forward(self, x: Any, *arguments: Any) -> Tensor:
        """The base layer's arguments and result, in its shapes; the last argument is the random stream, or None."""
        names = self.selection.now()
        return mixed(self, names, x, arguments) if type(names) is Rows else self.compute(names, x, arguments)

    def compute(self, names: list[str], x: Any, arguments: tuple, base_layer: Callable | None = None) -> Tensor:
        """The output, in the base layer's shape, with the named adapters that are here, each around those before it.

        `base_layer`: what computes the base layer, where it is not this one itself.
        """
        base_layer = base_layer or self.base_layer
        names = [name for name in names if name in self.adapters]
        if not names:
            return base_layer(x, *arguments)
        if self.merged_names == names:
            return self.merged(x, *arguments)
        rng = arguments[-1] if arguments and isinstance(arguments[-1], Rng) else None
        inner: Callable = lambda x: base_layer(x, *arguments)  # noqa: E731
        for number, name in enumerate(names, 1):
            stream = rng and rng.at(STREAM + self.stream, number)
            inner = partial(self.adapters[name].forward, inner=inner, base=self.base_layer, rng=stream)
        return inner(x)

    def merge(self, names: list[str] | None = None) -> Module:
        """A new plain layer that computes what these adapters (by default the active ones), in order, make of the base.

        Where the layer has none of them it is the base layer itself. Raises PeftError for an adapter that cannot be
        merged, and for a merge that is not finite.
        """
        layer = self.base_layer
        for name in [n for n in (self.selection.active if names is None else names) if n in self.adapters]:
            layer = self.adapters[name].merge(layer, self.base_layer)
            for path, p in layer.named_parameters():
                if not bool(xp_of(p.data).isfinite(p.data).all().item()):
                    raise PeftError(f"merging {name!r} gives a {path} that is not finite; nothing was merged")
        return layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base_layer" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        """Linear(weight [16, 16]) + default: LoraLinear(lora_A [2, 16], lora_B [16, 2])"""
        return " + ".join([repr(self.base_layer), *(f"{name}: {part!r}" for name, part in self.adapters.items())])

    def children(self) -> Iterator[tuple[str, Module]]:
        """The base layer, then each adapter under its name."""
        yield "base_layer", self.base_layer
        yield from self.adapters.items()

    def _set_child(self, name: str, module: Module) -> None:
        if name == "base_layer":
            self.base_layer = module
        else:
            self.adapters[name] = module


class Adapter(Module):
    """What a method trains at one place. A subclass gives its parameters values and defines `forward` and `merge`.

    Args:
        shapes: {key: shape}, the key being the parameter's name in a file; up to the first dot it is the attribute.
        like: a layer beside which the parameters are allocated: on its device, in float32 (float64 where it is).
        seed: of the initial values, which `start` draws. None allocates nothing: for a model that is about to be
            loaded, or only counted.
        config, path: the method's configuration, and where in the plain model it is put.
    """

    frozen: tuple[str, ...] = ()  # attributes that are constants, neither trained nor counted

    def __init__(self, shapes: dict[str, Shape], like: Module, seed: Seed, config: Any = None, path: str = ""):
        self.keys, self.config, self.path = list(shapes), config, path
        for key, shape in shapes.items():
            setattr(self, key.partition(".")[0], Parameter(zeros(shape, *placement(like), seed)))
        if seed is not None:
            self.start(like, np.random.default_rng(seed))

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        """Give the parameters, all zeros, their first values, beside this layer."""

    def forward(self, x: Any, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """The adapted layer's output, of the shape of inner(x).

        Args:
            x: the layer's input.
            inner: the layer as it is without this adapter.
            base: the frozen layer at the bottom.
            rng: this place's own random stream, or None outside of training.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def merge(self, layer: Module, base: Module) -> Module:
        """A new plain layer that computes what this adapter around `layer` does. Raises PeftError if none does."""
        raise NotImplementedError(f"{type(self).__name__} defines no merge")

    def trained(self) -> dict[str, Parameter]:
        """{path: parameter} of what is trained."""
        return {path: p for path, p in self.named_parameters() if path.partition(".")[0] not in self.frozen}

    def __repr__(self) -> str:
        trained = ", ".join(f"{key} {shape_and_dtype(p)}" for key, p in self.trained().items())
        return f"{type(self).__name__}({trained})"

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
    Raises PeftError for a module of more inputs than one, or with quantized weights.
    """

    def __init__(self, module: Module, seed: Any, prefix: str = ""):
        if len(inspect.signature(module.forward).parameters) > 2:
            raise PeftError(f"a {type(module).__name__} takes more than one input; name the layers inside it instead")
        if any(p.dtype.kind != "f" for p in module.parameters()):
            how = "keep it in floats (quantize_model(skip=...)) or adapt it"
            raise PeftError(f"a {type(module).__name__} with quantized weights cannot be trained whole; {how}")
        self.module = module.copy(share=seed is None).requires_grad_(True)
        for p in self.module.parameters():
            xp = xp_of(p.data)
            dtype = xp.float32 if p.dtype == xp.float16 else p.dtype
            p.data = zeros(p.shape, xp, dtype, None) if seed is None else p.data.astype(dtype, copy=False)
        self.prefix = prefix

    def forward(self, x: Any, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """The copy's output, of the original's shape. What is below, the base layer or another adapter, is not used."""
        return self.module(x, rng)

    def merge(self, layer: Module, base: Module) -> Module:
        merged = self.module.copy()
        for p, original in zip(merged.parameters(), base.parameters()):
            p.data = p.data.astype(original.dtype, copy=False)
        return merged

    def saved(self) -> dict[str, Parameter]:
        return {self.prefix + path: p for path, p in self.module.named_parameters()}


def kept(n: int, p: float, rng: Rng, like: Tensor) -> Tensor:
    """[1, n] ones, each dropped to zero with probability p; the same, whichever rows of the batch ask."""
    return F.dropout(Tensor(xp_of(like.data).ones((1, n), like.dtype)), p, Rng(*rng.path)) * (1 - p)
