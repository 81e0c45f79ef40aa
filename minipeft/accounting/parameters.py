"""How many parameters a method trains, stores for a task, and leaves in the model: from shapes, without the model.

Conventions, those of PEFT's `print_trainable_parameters`:

    a tied parameter    counts once (GPT-2's `lm_head` adds nothing); trained as a copy of its own, that copy counts too
    the head            counts as the model has it
    packed weights      count their elements: a weight in 4 bits is as many parameters as in 32
    a method's constants  (VeRA's shared projections) are not trained and not counted in the total, but stored

    experts in one array  no layer, so no method's target but LoRA's, as PEFT (0.21) puts it on Mixtral's and Qwen3's: with
                        all-linear, by the arrays' names, or those of the layers that experts once were (w1, w2, w3;
                        gate_proj, up_proj, down_proj). Of gate_up_proj [E, 2f, d] it trains factors of the rank 2rE, of down_proj rE, and
                        of the router r

A method's rule is its configuration's own `parameter_shapes(name, kind, shape) -> {name: shape}`, the one that its
modules are built with: for a weight or bias of the module called `name`, the parameters that the method trains there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..peft.targets import check_patterns, match, matches
from .architectures import Architecture, Shape, architecture


@dataclass(frozen=True)
class ParameterCount:
    """trainable: updated by the optimizer; stored: what the task's own file holds; total: in the adapted model.

    What is trained is stored, but for what only computes it (a prefix's or a prompt's network); constants are stored
    too, unless they follow from the base (PiSSA's start). Zeros that a file format makes explicit (a fused layer's
    projections that are not adapted) are not counted, nor the base's own embedding or head, which PEFT's format holds
    too where it is adapted.
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
    trained = trained_parameters(arch, config)
    stored = _stored(arch, config, trained)
    return ParameterCount(*[elements(shapes, only) for shapes in (trained, stored, {**arch.shapes, **trained})])


def stored_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of what a trained `config`'s file holds: see `ParameterCount`. Raises as `trained_parameters`."""
    return _stored(arch, config, trained_parameters(arch, config))


