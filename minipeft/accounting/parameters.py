"""How many parameters a method trains, stores for a task, and leaves in the model: from shapes, without the model.

Conventions. A tied parameter counts once, a head as the model has it (GPT-2's tied `lm_head` adds nothing). Parameters
are logical ones: a weight packed into 4 bits counts each of its values. Frozen constants that a method adds (VeRA's
shared projections, say) count in the total if the configuration lists them, and are not trained.

A method's rule is its configuration's own `parameter_shapes(name, kind, shape) -> {name: shape}`, the one that its
modules are built with: for a weight or bias of the module called `name`, the parameters that the method trains there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .architectures import Architecture, Shape, architecture


@dataclass(frozen=True)
class ParameterCount:
    """trainable: updated by the optimizer; stored: written to the task's own file; total: in the adapted model."""

    trainable: int
    stored: int
    total: int

    @property
    def share(self) -> float:
        """trainable / total, what `print_trainable_parameters` prints as trainable%."""
        return self.trainable / self.total if self.total else 0.0


def trained_parameters(arch: Architecture, config: Any = None) -> Mapping[str, Shape]:
    """name -> shape of the parameters that are trained: those of `arch` itself (full fine-tuning), or ones added to it.

    Args:
        config: a method's configuration; None is full fine-tuning, "head" the language model's head alone, "frozen"
            nothing at all. A tied head that is trained alone is untied, as `nn.heads.head_only` does.

    Raises ValueError for a name that is no method and for a model without a head.
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
    if not hasattr(config, "parameter_shapes"):
        raise ValueError(
            f"config must be None (full fine-tuning), 'head', 'frozen' or a method's configuration, not {config!r}"
        )
    config = config.with_targets(SimpleNamespace(config=arch.config or arch))
    saved = config.modules_to_save or ()
    trained: dict[str, Shape] = {}
    for name in (*arch, *arch.tied):
        shape = arch[arch.tied.get(name, name)]
        path, _, attribute = name.rpartition(".")
        if any(f".{module}." in f".{path}." for module in saved):
            trained[f"{path}.modules_to_save.{attribute}"] = shape
            continue
        kind = "linear" if name in arch.tied else arch.kinds[name]
        for key, added in config.parameter_shapes(path, kind, shape).items():
            place = f"{path}.{key}"
            if place in arch:  # BitFit's bias: a copy, beside the frozen one
                place = f"{path}.modules_to_save.{key}"
            trained[place] = added
    if not trained:
        raise ValueError(
            f"{type(config).__name__} trains nothing of {arch.name}: no module matches target_modules="
            f"{config.target_modules!r}; its modules are called {', '.join(_last_names(arch))}"
        )
    return trained


def _last_names(arch: Architecture) -> list[str]:
    """The last parts of the module paths, each once."""
    return list(dict.fromkeys(name.split(".")[-2] for name in arch))


def count_parameters(model: Any, config: Any = None) -> ParameterCount:
    """Trainable, stored and total parameters of a model under a method.

    `model` is an `Architecture`, or what `architecture` takes; `config` as in `trained_parameters`. What is trained is
    stored, but for what only computes it (a prefix's or a prompt's network): a method's `inference_mode` is without.
    Raises ValueError as they do.
    """
    arch = model if isinstance(model, Architecture) else architecture(model)
    trained = trained_parameters(arch, config)
    folded = config.replace(inference_mode=True) if hasattr(config, "inference_mode") else config
    needed = trained_parameters(arch, folded)
    n, stored = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (trained, needed))
    added = sum(math.prod(shape) for name, shape in trained.items() if name not in arch.shapes)
    return ParameterCount(trainable=n, stored=stored, total=arch.size + added)
