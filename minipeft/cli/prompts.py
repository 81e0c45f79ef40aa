"""The template of the prompts: the one that is asked for, or was saved beside the model."""

from __future__ import annotations

import os
from pathlib import Path

import minipeft as mp

from .arguments import Arguments

FILE = "template.json"


def chosen_template(
    option: str | None, record: mp.text.datasets.Record, tokenizer: mp.text.tokenizer.Tokenizer
) -> tuple[str | None, mp.text.templates.Template | None]:
    """(name or text, template) of --template, in which \\n is a line break; without it, the usual one of a record.

    (None, None) for running text, which takes none.
    """
    templates = mp.text.templates
    if option is not None:
        option = option.replace("\\n", "\n")
        return option, templates.get_template(option, tokenizer)
    if isinstance(record, mp.text.datasets.Document):
        return None, None
    template = templates.default_template(record, tokenizer)
    shipped = (templates.plain, templates.alpaca, templates.chatml)
    return (template.__name__ if template in shipped else "chat"), template


def save_template(directory: str | os.PathLike, name: str) -> None:
    """Record which template the model in a directory was trained with: a name, or the text of a custom one."""
    mp.files.write_json(Path(directory) / FILE, {"template": name})


def saved_template(directory: str | os.PathLike | None) -> str | None:
    """What `save_template` wrote there, None where it did not. Raises FileError for a file that is something else."""
    if directory is None or not (path := Path(directory) / FILE).is_file():
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
    from ..peft.provenance import recorded_base

    adapter = adapter or args.adapter or None
    base = args.model or (adapter and recorded_base(adapter)[0])
    option = getattr(args, "template", None) or saved_template(adapter) or saved_template(base)
    return option and option.replace("\\n", "\n")
