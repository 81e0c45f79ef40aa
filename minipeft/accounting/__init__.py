"""The arithmetic of fine-tuning, from shapes alone: tables, counts and bytes of models; the published figures audited.

A public name is imported when it is first used: counting parameters loads neither a method nor an optimizer, and a
ledger loads what its own step runs.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .architectures import Architecture as Architecture, architecture as architecture
    from .parameters import ParameterCount as ParameterCount, count_parameters as count_parameters
    from .precision import Precision as Precision
    from .memory import MemoryLedger as MemoryLedger, measure_peak as measure_peak, memory_ledger as memory_ledger
    from .loop import Loop as Loop
    from .pytorch_loop import pytorch_ledger as pytorch_ledger
    from .flops import step_flops as step_flops
    from .shapes import rule as rule
    from .timelines import Timeline as Timeline, timeline as timeline, what_ifs as what_ifs
    from .ppo import ppo_ledger as ppo_ledger
    from .published import audit as audit, read_published as read_published
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
