"""What the commands share: usage errors in one line that name the nearest right word, and options of several."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

from ..options import REQUIRED, add_options, configuration, option


class Arguments(argparse.Namespace):
    """The value of each option by its name. `given` are those on the command line, `flags` their names there."""

    given: set[str]
    flags: dict[str, str]
    plugin: list[str] | None
    run: Callable[[Arguments], int | None]

    def flag(self, name: str) -> str:
        """--name-of-the-option"""
        return f"--{self.flags[name].replace('_', '-')}"

    def in_flags(self, message: str) -> str:
        """A message of the library, in which the options that are given are called as on the command line."""
        for name in self.given & self.flags.keys():
            if "_" in name:  # else it may be a plain word; and a path, or what is quoted, is no option
                message = re.sub(rf"(?<![\w./'\"-]){name}(?![\w=(]|\.\w)", self.flag(name), message)
        return message

    def next_command(self, *words: str) -> str:
        """A command line of minipeft to copy into a shell, with the plugins of this one."""
        plugins = (word for module in self.plugin or () for word in ("--plugin", module))
        return shlex.join(("minipeft", *plugins, *words))

    def refuse(self, names: Iterable[str], where: str) -> None:
        """ValueError, by its flag, for the first of these options that is given: there it does nothing."""
        for name in names:
            if name in self.given:
                raise ValueError(f"{self.flag(name)} does nothing {where}; leave it out")

    def only_one(self, *names: str) -> None:
        """ValueError where more than one of these options is given."""
        flags = [self.flag(name) for name in names if name in self.given]
        if len(flags) > 1:
            raise ValueError(f"{' and '.join(flags)} exclude each other: give one of them")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports a wrong use in one line (exit status 2)."""

    def __init__(self, **options: Any):
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **options})

    def options(self, cls: type, *names: str, group: str | None = None, **more: Any) -> None:
        """The flags of a configuration, under a heading: see `add_options`."""
        groups = {g.title: g for g in self._action_groups}
        add_options(self if group is None else groups.get(group) or self.add_argument_group(group), cls, *names, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minipeft: error: {' '.join(message.split())} (see: {self.prog} --help)\n")

    def flags(self) -> dict[str, str]:
        """The name that the command line has for each option, by the name of its value."""
        names = {a.dest: next((o for o in a.option_strings if o.startswith("--")), "") for a in self._actions}
        return {dest: name.lstrip("-").replace("-", "_") for dest, name in names.items() if name}

    def take_defaults(self) -> dict[str, Any]:
        """The defaults of the options, which these then have no more: what is parsed has only what was given."""
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return defaults

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(None, unknown(f"value of {action.option_strings[-1]}", value, action.choices))


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """`unknown command 'comparre'; did you mean compare? (known: compare, finetune, ...)`"""
    known = [*map(str, known)]
    return f"unknown {what} {value!r}{nearest(str(value), known)} (known: {', '.join(known)})"


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for the first of the names that is unknown."""
    for name in names:
        if name not in known:
            raise ValueError(unknown(what, name, known))


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X or Y?', or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


COLUMNS = "what fields are called in the file, as prompt=question completion=response; others are dropped"


@configuration(kw_only=True)
class Common:
    """Options of several commands, which mean the same in each."""

    data: str | None = option(None, "a .jsonl or .txt file to learn from", metavar="FILE")
    columns: list[str] | None = option(None, COLUMNS, metavar="FIELD=NAME")
    model: str | None = option(None, "a Hugging Face directory or a .gguf file; None: the shipped base", metavar="PATH")
    adapter: str | None = option(None, "an adapter directory to put on the model", metavar="DIR")
    adapter_config: str | None = option(None, "the method of an adapter_config.json, or a directory", metavar="PATH")
    load_in_4bit: bool = option(False, "linear layers in 4 bits, also where the adapter was not trained so")
    template: str | None = option(
        None, "plain, alpaca, chatml, chat or a text with {prompt} (default: as in training)", metavar="NAME|TEXT"
    )
    num_labels: int | None = option(None, "with a classifier's head of N classes", least=1)
    output: str = option(REQUIRED, "where to write; must be new or empty", metavar="DIR")
    json: bool = option(False, "print one JSON object")
    threads: int | None = option(None, "CPU threads; None: MINIPEFT_THREADS, else every core", least=1)
    backend: str | None = option(None, "cupy: on a GPU; None: MINIPEFT_BACKEND, numpy", choices=("numpy", "cupy"))


def add_machine(parser: Parser) -> None:
    """--threads and --backend, which `use_machine` obeys before the command runs."""
    parser.options(Common, "threads", "backend", group="machine")


def use_machine(args: Arguments) -> None:
    """Make --threads and --backend the setting of this process, for a command that has them.

    Raises BackendError where there is no such device.
    """
    if "backend" not in args:
        return
    from .. import backend

    if args.threads:
        backend.set_num_threads(args.threads)
    backend.get_backend(args.backend)
