"""Which model a command works on: the shipped base, or what --model names, on the device asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_model(
    path: str | None,
    backend: str | None = None,
    load_in_4bit: bool | None = False,
    adapter: str | Sequence[str] | None = None,
    is_trainable: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of the shipped base (None), of a Hugging Face directory or of a .gguf file, with adapters.

    The first adapter is active and called "default", further ones "1", "2", ... Without a path, its base is the one that
    its directory names; `load_in_4bit` None is what it says, too.
    Raises ValueError where it is no language model or comes without a tokenizer: the commands read and write text.
    """
    adapters = [adapter] if isinstance(adapter, str) else list(adapter or ())
    for directory in adapters:
        if not Path(directory).is_dir():
            raise ValueError(f"--adapter {directory}: there is no such directory")
    if adapters:
        path, load_in_4bit = _recorded(adapters[0], path, load_in_4bit)
    from ..hub.base import load_base
    from ..hub.pretrained import from_pretrained
    from ..nn.transformer import Transformer

    options: dict[str, Any] = {"backend": backend, "load_in_4bit": bool(load_in_4bit)}
    model, tokenizer = load_base(**options) if path is None else from_pretrained(path, **options)
    if not isinstance(model, Transformer):
        raise ValueError(f"{path}: holds a {type(model).__name__}; this command needs a language model")
    if tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer with the model (tokenizer.json), and text is to be encoded")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        )
    if adapters:
        from ..peft.model import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0], is_trainable=is_trainable)
        for number, directory in enumerate(adapters[1:], start=1):
            model.load_adapter(directory, str(number))
    return model, tokenizer


def _recorded(adapter: str, path: str | None, load_in_4bit: bool | None) -> tuple[str | None, bool | None]:
    """(path, load_in_4bit), where they are None those of the base that an adapter was trained on."""
    from ..hub.base import NAME
    from ..peft.provenance import recorded_base

    name, packed = recorded_base(adapter)
    if path is None and name not in (None, NAME):
        path = name
        if not Path(name).exists():
            raise ValueError(f"--adapter {adapter}: its base is {name}, which is no path here; say with --model where it is")
    return path, packed if load_in_4bit is None else load_in_4bit
