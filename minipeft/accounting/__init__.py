"""The arithmetic of fine-tuning, from shapes alone: tables, counts and bytes of models; the published figures audited.

A public name is imported when it is first used: counting parameters loads neither a method nor an optimizer, and a
ledger loads what its own step runs.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "architectures": "Architecture architecture",
    "parameters": "ParameterCount count_parameters",
    "precision": "Precision",
    "memory": "MemoryLedger measure_peak memory_ledger",
    "ppo": "ppo_ledger",
    "published": "audit read_published",
}
_OBJECTS = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = list(_OBJECTS)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _OBJECTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_OBJECTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_HOMES])
