"""Layers and the transformer, with PyTorch's names."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from . import generation as generation, heads as heads, transformer as transformer
    from .layers import (
        Conv1D as Conv1D, Dropout as Dropout, Embedding as Embedding, LayerNorm as LayerNorm, Linear as Linear,
        RMSNorm as RMSNorm,
    )  # fmt: skip
    from .module import (
        Module as Module, ModuleList as ModuleList, Parameter as Parameter, Sequential as Sequential,
    )  # fmt: skip
    from .watch import gradient_norms as gradient_norms
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
