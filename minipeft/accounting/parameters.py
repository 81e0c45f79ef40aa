"""How many parameters a method trains, stores for a task, and leaves in the model: from shapes, without the model.

Conventions. A tied parameter counts once, a head as the model has it (GPT-2's tied `lm_head` adds nothing). Parameters
are logical ones: a weight packed into 4 bits counts each of its values. Frozen constants that a method adds (VeRA's
shared projections, say) count in the total if the configuration lists them, and are not trained.

A method's rule is its configuration's own `parameter_shapes(name, kind, shape) -> {name: shape}`, the one that its
modules are built with: for a parameter of the base, the parameters that the method trains for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
    """name -> shape of the parameters that are trained; names that `arch` has are its own, the others are added.

    Args:
        config: a method's configuration; None is full fine-tuning, "head" the language model's (or, without one, no)
            head alone, "frozen" nothing at all. A tied head that is trained alone is untied, as `nn.heads.head_only` does.

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
        raise ValueError(f"config must be None (full fine-tuning), 'head', 'frozen' or a method's configuration, not {config!r}")
    trained: dict[str, Shape] = {}
    for name, shape in arch.items():
        trained.update(config.parameter_shapes(name, arch.kinds[name], shape))
    return trained


def count_parameters(model: Any, config: Any = None) -> ParameterCount:
    """Trainable, stored and total parameters of a model (an `Architecture`, or what `architecture` takes) under a method.

    `config` as in `trained_parameters`. What is trained is stored.
    """
    arch = model if isinstance(model, Architecture) else architecture(model)
    trained = trained_parameters(arch, config)
    n = sum(math.prod(shape) for shape in trained.values())
    added = sum(math.prod(shape) for name, shape in trained.items() if name not in arch.shapes)
    return ParameterCount(trainable=n, stored=n, total=arch.size + added)
