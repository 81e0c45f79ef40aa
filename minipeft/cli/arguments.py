"""What the commands' options share: usage errors in one line that name the nearest right word, and checked numbers."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from ..options import reader


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports a wrong use in one line (exit status 2)."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minipeft: error: {' '.join(message.split())} (see: {self.prog} --help)\n")

    def option_names(self) -> list[str]:
        """The names of all options: --help, -h, ..."""
        return [name for action in self._actions for name in action.option_strings]

    def flags(self) -> dict[str, str]:
        """The name that the command line has for each option, by the name of its value."""
        names = {a.dest: next((o for o in a.option_strings if o.startswith("--")), "") for a in self._actions}
        return {dest: name.lstrip("-").replace("-", "_") for dest, name in names.items() if name}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"value of {action.option_strings[-1]}" if action.option_strings else "command"
            raise argparse.ArgumentError(None, unknown(what, value, action.choices))


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """`unknown command 'comparre'; did you mean compare? (known: compare, finetune, ...)`"""
    known = list(known)
    return f"unknown {what} {value!r}{nearest(str(value), known)} (known: {', '.join(known)})"


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X or Y?', or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


positive_int = reader(int, {"least": 1})
positive = reader(float, {"above": 0})


def add_model(parser: argparse.ArgumentParser, adapter: str | None = None) -> None:
    """--model; and --adapter, a directory that serves this purpose, where the command takes one."""
    parser.add_argument(
        "--model", metavar="PATH", help="a Hugging Face model directory or a .gguf file (default: the shipped base)"
    )
    if adapter is not None:
        parser.add_argument("--adapter", metavar="DIR", help=f"an adapter directory{adapter}")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--threads and --backend, which `use_machine` obeys before the command runs."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: MINIPEFT_THREADS, else every core)"
    )
    group.add_argument(
        "--backend",
        choices=("numpy", "cupy"),
        help="array library; cupy needs a GPU and the extra 'gpu' (default: MINIPEFT_BACKEND, else numpy)",
    )


def use_machine(args: argparse.Namespace) -> None:
    """Make --threads and --backend the setting of this process, for a command that has them.

    Raises BackendError where there is no such device.
    """
    if "backend" not in args:
        return
    from .. import backend

    if args.threads:
        backend.set_num_threads(args.threads)
    backend.get_backend(args.backend)


def take_plugins(argv: list[str]) -> list[str]:
    """The command line without --plugin MODULE, whose modules are imported, from the working directory first.

    Raises ValueError for one that cannot be imported, and for one that registers no method.
    """
    if not any(word.partition("=")[0] == "--plugin" for word in argv):
        return argv
    from ..peft.methods import METHODS

    parser = Parser(prog="minipeft", add_help=False)
    parser.add_argument("--plugin", action="append", default=[])
    args, rest = parser.parse_known_args(argv)
    if "" not in sys.path:
        sys.path.insert(0, "")
    for name in args.plugin:
        before = {**METHODS} if name not in sys.modules else {}
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a foreign module can raise
            hint = f" (a module's name has no .py: {name.removesuffix('.py')})" * name.endswith(".py")
            raise ValueError(f"--plugin {name} cannot be imported: {type(error).__name__}: {error}{hint}") from error
        if before == METHODS:
            raise ValueError(f"--plugin {name} registers no method: put @minipeft.peft.register before a configuration class")
    return rest
