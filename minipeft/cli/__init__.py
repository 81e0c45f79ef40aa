"""Fine-tuning large language models, from scratch in NumPy: to read, to run, to trust.

Exit status: 0 done; 1 something that was checked failed (gradcheck, lessons, exercise, audit), or a run of a sweep; 2 an
error, in one line on standard error; 130 interrupted.

examples:
  minipeft compare                                   every method on the shipped base, side by side
  minipeft finetune --data my.jsonl --output tuned   one run on your own file
  minipeft generate --model tuned --prompt "Once"    text from any saved model
  minipeft evaluate --data test.jsonl --model tuned  its scores on data of yours
  minipeft memory llama-7b --method qlora --seq 512  what a method needs, and the GPUs it fits on
  minipeft COMMAND --help                            all options of a command, with examples
  minipeft --plugin mine compare                     with the methods of your own that mine.py registers
"""

# The command line, also `python -m minipeft COMMAND ...`. One file per command: a module with `add_arguments(parser)`
# and `run(args) -> exit status` (None for 0); its docstring is its help, as the one above is, and the first line stands
# in the list of all. Only the module of the chosen command is imported, so that the list appears at once.

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

from .. import __version__
from .arguments import Arguments, Parser, nearest, unknown, use_machine
from .foreign import take_plugins
from .streams import STDOUT, open_closed_streams, printable, safe_output

COMMANDS = (
    "compare", "finetune", "sweep", "evaluate", "generate", "merge", "sft", "reward", "ppo", "dpo",
    "count", "memory", "audit", "claims", "gradcheck", "lessons", "exercise", "book",
)  # fmt: skip
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status. Errors never leave as exceptions."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    open_closed_streams()
    args: Arguments | None = None
    try:
        with safe_output(), warnings.catch_warnings():
            args = _parse(argv)
            # Overflow and the like: every command looks at its numbers itself, and says it in a sentence.
            warnings.simplefilter("default" if debug else "ignore", RuntimeWarning)
            warnings.simplefilter("always", UserWarning)
            shown = warnings.showwarning
            warnings.showwarning = lambda *w, **more: _warn(w[0]) if w[1] is UserWarning else shown(*w, **more)
            use_machine(args)  # imports NumPy, which an interrupt would make an ImportError
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__
                signal.signal(signal.SIGINT, signal.default_int_handler)
            with ExitStack() as args.until_end:  # what the command holds
                return args.run(args) or 0
    except SystemExit as stop:  # help, version, usage errors
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt as stop:
        print(f"minipeft: interrupted{f'; {stop}' if stop.args else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == STDOUT:  # its reader has gone, as `| head` does
            return 1
        if debug:
            traceback.print_exc()
        message = args.in_flags(describe(error)) if args else describe(error)
        print(f"minipeft: error: {printable(message)}", file=sys.stderr)
        return 2


def _warn(message: object) -> None:
    print(f"minipeft: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def describe(error: Exception) -> str:
    """An exception as one line; one that no part of the library raises on purpose is called unexpected."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({message})' if message else ''}; try a smaller --batch-size or --max-length"
    if isinstance(error, KeyError) and " " in message:  # a sentence, of which str() gives the repr, and not a bare key
        return " ".join(str(error.args[0]).split())
    sentences = (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError, ImportError, OSError)
    if message and isinstance(error, sentences):
        return message
    return f"unexpected {type(error).__name__}{f': {message}' if message else ''} (--debug shows where)"


def _parse(argv: list[str]) -> Arguments:
    argv, plugins = take_plugins(argv)  # before a command lists the methods
    command = next((word for word in argv if not word.startswith("-")), "")
    parser = Parser(prog=f"minipeft {command}".strip())
    if command and command not in COMMANDS:
        early = [word for word in argv[: argv.index(command)] if word != "--debug"]
        if early and not {*COMMANDS}.isdisjoint(argv):
            why = "options other than --debug and --plugin come after it"
            Parser(prog="minipeft").error(f"{early[-1]} {command} stands before the command: {why}")
        Parser(prog="minipeft").error(unknown("command", command, COMMANDS))
    module = importlib.import_module(f"{__name__}.{command}".strip("."))
    parser.description, heading, examples = module.__doc__.partition("\nexamples:\n")
    parser.epilog = heading + examples
    if command:
        argv.remove(command)
        module.add_arguments(parser)
    else:
        parser.usage = "minipeft COMMAND [options]"
        parser.description += "\ncommands:\n" + "\n".join(f"  {name:10} {_summary(name)}" for name in COMMANDS)
    parser.add_argument("--version", action="version", version=f"minipeft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    plugin = "import a module, found from the working directory, that registers methods of your own; may be repeated"
    parser.add_argument("--plugin", metavar="MODULE", default=argparse.SUPPRESS, help=plugin)
    defaults = parser.take_defaults() | {"plugin": plugins or None}
    args, rest = parser.parse_known_args(argv)
    if rest:
        what = "option" if rest[0].startswith("-") else "argument"
        near = nearest(rest[0].partition("=")[0], parser._option_string_actions)
        parser.error(f"unknown {what} {rest[0]!r}{near}")
    if not command:
        parser.print_help()
        raise SystemExit(0)
    given = vars(args)
    return Arguments(**defaults | given, command=command, run=module.run, flags=parser.flags(), given={*given})


def _summary(command: str) -> str:
    """The first line of a command's help, read from its file: importing all of them would take long."""
    with open(os.path.join(os.path.dirname(__file__), f"{command}.py"), encoding="utf-8") as file:
        return file.readline().strip('".\n')
