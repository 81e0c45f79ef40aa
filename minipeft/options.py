"""One declaration an option: a field that carries its default, its range and its help.

    @configuration
    class Settings:
        learning_rate: float = option(1e-3, "peak learning rate", above=0, flag="--lr")
        max_steps: int | None = option(None, "optimizer steps; None: as many as the epochs have", least=1)

Three things follow from it, so they cannot disagree: the check of every value (`check`, when a `Settings` is made), the
flags of a command (`add_options`, `from_arguments`), and the list of options at the end of the class's docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, wraps
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints, overload

C = TypeVar("C")
REQUIRED: Any = dataclasses.MISSING  # in place of a default


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Collection[Any] | None = None,
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field: `default` (lists, dicts are copied) or REQUIRED, one line of `help`, and the range
    least <= value <= most or above < value < below, or the `choices`, as they are when a value is checked. None is
    allowed where the annotation says so. `flag` (or several, "-r --rank") and `metavar` are the command line's; by
    default --name-of-the-field, and the kind of value.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"help": help, "choices": choices, "flag": flag, "metavar": metavar}
    metadata |= {name: value for name, value in limits.items() if value is not None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@overload
def configuration(cls: type[C]) -> type[C]: ...


@overload
def configuration(*, frozen: bool = False, kw_only: bool = False) -> Callable[[type[C]], type[C]]: ...


# To type checkers an option is a plain default: of a field specifier they would read the keyword `default` alone.
@dataclass_transform(field_specifiers=(dataclasses.field,))
def configuration(cls: type | None = None, **arguments: Any) -> Any:
    """`dataclass(**arguments)`, whose docstring also lists the options, and whose values are checked (ValueError).

    A class that has a `__post_init__` calls `check(self)` there itself, or its parent's that does. TypeError for an
    option that the class does not have, with the nearest ones that it has.
    """
    if cls is None:
        return lambda cls: configuration(cls, **arguments)
    if not hasattr(cls, "__post_init__"):
        cls.__post_init__ = check
    cls = dataclasses.dataclass(**arguments)(cls)
    cls.__doc__ = f"{(cls.__doc__ or cls.__name__).rstrip()}\n\n    Options:\n{_table(cls)}"
    cls.__init__ = _naming_neighbors(cls)
    return cls


def _naming_neighbors(cls: type) -> Callable[..., None]:
    """The class's `__init__`, which says of an unknown option what may have been meant."""
    init, names = cls.__init__, {f.name: f.name for f in dataclasses.fields(cls) if f.init}
    flags = {f.metadata["flag"].strip("-"): f.name for f in _options(cls) if f.init and f.metadata["flag"]}

    @wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                known = {**flags, **names}
                near = [known[n] for n in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
                raise TypeError(
                    f"{cls.__name__} has no option {name!r}; "
                    + (f"nearest: {', '.join(dict.fromkeys(near))}" if near else f"it has {', '.join(names)}")
                )
        init(self, *args, **options)

    return __init__


def check(config: Any, error: type[Exception] = ValueError) -> None:
    """Raises `error`, "<name> must be <what>, got <value>", for the first option whose type or value is wrong.

    NumPy's scalars become Python's, and sets sorted lists, so that a file can hold them.
    """
    for field in _options(type(config)):
        given = getattr(config, field.name)
        value = _plain(given)
        if value is not given:
            object.__setattr__(config, field.name, value)
        if not fits(value, _hints(type(config))[field.name]) or not (value is None or _within(value, field.metadata)):
            raise error(f"{field.name} must be {_wanted(type(config), field)}, got {given!r}")


def check_flags(**given: Any) -> None:
    """Raises TypeError for a text where True or False belongs: "false" would count as true."""
    for name, value in given.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be True or False, not the text {value!r}")


def add_options(
    parser: Any, cls: type, *names: str, defaults: Mapping[str, Any] | None = None, **helps: str
) -> None:
    """Flags for fields of a configuration (default: all its options) in an argparse parser or group.

    `defaults` are a command's own; None stands for "the command finds it out", and the help says how: "; None: so" at
    its end is shown as the default. `helps` replaces the help of a field in this command. A flag that takes several
    values may be given again.
    """
    fields, defaults = {f.name: f for f in _options(cls)}, defaults or {}
    for name in names or fields:
        field = fields[name]
        kinds = [kind for kind in _kinds(_hints(cls)[name]) if kind is not NoneType]
        flags = flags_of(field)
        text, none, usual = helps.get(name, field.metadata["help"]).replace("%", "%%").partition("; None: ")
        text += f" (default: {usual})" if none else ""
        default = defaults.get(name, _default(field))
        common: dict[str, Any] = {"dest": name, "default": default}
        if default is REQUIRED:
            common |= {"default": None, "required": True}
        if kinds == [bool]:
            if default is None:
                common["action"] = argparse.BooleanOptionalAction
            else:
                common["action"] = "store_false" if default else "store_true"
            if default:
                flags = [f"--no-{flag.removeprefix('--no-').lstrip('-')}" for flag in flags]
            parser.add_argument(*flags, help=f"{'not: ' if default else ''}{text}", **common)
            continue
        if bool in kinds:  # a switch that may take a value
            kinds.remove(bool)
            common |= {"nargs": "?", "const": True}
        inner = kinds[0]
        if get_origin(inner) in (list, tuple):
            inner = get_args(inner)[0]
            common |= {"nargs": "+", "action": "extend"}
        choices = field.metadata["choices"]
        if choices:
            common["choices"] = tuple(c for c in choices if c is not None)
        if not choices or field.metadata["metavar"]:
            usual = {int: "N", float: "X"}.get(inner, "NAME" if "nargs" in common else "TEXT")
            common["metavar"] = field.metadata["metavar"] or usual
        if not (default is None or default is False or default is REQUIRED):
            text += f" (default: {_shown(default)})"
        parser.add_argument(*flags, type=reader(inner, field.metadata), help=text, **common)


def flags_of(field: dataclasses.Field) -> list[str]:
    """What the command line calls an option: ["-r", "--rank"]."""
    return (field.metadata["flag"] or f"--{field.name.replace('_', '-')}").split()


def from_arguments(cls: type, given: argparse.Namespace | Mapping[str, Any], **fixed: Any) -> Any:
    """A configuration from a parsed command line: its own fields that are given there, and `fixed` ones.

    Raises what the class raises for a wrong value.
    """
    values = given if isinstance(given, Mapping) else vars(given)
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(**{**{k: v for k, v in values.items() if k in names}, **fixed})


# -------------------------------------------------------------------------------------------------- from annotations


def _options(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. A bool is no number; an integer is a float, of 64 bits; NaN is none."""
    kinds = _kinds(hint)
    if len(kinds) > 1:
        return any(fits(value, kind) for kind in kinds)
    origin, inside = get_origin(hint), get_args(hint)
    if hint in (int, float):
        number = isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
        return number and -_LARGEST[hint] <= value <= _LARGEST[hint]
    if origin in (list, tuple, set, frozenset):
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(v, inside[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    return hint is Any or not isinstance(origin or hint, type) or isinstance(value, origin or hint)


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's and sets as sorted lists, in containers too; what has none of them as it is."""
    numpy = sys.modules.get("numpy")  # not imported here: a value of its types exists only where it has been
    if numpy and isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return [_plain(v) for v in sorted(value, key=lambda v: (str(type(v)), v))]
    if isinstance(value, dict) and any(_plain(v) is not v for v in value.values()):
        return {k: _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple) and any(_plain(v) is not v for v in value):
        return type(value)(map(_plain, value))
    return value


_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}


def _within(value: Any, metadata: Mapping[str, Any]) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_within(v, metadata) for v in value)
    if metadata.get("choices") is not None:
        return any(value is c or (type(value) is type(c) and value == c) for c in metadata["choices"])
    if isinstance(value, dict):
        return all(_within(v, metadata) for v in value.values())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return (
        value >= metadata.get("least", -math.inf)
        and value > metadata.get("above", -math.inf)
        and value <= metadata.get("most", math.inf)
        and value < metadata.get("below", math.inf)
    )


