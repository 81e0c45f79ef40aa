"""Modules: a tree of layers whose parameters have paths, as in PyTorch, and which can be copied and operated on.

A module is an ordinary object; its parameters and submodules are the attributes that are Parameters and Modules, in
the order in which they were assigned. Nothing is registered, so surgery is plain assignment.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from types import ModuleType
from typing import Any, Self

import numpy as np

from ..autograd.tensor import Tensor
from ..backend import Array, BackendError, Rng, asarray, get_backend, is_array, to_numpy, xp_of

NARROW = {"bfloat16": ("bfloat16", "torch.bfloat16", "bf16"), "float16": ("float16", "torch.float16", "fp16", "half")}


class Parameter(Tensor):
    """A Tensor that belongs to a module; it requires gradients unless `requires_grad` is False."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True):
        super().__init__(data, requires_grad)


def unallocated(*shape: int) -> np.ndarray:
    """A read-only float32 array of any shape in four bytes: a weight that is yet to be loaded, or only counted."""
    return np.broadcast_to(np.float32(0), shape)


class Module:
    """Base of all layers: subclasses assign Parameters and Modules in `__init__` and define `forward`.

    `module(x)` is `module.forward(x)`, without a function in between: that halves the stack through a model.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes. Raises NotImplementedError where a subclass does not say."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    __call__ = forward

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__call__ = cls.forward

    # ------------------------------------------------------------------------------------------------- the tree

    def extra_repr(self) -> str:
        """What `repr` says of this module beside its submodules: its own parameters, or the numbers of one without."""
        own = [f"{name} {shape_and_dtype(p)}" for name, p in self.__dict__.items() if isinstance(p, Parameter)]
        leaf = next(self.children(), None) is None
        numbers = [f"{n}={v!r}" for n, v in self.__dict__.items() if leaf and n[0] != "_" and type(v) in (int, float)]
        return ", ".join(own + numbers)

    def __repr__(self) -> str:
        """The tree, as PyTorch writes it; of a list, equal modules in a row once."""
        text = self.extra_repr()
        children = [(name, getattr(child, "__name__", None) or repr(child)) for name, child in self._shown()]
        lines = [text] if text and children else []
        for _, equal in groupby(children, key=lambda child: child[isinstance(self, ModuleList) :]):
            (first, below), *others = equal
            names = f"({first}-{others[-1][0]}): {len(others) + 1} x " if others else f"({first}): "
            lines.append(names + below)
        inside = "".join("\n" + line for line in lines).replace("\n", "\n  ") + "\n" if lines else text
        return f"{type(self).__name__}({inside})"

    def _shown(self) -> Iterator[tuple[str, Any]]:
        return self.children()

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct submodules."""
        for name, value in self.__dict__.items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and everything below it, parents first."""
        ahead = [(prefix, self)]
        while ahead:
            path, module = ahead.pop()
            yield path, module
            ahead += [(f"{path}.{name}" if path else name, child) for name, child in module.children()][::-1]

    def all_named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter) for every path, so a tied parameter appears once for each of its names."""
        for path, module in self.named_modules():
            for name, value in module.__dict__.items():
                if isinstance(value, Parameter):
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), each parameter once, under its first path."""
        return ((paths[0], parameter) for parameter, paths in self.parameter_paths().items())

    def parameter_paths(self) -> dict[Parameter, list[str]]:
        """parameter -> its paths: several where it is tied."""
        paths: dict[Parameter, list[str]] = {}
        for path, parameter in self.all_named_parameters():
            paths.setdefault(parameter, []).append(path)
        return paths

    def parameters(self) -> list[Parameter]:
        """Every parameter, once."""
        return [parameter for _, parameter in self.named_parameters()]

    def get_submodule(self, path: str) -> Module:
        """The module at a dotted path ("" is this one). Raises KeyError naming the near misses."""
        module = self
        for name in path.split(".") if path else ():
            found = dict(module.children()).get(name)
            if found is None:
                near = difflib.get_close_matches(path, [p for p, _ in self.named_modules()], n=3, cutoff=0.3)
                raise KeyError(f"no module {path!r}; nearest: {', '.join(near) or 'none'}")
            module = found
        return module

    def replace(self, path: str, module: Module) -> None:
        """Put `module` in the place of the one at a dotted path.

        Raises KeyError where there is none, and ValueError for "", which is this one.
        """
        if not path:
            raise ValueError(
                f"replace names a module inside this {type(self).__name__}; the path '' is the whole of it"
            )
        parent, _, name = path.rpartition(".")
        self.get_submodule(path)
        self.get_submodule(parent)._set_child(name, module)

    def _set_child(self, name: str, module: Module) -> None:
        setattr(self, name, module)

    def watch(self, pattern: str = "*") -> AbstractContextManager[dict[str, Any]]:
        """Inside `with model.watch("*.mlp") as seen:` what these modules give, and its gradient; see `nn.watch`."""
        from .watch import watch

        return watch(self, pattern)

    # --------------------------------------------------------------------------------------------------- copies

    def copy(self, share: bool = False) -> Self:
        """A new tree of modules with new Parameter objects (ties preserved).

        `share=False`: an independent model, every array copied. `share=True`: the arrays are the same objects, which is
        what surgery starts from: replacing modules or parameters of the copy leaves this model as it is.
        """
        return _copied(self, {}, share)

    def to(self, xp: ModuleType | str) -> Self:
        """Move every parameter, in place, to an array library's device ("numpy", "cupy" or a module); returns self.

        Raises as `get_backend`, and for a 16-bit type, in which a model computes inside `mp.autocast` alone.
        """
        name = xp if isinstance(xp, str) else getattr(xp, "__name__", str(xp))
        if not isinstance(xp, (str, ModuleType)) and not any(name in names for names in NARROW.values()):
            raise BackendError(f"to() takes an array library, 'numpy', 'cupy' or a module, not {name}")
        if dtype := next((dtype for dtype, names in NARROW.items() if name in names), None):
            why = "weights stay float32, as NumPy has no bfloat16"
            raise BackendError(f"to() takes no dtype: {why}; compute in {dtype} inside mp.autocast({dtype!r})")
        library = get_backend(xp) if isinstance(xp, str) else xp
        for parameter in self.parameters():
            parameter.data = asarray(parameter.data, library)
            parameter.grad = None
        return self

    # ---------------------------------------------------------------------------------------------------- values

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of every parameter that can be trained (of a quantized layer, the bias); returns self."""
        for value in self.__dict__.values():
            if isinstance(value, Parameter):
                value.requires_grad = requires_grad
        for _, child in self.children():
            child.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Forget every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Array]:
        """path -> array of every parameter, tied ones once. The arrays are the live ones, not copies."""
        return {path: parameter.data for path, parameter in self.named_parameters()}

    def load_state_dict(self, arrays: Mapping[str, Array], strict: bool = True) -> None:
        """Give the parameters new arrays (copies, of each parameter's dtype and device).

        A tied parameter may be given under any of its names. Raises ValueError naming missing and unexpected keys
        (unless `strict=False`), shapes that differ, and tied names with different values; nothing is changed then.
        """
        names = self.parameter_paths()
        found = {p: [path for path in paths if path in arrays] for p, paths in names.items()}
        missing = [names[p][0] for p, paths in found.items() if not paths]
        unexpected = sorted(set(arrays) - {path for paths in names.values() for path in paths})
        if strict and (missing or unexpected):
            raise ValueError(
                f"the state does not fit this {type(self).__name__}: "
                f"missing {some(missing)}; unexpected {some(unexpected)}"
            )
        given = {parameter: paths[0] for parameter, paths in found.items() if paths}
        for p, path in given.items():
            if arrays[path].shape != p.shape:
                raise ValueError(f"{path}: the state has shape {arrays[path].shape}, the model {p.shape}")
            for other in found[p][1:]:
                a, b = (to_numpy(arrays[name]).astype(p.dtype) for name in (path, other))
                if a.shape != b.shape or not ((a == b) | ((a != a) & (b != b))).all():  # NaN is not equal to itself
                    raise ValueError(f"{path} and {other} are one parameter of this model, and the state has two values of it")
        for p, path in given.items():
            p.data = asarray(arrays[path], xp_of(p.data)).astype(p.dtype, copy=True)
            p._version += 1


