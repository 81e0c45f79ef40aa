"""A function of the user's own, by name: `module:name`, imported from the working directory or from what is installed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .arguments import nearest


def load_function(text: str, flag: str) -> Callable[..., Any]:
    """What `text`, "module:name", names. ValueError, beginning with the flag, where there is no such function."""
    module, colon, name = text.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        file = module.removesuffix(".py") or "module"
        raise ValueError(f"{flag} must be MODULE:NAME, such as {file}:reward for a function of {file}.py, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            where = f"neither here ({os.getcwd()}) nor installed"
            raise ValueError(f"{flag} {text}: there is no module {error.name!r}, {where}") from error
        raise ValueError(f"{flag} {text}: importing {module} raised {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise ValueError(f"{flag} {text}: the module {module} has no {name!r}{nearest(name, vars(found))}")
    if not callable(function := getattr(found, name)):
        raise ValueError(f"{flag} {text}: is no function but a {type(function).__name__}")
    return function
