"""MODEL, --method and its options on a command line: a table of shapes, and the configuration of a method.

One flag serves all methods that have what it sets (`FIELDS`), and a command's help loads no method: so the flags stand
here, while the fields' defaults, ranges and checks are those of the methods' configurations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.methods import METHODS
from .arguments import nearest, positive, positive_int

if TYPE_CHECKING:
    from ..accounting import Architecture

CHOICES = (*METHODS, "frozen")

_NAMES = {"nargs": "+", "metavar": "NAME"}
_NUMBER, _FACTOR = {"type": positive_int, "metavar": "N"}, {"type": positive, "metavar": "X"}
_LAYERS, _SWITCH = {"nargs": "+", "type": int, "metavar": "N"}, {"action": "store_true", "default": None}

# flag -> (the configuration's fields that it sets, those that the method has; help; what else argparse takes)
FIELDS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "rank": (("r", "init_r"), "rank of lora, dora, pissa, qlora, vera, adalora", _NUMBER),
    "target": (("target_modules",), "modules to adapt, by ends of their paths, or all-linear (qlora's)", _NAMES),
    "exclude": (("exclude_modules",), "modules that are left out", _NAMES),
    "layers": (("layers_to_transform",), "only these layers", _LAYERS),
    "modules_to_save": (("modules_to_save",), "modules trained whole beside it, as copies", _NAMES),
    "virtual_tokens": (("num_virtual_tokens",), "of prompt, prefix, p-tuning (default: 20)", _NUMBER),
    "projection": (("prefix_projection",), "prefix: computed by an MLP in training", _SWITCH),
    "hidden_size": (("encoder_hidden_size",), "width of the MLP of p-tuning, and of prefix with --projection", _NUMBER),
    "placement": (("placement",), "of a bottleneck: houlsby, pfeiffer (default) or parallel", {"metavar": "NAME"}),
    "bottleneck": (("bottleneck_size",), "width of a bottleneck, or", _NUMBER),
    "reduction": (("reduction_factor",), "how many times narrower it is (default: 16; parallel 2)", _FACTOR),
}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --method, and an option for what decides a method's size."""
    what = "a published model's name (a wrong one lists the nearest), a config.json, a .gguf, or a model directory"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--method", choices=CHOICES, help="default: full (all parameters)")
    group = parser.add_argument_group("the method (default of every option: as in Hugging Face PEFT)")
    for name, (_, text, arguments) in FIELDS.items():
        group.add_argument(*["-r"] * (name == "rank"), flag(name), help=text, **arguments)
    text = "any other option, by PEFT's name, its value as JSON: use_dora=true"
    group.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help=text)
    group.add_argument("--adapter", metavar="PATH", help="take the method from an adapter_config.json or its directory")


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


# The options that make the method itself; and those that have no default in PEFT.
FIXED = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "qlora": {"target_modules": "all-linear"}}
NEEDED = ("num_virtual_tokens", "total_step")


def method_name(args: argparse.Namespace, config: Any) -> str:
    """What a report calls the method: --method, or the type that an adapter's file names."""
    return args.method or (config.peft_type if args.adapter is not None else "full")


def configuration(args: argparse.Namespace) -> tuple[Any, bool]:
    """(what `minipeft.accounting` takes for the method and its options, whether the base is stored in four bits).

    Raises ValueError for an option that the method does not have, naming those that it has, and for one that another
    option leaves without effect.
    """
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.adapter is not None:
        if given or args.set or args.method not in (None, "qlora"):
            other = next(iter(given), "set" if args.set else "method")
            raise ValueError(f"--adapter says everything about the method; leave {flag(other)} out")
        from ..peft.huggingface import CONFIG, read_config

        path = Path(args.adapter)
        return read_config(path / CONFIG if path.is_dir() else path), args.method == "qlora"
    name = args.method or "full"
    like = METHODS[name].config() if name in METHODS else name
    if like is None or isinstance(like, str):
        if given or args.set:
            raise ValueError(f"--method {name} has no options, so {flag(next(iter(given), 'set'))} means nothing there")
        return like, False
    fields = set(like.to_dict()) | set(vars(like))
    options = FIXED.get(name, {}) | {name: getattr(like, name) for name in NEEDED if hasattr(like, name)}
    for option, value in given.items():
        field = next((f for f in FIELDS[option][0] if f in fields), None)
        if field is None:
            mine = [flag(n) for n, (names, *_) in FIELDS.items() if fields & set(names)]
            raise ValueError(f"--method {name} has no option {flag(option)}; it has {', '.join(mine)} and --set")
        options[field] = value
    if options.get("target_modules") == ["all-linear"]:
        options["target_modules"] = "all-linear"
    for text in args.set:
        field, equals, value = text.partition("=")
        if not equals or field not in fields:
            near = nearest(field, fields)
            raise ValueError(f"--set takes FIELD=VALUE; {field!r} is no option of {type(like).__name__}{near}")
        try:
            options[field] = json.loads(value)
        except json.JSONDecodeError:
            options[field] = value  # a bare word
    if args.bottleneck and args.reduction:
        raise ValueError("--bottleneck is the width and --reduction divides another by it: give one of them")
    if "init_r" in options:
        options.setdefault("target_r", min(options["init_r"], like.target_r))
    config = type(like)(**options)
    if args.hidden_size and not getattr(config, "prefix_projection", True):
        raise ValueError("--hidden-size is the width of the MLP that computes a prefix: give --projection too")
    return config, METHODS[name].quantized
