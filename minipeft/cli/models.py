"""Which model a command works on, with which adapters, and the template in which it is asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import minipeft as mp

from ..peft.methods import Method
from .arguments import Arguments
from .method_options import FLAGS, method_of

TEMPLATE = "template.json"


def load_model(args: Arguments, load_in_4bit: bool = False, is_trainable: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of the shipped base, of --model, or of the base that the directory of --adapter names.

    The first adapter is active and called "default", further ones "1", "2", ... The base is in four bits with
    `load_in_4bit` or --load-in-4bit, and where the first adapter was trained so.
    Raises ValueError where it is no language model or comes without a tokenizer: the commands read and write text.
    """
    path, adapters = args.model, getattr(args, "adapter", None) or []
    adapters = [adapters] if isinstance(adapters, str) else adapters
    _check_finished("--model", path)
    load_in_4bit = load_in_4bit or getattr(args, "load_in_4bit", False)
    for directory in adapters:
        if not Path(directory).is_dir():
            raise ValueError(f"--adapter {directory}: there is no such directory")
        _check_finished("--adapter", directory)
    if adapters:
        from ..peft.provenance import recorded_base

        name, packed = recorded_base(adapters[0])
        load_in_4bit = load_in_4bit or bool(packed)
        if path is None and name not in (None, mp.hub.base.NAME):
            path = name
            if not Path(name).exists():
                where = f"its base is {name}, which is no path here; say with --model where it is"
                raise ValueError(f"--adapter {adapters[0]}: {where}")
    options = {"backend": args.backend, "load_in_4bit": load_in_4bit}
    model, tokenizer = mp.load_base(**options) if path is None else mp.from_pretrained(path, **options)
    if not isinstance(model, mp.Transformer):
        raise ValueError(f"{path}: holds a {type(model).__name__}; this command needs a language model")
    if tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer with the model (tokenizer.json), and text is to be encoded")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        raise ValueError(f"{path}: {sizes}")
    if adapters:
        model = mp.PeftModel.from_pretrained(model, adapters[0], is_trainable=is_trainable)
    for number, directory in enumerate(adapters[1:], start=1):
        model.load_adapter(directory, str(number))
    return model, tokenizer


def _check_finished(option: str, directory: str | None) -> None:
    """ValueError for the directory of a run that has left checkpoints, and not yet the model or adapter."""
    if directory and mp.train.last_checkpoint(directory):
        if not any((Path(directory) / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{option} {directory} holds a run that has not ended: end it by its command with --resume")


def load_trained(args: Arguments) -> tuple[str, Method | None, Any, Any]:
    """(what a report calls the method, the method, model, tokenizer); the method is None for a model with --adapter.

    Raises ValueError for --adapter together with a method or its options, and as `method_of` and `load_model`.
    """
    if args.adapter is None:
        name, method = method_of(args)
        return name, method, *load_model(args, method.quantized)
    args.refuse(("method", "adapter_config", *FLAGS), "with --adapter, which is trained further as it is")
    return "adapter", None, *load_model(args, is_trainable=True)


def base_of(args: Arguments, adapter: str | None = None) -> str | None:
    """--model, else the base that the directory of an adapter names (by default --adapter's), else None."""
    from ..peft.provenance import recorded_base

    adapter = adapter or args.adapter
    return args.model or (recorded_base(adapter)[0] if adapter else None)


# ---------------------------------------------------------------------------------------------------------- templates


def chosen_template(option: str | None, record: Any, tokenizer: Any) -> tuple[str | None, Any]:
    """(name or text, template) of --template, in which \\n is a line break; without it, the usual one of a record.

    (None, None) for running text, which takes none.
    """
    templates = mp.text.templates
    if option is not None and isinstance(record, mp.text.datasets.Document):
        raise ValueError("--template is of prompts and completions; running text takes none")
    if option is not None:
        option = option.replace("\\n", "\n")
        return option, templates.get_template(option, tokenizer)
    if isinstance(record, mp.text.datasets.Document):
        return None, None
    template = templates.default_template(record, tokenizer)
    named = template in (templates.plain, templates.alpaca, templates.chatml)
    return template.__name__ if named else "chat", template


def save_template(directory: str | os.PathLike, name: str) -> None:
    """Record which template the model in a directory was trained with: a name, or the text of a custom one."""
    mp.files.write_json(Path(directory) / TEMPLATE, {"template": name})


def saved_template(directory: str | os.PathLike | None) -> str | None:
    """What `save_template` wrote there, None where it did not. Raises FileError for a file that is something else."""
    if directory is None or not (path := Path(directory) / TEMPLATE).is_file():
        return None
    template = mp.files.read_json(path).get("template")
    if not isinstance(template, str):
        raise mp.files.FileError(f'{path}: must hold {{"template": a name or a text}}')
    return template


def usual_template(args: Arguments, adapter: str | None = None) -> str | None:
    """--template, in which \\n is a line break; else what the adapter was trained in, else the model, else None.

    `adapter`: which one, for a command that takes several. Its model is the base that its directory names, unless
    --model says another.
    """
    adapter = adapter or args.adapter or None
    option = getattr(args, "template", None) or saved_template(adapter) or saved_template(base_of(args, adapter))
    return option and option.replace("\\n", "\n")
