"""The arithmetic of fine-tuning, from shapes alone: tables, counts and bytes of models; the published figures audited."""

from .architectures import Architecture, architecture
from .memory import MemoryLedger, Precision, measure_peak, memory_ledger
from .parameters import ParameterCount, count_parameters
from .ppo import ppo_ledger
from .published import audit, read_published

__all__ = [
    "Architecture", "MemoryLedger", "ParameterCount", "Precision", "architecture", "audit", "count_parameters",
    "measure_peak", "memory_ledger", "ppo_ledger", "read_published",
]  # fmt: skip
