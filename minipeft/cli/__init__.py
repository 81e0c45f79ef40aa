"""The command line: `minipeft COMMAND ...`, also `python -m minipeft COMMAND ...`. One file per command.

A command is a module with `add_arguments(parser)` and `run(args) -> exit status`; its docstring is its help. Only the
module of the chosen command is imported, so that the list of all of them appears at once.

Exit status: 0 done; 1 something that was checked failed (gradcheck, lessons), or a run of a sweep; 2 an error, in one
line on standard error; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

from .. import __version__
from .arguments import Parser, nearest, take_plugins, use_machine
from .streams import STDOUT, open_closed_streams, printable, safe_output

COMMANDS = {
    "compare": "fine-tune the shipped base with every method and compare them",
    "finetune": "fine-tune a model on your own file",
    "sweep": "fine-tune over a grid of learning rates, ranks and seeds, and find the best",
    "evaluate": "score a model: loss, its answers, multiple choice",
    "generate": "let a model continue text",
    "merge": "merge an adapter into its base, as a plain model",
    "sft": "teach a model to follow instructions",
    "reward": "train a reward model on preferences",
    "ppo": "train a model on how its own answers are scored (PPO, RLOO, GRPO)",
    "dpo": "train a model on preferences, directly",
    "count": "count what a method trains and stores, from shapes",
    "memory": "predict the memory of training or using a model",
    "audit": "recompute the literature's parameter counts and memory figures",
    "gradcheck": "check every derivative against differences",
    "lessons": "list the lessons, run one or all",
}

PLUGIN = "import a module, found from the working directory, that registers methods of your own; may be repeated"
DESCRIPTION = "Fine-tuning large language models, from scratch in NumPy: to read, to run, to trust."
EXAMPLES = """\
examples:
  minipeft compare                                   every method on the shipped base, side by side
  minipeft finetune --data my.jsonl --output tuned   one run on your own file
  minipeft generate --model tuned --prompt "Once"    text from any saved model
  minipeft evaluate --data test.jsonl --model tuned  its scores on data of yours
  minipeft memory llama-7b --method qlora --seq 512  what a method needs, and the GPUs it fits on
  minipeft COMMAND --help                            all options of a command, with examples
  minipeft --plugin mine compare                     with the methods of your own that mine.py registers
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status. Errors never leave as exceptions."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    open_closed_streams()
    try:
        args = _parse(argv)
        with warnings.catch_warnings(), safe_output():
            # Overflow and the like: every command looks at its numbers itself, and says it in a sentence.
            warnings.simplefilter("default" if debug else "ignore", RuntimeWarning)
            shown = warnings.showwarning
            warnings.showwarning = lambda *w, **more: _warn(w[0]) if w[1] is UserWarning else shown(*w, **more)
            use_machine(args)  # imports NumPy, which an interrupt would make an ImportError
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__
                signal.signal(signal.SIGINT, signal.default_int_handler)
            with ExitStack() as args.until_end:  # what the command holds
                return args.run(args)
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
        print(f"minipeft: error: {printable(describe(error))}", file=sys.stderr)
        return 2


def _warn(message: object) -> None:
    print(f"minipeft: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def describe(error: Exception) -> str:
    """An exception as one line; one that no part of the library raises on purpose is called unexpected."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError) and message:  # a sentence of the library, not of the system
        return message
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({message})' if message else ''}; try a smaller --batch-size or --max-length"
    if isinstance(error, KeyError) and " " in message:  # a sentence, of which str() gives the repr, and not a bare key
        return " ".join(str(error.args[0]).split())
    if message and isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError, ImportError)):
        return message
    return f"unexpected {type(error).__name__}{f': {message}' if message else ''} (--debug shows where)"


def _parse(argv: list[str]) -> argparse.Namespace:
    usage = "minipeft COMMAND [options]"
    parser = Parser(prog="minipeft", usage=usage, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=_formatter)
    parser.add_argument("--version", action="version", version=f"minipeft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (with any command)")
    parser.add_argument("--plugin", metavar="MODULE", default=argparse.SUPPRESS, help=PLUGIN)
    commands = parser.add_subparsers(prog="minipeft", metavar="COMMAND ...", title="commands", dest="command")
    parsers = {c: commands.add_parser(c, help=text, formatter_class=_formatter) for c, text in COMMANDS.items()}
    argv = take_plugins(argv)  # before a command lists the methods
    chosen = next((word for word in argv if not word.startswith("-")), None)
    known = parsers.get(chosen, parser)
    if chosen in COMMANDS:
        module = importlib.import_module(f"{__name__}.{chosen}")
        known.description, _, examples = module.__doc__.partition("\nexamples:\n")
        known.epilog = f"examples:\n{examples}" if examples else None
        module.add_arguments(known)
        known.add_argument("--debug", action="store_true", help="show the traceback of an error")
        known.add_argument("--plugin", metavar="MODULE", default=argparse.SUPPRESS, help=PLUGIN)
        known.set_defaults(run=module.run, flags=known.flags())
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        what = "option" if unknown[0].startswith("-") else "argument"
        known.error(f"unknown {what} {unknown[0]!r}{nearest(unknown[0].partition('=')[0], known.option_names())}")
    if args.command is None:
        parser.print_help()
        raise SystemExit(0)
    return args


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)
