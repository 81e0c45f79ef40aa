"""Modules of the user's own, imported from the working directory or from what is installed: functions, and plugins."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .arguments import Parser, nearest


def imported(module: str, given: str) -> ModuleType:
    """The module. ValueError, with the option and its value as they were `given`, where it cannot be imported."""
    if os.getcwd() not in sys.path:  # and it stays: a function may import more when it is called
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside the user's file
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign module can raise
        hint = f" (a module's name has no .py: {module.removesuffix('.py')})" * module.endswith(".py")
        raise ValueError(f"{given}: cannot import {module} ({type(error).__name__}: {error}){hint}") from error
    finally:
        sys.dont_write_bytecode = bytecode


def load_function(text: str, flag: str) -> Callable[..., Any]:
    """The function that `text`, "module:name", names. ValueError, with the option's flag, where there is none."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        file = module.removesuffix(".py") or "my_module"
        raise ValueError(f"{flag} {text}: must be MODULE:NAME, such as {file}:my_function of {file}.py")
    found = imported(module, f"{flag} {text}")
    if not callable(function := getattr(found, name, None)):
        raise ValueError(f"{flag} {text}: {module} has no function {name!r}{nearest(name, vars(found))}")
    return function


def take_plugins(argv: list[str]) -> list[str]:
    """The command line without --plugin MODULE, whose modules are imported.

    Raises ValueError for one that cannot be imported, and for one that registers no method.
    """
    parser = Parser(prog="minipeft", add_help=False)
    parser.add_argument("--plugin", action="append", default=[])
    args, rest = parser.parse_known_args(argv)
    for name in args.plugin:
        from ..peft.methods import METHODS  # only where it is needed: a list of the commands appears at once

        before = {**METHODS} if name not in sys.modules else {}
        imported(name, f"--plugin {name}")
        if before == METHODS:
            how = "put @minipeft.peft.register before a configuration class"
            raise ValueError(f"--plugin {name} registers no method: {how}")
    return rest
