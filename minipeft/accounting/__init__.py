"""The arithmetic of fine-tuning: shapes of published models, parameter counts, bytes of memory; none is allocated."""

from .architectures import Architecture, architecture
from .memory import MemoryLedger, Precision, measure_peak, memory_ledger
from .parameters import ParameterCount, count_parameters

__all__ = [
    "Architecture", "MemoryLedger", "ParameterCount", "Precision", "architecture", "count_parameters", "measure_peak",
    "memory_ledger",
]  # fmt: skip
