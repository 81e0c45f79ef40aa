"""What the commands' options share: usage errors in one line that name the nearest right word, and checked numbers."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports a wrong use in one line (exit status 2)."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minipeft: error: {' '.join(message.split())} (see: {self.prog} --help)\n")

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

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


def _number(convert: Callable[[str], Any], accept: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return parse


positive_int = _number(int, lambda n: n > 0, "a whole number of at least 1")
natural_int = _number(int, lambda n: n >= 0, "a whole number of at least 0")
positive = _number(float, lambda x: x > 0, "a number above 0")
natural = _number(float, lambda x: x >= 0, "a number of at least 0")
probability = _number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
proportion = _number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help=f"seed of {what} (default: 0)")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH", help="a Hugging Face model directory or a .gguf file (default: the shipped base)"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--threads and --backend, which `use_machine` obeys."""
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
    """Make --threads and --backend the setting of this process; raises BackendError where there is no such device."""
    from .. import backend

    if args.threads:
        backend.set_num_threads(args.threads)
    backend.get_backend(args.backend)
