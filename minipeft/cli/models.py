"""Which model a command works on: the shipped base, or what --model names, with --adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import minipeft as mp

from .arguments import Arguments


def load_model(args: Arguments, load_in_4bit: bool = False, is_trainable: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of the shipped base, of --model, or of the base that the directory of --adapter names.

    The first adapter is active and called "default", further ones "1", "2", ... The base is in four bits with
    `load_in_4bit` or --load-in-4bit, and where the first adapter was trained so.
    Raises ValueError where it is no language model or comes without a tokenizer: the commands read and write text.
    """
    path, adapters = args.model, getattr(args, "adapter", None) or []
    adapters = [adapters] if isinstance(adapters, str) else adapters
    load_in_4bit = load_in_4bit or getattr(args, "load_in_4bit", False)
    for directory in adapters:
        if not Path(directory).is_dir():
            raise ValueError(f"--adapter {directory}: there is no such directory")
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
    for number, directory in enumerate(adapters):
        if number:
            model.load_adapter(directory, str(number))
        else:
            model = mp.PeftModel.from_pretrained(model, directory, is_trainable=is_trainable)
    return model, tokenizer
