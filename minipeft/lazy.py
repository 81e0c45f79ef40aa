"""What is imported when it is first used, so that importing the package costs little: public names, and extras."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package whose source imports its public names for type checkers:

        if TYPE_CHECKING:
            from . import schedule as schedule  # a module
            from .trainer import Trainer as Trainer  # a name that a module defines
        else:
            __getattr__, __dir__, __all__ = lazy(__name__)

    Type checkers and editors read the block; at run time each of its imports is made when the name is first used. The
    modules that names come from (`trainer`) are attributes too, but are not in `__all__`. `__getattr__` raises
    AttributeError for any other name. Source of the idea: lazy_loader, Scientific Python's SPEC 1 (there, a stub file).
    """
    places: dict[str, tuple[str, str]] = {}  # public name -> (module, the name there or "")
    for statement in ast.parse(sys.modules[package].__loader__.get_source(package)).body:
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Name):
            for line in filter(lambda line: isinstance(line, ast.ImportFrom), statement.body):
                for alias in line.names:
                    home = (f".{line.module}", alias.name) if line.module else (f".{alias.name}", "")
                    places[alias.asname or alias.name] = home
    inside = {module[1:]: (module, "") for module, _ in places.values() if "." not in module[1:]}

    def get(name: str) -> Any:
        if name not in places and name not in inside:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = places.get(name) or inside[name]
        value = importlib.import_module(module, package)
        value = getattr(value, attribute) if attribute else value
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*places, *inside}), list(places)


def extra(module: str, name: str, what: str) -> Any:
    """A module that the extra `name` of this package brings; ImportError says what takes it, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} takes the package {package}: pip install 'minipeft[{name}]'") from error
