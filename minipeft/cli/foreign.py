"""Modules of the user's own, from the working directory, from what is installed, or a file: functions, and plugins."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .arguments import Parser, nearest


def imported(module: str, given: str) -> ModuleType:
    """The module. ValueError, with the option and its value as they were `given`, where it cannot be imported."""
    if os.getcwd() not in sys.path:  # and it stays: a function may import more when it is called
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        with no_bytecode():
            return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign module can raise
        hint = f" (a module's name has no .py: {module.removesuffix('.py')})" * module.endswith(".py")
        raise ValueError(f"{given}: cannot import {module} ({type(error).__name__}: {error}){hint}") from error


@contextmanager
def no_bytecode() -> Iterator[None]:
    """No __pycache__ beside the user's file."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def function_in_file(path: str, name: str) -> Callable[..., Any]:
    """The function of this name that a Python file defines. ValueError where it cannot be run, or defines none."""
    with open(path, "rb"):  # a missing file has its usual sentence
        spec = importlib.util.spec_from_file_location("answer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: must be a Python file, FILE.py")
    module = importlib.util.module_from_spec(spec)
    try:
        with no_bytecode():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign file can raise
        raise ValueError(f"{path} stops ({type(error).__name__}: {error})") from error
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name!r}{nearest(name, vars(module))}")
    return function


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


def take_plugins(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the command line without --plugin MODULE, those modules, which are imported).

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
    return rest, args.plugin
