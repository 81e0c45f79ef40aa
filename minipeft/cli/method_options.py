"""MODEL, --method and its options on a command line: a table of shapes, and the configuration of a method."""

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

# option -> (the configuration's fields that it sets, those that the method has)
FIELDS = {
    "rank": ("r", "init_r"),
    "target": ("target_modules",),
    "exclude": ("exclude_modules",),
    "layers": ("layers_to_transform",),
    "modules_to_save": ("modules_to_save",),
    "virtual_tokens": ("num_virtual_tokens",),
    "projection": ("prefix_projection",),
    "hidden_size": ("encoder_hidden_size",),
    "placement": ("placement",),
    "bottleneck": ("bottleneck_size",),
    "reduction": ("reduction_factor",),
}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --method, and an option for what decides a method's size."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a published model's name (a wrong one lists the nearest), a config.json, a .gguf, or a model directory",
    )
    parser.add_argument("--method", choices=CHOICES, default="full", help="default: full (all parameters)")
    group = parser.add_argument_group("the method (where nothing is said: Hugging Face PEFT's defaults)")
    group.add_argument(
        "-r", "--rank", type=positive_int, metavar="N", help="rank of lora, dora, pissa, qlora, vera, adalora"
    )
    group.add_argument(
        "--target",
        nargs="+",
        metavar="NAME",
        help="the modules it is put on, by the ends of their paths; or all-linear (qlora's default)",
    )
    group.add_argument("--exclude", nargs="+", metavar="NAME", help="modules that are left out")
    group.add_argument("--layers", nargs="+", type=int, metavar="N", help="only these layers")
    group.add_argument(
        "--modules-to-save", nargs="+", metavar="NAME", help="modules trained whole beside it, as copies"
    )
    group.add_argument(
        "--virtual-tokens", type=positive_int, metavar="N", help="of prompt, prefix, p-tuning (default: 20)"
    )
    group.add_argument("--projection", action="store_true", default=None, help="prefix: computed by an MLP in training")
    group.add_argument("--hidden-size", type=positive_int, metavar="N", help="width of the MLP of prefix and p-tuning")
    group.add_argument("--placement", metavar="NAME", help="of a bottleneck: houlsby, pfeiffer (default) or parallel")
    group.add_argument("--bottleneck", type=positive_int, metavar="N", help="width of a bottleneck, or")
    group.add_argument(
        "--reduction", type=positive, metavar="X", help="how many times narrower it is (default: 16; parallel 2)"
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="any other option, by PEFT's name, its value as JSON: use_dora=true",
    )
    group.add_argument("--adapter", metavar="PATH", help="take the method from an adapter_config.json or its directory")


def architecture_of(model: str, num_labels: int | None = None) -> Architecture:
    """The table of what MODEL names. Raises ValueError naming the nearest names for one that is unknown."""
    from ..accounting import architecture

    if Path(model).suffix == ".gguf":
        from ..hub.gguf import read_gguf

        return architecture(read_gguf(Path(model))[0], num_labels)
    return architecture(model, num_labels)


def configuration(args: argparse.Namespace) -> tuple[Any, bool]:
    """(what `minipeft.accounting` takes for the method and its options, whether the base is stored in four bits).

    Raises ValueError for an option that the method does not have, naming those that it has.
    """
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.adapter is not None:
        if given or args.set:
            raise ValueError(
                f"--adapter says everything about the method; leave {_named(next(iter(given), 'set'))} out"
            )
        return _read(Path(args.adapter)), args.method == "qlora"
    method = METHODS.get(args.method)
    like = None if method is None else method.config()
    if like is None or isinstance(like, str):
        if given or args.set:
            raise ValueError(
                f"--method {args.method} has no options, so {_named(next(iter(given), 'set'))} means nothing there"
            )
        return (args.method if method is None else like), False
    fields = set(like.to_dict()) | set(vars(like))
    options = _fixed(args.method, like)
    for name, value in given.items():
        field = next((f for f in FIELDS[name] if f in fields), None)
        if field is None:
            mine = [_named(n) for n, names in FIELDS.items() if fields & set(names)]
            raise ValueError(f"--method {args.method} has no option {_named(name)}; it has {', '.join(mine)} and --set")
        options[field] = value
    if options.get("target_modules") == ["all-linear"]:
        options["target_modules"] = "all-linear"
    for text in args.set:
        field, equals, value = text.partition("=")
        if not equals or field not in fields:
            raise ValueError(
                f"--set takes FIELD=VALUE; {field!r} is no option of {type(like).__name__}{nearest(field, fields)}"
            )
        try:
            options[field] = json.loads(value)
        except json.JSONDecodeError:
            options[field] = value  # a bare word
    if "init_r" in options:
        options.setdefault("target_r", min(options["init_r"], like.target_r))
    return type(like)(**options), method.quantized


def _fixed(method: str, like: Any) -> dict[str, Any]:
    """What makes the method itself, or has no default in PEFT."""
    fixed = {
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "qlora": {"target_modules": "all-linear"},
        "adalora": {"total_step": like.to_dict().get("total_step")},
    }.get(method, {})
    if hasattr(like, "num_virtual_tokens"):
        fixed["num_virtual_tokens"] = like.num_virtual_tokens
    return fixed


def _named(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(path: Path) -> Any:
    from ..files import FileError, read_json
    from ..peft.huggingface import CONFIG, config_class
    from ..peft.huggingface import METHODS as PEFT_TYPES

    file = path / CONFIG if path.is_dir() else path
    options = read_json(file)
    kind = options.get("peft_type") if isinstance(options, dict) else None
    if kind not in PEFT_TYPES:
        raise FileError(f"{file}: its peft_type must be one of {', '.join(PEFT_TYPES)}, not {kind!r}")
    return config_class(kind).from_dict(options)
