"""What a model answers, and how good that is.

config.py     how an answer is generated         scores.py     `evaluate`: loss, exact match, chrF, a metric of your own;
answers.py    `ask`: from prompts to answers                   the accuracy on multiple choice
cloze.py      general items, from held-out text  intervals.py  95 % confidence intervals

A public name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .answers import (
        answer_turns as answer_turns, ask as ask, asked_turns as asked_turns, stop_tokens as stop_tokens,
    )  # fmt: skip
    from .cloze import general_cloze as general_cloze
    from .config import GenerationConfig as GenerationConfig
    from .intervals import Estimate as Estimate, mean as mean, share as share
    from .scores import Evaluation as Evaluation, evaluate as evaluate
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
