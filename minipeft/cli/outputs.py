"""Where a command writes: apart from all that it reads, held by it alone, and an old run there until the new one has ended.

    output/                what an earlier run has left, if there was one
           .minipeft-new/  a run with --overwrite, which then takes its place
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

NEW = ".minipeft-new"  # in an output directory: the run that is to replace the one there, until it has ended
READ = ("data", "validation", "prompts", "human", "model", "adapter", "adapter_config", "reward")


def check_output(args: argparse.Namespace) -> Path:
    """Where the command writes, and no other process until it ends: --output, or NEW in it while that holds an old run.

    Raises ValueError where --output is not empty and no option says what to do, or --overwrite would replace what is no
    earlier run's; and as `check_directory`, DirectoryInUse.
    """
    from ..directory import LOCK

    if "work" in args:
        return args.work
    output, hint = Path(args.output), ", or give --resume or --overwrite" * hasattr(args, "resume")
    if hint and args.resume and args.overwrite:
        raise ValueError("--resume goes on with an earlier run and --overwrite replaces it: give one of them")
    hold(args, output)
    if any(path.name != LOCK for path in output.iterdir()) and not (hint and (args.resume or args.overwrite)):
        raise ValueError(f"--output {output} is not empty; choose another{hint}")
    args.work = output
    if hint:
        from ..train import last_checkpoint

        replaced = bool(earlier(output)) if args.overwrite else args.resume and last_checkpoint(output / NEW)
        args.work = output / NEW if replaced else output
    return args.work


def hold(args: argparse.Namespace, path: Path, option: str = "--output") -> None:
    """Keep a directory from other processes until the command ends. Raises as `check_directory`, and DirectoryInUse."""
    from ..directory import locked

    check_directory(args, path, option)
    args.until_end.enter_context(locked(path))


def check_directory(args: argparse.Namespace, path: Path, option: str = "--output") -> None:
    """ValueError where a directory that is to be written is a file, or could replace what the command reads."""
    from ..directory import keep_apart

    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path} is a file; a directory is to be written")
    keep_apart(path, inputs(args, path), option)


def inputs(args: argparse.Namespace, output: Path) -> Iterator[tuple[str, str]]:
    """(option, path) of all that the command reads, with the bases of adapters, and of a module called like `output`."""
    from ..files import FileError
    from ..hub.base import BASE
    from ..peft.provenance import recorded_base

    given = {name: value for name in READ if (value := getattr(args, name, None)) is not None}
    for name, value in given.items():
        for path in [value] if isinstance(value, str) else value:
            yield f"--{name.replace('_', '-')}", path
            if name == "adapter":
                with suppress(FileError, OSError):  # which is said when it is loaded
                    yield f"the base of --adapter {path},", recorded_base(path)[0] or ""
    if "model" not in given:
        yield "the shipped base", str(BASE)
    for name, module in list(sys.modules.items()):
        if os.path.basename(file := getattr(module, "__file__", None) or "") == output.name:
            yield f"the module {name},", file


def earlier(output: Path) -> list[str]:
    """The names of what an earlier run has left in a directory. ValueError for a checkpoint-N that is no run's."""
    from ..directory import OF_A_RUN
    from ..train.checkpoint import is_checkpoint

    names = sorted(path.name for path in output.iterdir() if OF_A_RUN.fullmatch(path.name))
    for path in (output / name for name in names):
        if path.is_dir() and not is_checkpoint(path):
            raise ValueError(f"{path} is in the way: it is no checkpoint of an earlier run; move it, or choose another --output")
    return names


def run_training(args: argparse.Namespace, trainer: Any) -> Any:
    """What `trainer.train` gives. A KeyboardInterrupt says how to go on."""
    from ..directory import discard
    from ..train import last_checkpoint

    new = Path(args.output) / NEW
    if args.overwrite or args.work != new:  # another run, which was to replace this one, has been given up
        discard(new)
    try:
        return trainer.train(resume_from_checkpoint=args.resume)
    except BaseException as error:
        if last_checkpoint(args.work) is None:
            discard(new)
        elif isinstance(error, KeyboardInterrupt):
            instead = " in place of --overwrite" * args.overwrite
            raise KeyboardInterrupt(f"the same command with --resume{instead} goes on from the last checkpoint") from None
        raise


def replace_earlier(args: argparse.Namespace) -> None:
    """Put a run that is written down in the place of the one that it replaces, if it does."""
    from ..directory import publish

    if args.work != (output := Path(args.output)):
        publish(args.work, output, earlier(output))
