"""Experiments: what a run costs, learns and forgets, and sweeps over settings.

A public name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from . import costs as costs, shipped as shipped, sweep as sweep
    from .rows import read_rows as read_rows
    from .run import Settings as Settings, fine_tune as fine_tune
    from .seeds import interval as interval
    from .tables import means as means, plot as plot, table as table
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
