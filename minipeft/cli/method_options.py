"""--method and its options, the same in every command that trains, counts or measures: what the method's name means in
`peft.methods.METHODS`, changed by the options.

A command's help loads no method: so the flags stand here, while the fields' ranges and checks are those of the methods'
configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .. import accounting, hub
from ..options import configuration, flags_of, option
from ..peft.methods import METHODS, Method
from .arguments import Arguments, Common, Parser, nearest


@configuration(kw_only=True)
class MethodOptions:
    """The options of methods, by PEFT's names. One flag serves all methods that have its field, or one of `ALSO`."""

    r: int | None = option(None, "rank; adalora's at the end, oft's number of blocks", least=1, flag="-r --rank")
    lora_alpha: float | None = option(None, "numerator of lora's scaling; stays where -r changes", flag="--alpha")
    lora_dropout: float | None = option(None, "of the adapter's input", least=0, below=1, flag="--dropout", metavar="P")
    target_modules: list[str] | None = option(None, "modules to adapt: ends of paths, or all-linear", flag="--target")
    exclude_modules: list[str] | None = option(None, "modules that are left out", flag="--exclude")
    layers_to_transform: list[int] | None = option(None, "only these layers of the targets", flag="--layers")
    modules_to_save: list[str] | None = option(None, "modules trained whole beside it, as copies")
    num_virtual_tokens: int | None = option(None, "of prompt, prefix, p-tuning", least=1, flag="--virtual-tokens")
    prefix_projection: bool | None = option(None, "prefix: whether an MLP computes it in training", flag="--projection")
    encoder_hidden_size: int | None = option(None, "prefix, p-tuning: width of the MLP", least=1, flag="--hidden-size")
    placement: str | None = option(None, "of a bottleneck: houlsby, pfeiffer or parallel", metavar="NAME")
    bottleneck_size: int | None = option(None, "width of a bottleneck, or", least=1, flag="--bottleneck")
    reduction_factor: float | None = option(None, "how many times narrower it is", above=0, flag="--reduction")
    set: list[str] | None = option(
        None, "any other option, by PEFT's name, its value as JSON: use_rslora=true; target_modules=null: PEFT's usual",
        metavar="FIELD=VALUE",
    )  # fmt: skip


ALSO = {"r": "target_r", "lora_alpha": "alpha", "lora_dropout": "vera_dropout"}  # what other methods call it
FLAGS = {field.name: flags_of(field)[-1] for field in dataclasses.fields(MethodOptions)}


def add_method(parser: Parser, *more: str, usual: str = "full (all parameters)", cls: type = MethodOptions) -> None:
    """--method, of METHODS and `more`, and its options."""
    parser.add_argument("--method", choices=(*METHODS, *more), help=f"default: {usual}")
    add_method_options(parser, cls)


def add_method_options(parser: Parser, cls: type = MethodOptions) -> None:
    """The options of methods, and --adapter-config."""
    group = "the method (options that are not given are its usual ones)"
    parser.options(cls, *FLAGS, group=group)
    parser.options(Common, "adapter_config", group=group)


def add_shapes(parser: Parser) -> None:
    """MODEL, a table of shapes, and --models; a method, or none; --num-labels and --json."""
    what = "a published model's name, here or on the hub, a config.json, a .gguf, or a model directory"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--models", action=_ListModels, nargs=0, help="list the published models by family, and exit")
    add_method(parser, "frozen")
    parser.options(Common, "num_labels", "json")


