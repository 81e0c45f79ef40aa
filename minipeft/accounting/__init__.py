"""The arithmetic of fine-tuning: shapes of published models, parameter counts, bytes of memory; none is allocated."""

from .architectures import Architecture, architecture
from .memory import MemoryLedger, Precision, measure_peak, memory_ledger
from .parameters import ParameterCount, count_parameters
from .ppo import ppo_ledger

__all__ = [
    "Architecture", "MemoryLedger", "ParameterCount", "Precision", "architecture", "count_parameters", "measure_peak",
    "memory_ledger", "ppo_ledger",
]  # fmt: skip
