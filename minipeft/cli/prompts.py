"""Prompts: from a file, in the template that is asked for or was saved beside the model; and what ends an answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import FileError, read_json, write_json
from ..text.datasets import Completion, DatasetError, Document, Record
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
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("template"), str):
        raise FileError(f'{path}: must hold {{"template": a name or a text}}')
    return content["template"]


def asked(template: Template, prompt: str) -> Turn:
    """What a model is shown for a prompt, as in training, and how an answer there ends ("-" stands for its words)."""
    return template(Completion(prompt, "-"))[-1]


def stop_tokens(model: Any, tokenizer: Tokenizer, turn: Turn) -> list[int]:
    """The ids that end a text: the model's, the tokenizer's, and the special token that ends the template's answers."""
    configured = getattr(getattr(model, "config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    last = turn.completion[-1]
    ids = [*ids, tokenizer.eos_token_id, tokenizer.token_to_id(last) if isinstance(last, Special) else None]
    return sorted({i for i in ids if i is not None})


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, or the field 'prompt' of every line of a .jsonl file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DatasetError(path, None, f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DatasetError(path, None, "the file is empty; it must hold at least one prompt")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(path, number, f"not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise DatasetError(path, number, "must be a JSON object with a text field 'prompt'")
        prompts.append(value["prompt"])
    return prompts
