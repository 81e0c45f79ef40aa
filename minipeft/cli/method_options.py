"""--method and its options, the same in every command that trains, counts or measures: what the method's name means in
`peft.methods.METHODS`, changed by the options.

One flag serves all methods that have what it sets (`FIELDS`), and a command's help loads no method: so the flags stand
here, while the fields' ranges and checks are those of the methods' configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import reader
from ..peft.methods import METHODS, Method
from .arguments import nearest, positive, positive_int

if TYPE_CHECKING:
    from ..accounting import Architecture

_NAMES = {"nargs": "+", "metavar": "NAME"}
_NUMBER, _FACTOR = {"type": positive_int, "metavar": "N"}, {"type": positive, "metavar": "X"}
_ALPHA = {"type": reader(float, {}), "metavar": "X"}
_SHARE = {"type": reader(float, {"least": 0, "below": 1}), "metavar": "P"}
_LAYERS, _SWITCH = {"nargs": "+", "type": int, "metavar": "N"}, {"action": argparse.BooleanOptionalAction}

# flag -> (the configuration's fields that it sets, the first that the method has; help; what else argparse takes)
FIELDS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "rank": (("r", "target_r"), "rank; adalora's at the end, from 1.5 N; oft: number of a layer's blocks", _NUMBER),
    "alpha": (("lora_alpha", "alpha"), "numerator of the scaling of lora and its kin; stays as it is where -r changes", _ALPHA),
    "dropout": (("lora_dropout", "vera_dropout"), "dropout of the adapter's input", _SHARE),
    "target": (("target_modules",), "modules to adapt, by ends of their paths, or all-linear", _NAMES),
    "exclude": (("exclude_modules",), "modules that are left out", _NAMES),
    "layers": (("layers_to_transform",), "only these layers, of the modules of --target", _LAYERS),
    "modules_to_save": (("modules_to_save",), "modules trained whole beside it, as copies", _NAMES),
    "virtual_tokens": (("num_virtual_tokens",), "of prompt, prefix, p-tuning", _NUMBER),
    "projection": (("prefix_projection",), "prefix: whether an MLP computes it in training", _SWITCH),
    "hidden_size": (("encoder_hidden_size",), "width of the MLP of prefix and p-tuning", _NUMBER),
    "placement": (("placement",), "of a bottleneck: houlsby, pfeiffer or parallel", {"metavar": "NAME"}),
    "bottleneck": (("bottleneck_size",), "width of a bottleneck, or", _NUMBER),
    "reduction": (("reduction_factor",), "how many times narrower it is", _FACTOR),
}


def add_method(parser: argparse.ArgumentParser, *more: str) -> None:
    """--method, of METHODS and `more`, and its options."""
    parser.add_argument("--method", choices=(*METHODS, *more), help="default: full (all parameters)")
    add_method_options(parser)


def add_method_options(parser: argparse.ArgumentParser, several: tuple[str, ...] = ()) -> None:
    """The options of methods; `several` take several values. One that is not given is not set in the result."""
    group = parser.add_argument_group("the method (options that are not given are its usual ones)")
    for name, (_, text, arguments) in FIELDS.items():
        flags = [*["-r"] * (name == "rank"), flag(name)]
        arguments = arguments | ({"nargs": "+"} if name in several else {})
        group.add_argument(*flags, dest=f"method_{name}", default=argparse.SUPPRESS, help=text, **arguments)
    group.add_argument(
        "--set", nargs="+", action="extend", dest="method_set", default=argparse.SUPPRESS, metavar="FIELD=VALUE",
        help="any other option, by PEFT's name, its value as JSON: use_rslora=true; target_modules=null: PEFT's usual",
    )  # fmt: skip
    group.add_argument(
        "--adapter-config", metavar="PATH", help="take the method from an adapter_config.json or its directory"
    )


def add_model_name(parser: argparse.ArgumentParser) -> None:
    """MODEL: a table of shapes."""
    what = "a published model's name (a wrong one lists the nearest), a config.json, a .gguf, or a model directory"
    parser.add_argument("model", metavar="MODEL", help=what)


def flag(name: str) -> str:
    """--virtual-tokens"""
    return f"--{name.replace('_', '-')}"


def architecture_of(model: str, num_labels: int | None = None) -> Architecture:
    """The table of what MODEL names. Raises ValueError naming the nearest names for one that is unknown."""
    from ..accounting import architecture

    if Path(model).suffix == ".gguf":
        from ..hub.gguf import read_gguf

        return architecture(read_gguf(Path(model))[0], num_labels)
    return architecture(model, num_labels)


# ------------------------------------------------------------------------------------------------ from the command line


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """{name in FIELDS, or "set": value} of the method's options that the command line has."""
    return {name: getattr(args, f"method_{name}") for name in (*FIELDS, "set") if hasattr(args, f"method_{name}")}


