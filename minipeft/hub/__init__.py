"""Models from files and into them: Hugging Face directories, GGUF files, and the base model that ships with the package."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # each is imported when it is first used
    from . import base as base, configuration as configuration, gguf as gguf, pretrained as pretrained
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
