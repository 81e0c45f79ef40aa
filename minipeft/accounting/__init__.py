"""The arithmetic of fine-tuning, from shapes alone: tables, counts and bytes of models; the published figures audited.

A public name is imported when it is first used: counting parameters loads neither a method nor an optimizer, and a
ledger loads what its own step runs.
"""

from ..lazy import lazy

_HOMES = {
    "architectures": "Architecture architecture",
    "parameters": "ParameterCount count_parameters",
    "precision": "Precision",
    "memory": "MemoryLedger measure_peak memory_ledger",
    "shapes": "rule",
    "ppo": "ppo_ledger",
    "published": "audit read_published",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