def shape_and_dtype(p: Parameter) -> str:
    """A parameter's shape, such as [16, 8], and its dtype where that is not float32."""
    return f"{list(p.shape)}" + ("" if p.dtype == np.float32 else f" {p.dtype}")


def some(names: list[str]) -> str:
    """The first five names, and the number of others: for an error."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "nothing"


def _copied(value: Any, memo: dict[int, Any], share: bool) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Parameter):
        twin = Parameter(value.data if share else value.data.copy(), value.requires_grad)
    elif isinstance(value, Module):
        twin = object.__new__(getattr(type(value), "unwatched", type(value)))
        memo[id(value)] = twin
        twin.__dict__.update({name: _copied(v, memo, share) for name, v in value.__dict__.items()})
    elif isinstance(value, list):
        return [_copied(v, memo, share) for v in value]
    elif isinstance(value, dict):
        return {k: _copied(v, memo, share) for k, v in value.items()}
    elif is_array(value) and not share:
        twin = value.copy()
    else:
        return value
    memo[id(value)] = twin
    return twin


class ModuleList(Module):
    """Modules in a row, named "0", "1", ..."""

    def __init__(self, modules: list[Module] | tuple[Module, ...] = ()):
        self._items = list(modules)

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(i), module) for i, module in enumerate(self._items) if isinstance(module, Module))

    def _set_child(self, name: str, module: Module) -> None:
        self._items[int(name)] = module

    def append(self, module: Module) -> None:
        """Add a module at the end."""
        self._items.append(module)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int | slice) -> Any:
        """A module; of a slice, these modules in the same container."""
        if not isinstance(i, slice):
            return self._items[i]
        part = type(self)()
        part._items = self._items[i]
        return part


class Sequential(ModuleList):
    """Modules (or plain functions of a Tensor) applied one after the other."""

    def __init__(self, *modules: Module | Callable[[Tensor], Tensor]):
        super().__init__(modules)

    def _shown(self) -> Iterator[tuple[str, Any]]:
        return ((str(i), item) for i, item in enumerate(self._items))

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x through every module in turn; its shape is what the last one gives. With `rng`, modules are given one each."""
        for i, module in enumerate(self._items):
            x = module(x) if rng is None or not isinstance(module, Module) else module(x, rng.at(i))
        return x
