"""Training: optimizers, schedules, the loop, callbacks, checkpoints.

A public name is imported when it is first used, so the options of a command load no NumPy.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "arguments": "TrainingArguments",
    "batches": "Batch collate collate_packed pack",
    "callbacks": "Callback",
    "checkpoint": "CheckpointError last_checkpoint list_checkpoints load_checkpoint save_checkpoint",
    "evaluation": "evaluate",
    "metrics": "plot_loss",
    "optim": "SGD Adam AdamW NonFiniteGradient Optimizer clip_grad_norm",
    "run": "Run",
    "schedule": "",
    "divergence": "TrainingDiverged",
    "trainer": "Trainer TrainingResult",
}
_OBJECTS = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = list(_OBJECTS)


def __getattr__(name: str) -> Any:
    if name not in _OBJECTS and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_OBJECTS.get(name, name)}")
    value = getattr(module, name) if name in _OBJECTS else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
