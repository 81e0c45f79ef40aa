"""Text: the tokenizer, prompt templates, data sets, examples to train on, and the corpora that ship with it."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # each is imported when it is first used
    from . import (
        chat as chat, corpora as corpora, datasets as datasets, examples as examples, instructions as instructions,
        tasks as tasks, templates as templates, tokenizer as tokenizer,
    )  # fmt: skip
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