def _wanted(cls: type, field: dataclasses.Field) -> str:
    """"an integer of at least 1, or None"."""
    if field.metadata["choices"] is not None:
        return f"one of {', '.join(map(str, field.metadata['choices']))}"
    return ", or ".join(dict.fromkeys(_words(kind, field.metadata) for kind in _kinds(_hints(cls)[field.name])))


def _words(kind: Any, metadata: Mapping[str, Any]) -> str:
    names = {int: "an integer", float: "a finite number", bool: "True or False", str: "a text", NoneType: "None"}
    if kind not in (int, float):
        inside = [_words(k, metadata) for k in get_args(kind)]
        origin = get_origin(kind) or kind
        if origin in (list, tuple):
            return f"a list, each {inside[0]}" if inside else "a list"
        if origin is dict:
            return f"a dictionary, each value {inside[1]}" if inside else "a dictionary"
        return names.get(kind, f"a {getattr(kind, '__name__', kind)}")
    limits = {"least": "of at least {}", "above": "above {}", "most": "at most {}", "below": "below {}"}
    said = [text.format(f"{metadata[name]:g}") for name, text in limits.items() if name in metadata]
    name = "a number" if said and kind is float else names[kind]
    return f"{name} {' and '.join(said)}".rstrip()


def reader(kind: Any, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """From a command line's text to a value of a kind, in the limits of an option's metadata: argparse's `type`.

    The function raises ArgumentTypeError for any other text.
    """

    def read(text: str) -> Any:
        try:
            value = kind(text) if kind in (int, float) else text
        except ValueError:
            value = None
        choices = metadata.get("choices")  # argparse looks at them itself, and lists them
        if value is None or not fits(value, kind) or (not choices and not _within(value, metadata)):
            raise argparse.ArgumentTypeError(f"must be {_words(kind, metadata)}, not {text!r}")
        return value

    return read


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _table(cls: type) -> str:
    rows = [(f.name, _default(f), f.metadata["help"]) for f in _options(cls)]
    width = max((len(name) for name, _, _ in rows), default=0)
    return "".join(f"        {name:{width}}  {text} (default: {default!r})\n" for name, default, text in rows)