class _ListModels(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ..accounting.models import groups

        wrap = partial(textwrap.fill, width=80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        for group, models in groups().items():
            print(group, wrap(", ".join(models)), sep="\n")
        parser.exit()


def architecture_of(args: Arguments) -> accounting.Architecture:
    """The table of what MODEL names. Raises ValueError naming the nearest names for one that is unknown."""
    path = Path(args.model)
    model = hub.gguf.read_gguf(path)[0] if path.suffix == ".gguf" else args.model
    return accounting.architecture(model, args.num_labels)


# ------------------------------------------------------------------------------------------------ from the command line


def given_options(args: Arguments) -> dict[str, Any]:
    """{name in MethodOptions: value} of the method's options that the command line has."""
    return {name: getattr(args, name) for name in FLAGS if name in args.given}


def method_of(args: Arguments) -> tuple[str, Method]:
    """(what a report calls it, the method) of --method and its options, or of --adapter-config; see `method_named`."""
    return method_named(args.method, args.adapter_config, given_options(args))


def method_named(name: str | None, adapter_config: str | None, options: Mapping[str, Any]) -> tuple[str, Method]:
    """(what a report calls it, the method) of a name (None: full) and options, or of a file.

    Raises ValueError for an option that the method does not have, naming those that it has, and for one that another
    option leaves without effect.
    """
    if adapter_config is None:
        name = name or "full"
        return name, methods_of([name], options)[name]
    _alone(name, options)
    method = dataclasses.replace(_of_file(adapter_config), quantized=name == "qlora")
    return name or method.label, method


def counted_of(args: Arguments, arch: accounting.Architecture) -> tuple[str, Any, bool]:
    """(what a report calls it, what `minipeft.accounting` takes for it on `arch`, whether weights are in four bits).

    As `method_of`; a file's method may be one that is counted and not trained here, too.
    """
    if args.adapter_config is None:
        name, method = method_of(args)
        return name, method.config(), method.quantized
    _alone(args.method, given_options(args))
    from ..accounting.counted import COUNTED, counted_config
    from ..peft.huggingface import PEFT_TYPES, read_options

    options = read_options(args.adapter_config, (*PEFT_TYPES, *COUNTED))
    config = counted_config({**options, "inference_mode": False}, arch)  # as it is trained
    return args.method or config.peft_type, config, args.method == "qlora"


def _alone(name: str | None, options: Mapping[str, Any]) -> None:
    """ValueError for what is given beside --adapter-config, but for qlora, which is not a file's to say."""
    extra = next((FLAGS[name] for name in options), None if name in (None, "qlora") else "--method")
    if extra:
        raise ValueError(f"--adapter-config says everything about the method; leave {extra} out")


def methods_of(names: Iterable[str], options: Mapping[str, Any]) -> dict[str, Method]:
    """{name: method}; each option is changed in those that have it. Raises ValueError for an option that none has."""
    methods = {name: METHODS.get(name) or Method(name, name) for name in names}
    fields = {name: _fields(method) for name, method in methods.items()}
    changes: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for flag, field, value in _assignments(options):
        having = {name: found for name in methods for found in (ALSO.get(field), field) if found in fields[name]}
        if not having:
            raise _unknown(flag, field, fields)
        for name, found in having.items():
            if found in changes[name]:
                raise ValueError(f"{found} is given twice, as {changes[name][found]!r} and as {value!r}: give it once")
            changes[name][found] = value
    for name, method in methods.items():
        methods[name] = method.with_options(**_settled(changes[name], fields[name], "r" in options))
        methods[name].config()  # checks the values
    return methods


def _assignments(options: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(flag, field, value) of each option of the command line."""
    for name, value in options.items():
        if name != "set":
            yield FLAGS[name], name, "all-linear" if value == ["all-linear"] else value
            continue
        for text in value:
            field, equals, word = text.partition("=")
            if not equals:
                raise ValueError(f"--set takes FIELD=VALUE, not {text!r}")
            with suppress(json.JSONDecodeError):  # else it is a bare word
                word = json.loads(word)
            yield "--set", field, word


def _settled(changes: dict[str, Any], fields: set[str], ranked: bool) -> dict[str, Any]:
    """The changes, and what follows from them. Raises ValueError for one that another leaves without effect."""
    if {"bottleneck_size", "reduction_factor"} <= changes.keys():
        raise ValueError("--bottleneck is the width and --reduction divides another by it: give one of them")
    if changes.get("prefix_projection") is False and "encoder_hidden_size" in changes:
        raise ValueError("--hidden-size is the width of the MLP that computes a prefix: leave --no-projection out")
    if "reduction_factor" in changes:
        changes["bottleneck_size"] = None
    if "oft_block_size" in fields and changes.get("r"):  # OFT's r, in place of the size of its blocks
        changes.setdefault("oft_block_size", 0)
    if ranked and "target_r" in changes:  # as the paper: the budget starts at 1.5 times the last
        changes.setdefault("init_r", changes["target_r"] * 3 // 2)
    return changes


def _fields(method: Method) -> set[str]:
    """The options that a method has."""
    config = method.config()
    if config is None or isinstance(config, str):
        return set()
    from ..peft.prompt_learning import MODULE_OPTIONS, PromptLearningConfig

    without = MODULE_OPTIONS if isinstance(config, PromptLearningConfig) else ()
    return {field.name for field in dataclasses.fields(config)} - {*without}


def _unknown(flag: str, field: str, fields: dict[str, set[str]]) -> ValueError:
    """The error for an option that none of the methods has, of which `fields` holds the options."""
    known = {name for names in fields.values() for name in names}
    *others, last = fields
    has = f"none of {', '.join(others)} and {last} has" if others else f"--method {last} has no"
    what = repr(field) if flag == "--set" else flag
    if not known:
        return ValueError(f"{has} options, so {what} means nothing there")
    has += " an option" if others else " option"
    if flag == "--set":
        return ValueError(f"--set: {has} {what}{nearest(field, known)}")
    mine = [flag for name, flag in FLAGS.items() if known & {name, ALSO.get(name)}]
    return ValueError(f"{has} {what}; there are {', '.join(mine)} and --set")


def _of_file(path: str) -> Method:
    """The method of an adapter_config.json, or of a directory that holds one, to be trained anew."""
    from ..peft.huggingface import read_config

    config = read_config(path, inference_mode=False, base_model_name_or_path=None)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Method(config.peft_type, config.peft_type, options)
