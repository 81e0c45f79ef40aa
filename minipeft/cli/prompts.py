"""The template of the prompts: the one that is asked for, or was saved beside the model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..files import FileError, read_json, write_json
from ..text.datasets import Document, Record
from ..text.templates import Template, alpaca, chatml, default_template, get_template, plain
from ..text.tokenizer import Tokenizer

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


def usual_template(args: argparse.Namespace, adapter: str | None = None) -> str | None:
    """--template, in which \\n is a line break; else what the adapter or the model was trained in, else None.

    `adapter`: which one, for a command that takes several.
    """
    option = args.template or saved_template(adapter or args.adapter or None) or saved_template(args.model)
    return option and option.replace("\\n", "\n")
