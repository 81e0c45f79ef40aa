"""The arithmetic of fine-tuning: shapes of published models, parameter counts, and bytes of memory, without allocating."""

from .architectures import Architecture, architecture

__all__ = ["Architecture", "architecture"]
