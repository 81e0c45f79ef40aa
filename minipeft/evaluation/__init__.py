"""What a model answers, and how good that is.

config.py     how an answer is generated         scores.py     `evaluate`: loss, exact match, chrF, a metric of your own;
answers.py    `ask`: from prompts to answers                   the accuracy on multiple choice
cloze.py      general items, from held-out text  intervals.py  95 % intervals of means and shares

A public name is imported when it is first used.
"""

from ..lazy import lazy

_HOMES = {
    "answers": "answer_turns ask asked_turns stop_tokens",
    "cloze": "general_cloze",
    "config": "GenerationConfig",
    "intervals": "Estimate mean share",
    "scores": "Evaluation evaluate",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
