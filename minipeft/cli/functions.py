"""A function of the user's own, by name: `module:name`, imported from the working directory or from what is installed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .arguments import nearest


def load_function(text: str, flag: str) -> Callable[..., Any]:
    """The function that `text`, "module:name", names. ValueError, with the option's flag, where there is none."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        file = module.removesuffix(".py") or "my_module"
        raise ValueError(f"{flag} {text}: must be MODULE:NAME, such as {file}:my_function of {file}.py")
    if os.getcwd() not in sys.path:  # and it stays: the function may import more when it is called
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign module can raise
        raise ValueError(f"{flag} {text}: cannot import {module} ({type(error).__name__}: {error})") from error
    if not callable(function := getattr(found, name, None)):
        raise ValueError(f"{flag} {text}: {module} has no function {name!r}{nearest(name, vars(found))}")
    return function