def method_of(args: argparse.Namespace) -> tuple[str, Method]:
    """(what a report calls it, the method) of --method and its options, or of --adapter-config.

    Raises ValueError for an option that the method does not have, naming those that it has, and for one that another
    option leaves without effect.
    """
    if args.adapter_config is not None:
        extra = next(iter(given_options(args)), "method" if args.method not in (None, "qlora") else None)
        if extra:
            raise ValueError(f"--adapter-config says everything about the method; leave {flag(extra)} out")
        method = dataclasses.replace(_of_file(args.adapter_config), quantized=args.method == "qlora")
        return args.method or method.label, method
    name = args.method or "full"
    return name, methods_of(args, [name])[name]


def methods_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Method]:
    """{name: method}; each option is changed in those that have it. Raises ValueError for an option that none has."""
    methods = {name: METHODS.get(name) or Method(name, name) for name in names}
    fields = {name: _fields(method) for name, method in methods.items()}
    changes: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for option, value in given_options(args).items():
        for names_, value_ in _assignments(option, value):
            having = {
                name: found for name in methods if (found := next((f for f in names_ if f in fields[name]), None))
            }
            if not having:
                raise _unknown(option, names_[0], fields)
            for name, found in having.items():
                if found in changes[name]:
                    raise ValueError(f"{found} is given twice, as {changes[name][found]!r} and as {value_!r}: give it once")
                changes[name][found] = value_
    for name in methods:
        if "oft_block_size" in fields[name] and changes[name].get("r"):  # OFT's r, in place of the size of its blocks
            changes[name].setdefault("oft_block_size", 0)
    changed = {name: method.with_options(**_settled(changes[name], args)) for name, method in methods.items()}
    for method in changed.values():
        method.config()  # checks the values
    return changed


def _assignments(option: str, value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """[(the fields, of which the first that a method has is meant; value)] of one option of the command line."""
    if option != "set":
        return [(FIELDS[option][0], "all-linear" if value == ["all-linear"] else value)]
    found = []
    for text in value:
        field, equals, word = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, not {text!r}")
        try:
            found.append(((field,), json.loads(word)))
        except json.JSONDecodeError:
            found.append(((field,), word))  # a bare word
    return found


def _settled(changes: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The changes, and what follows from them. Raises ValueError for one that another leaves without effect."""
    if {"bottleneck_size", "reduction_factor"} <= changes.keys():
        raise ValueError("--bottleneck is the width and --reduction divides another by it: give one of them")
    if changes.get("prefix_projection") is False and "encoder_hidden_size" in changes:
        raise ValueError("--hidden-size is the width of the MLP that computes a prefix: leave --no-projection out")
    if "reduction_factor" in changes:
        changes["bottleneck_size"] = None
    if hasattr(args, "method_rank") and "target_r" in changes:  # as the paper: the budget starts at 1.5 times the last
        changes.setdefault("init_r", changes["target_r"] * 3 // 2)
    return changes


def _fields(method: Method) -> set[str]:
    """The options that a method has."""
    config = method.config()
    if config is None or isinstance(config, str):
        return set()
    from ..peft.prompt_learning import MODULE_OPTIONS, PromptLearningConfig

    without = MODULE_OPTIONS if isinstance(config, PromptLearningConfig) else ()
    return {field.name for field in dataclasses.fields(config)} - set(without)


def _unknown(option: str, field: str, fields: dict[str, set[str]]) -> ValueError:
    """The error for an option that none of the methods has, of which `fields` holds the options."""
    known = set().union(*fields.values())
    *others, last = fields
    has = f"none of {', '.join(others)} and {last} has" if others else f"--method {last} has no"
    what = repr(field) if option == "set" else flag(option)
    if not known:
        return ValueError(f"{has} options, so {what} means nothing there")
    has += " an option" if others else " option"
    if option == "set":
        return ValueError(f"--set: {has} {what}{nearest(field, known)}")
    mine = [flag(name) for name, (names, *_) in FIELDS.items() if known & set(names)]
    return ValueError(f"{has} {what}; there are {', '.join(mine)} and --set")


def _of_file(path: str) -> Method:
    """The method of an adapter_config.json, or of a directory that holds one, to be trained anew."""
    from ..peft.huggingface import read_config

    config = read_config(path, inference_mode=False, base_model_name_or_path=None)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Method(config.peft_type, config.peft_type, options)
