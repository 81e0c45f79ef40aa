"""Prompts: in the template that is asked for or was saved beside the model; and what ends an answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import FileError, read_json, write_json
from ..text.datasets import Completion, Document, Record
from ..text.templates import Template, Turn, alpaca, chatml, default_template, get_template, plain
from ..text.tokenizer import Special, Tokenizer

FILE = "template.json"


def chosen_template(option: str | None, record: Record, tokenizer: Tokenizer) -> tuple[str | None, Template | None]:
    """(name or text, template) of --template, in which \\n is a line break; without it, the usual one of a record.

    (None, None) for running text, which takes none.
    """
    if option is not None:
        option = option.replace("\\n", "\n")
        return option, get_template(option, tokenizer)
    if isinstance(record, Document):
        return None, None
    template = default_template(record, tokenizer)
    return (template.__name__ if template in (plain, alpaca, chatml) else "chat"), template


def save_template(directory: str | os.PathLike, name: str) -> None:
    """Record which template the model in a directory was trained with: a name, or the text of a custom one."""
    write_json(Path(directory) / FILE, {"template": name})


def saved_template(directory: str | os.PathLike | None) -> str | None:
    """What `save_template` wrote there, None where it did not. Raises FileError for a file that is something else."""
    if directory is None or not (path := Path(directory) / FILE).is_file():
        return None
    template = read_json(path).get("template")
    if not isinstance(template, str):
        raise FileError(f'{path}: must hold {{"template": a name or a text}}')
    return template


def asked(template: Template, prompt: str) -> Turn:
    """What a model is shown for a prompt, as in training, and how an answer there ends ("-" stands for its words)."""
    return template(Completion(prompt, "-"))[-1]


def stop_tokens(model: Any, tokenizer: Tokenizer, turn: Turn) -> list[int]:
    """The ids that end a text: the model's, the tokenizer's, and the special token that ends the template's answers.

    Raises ValueError where the tokenizer lacks a token of the template.
    """
    try:
        tokenizer.encode_pieces([*turn.prompt, *turn.completion])
    except ValueError as error:
        raise ValueError(f"this model's tokenizer cannot write the template: {error}") from error
    configured = getattr(getattr(model, "config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    last = turn.completion[-1]
    ids = [*ids, tokenizer.eos_token_id, tokenizer.token_to_id(last) if isinstance(last, Special) else None]
    return sorted({i for i in ids if i is not None})
