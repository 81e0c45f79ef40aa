"""The textbook on trial: what every overview of fine-tuning teaches, each statement judged by a rule, from numbers.

A public name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .register import (
        Experiment as Experiment, Number as Number, Rule as Rule, Statement as Statement, Verdict as Verdict,
        claim as claim, judge as judge, rule_of as rule_of, statements as statements,
    )  # fmt: skip
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
