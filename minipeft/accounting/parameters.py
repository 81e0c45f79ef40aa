"""How many parameters a method trains, stores for a task, and leaves in the model: from shapes, without the model.

Conventions, those of PEFT's `print_trainable_parameters`:

    a tied parameter    counts once (GPT-2's `lm_head` adds nothing); trained as a copy of its own, that copy counts too
    the head            counts as the model has it
    packed weights      count their elements: a weight in 4 bits is as many parameters as in 32
    a method's constants  (VeRA's shared projections) are not trained and not counted in the total, but stored

A method's rule is its configuration's own `parameter_shapes(name, kind, shape) -> {name: shape}`, the one that its
modules are built with: for a weight or bias of the module called `name`, the parameters that the method trains there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..peft.targets import check_patterns, match
from .architectures import Architecture, Shape, architecture


@dataclass(frozen=True)
class ParameterCount:
    """trainable: updated by the optimizer; stored: what the task's own file holds; total: in the adapted model.

    What is trained is stored, but for what only computes it (a prefix's or a prompt's network); constants are stored
    too, unless they follow from the base (PiSSA's start). Zeros that a file format makes explicit (a fused layer's
    projections that are not adapted) are not counted.
    """

    trainable: int
    stored: int
    total: int

    @property
    def share(self) -> float:
        """trainable / total, what `print_trainable_parameters` prints as trainable%."""
        return self.trainable / self.total if self.total else 0.0


def count_parameters(model: Any, config: Any = None, only: str | None = None) -> ParameterCount:
    """Trainable, stored and total parameters of a model under a method.

    Args:
        model: an `Architecture`, or what `architecture` takes.
        config: as in `trained_parameters`.
        only: a regular expression; parameters whose whole name it does not match are left out of all three counts.

    Raises ValueError as `architecture` and `trained_parameters` do, and for what is no regular expression.
    """
    arch = model if isinstance(model, Architecture) else architecture(model)
    if only is not None:
        check_patterns("only", only)
    trained, stored = trained_parameters(arch, config), stored_parameters(arch, config)
    return ParameterCount(*[elements(shapes, only) for shapes in (trained, stored, {**arch.shapes, **trained})])


def stored_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of what a trained `config`'s file holds: see `ParameterCount`. Raises as `trained_parameters`."""
    folded = config.replace(folded=True) if hasattr(config, "folded") else config
    constants = constant_parameters(arch, config) if getattr(config, "stores_constants", False) else {}
    return {**trained_parameters(arch, folded), **constants}


def trained_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of the parameters that are trained: those of `arch` itself (full fine-tuning), or ones added to it.

    Args:
        config: a method's configuration; None is full fine-tuning, "head" the language model's head alone, "frozen"
            nothing at all. A tied head that is trained alone is untied, as `nn.heads.head_only` does.

    Raises ValueError for a name that is no method, a model without a head, and targets that the model does not have or
    the method cannot be put on.
    """
    if config is None:
        return arch.shapes
    if config == "frozen":
        return {}
    if config == "head":
        if "lm_head.weight" not in {*arch.shapes, *arch.tied}:
            raise ValueError(f"{arch.name} has no language-model head to train alone")
        owner = arch.tied.get("lm_head.weight", "lm_head.weight")
        return {"lm_head.weight": arch[owner]}
    config = _resolved(arch, config)
    paths = _paths(arch)
    saved = config.resolve_saved(paths)
    trained: dict[str, Shape] = {}
    for name, kind, shape in _weights(arch):
        path, _, attribute = name.rpartition(".")
        if any(f"{path}.".startswith(f"{module}.") for module in saved):
            trained[f"{path}.modules_to_save.{attribute}"] = shape
            continue
        for key, added in config.parameter_shapes(path, kind, shape).items():
            copied = "modules_to_save." if f"{path}.{key}" in arch else ""  # BitFit's bias, beside the frozen one
            trained[f"{path}.{copied}{key}"] = added
    for path, kind in paths.items():
        named = isinstance(config.target_modules, list)  # a regular expression may match what holds the layers, too
        if named and config.kinds and config.targets(path, kind) and kind not in config.kinds:
            what = f"of the kind {kind}" if kind else "not a layer but several"
            works = f"{type(config).__name__} works on {', '.join(config.kinds)}"
            raise ValueError(f"target_modules: {path!r} of {arch.name} is {what}; {works}")
    if not trained and config.target_modules is None:
        raise ValueError(f"{type(config).__name__} trains nothing of {arch.name}: no parameter there is of its kind")
    config.check_names(paths, trained)
    return trained


def constant_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of what a method adds and never trains. Raises ValueError for what is no method."""
    if config is None or isinstance(config, str):
        return {}
    config = _resolved(arch, config)
    layers = {
        name.rpartition(".")[0]: (kind, shape)
        for name, kind, shape in _weights(arch)
        if kind in config.kinds and config.targets(name.rpartition(".")[0], kind)
    }
    return config.constant_shapes(layers)


def _resolved(arch: Architecture, config: Any) -> Any:
    """The configuration with its targets, or a model's dimensions, filled in."""
    if not hasattr(config, "parameter_shapes"):
        what = "None (full fine-tuning), 'head', 'frozen' or a method's configuration"
        raise ValueError(f"config must be {what}, not {config!r}")
    dimensions = SimpleNamespace(model_type=arch.model_type, **arch.dimensions)
    return config.with_targets(SimpleNamespace(config=arch.config or dimensions))


def _weights(arch: Architecture) -> Iterable[tuple[str, str, Shape]]:
    """(name, kind, shape) of every parameter under every name: a tied head is a linear layer too."""
    for name in (*arch, *arch.tied):
        yield name, "linear" if name in arch.tied else arch.kinds[name], arch[arch.tied.get(name, name)]


def _paths(arch: Architecture) -> dict[str, str]:
    """path -> kind of every module; "" for one that only holds others."""
    paths: dict[str, str] = {}
    for name, kind, _ in _weights(arch):
        path = name.rpartition(".")[0]
        for i, character in enumerate(path):
            if character == ".":
                paths.setdefault(path[:i], "")
        if kind != "bias":
            paths[path] = kind
    return paths


def elements(shapes: Mapping[str, Shape], only: str | None = None) -> int:
    """The number of elements of all shapes, or of those whose whole name matches `only`."""
    return sum(math.prod(shape) for name, shape in shapes.items() if only is None or match(only, name, whole=True))