def _stored(arch: Architecture, config: Any, trained: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """What `stored_parameters` gives, of what `trained_parameters` gives."""
    if hasattr(config, "folded"):
        trained = trained_parameters(arch, config.replace(folded=True))
    constants = constant_parameters(arch, config) if getattr(config, "stores_constants", False) else {}
    return {**trained, **constants}


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
        shapes = {**arch.shapes, **{name: arch[owner] for name, owner in arch.tied.items()}}
        head = {name: shape for name, shape in shapes.items() if name.startswith(("lm_head.", "proj_out."))}
        if not head:
            raise ValueError(f"{arch.name} has no language-model head to train alone")
        return head
    config = _resolved(arch, config)
    paths = _paths(arch)
    saved = config.resolve_saved(paths)
    trained: dict[str, Shape] = {}
    for name, kind, shape in _weights(arch):
        path, attribute = _path(name, kind), name.rpartition(".")[2]
        if any(f"{path}.".startswith(f"{module}.") for module in saved):
            trained[f"{path}.modules_to_save.{attribute}"] = shape
            continue
        if kind == "bias" and config.target_modules == "all-linear" and paths.get(path) not in ("linear", "conv1d"):
            continue
        for key, added in _added(config, path, kind, shape).items():
            copied = "modules_to_save." if f"{path}.{key}" in arch else ""  # BitFit's bias, beside the frozen one
            trained[f"{path}.{copied}{key}"] = added
    for path, kind in paths.items():
        named = isinstance(config.target_modules, list)  # a regular expression may match what holds the layers, too
        kinds = (*config.kinds, *(EXPERTS if config.peft_type == "LORA" else ()))
        if named and config.kinds and config.targets(path, kind) and kind not in kinds:
            what = f"of the kind {kind}" if kind else "not a layer but several"
            works = f"{type(config).__name__} works on {', '.join(config.kinds)}"
            raise ValueError(f"target_modules: {path!r} of {arch.name} is {what}; {works}")
    if not trained and config.target_modules is None:
        raise ValueError(f"{type(config).__name__} trains nothing of {arch.name}: no parameter there is of its kind")
    config.check_names(paths, trained)
    return trained


def virtual_tokens(config: Any) -> tuple[int, int]:
    """(how many positions a method puts in front of the input, how many keys and values in front of every layer's)."""
    n = getattr(config, "num_virtual_tokens", 0)
    return (0, n) if getattr(config, "peft_type", "") == "PREFIX_TUNING" else (n, 0)


def trained_name(name: str) -> str:
    """The model's own name of a parameter that a method trains as a copy."""
    return re.sub(r"\.(modules_to_save|ln_tuning_layers)\.", ".", name)


EXPERTS = ("router", "experts")  # kinds
# model_type -> what PEFT (0.21.2) takes the names of the experts' layers for, which transformers 5 has no more
ONCE = {
    "mixtral": {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen3_moe": {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
}


def _added(config: Any, path: str, kind: str, shape: Shape) -> Mapping[str, Shape]:
    """The parameters that a method adds for one of the model's."""
    if kind not in EXPERTS or config.peft_type != "LORA":
        return config.parameter_shapes(path, kind, shape)
    if not config.targets(path, "linear"):
        return {}
    if config.use_dora:
        raise ValueError(f"{path}: DoRA is not defined for experts in one array; leave use_dora out, or their names")
    E, (n_out, n_in) = shape[0] if kind == "experts" else 1, shape[-2:]
    r = config.rank(path) * E * (2 if path.endswith("gate_up_proj") else 1)
    return {"lora_A.weight": (r, n_in), "lora_B.weight": (n_out, r)}


def constant_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of what a method adds and never trains. Raises ValueError for what is no method."""
    if config is None or isinstance(config, str):
        return {}
    config = _resolved(arch, config)
    layers = {
        _path(name, kind): (kind, shape)
        for name, kind, shape in _weights(arch)
        if kind in config.kinds and config.targets(_path(name, kind), kind)
    }
    return config.constant_shapes(layers)


def _resolved(arch: Architecture, config: Any) -> Any:
    """The configuration with its targets, or a model's dimensions, filled in.

    Of a family's usual targets a model may have some; of experts, the names are those of today's arrays.
    """
    if not hasattr(config, "parameter_shapes"):
        what = "None (full fine-tuning), 'head', 'frozen' or a method's configuration"
        raise ValueError(f"config must be {what}, not {config!r}")
    dimensions = SimpleNamespace(model_type=arch.model_type, **arch.dimensions)
    resolved = config.with_targets(SimpleNamespace(config=arch.config or dimensions))
    targets = resolved.target_modules
    if isinstance(targets, list):
        if config.target_modules is None:
            targets = [name for name in targets if any(matches([name], path) for path in _paths(arch))] or targets
        if config.peft_type == "LORA":
            once = ONCE.get(arch.model_type, {})
            half = {n for n in targets if once.get(n) == "gate_up_proj"}
            if len(half) == 1:
                both = " and ".join(name for name, new in once.items() if new == "gate_up_proj")
                raise ValueError(f"target_modules: {both} of {arch.name} are one array: name both or neither")
            targets = list(dict.fromkeys(once.get(name, name) for name in targets))
    return resolved if targets == resolved.target_modules else resolved.replace(target_modules=targets)


def _weights(arch: Architecture) -> Iterable[tuple[str, str, Shape]]:
    """(name, kind, shape) of every parameter under every name: a tied head is a linear layer too."""
    for name in (*arch, *arch.tied):
        yield name, "linear" if name in arch.tied else arch.kinds[name], arch[arch.tied.get(name, name)]


def _paths(arch: Architecture) -> dict[str, str]:
    """path -> kind of every module; "" for one that only holds others."""
    paths: dict[str, str] = {}
    for name, kind, _ in _weights(arch):
        path = _path(name, kind)
        if path.rpartition(".")[0] not in paths:  # of what is known, so is all that holds it
            for i, character in enumerate(path):
                if character == ".":
                    paths.setdefault(path[:i], "")
        if kind != "bias":
            paths[path] = kind
    return paths


def _path(name: str, kind: str) -> str:
    """The path of the module that a parameter belongs to; experts in one array are their own."""
    return name if kind == "experts" else name.rpartition(".")[0]


def elements(shapes: Mapping[str, Shape], only: str | None = None) -> int:
    """The number of elements of all shapes, or of those whose whole name matches `only`."""
    return sum(math.prod(shape) for name, shape in shapes.items() if only is None or match(only, name, whole=True))
