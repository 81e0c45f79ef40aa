"""What a model answers to prompts.

config.py     how an answer is generated
answers.py    `ask`: from prompts to answers

A public name is imported when it is first used.
"""

from ..lazy import lazy

_HOMES = {
    "answers": "answer_turns ask asked_turns stop_tokens",
    "config": "GenerationConfig",
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES)
