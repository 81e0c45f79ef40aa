"""What is imported when it is first used, so that importing the package costs little: public names, and extras."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its `__name__`.
        homes: module -> the names that are defined there, separated by spaces; the modules themselves are names
            too, but are not in `__all__`.
        modules: more names, which are modules -> where these are.

    Type checkers take every attribute of such a package for Any. AttributeError for a name that is not listed.
    """
    modules = modules or {}
    places = {name: module for module, names in homes.items() for name in names.split()}
    listed, inside = [*places, *modules], {home: home for home in homes if "." not in home}

    def get(name: str) -> Any:
        place = places.get(name) or {**inside, **modules}.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = importlib.import_module(f"{package}.{place}")
        value = getattr(value, name) if name in places else value
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*listed, *inside}), listed


def extra(module: str, name: str, what: str) -> Any:
    """A module that the extra `name` of this package brings; ImportError says what takes it, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} takes the package {package}: pip install 'minipeft[{name}]'") from error
